"""Rows, standings, headline and tables against independent computations on the same curves."""

import json

import numpy as np
import pytest
from evaluations import (
    HOSTILE,
    NUM_STEPS,
    WINDOW,
    adam,
    contenders,
    descend,
    write_index,
    write_task,
)

from metaopt.evaluation import records
from metaopt.report import figures, summary, tables
from metaopt.report.looks import MOST_PANELS

STEPS = np.arange(0, NUM_STEPS + 1, WINDOW)
TRAINING = {"step": [1, 2], "meta_loss": [2.0, 1.0]}


@pytest.fixture(scope="module")
def evaluation(folder):
    return summary.load(folder)


def expected_speedups(loss: np.ndarray, reference: np.ndarray, cost: int = 1) -> np.ndarray:
    """Speed-ups by inverting the curves of the lowest loss so far."""
    factors = []
    for ours, theirs in zip(loss, reference, strict=True):
        target = theirs[-3:].mean()
        ours, theirs = np.minimum.accumulate(ours), np.minimum.accumulate(theirs)
        if ours[-1] <= target:
            needed = np.interp(-target, -theirs, STEPS)
            factors.append(needed / (cost * np.interp(-target, -ours, STEPS)))
        else:
            factors.append(np.interp(-ours[-1], -theirs, STEPS) / (cost * NUM_STEPS))
    return np.array(factors)


def iqm(*tasks: np.ndarray) -> float:
    pooled = np.sort(np.concatenate(tasks))
    cut = pooled.size // 4
    return pooled[cut : pooled.size - cut].mean()


def test_optimizers_are_ordered_by_kind(evaluation):
    names = list(evaluation.tasks[0].curves)
    assert names == ["SGD", "Adam", HOSTILE, "Wild", f"RACE({HOSTILE}, SGD)"]
    assert [task.folder for task in evaluation.tasks] == ["0-first", "1-second"]


def test_rows_hold_final_losses_and_speedups(evaluation):
    rows = {row.optimizer: row for row in summary.rows(evaluation.tasks[0])}
    sgd, theirs = descend(0.3), adam(0.05)
    np.testing.assert_allclose(rows["SGD"].loss.mean, sgd[:, -3:].mean(), rtol=1e-5)
    expected = iqm(expected_speedups(sgd, theirs))
    np.testing.assert_allclose(rows["SGD"].speedup.mean, expected, rtol=1e-3)
    assert rows["SGD"].speedup.low <= expected <= rows["SGD"].speedup.high
    assert rows["SGD"].velodrome == 1.25 and rows[HOSTILE].velodrome is None
    assert rows["Adam"].outcome is None and rows["Adam"].diverged == 0
    wild = rows["Wild"]
    assert wild.diverged == 1 and wild.outcome == "loss" and wild.speedup.mean == 0
    best = next(iter(rows.values()))
    assert best.loss.mean == min(row.loss.mean for row in rows.values())


def test_standings_aggregate_over_tasks(evaluation):
    standings = {s.optimizer: s for s in summary.standings(evaluation)}
    pairs = [(descend(1.2, seed), adam(0.05, seed)) for seed in (0, 1)]
    for name, cost in ((HOSTILE, 1), (f"RACE({HOSTILE}, SGD)", 2)):
        steps = iqm(*(expected_speedups(*pair) for pair in pairs))
        grads = iqm(*(expected_speedups(*pair, cost=cost) for pair in pairs))
        final = lambda loss: loss[:, -3:].mean(axis=1)
        ratio = iqm(*(final(ours) / final(theirs) for ours, theirs in pairs))
        np.testing.assert_allclose(standings[name].speedup.mean, steps, rtol=1e-3)
        np.testing.assert_allclose(standings[name].speedup_grads.mean, grads, rtol=1e-3)
        np.testing.assert_allclose(standings[name].ratio.mean, ratio, rtol=1e-3)
    wild = standings["Wild"]
    assert (wild.wins, wild.ties, wild.losses, wild.diverged) == (0, 0, 2, 1.0)
    order = [float(s.speedup.mean) for s in standings.values()]
    assert order == sorted(order, reverse=True)


def test_the_headline_names_the_winner(evaluation):
    ranking = summary.standings(evaluation)
    first, details = summary.headline(evaluation, ranking)
    best = next(s for s in ranking if s.optimizer != "Adam")
    assert first.startswith(f"{HOSTILE} is the fastest: it needs")
    assert f"{summary.factor(best.speedup.mean)} times fewer steps" in first
    assert f"wins {best.wins}, ties {best.ties} and loses {best.losses} of 2 tasks" in details
    assert details.endswith("None of its runs diverged.")


@pytest.mark.parametrize(
    "rate, words", [(0.01, "Tuned Adam is the fastest; SGD comes next"), (None, "No optimizer is")]
)
def test_the_headline_when_nothing_beats_the_reference(tmp_path, rate, words):
    entry, same = contenders(0)["Adam"]
    loss = same.loss if rate is None else descend(rate).astype(np.float32)
    pair = {"Adam": (entry, same), "SGD": (entry, same._replace(loss=loss))}
    write_task(tmp_path / "0", "task", pair)
    write_index(tmp_path, ["0"])
    evaluation = summary.load(tmp_path)
    assert words in summary.headline(evaluation, summary.standings(evaluation))[0]


@pytest.mark.parametrize(
    "rate, noise, words, against",
    [
        (1.2, 0.0, "fewer than tuned Muon, the best baseline (", "wins 1, ties 0 and loses 0"),
        (0.81, -0.3, "level with tuned Muon: the speed-up over it is 1.0", "wins 0, ties 1"),
    ],
)
def test_the_fastest_is_compared_with_the_best_baseline_itself(
    tmp_path, rate, noise, words, against
):
    """Muon is here a baseline that is faster than Adam, descent at a rate of 0.8."""
    entries = contenders(0)
    learned, baseline, some = entries[HOSTILE][0], entries["SGD"][0], entries["SGD"][1]
    signs = np.resize([1.0, -1.0], (len(some.loss), 1))
    losses = {"Learned": descend(rate) * (1 + noise * signs), "Muon": descend(0.8)}
    of = lambda name: some._replace(loss=losses[name].astype(np.float32))
    rivals = {"Learned": (learned, of("Learned")), "Muon": (baseline, of("Muon"))}
    write_task(tmp_path / "0", "task", {"Adam": entries["Adam"], **rivals})
    write_index(tmp_path, ["0"])
    evaluation = summary.load(tmp_path)
    ranking = summary.standings(evaluation)
    standing = {s.optimizer: s for s in ranking}
    expected = iqm(expected_speedups(losses["Learned"], losses["Muon"]))
    np.testing.assert_allclose(standing["Learned"].over_rival.mean, expected, rtol=1e-3)
    assert standing["Muon"].over_rival is None and standing["Adam"].over_rival.high < 1
    assert standing["Muon"].rival == "Muon"
    headers = tables.standing_columns("Muon")
    cells = tables.standing_cells(standing["Muon"], len(evaluation.tasks))
    assert cells[list(headers.values()).index("over Muon")] == "1"
    first, details = summary.headline(evaluation, ranking)
    assert words in first and f"Against Muon it {against}" in details
    assert first.startswith("Learned") and ("is the fastest" in first) == (not noise)


def test_the_headline_says_when_the_fastest_diverges(tmp_path):
    all_contenders = contenders(0)
    entry, fast = all_contenders[HOSTILE]
    loss = fast.loss.copy()
    loss[0, -1] = np.inf  # one seed of 8, which the interquartile mean drops
    chosen = {name: all_contenders[name] for name in ("Adam", "SGD")}
    write_task(tmp_path / "0", "task", chosen | {"Bold": (entry, fast._replace(loss=loss))})
    write_index(tmp_path, ["0"])
    evaluation = summary.load(tmp_path)
    first, details = summary.headline(evaluation, summary.standings(evaluation))
    assert first.startswith("Bold is the fastest")
    assert first.endswith(", but 12% of its runs diverged.")
    words = "Among the optimizers that never diverged, SGD is the fastest, with a speed-up of 0."
    assert words in details


def test_without_the_reference_there_is_no_speedup(tmp_path):
    write_task(tmp_path / "0", "task", {"SGD": contenders(0)["SGD"]})
    write_index(tmp_path, ["0"])
    evaluation = summary.load(tmp_path)
    assert summary.standings(evaluation) == []
    assert "nothing was compared" in summary.headline(evaluation, [])[0]
    assert "Tuned Adam was not run" in " ".join(tables.caveats(evaluation))
    assert tables.row_columns(summary.rows(evaluation.tasks[0])) == [
        "optimizer",
        "final test loss",
        "accuracy",
        "diverged",
    ]


def test_caveats_name_few_seeds_and_unfinished_tasks(folder, evaluation, tmp_path):
    assert tables.caveats(evaluation) == ["Not finished and not in this report: 2-third."]
    entry, arrays = contenders(0)["Adam"]
    fields = ("loss", "accuracy", "train_loss")
    few = arrays._replace(**{name: getattr(arrays, name)[:2] for name in fields})
    write_task(tmp_path / "0", "task", {"Adam": (entry, few)})
    write_index(tmp_path, ["0"])
    assert "Only 2 seeds" in tables.caveats(summary.load(tmp_path))[0]


def test_searches_that_end_at_an_edge_are_named(tmp_path):
    grid = np.stack([descend(rate) for rate in (0.1, 0.3)])
    write_task(tmp_path / "0-first", "first", contenders(0), {"SGD": ([0.1, 0.3], grid)})
    write_index(tmp_path, ["0-first"])
    path = tmp_path / "0-first" / records.RECORD
    record = json.loads(path.read_text())
    tuned = record["tuned"]["SGD"]
    assert not summary.at_edges(summary.load(tmp_path))  # of older records nothing is known
    lr = {"Dense_0": 0.25, "Dense_1": 1.0}
    tuned |= {"extended": 2, "edge": "highest", "point": {"schedule": "cosine", "lr": lr}}
    record["tuned"] = {"SGD": tuned} | {f"SGD {i}": tuned | {"extended": 1} for i in range(11)}
    path.write_text(json.dumps(record))
    text = tables.markdown(summary.load(tmp_path))
    assert text.count("may lie beyond it: SGD on first (highest), SGD 0 on first") == 1
    assert "SGD 8 on first (highest), and 2 more searches." in text
    assert "1.5 s, with 2 learning rates beyond the first grid. Chosen: cosine, lr " in text
    assert "1.5 s, with 1 learning rate beyond" in text
    assert "Chosen: cosine, lr (Dense_0 0.25, Dense_1 1)." in text


def test_an_optimizer_left_out_of_a_task_is_marked(tmp_path):
    everyone = contenders(0)
    write_task(tmp_path / "0", "all", everyone)
    write_task(tmp_path / "1", "some", {name: everyone[name] for name in ("Adam", "SGD")})
    write_index(tmp_path, ["0", "1"])
    evaluation = summary.load(tmp_path)
    assert "| Wild (1 of 2 tasks) |" in tables.markdown(evaluation)
    first, _ = summary.headline(evaluation, summary.standings(evaluation))
    assert "SGD" in first and HOSTILE not in first  # the winner must have run on all tasks


def test_a_folder_without_curves_is_an_error(tmp_path):
    write_index(tmp_path, ["0"])
    with pytest.raises(ValueError, match="no finished task"):
        summary.load(tmp_path)
    records.write_json(tmp_path / "evaluation.json", {"format": 1})
    with pytest.raises(ValueError, match="format 1"):
        summary.load(tmp_path)


@pytest.mark.parametrize(
    "value, text",
    [(1.234, "1.23"), (12.6, "13"), (0.0432, "0.043"), (0.0, "0"), (np.inf, "∞"), (np.nan, "–")],
)
def test_factors_have_about_two_digits(value, text):
    assert summary.factor(value) == text


@pytest.mark.parametrize(
    "value, text",
    [
        (0.12345, "0.1235"),
        (0, "0.0000"),
        (1e-6, "1.0e-06"),
        (2e12, "2.0e+12"),
        (np.inf, "not finite"),
    ],
)
def test_losses_far_off_show_their_order_of_magnitude(value, text):
    assert tables.loss_text(value) == text


def test_pictures_are_bounded(evaluation, monkeypatch):
    many = evaluation._replace(
        tasks=evaluation.tasks * 500,
        index={**evaluation.index, "training": {f"run {i}": TRAINING for i in range(500)}},
    )
    drawn = []
    monkeypatch.setattr(figures, "standings", lambda evaluation: [])
    monkeypatch.setattr(figures, "curves_figure", lambda tasks, *a, **k: drawn.append(len(tasks)))
    monkeypatch.setattr(figures, "meta_training_figure", lambda runs: drawn.append(len(runs)))
    monkeypatch.setattr(figures, "_task_curves", lambda task, cost: task)
    monkeypatch.setattr(figures, "mixture_figure", lambda mixture: None)
    for make in figures.drawings(many).values():
        make()
    assert drawn == [MOST_PANELS] * 3
    assert f"the first {MOST_PANELS} of 1000 tasks" in " ".join(tables.caveats(many))
    tall, _ = figures._panels(MOST_PANELS, 1, width=6.6, height=3.3)
    assert max(tall.get_size_inches()) * figures.style()["savefig.dpi"] < 2**16
