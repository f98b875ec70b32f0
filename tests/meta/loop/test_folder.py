"""The folder of a run: a command that fails leaves it as it was, and what is missing is said."""

import gc
import json
import shutil
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from refusals import fingerprint

from metaopt.core import memory
from metaopt.core.files import LOCK, only_writer
from metaopt.meta import MetaTrainer
from metaopt.meta.loop import METRICS, STATES, read_metrics, train
from metaopt.meta.loop.folder import CONFIG

# What orbax leaves behind after a failed read complains when it is collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
OLD, NEW = {"task": "a", "seed": 1}, {"task": "a", "seed": 2}


@pytest.fixture(scope="module", autouse=True)
def collected():
    yield
    gc.collect()


def trainer():
    """Each step adds one to theta."""

    def step(key, state):
        return state + 1.0, {"meta_loss": jnp.sum(state), "inner_steps": jnp.ones([])}

    return MetaTrainer(lambda key, theta: theta, step, lambda state: state)


def run(out, steps=2, config=OLD, *, size=2, validate=lambda theta, key: 9 - theta[0], **settings):
    given = {"validate_every": 1, "checkpoint_every": 1, **settings}
    theta = jnp.zeros(size)
    return train(
        trainer(), theta, steps=steps, seed=0, out=out, config=config, validate=validate, **given
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(folder)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def contents(folder):
    return {name: what for name, what in fingerprint(folder).items() if not name.endswith(LOCK)}


def raises(theta, key):
    raise ValueError("the user's own error")


FAILING = {
    "another seed": ({"config": NEW}, "another configuration"),
    "resumed with another theta": (
        {"config": NEW, "size": 3, "resume_changed": True},
        "no checkpoint can be read",
    ),
    "overwritten with a loss that raises": (
        {"config": NEW, "overwrite": True, "validate": raises},
        "the user's own error",
    ),
}


@pytest.mark.filterwarnings("ignore:.*continuing with a changed configuration")
@pytest.mark.parametrize("case", FAILING)
def test_a_command_that_fails_leaves_the_folder_as_it_was(folder, case):
    settings, match = FAILING[case]
    before = contents(folder)
    with pytest.raises(ValueError, match=match):
        run(folder, steps=3, **settings)
    assert contents(folder) == before
    run(folder)  # the old command is still that of the folder


def test_a_run_that_needs_too_much_memory_is_told_before_it_begins(tmp_path, folder, monkeypatch):
    before = contents(folder)
    monkeypatch.setattr(memory, "available", lambda device: 8)  # theta alone takes as much
    for out in (folder, tmp_path / "new"):
        with pytest.raises(MemoryError, match=r"a meta-update needs about .*--population-chunk"):
            run(out, steps=3)
    assert contents(folder) == before and CONFIG not in contents(tmp_path / "new")


def test_overwriting_replaces_the_run_and_nothing_else(folder):
    (folder / "thesis.tex").write_text("years")
    before = contents(folder)
    with pytest.raises(ValueError, match=r"holds 'thesis\.tex', which metaopt did not write"):
        run(folder, steps=1, config=NEW, overwrite=True)
    assert contents(folder) == before
    (folder / "thesis.tex").unlink()
    run(folder, steps=1, config=NEW, overwrite=True)
    assert json.loads((folder / CONFIG).read_text()) == NEW
    np.testing.assert_array_equal(read_metrics(folder)["step"], [0])


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_that_holds_no_run_is_not_taken_for_one(tmp_path, overwrite):
    (tmp_path / METRICS).write_text("of another tool")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=METRICS):
        run(tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_without_its_configuration_a_run_is_known_by_its_checkpoints(folder):
    (folder / CONFIG).unlink()
    before = contents(folder)
    with pytest.raises(ValueError, match=r"another configuration \(seed: 1 -> 2\)"):
        run(folder, steps=3, config=NEW)
    assert contents(folder) == before
    with pytest.warns(UserWarning, match=r"config\.json is missing"):
        run(folder, steps=3)
    assert json.loads((folder / CONFIG).read_text()) == OLD


def test_a_changed_configuration_is_saved_with_the_checkpoints_too(folder):
    with pytest.warns(UserWarning, match=r"changed configuration \(seed: 1 -> 2\)"):
        run(folder, steps=3, config=NEW, resume_changed=True)
    (folder / CONFIG).unlink()
    with pytest.raises(ValueError, match=r"another configuration \(seed: 2 -> 1\)"):
        run(folder, steps=3)


@pytest.mark.parametrize("kept", [0, 1])
def test_lost_metrics_are_told(folder, kept):
    lines = (folder / METRICS).read_text().splitlines(keepends=True)
    (folder / METRICS).write_text("".join(lines[:kept]))
    with pytest.warns(UserWarning, match=f"metrics of {2 - kept} of the 2 steps so far"):
        run(folder, steps=3)


def test_without_its_checkpoints_a_run_is_not_begun_again_unasked(folder):
    shutil.rmtree(folder / STATES)
    before = contents(folder)
    with pytest.raises(ValueError, match=r"holds metrics\.jsonl, but no checkpoints"):
        run(folder, steps=3)
    assert contents(folder) == before
    run(folder, steps=1, overwrite=True)


@pytest.mark.parametrize("loss", [jnp.nan, jnp.inf])
def test_a_held_out_loss_that_is_not_finite_is_told_at_the_first_validation(tmp_path, loss):
    with pytest.warns(UserWarning, match=f"loss of the initial theta is {loss}"):
        best, best_loss = run(tmp_path, validate=lambda theta, key: loss + theta[0])
    np.testing.assert_array_equal(best, [0.0, 0.0])  # what it began with
    assert best_loss == np.inf


def test_a_held_out_loss_that_becomes_finite_counts(tmp_path):
    with pytest.warns(UserWarning, match="loss of the initial theta is nan"):
        best, loss = run(tmp_path, validate=lambda theta, key: jnp.log(theta[0] - 0.5) ** 2)
    assert np.isfinite(loss) and best[0] > 0


def test_two_processes_do_not_write_one_run(tmp_path):
    with only_writer(tmp_path), pytest.raises(ValueError, match="another process is writing"):
        run(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path)
