"""Exports: what goes in comes out, and nothing broken or foreign is taken for an export."""

import functools
import json
import os
import threading

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import metaopt
from metaopt import optimizers
from metaopt.optimizers import L3RS, LSTM, AdafacMLP, Celo, Celo2, CeloAdam, VeLO
from metaopt.zoo import exports
from metaopt.zoo.exports import SPEC, WEIGHTS, CheckpointError

PARAMS = {"Dense_0": {"kernel": np.ones((3, 2), np.float32), "bias": np.zeros(2, np.float32)}}
SETTINGS = {
    "lstm": LSTM(hidden=3),
    "l3rs": L3RS(base=("sgd", "lion"), variant="per_layer", ema=(0.5, 0.9)),
    "velo": VeLO(hidden=4, bank=2),
    "celo": Celo(hidden=4, bank=2),
    "celo_adam": CeloAdam(hidden=4),
    "celo2": Celo2(orthogonalize=False, schedule="cosine"),
    "adafac_mlp": AdafacMLP(),
}


@functools.cache
def theta_of(name):
    return SETTINGS[name].build().init(jax.random.key(0), PARAMS)


def export(path, name="lstm", **trained):
    theta = theta_of(name)
    return metaopt.save(path, SETTINGS[name], theta, trained), theta


def update(optimizer, theta):
    tx = optimizer.apply(theta, num_steps=10)
    return tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=1.0)[0]


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_round_trip_is_bit_for_bit(tmp_path, name):
    folder, theta = export(tmp_path / "x", name, task="digits", num_steps=[100, 100])
    loaded = metaopt.load(folder)
    assert (loaded.name, loaded.settings) == (name, SETTINGS[name])
    assert loaded.trained == {"task": "digits", "num_steps": [100, 100]}
    assert jax.tree.structure(loaded.theta) == jax.tree.structure(theta)
    jax.tree.map(np.testing.assert_array_equal, loaded.theta, theta)
    step = jax.jit(lambda tx_theta: update(loaded.optimizer, tx_theta))
    reference = SETTINGS[name].build()
    expected = jax.jit(lambda tx_theta: update(reference, tx_theta))(theta)
    jax.tree.map(np.testing.assert_array_equal, step(loaded.theta), expected)


def test_spec_is_readable_json_with_shapes_and_version(tmp_path):
    folder, theta = export(tmp_path / "x")
    spec = json.loads((folder / SPEC).read_text())
    assert spec["metaopt"] == metaopt.__version__
    assert (spec["format"], spec["optimizer"]) == (exports.FORMAT, "lstm")
    assert spec["settings"] == {
        "hidden": 3,
        "layers": 2,
        "p": 10.0,
        "scale": 0.1,
        "warn_frozen": True,
    }
    assert spec["theta"]["net"]["readout"]["kernel"] == "float32[3,1]"
    assert sorted(os.listdir(folder)) == sorted([SPEC, WEIGHTS])
    sizes = sum(a.size for a in load_file(folder / WEIGHTS).values())
    assert sizes == exports.theta_size(theta)


def test_an_older_export_is_replaced_as_a_whole(tmp_path):
    export(tmp_path / "x", "l3rs")
    folder, _ = export(tmp_path / "x", "lstm")
    assert metaopt.load(folder).name == "lstm"
    assert os.listdir(tmp_path) == ["x"]


def test_a_failed_write_leaves_the_old_export(tmp_path, monkeypatch):
    folder, _ = export(tmp_path / "x", "l3rs")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        export(tmp_path / "x", "lstm")
    assert metaopt.load(folder).name == "l3rs"
    assert os.listdir(tmp_path) == ["x"]


def edit(folder, **changes):
    spec = json.loads((folder / SPEC).read_text())
    spec.update(changes)
    (folder / SPEC).write_text(json.dumps({k: v for k, v in spec.items() if v is not None}))


def truncate(path, keep=0.5):
    payload = path.read_bytes()
    path.write_bytes(payload[: int(len(payload) * keep)])


def flip(path):
    payload = bytearray(path.read_bytes())
    payload[-5] ^= 1
    path.write_bytes(bytes(payload))


def reweigh(folder, change):
    """Changes the weights and makes the checksum fit again."""
    import hashlib

    leaves = change(load_file(folder / WEIGHTS))
    save_file(leaves, folder / WEIGHTS)
    edit(folder, sha256=hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest())


def link(folder):
    target = folder.parent / "elsewhere"
    os.replace(folder / WEIGHTS, target)
    os.symlink(target, folder / WEIGHTS)


BREAKAGES = {
    "spec missing": (lambda f: os.remove(f / SPEC), f"{SPEC}.*No such file"),
    "weights missing": (lambda f: os.remove(f / WEIGHTS), f"{WEIGHTS}.*No such file"),
    "spec truncated": (lambda f: truncate(f / SPEC), f"{SPEC}: not valid JSON"),
    "spec not text": (lambda f: (f / SPEC).write_bytes(b"\x80\x02}q\x00."), "not valid JSON"),
    "spec a list": (lambda f: (f / SPEC).write_text("[]"), "not the spec"),
    "weights truncated": (lambda f: truncate(f / WEIGHTS), f"{WEIGHTS}: its checksum"),
    "bit flipped": (lambda f: flip(f / WEIGHTS), f"{WEIGHTS}: its checksum"),
    "weights a link": (link, "symbolic link"),
    "newer": (lambda f: edit(f, format=99, metaopt="9.1"), "format 99 is newer.*9.1"),
    "no format": (lambda f: edit(f, format=None), "no format number"),
    "no theta": (lambda f: edit(f, theta=None), "'theta' is missing"),
    "older": (lambda f: edit(f, format=1), f"{SPEC}: format 1 was written by metaopt .*format 2"),
    "settings a list": (lambda f: edit(f, settings=[1]), "'settings' is missing or not a dict"),
    "foreign": (lambda f: edit(f, optimizer="adamm"), "unknown optimizer 'adamm'"),
    "unknown setting": (lambda f: edit(f, settings={"hiden": 3}), "'lstm' has no setting 'hiden'"),
    "bad setting": (lambda f: edit(f, settings={"hidden": 0}), "LSTM.hidden must be at least 1"),
    "other shapes": (
        lambda f: edit(f, theta={"memory": "float32[9]"}),
        "leaf 'memory' of the spec is missing",
    ),
    "leaf renamed": (
        lambda f: reweigh(f, lambda w: {k.replace("readout", "x"): v for k, v in w.items()}),
        "leaf 'net/readout/(bias|kernel)' of the spec is missing",
    ),
    "leaf too many": (
        lambda f: reweigh(f, lambda w: {**w, "more": np.ones(2, np.float32)}),
        r"does not know: \['more'\]",
    ),
    "leaf reshaped": (
        lambda f: reweigh(f, lambda w: {**w, "net/readout/bias": np.ones(2, np.float32)}),
        r"'net/readout/bias' is float32\[2\], but the spec says float32\[1\]",
    ),
    "weights NaN": (
        lambda f: reweigh(f, lambda w: {k: v * np.float32("nan") for k, v in w.items()}),
        "holds NaN",
    ),
    "a pickle": (
        lambda f: (
            (f / WEIGHTS).write_bytes(b"\x80\x04cos\nsystem\n(S'echo'\ntR."),
            edit(f, sha256="5e7"),
        ),
        "checksum",
    ),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_export_gives_an_error_with_file_and_cause(tmp_path, breakage):
    folder, _ = export(tmp_path / "x")
    spoil, match = BREAKAGES[breakage]
    spoil(folder)
    with pytest.raises(CheckpointError, match=match):
        metaopt.load(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        metaopt.load(tmp_path / "nothing")


def test_what_cannot_be_rebuilt_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"settings must be one of L3RS, LSTM, VeLO, .*got 'lstm'"):
        metaopt.save(tmp_path / "x", "lstm", {})
    theta = LSTM().build().init(jax.random.key(0), PARAMS)
    with pytest.raises(ValueError, match="plain JSON"):
        metaopt.save(tmp_path / "x", LSTM(), theta, {"when": {1, 2}})
    assert not (tmp_path / "x").exists()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FOREIGN = {
    "thesis.tex": {"thesis.tex": "years", "data/x.csv": "1"},
    "spec.json": {SPEC: '{"openapi": "3.0"}'},
    "theta.safetensors": {WEIGHTS: "another tool's"},
    "a list": {SPEC: "[1]"},
}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_folder_of_other_files_is_not_replaced(tmp_path, foreign):
    for name, text in FOREIGN[foreign].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"holds '(thesis|spec|theta|data)[.\w]*' and no export"):
        export(tmp_path)
    assert contents(tmp_path) == before


def test_other_files_beside_an_export_stay(tmp_path):
    folder, _ = export(tmp_path / "x", "l3rs")
    (folder / "README.md").write_text("a model card")
    export(folder, "lstm")
    assert metaopt.load(folder).name == "lstm"
    assert sorted(os.listdir(folder)) == ["README.md", SPEC, WEIGHTS]


def unfit(theta):
    return {**theta, "more": np.ones(2, np.float32)}


REFUSED = {
    "NaN": (lambda theta: jax.tree.map(lambda x: x * np.nan, theta), "holds NaN or inf"),
    "float64 beyond float32": (
        lambda theta: jax.tree.map(lambda x: np.full(x.shape, 1e308), theta),
        "holds NaN or inf as float32",
    ),
    "another optimizer's": (unfit, "does not fit|other leaves"),
    "colliding names": (
        lambda theta: {**theta, "net/readout/bias": np.ones(1, np.float32)},
        "several leaves of the name 'net/readout/bias'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_load_would_refuse_replaces_no_good_export(tmp_path, case):
    folder, theta = export(tmp_path / "x")
    before = contents(folder)
    change, match = REFUSED[case]
    with pytest.raises(ValueError, match=match):
        metaopt.save(folder, SETTINGS["lstm"], change(theta))
    with pytest.raises(ValueError, match=match):
        metaopt.save(tmp_path / "new", SETTINGS["lstm"], change(theta))
    assert contents(folder) == before
    assert os.listdir(tmp_path) == ["x"]


def test_a_leaf_that_is_infinite_only_after_its_cast_is_refused(tmp_path):
    folder, _ = export(tmp_path / "x")
    name = "net/readout/kernel"
    reweigh(folder, lambda leaves: {**leaves, name: np.full((3, 1), 1e308)})
    with pytest.raises(CheckpointError, match=r"is float64\[3,1\], but the spec says float32"):
        metaopt.load(folder)
    spec = json.loads((folder / SPEC).read_text())
    spec["theta"]["net"]["readout"]["kernel"] = "float64[3,1]"
    edit(folder, theta=spec["theta"])
    with pytest.raises(CheckpointError, match=r"kernel' holds NaN or inf as float32"):
        metaopt.load(folder)


NO_THETA = {
    "None": None,
    "a string": "x",
    "objects": np.array([{}], object),
    "a key": jax.random.key(0),
    "a function": len,
    "integers": np.ones(3, np.int32),
    "complex numbers": np.ones(3, np.complex64),
}


@pytest.mark.parametrize("kind", NO_THETA)
def test_what_is_no_theta_is_refused_in_one_line(tmp_path, kind):
    theta = {**theta_of("lstm"), "memory": NO_THETA[kind]}
    with pytest.raises(ValueError, match="floating-point numbers") as refusal:
        metaopt.save(tmp_path / "x", SETTINGS["lstm"], theta)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "x").exists()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("older", [True, False])
def test_a_process_killed_at_any_rename_leaves_a_whole_export(tmp_path, monkeypatch, older):
    """Before and after each of them; the next `save` removes what was left behind."""
    names = set()
    for number in range(20):
        folder = tmp_path / str(number)
        if older:
            export(folder, "l3rs")
        calls = iter(range(20))

        def replace(source, target, real=os.replace, calls=calls, number=number):
            call = 2 * next(calls)
            if call == number:
                raise Killed
            real(source, target)
            if call + 1 == number:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                export(folder, "lstm")
                break
            except Killed:
                pass
        if older or (folder / SPEC).exists():
            names.add(metaopt.load(folder).name)
        export(folder, "velo")
        assert metaopt.load(folder).name == "velo"
        assert sorted(os.listdir(folder)) == [SPEC, WEIGHTS]
    assert number == 6  # three renames
    assert names == ({"l3rs", "lstm"} if older else {"lstm"})


def test_a_save_after_a_kill_never_leaves_less_than_it_found(tmp_path, monkeypatch):
    """Killed once before the weights have their name, and again at once in the next `save`."""
    folder, _ = export(tmp_path / "x", "l3rs")
    real = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda a, b: real(a, b) if b != folder / WEIGHTS else kill())
        with pytest.raises(Killed):
            export(folder, "lstm")
    with monkeypatch.context() as patch:
        patch.setattr(exports, "write_whole", lambda *arguments: kill())
        with pytest.raises(Killed):
            export(folder, "velo")
    assert metaopt.load(folder).name == "lstm"


def kill():
    raise Killed


def test_readers_beside_writers_never_fail(tmp_path):
    folder, _ = export(tmp_path / "x", "lstm")
    done, failures = threading.Event(), []

    def write(name):
        try:
            for _ in range(10):
                export(folder, name)
        except Exception as error:
            failures.append(error)

    def read():
        while not done.is_set():
            try:
                metaopt.load(folder)
            except Exception as error:
                failures.append(error)

    writers = [threading.Thread(target=write, args=(name,)) for name in ("lstm", "lstm", "velo")]
    reader = threading.Thread(target=read)
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert not failures
    assert sorted(os.listdir(folder)) == [SPEC, WEIGHTS]


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        ({"inner_steps": 10.0, "seconds": 2}, {"inner_steps": 10.0, "seconds": 2}),
        ({"inner_steps": 10.0}, None),
        ({"inner_steps": "many", "seconds": 2.0}, None),
        (3, None),
        (None, None),
    ],
)
def test_the_cost_is_told_where_it_is_known(tmp_path, cost, expected):
    settings = LSTM(hidden=2)
    theta = settings.build().init(jax.random.key(0), {})
    folder = exports.save(tmp_path / "export", settings, theta, {"cost": cost})
    assert exports.load(folder).cost == expected
