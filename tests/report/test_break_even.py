"""After how many jobs a meta-training has paid, against sums on the curves in closed form."""

import math

import numpy as np
import pytest
from evaluations import NUM_STEPS, SEEDS, WINDOW, curves, descend, write_index, write_task

from metaopt.evaluation import records
from metaopt.report import break_even, page, summary, tables

COSTS = {
    "L3RS": {"inner_steps": 90_000.0, "seconds": 9.0},
    "searched": {"inner_steps": 10_000.0, "seconds": 1.0},
}
STEPS = np.arange(0, NUM_STEPS + 1, WINDOW)
SEARCHED = 3 * SEEDS * NUM_STEPS  # gradients of the grid search of Adam


def write(folder, *, costs=COSTS, rates=(0.3, 0.4, 0.8)):
    """Gradient descent at three rates, by the names of a baseline, a search and an L3RS."""
    entry = lambda kind: records.CurveRecord("", kind)
    kinds = {"Adam": "baseline", "searched": "learned", "L3RS": "learned"}
    contenders = {
        name: (entry(kind), curves(descend(rate)))
        for (name, kind), rate in zip(kinds.items(), rates, strict=True)
    }
    grid = ([0.1, 0.2, 0.3], np.stack([descend(rate) for rate in (0.1, 0.2, 0.3)]))
    write_task(folder / "0-task", "quadratic", contenders, {"Adam": grid})
    write_index(folder, ["0-task"], training_cost=costs)
    return summary.load(folder)


def steps_to(target, rate):
    """Steps of each seed to its target, on its curve interpolated between measurements."""
    loss = descend(rate)
    return np.array([np.interp(-t, -row, STEPS) for t, row in zip(target, loss, strict=True)])


def saved(rate, rival):
    target = descend(rival)[:, -3:].mean(axis=1)
    factors = np.sort(steps_to(target, rival) / steps_to(target, rate))
    needed = steps_to(target, rival).mean()
    return needed - needed / factors[SEEDS // 4 : -SEEDS // 4].mean()


def test_savings_and_jobs(tmp_path):
    found = {(e.optimizer, e.rival, e.charge): e for e in break_even.break_evens(write(tmp_path))}
    assert found.keys() == {
        (*pair, charge)
        for pair in (("L3RS", "Adam"), ("L3RS", "searched"), ("searched", "Adam"))
        for charge in ("inner_steps", "seconds")
    }
    entry = found["L3RS", "Adam", "inner_steps"]
    np.testing.assert_allclose(entry.saved, saved(0.8, 0.3) + SEARCHED, rtol=1e-5)
    assert entry.tuned and entry.spent == 90_000
    np.testing.assert_allclose(entry.jobs, 90_000 / (saved(0.8, 0.3) + SEARCHED), rtol=1e-5)
    # A search is no rival that is tuned for each job; its own cost is not charged again.
    entry = found["L3RS", "searched", "inner_steps"]
    np.testing.assert_allclose(entry.saved, saved(0.8, 0.4), rtol=1e-5)
    assert not entry.tuned and entry.spent == 80_000
    # A step takes 1e-4 s, and the grid search took 1.5 s.
    entry = found["L3RS", "Adam", "seconds"]
    np.testing.assert_allclose(entry.saved, 1e-4 * saved(0.8, 0.3) + 1.5, rtol=1e-5)


def test_what_saves_nothing_never_pays(tmp_path):
    found = break_even.break_evens(write(tmp_path, rates=(0.3, 0.8, 0.4)))
    (entry,) = (e for e in found if (e.rival, e.charge) == ("searched", "inner_steps"))
    assert entry.saved < 0 and math.isinf(entry.jobs)
    assert tables.break_even_cells(entry)[-1] == "never"


def test_tables_and_page(tmp_path):
    evaluation = write(tmp_path)
    for text in (tables.markdown(evaluation), page.render(evaluation, tmp_path)):
        assert "When the meta-training pays" in text
        assert "Adam, tuned for each job" in text
        assert "90,000 gradients" in text
    without = write(tmp_path, costs={})
    assert break_even.break_evens(without) == []
    assert "meta-training pays" not in tables.markdown(without)


@pytest.mark.parametrize("cost", [{}, {"inner_steps": 1.0}, {"inner_steps": 1, "seconds": "x"}, 3])
def test_a_cost_of_another_form_is_refused(tmp_path, cost):
    with pytest.raises(ValueError, match=r"training_cost\.'?L3RS"):
        write(tmp_path, costs={"L3RS": cost})
