"""The checks of claims, on curves whose verdicts are evident."""

import numpy as np
import pytest

from experiments import checks
from experiments.figure_records import FigureRecords
from metaopt.evaluation import records
from metaopt.evaluation.records import FORMAT, INDEX, CurveRecord, Curves, TaskRecord

STEPS = np.arange(0, 1001, 100)  # ten windows of 100 steps
LOSSES = {
    "falls": np.linspace(2.0, 0.5, 11),
    "slow": np.linspace(2.0, 1.0, 11),
    "turns": np.abs(np.linspace(2.0, -1.5, 11)) + 0.1,
    "leaves": np.linspace(2.0, 9.0, 11),
    "breaks": np.where(STEPS < 800, np.linspace(2.0, 0.5, 11), np.nan),
}
STATE = {
    "losses": np.where(np.arange(10) < 6, 1.0, 3.0)[:, None] * np.array([2.0, 1.0]),
    "accepted": np.arange(10) < 3,
    "alpha": np.stack([np.linspace(0, 1, 10), np.linspace(1, 0, 10)], axis=1)[:, None],  # one layer
    "lambda_": np.array([0.1, 1, 1, 1, 1, 1, 0.9, 0.5, 0.2, 0.1])[:, None],
}


@pytest.fixture(scope="module")
def figure(tmp_path_factory):
    """Records of optimizers with the curves of `LOSSES`, each on two equal seeds."""
    folder, entries = tmp_path_factory.mktemp("figure"), {}
    for name, loss in LOSSES.items():
        two_seeds = lambda values: np.stack([values, values])
        curves = Curves(
            steps=STEPS,
            grad_evals=STEPS,
            seconds=STEPS * 1.0,
            loss=two_seeds(loss),
            accuracy=two_seeds(loss * 0),
            train_loss=two_seeds(loss * 0),
            windows=STEPS[1:],
            state={key: two_seeds(value) for key, value in STATE.items()},
        )
        records.write_arrays(folder / f"{name}.npz", curves)
        entries[name] = CurveRecord(f"{name}.npz", "learned", bases=("sgd", "adam"))
    record = TaskRecord(
        title="a task",
        task="quadratic",
        num_steps=1000,
        window=100,
        tuned={},
        curves=entries,
        left_out={},
        velodrome={},
    )
    records.write_record(folder, record)
    return FigureRecords(folder)


@pytest.mark.parametrize(
    "check, outcome",
    [
        (checks.below("falls", "slow"), "reproduced"),
        (checks.below("falls", "slow", step=500), "reproduced"),
        (checks.below("slow", "falls"), "not"),
        (checks.below("slow", "falls", "leaves"), "partly"),
        (checks.below("falls", "breaks"), "not"),  # no order with what is not finite
        (checks.ahead("falls", "slow", "leaves"), "reproduced"),
        (checks.ahead("falls", "slow", "falls"), "partly"),
        (checks.ahead("falls", "falls"), "not"),
        (checks.level("falls", "falls"), "reproduced"),
        (checks.level("falls", "slow"), "not"),
        (checks.rises("turns"), "reproduced"),
        (checks.rises("breaks"), "reproduced"),
        (checks.rises("falls"), "not"),
        (checks.diverges("leaves"), "reproduced"),
        (checks.diverges("breaks"), "reproduced"),
        (checks.diverges("turns"), "not"),
        (checks.stuck("slow"), "reproduced"),  # 1.1 of 2 on average at the end
        (checks.stuck("falls"), "not"),
        (checks.never_diverges("falls"), "reproduced"),
        (checks.never_diverges("turns"), "not"),  # 1.4 of 2.1
        (checks.never_diverges("breaks"), "not"),
        (checks.best_of("falls", "slow", "leaves"), "reproduced"),
        (checks.best_of("slow", "falls"), "not"),
        (checks.faster("falls", 1.4, "slow", "leaves"), "reproduced"),  # 700 steps of 1000
        (checks.faster("falls", 1.5, "slow", "leaves"), "not"),
        (checks.faster("slow", 1.0, "falls"), "not"),  # never gets there
        (checks.mostly("falls", "adam", 0, 0.1), "reproduced"),
        (checks.mostly("falls", "adam", 0.9, 1), "not"),
        (checks.mostly("falls", "sgd", 0.9, 1), "reproduced"),
        (checks.decays("falls"), "reproduced"),
        (checks.negated(checks.decays("falls")), "not"),
        (checks.every(checks.rises("turns"), checks.rises("falls")), "partly"),
    ],
)
def test_verdicts(figure, check, outcome):
    assert check(figure)[0] == outcome


def test_a_guard_is_trapped_where_both_of_its_candidates_are_worse(figure):
    outcome, words = checks.trapped("falls")(figure)
    assert outcome == "reproduced"
    assert words == "falls: 2 of 2 seeds, from 1 to 3 on average"
    other = FigureRecords(figure.folder)
    other.curves["falls"].state["losses"][..., 1] = 1.0  # the second candidate saves it
    assert checks.trapped("falls")(other)[0] == "not"


def test_shares_and_numbers(figure):
    assert figure.share_won("falls", 0, 0.5) == pytest.approx(
        0.6
    )  # three of the first five windows
    assert figure.loss("falls") == pytest.approx(LOSSES["falls"][-3:].mean())
    assert figure.lowest_loss("breaks") == (700, pytest.approx(LOSSES["falls"][5:8].mean()))
    assert figure.steps_to("falls", 0.5) == 1000
    assert figure.steps_to("slow", 0.5) == np.inf
    words = checks.below("falls", "slow", step=500)(figure)[1]
    assert words == "at step 500: falls 1.4, slow 1.6"


@pytest.mark.parametrize(
    "name, short_name",
    [
        ("L2O", "L2O"),
        ("SGD (constant)", "SGD"),
        ("Adam (head only)", "Adam (head only)"),
        ("SMG(L2O)", "SMG"),
        ("LGL2O(L2O, SGD (LGL2O's grid))", "LGL2O"),
        ("RACE(L2O-300, SGD (LGL2O's grid))", "RACE(L2O-300)"),
        ("RACE(L3RS, Adam)", "RACE(Adam)"),
        ("VeLO(ft)", "VeLO"),
    ],
)
def test_names_are_short(name, short_name):
    assert checks.short_name(name) == short_name


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    """Meta-trainings of 80 updates, measured at 9, 19, .. 79: soon at their end, late, unsteady."""
    nan = float("nan")
    held_out = {
        "soon, seed 0": [1.1, 1.05, 1.1, 1.0, 1.05, 1.0, 1.0, 1.0],
        "soon, seed 1": [1.5, 1.1, 1.1, 1.0, 1.0, 1.0, 1.0, 1.0],
        "late, seed 0": [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 1.0, 1.0],
        "unsteady, seed 0": [3.0, 4.0, 2.0, 3.0, 1.0, 1.0, 1.0, 1.1],
    }
    curves = {
        label: {
            "step": list(range(80)),
            "meta_loss": [1e9 if label[0] == "u" and i in (5, 30, 40) else 1.0 for i in range(80)],
            "validation_loss": [losses[i // 10] if i % 10 == 9 else nan for i in range(80)],
        }
        for label, losses in held_out.items()
    }
    folder = tmp_path_factory.mktemp("trainings")
    index = {"format": FORMAT, "job": {"suite": "a paper", "seeds": 1}, "tasks": []}
    records.write_json(folder / INDEX, index | {"environment": {}, "training": curves})
    return FigureRecords(folder)


@pytest.mark.parametrize(
    "check, outcome, words",
    [
        (checks.settles("soon", lambda s: s < 0.2), "reproduced", "after 18% of"),  # 9, 19 of 79
        (checks.settles("late", lambda s: s < 0.2), "not", "after 87% of"),
        (checks.settles("unsteady", lambda s: s > 0.5), "reproduced", "after 62% of"),
        (checks.gains("late"), "reproduced", "first quarter 8.5, last 1"),
        (checks.gains("soon"), "reproduced", "first quarter 1.19, last 1"),
        (
            checks.steadier("soon", "unsteady"),
            "reproduced",
            "0.0% of the generations of soon, 3.3%",
        ),
        (checks.steadier("unsteady", "soon"), "not", "0.0% of soon"),
    ],
)
def test_verdicts_on_meta_trainings(trainings, check, outcome, words):
    verdict, numbers = check(trainings)
    assert verdict == outcome and words in numbers
    with pytest.raises(KeyError, match="nobody"):
        trainings.held_out_losses("nobody")
