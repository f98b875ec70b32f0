"""Checkpoints: damaged ones are found out, and the one before is used."""

import gc
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.meta.loop import states
from metaopt.meta.loop.states import RunState, Saved

# What orbax leaves behind after a failed read complains when it is collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
CONFIG = {"seed": 7, "method": {"name": "nes", "sigma": [0.1, None]}}
LIKE = RunState(
    {"mean": jax.ShapeDtypeStruct((300,), jnp.float32), "n": jax.ShapeDtypeStruct((), jnp.int32)},
    jax.ShapeDtypeStruct((3,), jnp.float32),
    jax.ShapeDtypeStruct((), jnp.float32),
)


@pytest.fixture(scope="module", autouse=True)
def collected():
    yield
    gc.collect()


def state(step):
    mean = jax.random.normal(jax.random.key(step), (300,))
    return RunState({"mean": mean, "n": jnp.int32(step)}, mean[:3], jnp.float32(step))


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with states.manager(folder) as checkpoints:
        for step in (1, 5, 10):
            states.save(checkpoints, Saved(step, state(step), 1.5 * step, CONFIG))
    return folder


def restore(folder):
    with states.manager(folder) as checkpoints:
        return states.restore_newest(checkpoints, LIKE)


def check(saved, step):
    assert saved.step == step and saved.seconds == 1.5 * step and saved.config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, saved.state, state(step))


def test_what_is_saved_is_restored_and_two_are_kept(two_saved):
    check(restore(two_saved), 10)
    kept = sorted(p.name for p in (two_saved / states.STATES).iterdir() if p.is_dir())
    assert kept == ["10", "5"]


def test_without_a_checkpoint_there_is_none(tmp_path):
    assert restore(tmp_path) is None


def files(folder: Path) -> list[Path]:
    return sorted(p for p in (folder / states.STATES / "10").rglob("*") if p.is_file())


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path: Path):
    """Changes one byte in eight, from the middle on."""
    content = bytearray(path.read_bytes())
    for i in range(len(content) // 2, len(content), 8):
        content[i] ^= 0x5A
    path.write_bytes(content)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": truncate,
    "garbled": garble,
    "missing": lambda path: path.unlink(),
}


@pytest.mark.filterwarnings("ignore:the checkpoint of step 10 is damaged")
@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damage_to_any_file_goes_unnoticed(two_saved, tmp_path, damage):
    """Each file of the newest checkpoint in turn: its own values are restored, or the former's."""
    noticed = []
    for index, path in enumerate(files(two_saved)):
        if not path.stat().st_size:
            continue
        folder = shutil.copytree(two_saved, tmp_path / str(index))
        DAMAGES[damage](folder / path.relative_to(two_saved))
        saved = restore(folder)
        check(saved, saved.step)
        if saved.step == 5:
            noticed.append(path)
            assert not (folder / states.STATES / "10").exists()
            assert (folder / states.DAMAGED / "10").is_dir()
        else:
            assert saved.step == 10  # orbax can do without this file
    assert any("/d/" in str(path) for path in noticed)  # arrays
    assert any("facts" in str(path) for path in noticed)


FACTS = {
    "another time": ("15.0", "35.0"),
    "no time": ("15.0", "NaN"),
    "another configuration": ('"seed": 7', '"seed": 8'),
    "no configuration": ('"seed": 7', '"Seed": 7'),
}


@pytest.mark.parametrize("change", FACTS)
def test_the_checksum_covers_all_that_is_used(two_saved, tmp_path, change):
    folder = shutil.copytree(two_saved, tmp_path / "run")
    path = folder / states.STATES / "10" / "facts" / "metadata"
    old, new = FACTS[change]
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    with pytest.warns(UserWarning, match="step 10 is damaged .*checksum"):
        check(restore(folder), 5)


def test_a_checkpoint_under_the_number_of_another_step_is_found_out(two_saved, tmp_path):
    folder = shutil.copytree(two_saved, tmp_path / "run")
    (folder / states.STATES / "10").rename(folder / states.STATES / "12")
    with pytest.warns(UserWarning, match="step 12 is damaged .*checksum"):
        check(restore(folder), 5)


def test_a_damaged_checkpoint_is_told_and_saved_again(two_saved, tmp_path):
    folder = shutil.copytree(two_saved, tmp_path / "run")
    shutil.rmtree(folder / states.STATES / "10" / "state")
    with states.manager(folder) as checkpoints:
        with pytest.warns(UserWarning, match=r"step 10 is damaged .* continues from step 5"):
            check(states.restore_newest(checkpoints, LIKE), 5)
        states.save(checkpoints, Saved(10, state(10), 15.0, CONFIG))
    check(restore(folder), 10)


def test_other_values_under_the_old_checksum_are_found_out(two_saved, tmp_path, monkeypatch):
    folder = shutil.copytree(two_saved, tmp_path / "run")
    true = states.checksum
    monkeypatch.setattr(states, "checksum", lambda tree: true(state(10)))
    with states.manager(folder) as checkpoints:  # a whole checkpoint, but of another state
        states.save(checkpoints, Saved(11, state(9), 0.0, CONFIG))
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="step 11 is damaged .*checksum"):
        check(restore(folder), 10)


def test_where_nothing_can_be_read_the_run_says_so_and_nothing_is_moved(two_saved, tmp_path):
    folder = shutil.copytree(two_saved, tmp_path / "run")
    for step in ("5", "10"):
        shutil.rmtree(folder / states.STATES / step / "state")
    with pytest.raises(ValueError, match="no checkpoint can be read"):
        restore(folder)
    assert not (folder / states.DAMAGED).exists()


def test_the_checksum_sees_names_dtypes_shapes_and_values():
    one = {"a": jnp.arange(4.0)}
    others = [
        {"b": jnp.arange(4.0)},
        {"a": jnp.arange(4)},
        {"a": jnp.arange(4.0).reshape(2, 2)},
        {"a": jnp.arange(4.0).at[3].add(1e-6)},
    ]
    assert len({states.checksum(tree) for tree in (one, *others)}) == 5
    assert states.checksum(one) == states.checksum({"a": np.arange(4, dtype=np.float32)})
