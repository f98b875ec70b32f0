"""`metaopt report` on evaluation folders that are damaged, foreign or hostile."""

import io
import json
import os
import shutil
import zipfile

import numpy as np
import pytest
from evaluations import contenders, descend, write_index, write_task
from refusals import bad_inputs, bomb, refused
from rich.console import Console

from metaopt.evaluation.records import INDEX, RECORD
from metaopt.report import page, report, summary, tables

TASK, OTHER, MARKER = "0-first", "1-second", "executed"


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    grid = np.stack([descend(0.1), descend(0.3)])
    for name in (TASK, OTHER):
        write_task(folder / name, name, contenders(0), {"SGD": ([0.1, 0.3], grid)})
    write_index(folder, [TASK, OTHER])
    return folder


def raw(name, payload):
    payload = payload if isinstance(payload, bytes) else payload.encode()
    return lambda folder: (folder / name).write_bytes(payload)


def part(name, keep):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def edited(name, change):
    """Applies ``change`` to the parsed JSON of a file."""

    def spoil(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(change(content)))

    return spoil


def put(name, *path_and_value):
    """Puts a value where the path of keys leads; the value DROP takes the key away."""
    *path, last, value = path_and_value

    def change(content):
        inside = content
        for key in path:
            inside = inside[list(inside)[key] if isinstance(key, int) else key]
        if value is DROP:
            del inside[last]
        else:
            inside[last] = value
        return content

    return edited(name, change)


DROP = object()
index = lambda *where: put(INDEX, *where)
record = lambda *where: put(f"{TASK}/{RECORD}", *where)
CURVE = f"{TASK}/0.npz"  # of SGD
GRID = f"{TASK}/tuning-SGD.npz"


def arrays(name, **changes):
    """Replaces arrays of an npz file; None takes one away."""

    def spoil(folder):
        with np.load(folder / name) as file:
            content = {key: file[key] for key in file.files}
        for key, change in changes.items():
            if change is None:
                del content[key]
            else:
                content[key] = change(content[key])
        np.savez(folder / name, **content)

    return spoil


def member(name, payload):
    """An npz with one member of such bytes."""

    def spoil(folder):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("steps.npy", payload)

    return spoil


def objects(folder):
    """An npy member that is a pickle: numpy would have to run it."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "|O", "fortran_order": False, "shape": (1,)}
    )
    member(CURVE, head.getvalue() + bomb(folder / MARKER))(folder)


def huge_header():
    head = io.BytesIO()
    shape = (1 << 50,)
    np.lib.format.write_array_header_1_0(
        head, {"descr": "<f8", "fortran_order": False, "shape": shape}
    )
    return head.getvalue() + b"\0" * 64


def zip_bomb(folder):
    """A member that is 20 kB packed and 20 MB unpacked, and the header of 1 TB."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "<f8", "fortran_order": False, "shape": (1 << 37,)}
    )
    with zipfile.ZipFile(folder / CURVE, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("steps.npy", head.getvalue() + b"\0" * (20 << 20))


def moved_out(name):
    def spoil(folder):
        target = folder / "outside"
        os.replace(folder / name, target)
        (folder / name).symlink_to(target)

    return spoil


def pipe(name):
    def spoil(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return spoil


BAD = {
    "no index": (lambda f: (f / INDEX).unlink(), f"holds no {INDEX}"),
    "a file": (lambda f: [shutil.rmtree(f), f.write_text("x")], f"holds no {INDEX}"),
    "index half": (part(INDEX, 100), f"{INDEX}: not readable as JSON"),
    "index deep": (raw(INDEX, "[" * 100_000), f"{INDEX}: not readable as JSON"),
    "index a list": (raw(INDEX, "[]"), f"{INDEX}: "),
    "index a link": (moved_out(INDEX), f"{INDEX}: is a symbolic link"),
    "index a pipe": (pipe(INDEX), f"{INDEX}: is not a plain file"),
    "index of another format": (index("format", 99), f"{INDEX}: records of format 99"),
    "no tasks": (index("tasks", DROP), f"{INDEX}: .*tasks"),
    "tasks a number": (index("tasks", 3), f"{INDEX}: .*tasks"),
    "tasks empty": (index("tasks", []), "no finished task"),
    "a task that climbs out": (index("tasks", ["../x"]), f"{INDEX}: .*'../x'"),
    "a task that is the folder": (index("tasks", ["."]), f"{INDEX}: .*'.'"),
    "a task twice": (index("tasks", [TASK, TASK]), f"{INDEX}: .*tasks"),
    "only tasks that are not there": (index("tasks", ["9-ninth"]), "no finished task"),
    "job a list": (index("job", [1]), f"{INDEX}: .*job"),
    "environment a string": (index("environment", "x"), f"{INDEX}: .*environment"),
    "training of words": (
        index("training", {"L2O": {"step": ["a"], "meta_loss": ["b"]}}),
        f"{INDEX}: .*training",
    ),
    "training of two lengths": (
        index("training", {"L2O": {"step": [1, 2], "meta_loss": [1.0]}}),
        f"{INDEX}: .*training",
    ),
    "record a pickle": (
        lambda f: (f / TASK / RECORD).write_bytes(bomb(f / MARKER)),
        f"{RECORD}: not readable as JSON",
    ),
    "record a link": (moved_out(f"{TASK}/{RECORD}"), f"{RECORD}: is a symbolic link"),
    "record without curves": (record("curves", DROP), f"{RECORD}: not a record"),
    "record with more": (record("extra", 1), f"{RECORD}: not a record"),
    "title a number": (record("title", 3), f"{RECORD}: .*title"),
    "num_steps a string": (record("num_steps", "60"), f"{RECORD}: .*num_steps"),
    "curve's file a number": (record("curves", 0, "file", 3), f"{RECORD}: .*file"),
    "curve's file climbs out": (record("curves", 0, "file", "../x.npz"), f"{RECORD}: .*'../x.npz'"),
    "curve's file missing": (record("curves", 0, "file", "none.npz"), "none.npz: cannot be read"),
    "curve of an unknown kind": (record("curves", 0, "kind", "magic"), f"{RECORD}: .*kind"),
    "layers of numbers": (record("curves", 2, "layers", [1, 2]), f"{RECORD}: .*layers"),
    "guard a list": (record("curves", 0, "guard", ["race"]), f"{RECORD}: .*guard"),
    "tuned a list": (record("tuned", [1]), f"{RECORD}: .*tuned"),
    "tuned without a grid": (record("tuned", "SGD", "grid", DROP), f"{RECORD}: .*grid"),
    "tuned's loss a word": (record("tuned", "SGD", "loss", ["a", "b"]), f"{RECORD}: .*loss"),
    "tuned's edge a number": (record("tuned", "SGD", "edge", 1), f"{RECORD}: .*edge"),
    "tuned's extensions a word": (record("tuned", "SGD", "extended", "x"), f"{RECORD}: .*extended"),
    "left_out a list": (record("left_out", ["SGD"]), f"{RECORD}: .*left_out"),
    "velodrome a string": (record("velodrome", "x"), f"{RECORD}: .*velodrome"),
    "velodrome's speedup a list": (record("velodrome", {"speedup": [1]}), f"{RECORD}: .*velodrome"),
    "curves half": (part(CURVE, 700), "0.npz: not the arrays of a Curves"),
    "curves a link": (moved_out(CURVE), "0.npz: is a symbolic link"),
    "curves a pipe": (pipe(CURVE), "0.npz: is not a plain file"),
    "curves a pickle in an npz": (objects, "0.npz: not the arrays of a Curves"),
    "an array of 8 PB": (member(CURVE, huge_header()), "0.npz: not the arrays of a Curves"),
    "an array that unpacks a thousandfold": (zip_bomb, "0.npz: not the arrays of a Curves"),
    "a member that is no array": (member(CURVE, b"hello"), "0.npz: not the arrays of a Curves"),
    "steps missing": (arrays(CURVE, steps=None), "0.npz: .*no steps"),
    "loss of one axis": (arrays(CURVE, loss=lambda a: a[0]), "0.npz: .*loss"),
    "loss shorter than steps": (
        arrays(CURVE, loss=lambda a: a[:, :-1]),
        "0.npz: .*steps is not 12",
    ),
    "loss of words": (arrays(CURVE, loss=lambda a: a.astype(str)), "0.npz: .*loss"),
    "steps backwards": (arrays(CURVE, steps=lambda a: a[::-1]), "0.npz: .*steps"),
    "accuracy shorter": (arrays(CURVE, accuracy=lambda a: a[:2]), "0.npz: .*accuracy"),
    "seconds NaN": (arrays(CURVE, seconds=lambda a: a * np.nan), "0.npz: .*seconds"),
    "grad_evals of another length": (arrays(CURVE, grad_evals=lambda a: a[1:]), "0.npz: .*grad"),
    "state of other windows": (
        arrays(f"{TASK}/2.npz", **{"state/lambda_": lambda a: a[:, :-1]}),
        "2.npz: .*lambda_",
    ),
    "grid missing": (lambda f: (f / GRID).unlink(), "tuning-SGD.npz: cannot be read"),
    "grid of two axes": (arrays(GRID, loss=lambda a: a[0]), "tuning-SGD.npz: .*loss"),
    "grid of other points": (arrays(GRID, loss=lambda a: a[:1]), "tuning-SGD.npz: .*loss"),
    "grid's steps shorter": (arrays(GRID, steps=lambda a: a[1:]), "tuning-SGD.npz: .*steps|loss"),
}


@bad_inputs(BAD)
def test_a_bad_evaluation_is_refused(evaluation, tmp_path, bad, match):
    folder = shutil.copytree(evaluation, tmp_path / "x")
    bad(folder)
    refused(lambda: report(folder), match, tmp_path)
    assert not (folder / MARKER).exists()


def test_a_template_in_a_name_is_only_text(evaluation, tmp_path):
    """Names come from folders that anyone may have written; the page shows them as they are."""
    folder = shutil.copytree(evaluation, tmp_path / "x")
    template = "{{ cycler.__init__.__globals__.os.system('touch executed') }}${7*7}"
    put(f"{TASK}/{RECORD}", "title", template)(folder)
    shown = page.render(summary.load(folder), folder)
    assert "cycler.__init__" in shown and "${7*7}" in shown
    assert not (folder / MARKER).exists() and not os.path.exists(MARKER)


ABSURD = (None, 5, -1, "x", "", [], {}, [[1]], {"a": None}, 1e308, float("nan"), True, 10**400)


def paths(value, path=()):
    """The paths of keys to all values of parsed JSON; of lists, to the first two."""
    yield path
    inside = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        inside = enumerate(value[:2])
    for key, child in inside:
        yield from paths(child, (*path, key))


@pytest.mark.parametrize("name", [INDEX, f"{TASK}/{RECORD}"])
def test_absurd_fields_are_shown_or_refused_in_one_line(evaluation, tmp_path, name):
    """A sample of all fields with all absurd values, or without them."""
    folder = shutil.copytree(evaluation, tmp_path / "x")
    content = (folder / name).read_text()
    random = np.random.default_rng(0)
    places = list(paths(json.loads(content)))[1:]
    for index in random.integers(len(places), size=12):
        *outer, last = places[index]
        changed = inside = json.loads(content)
        for key in outer:
            inside = inside[key]
        kind = random.integers(len(ABSURD) + 1)
        if kind < len(ABSURD):
            inside[last] = ABSURD[kind]
        else:
            del inside[last]
        (folder / name).write_text(json.dumps(changed))
        try:
            shown = tables.markdown(summary.load(folder))
        except ValueError as error:
            assert str(folder) in str(error)
        else:
            assert shown.startswith("# Evaluation")


def test_names_do_not_control_a_terminal_or_a_page(evaluation, tmp_path):
    folder = shutil.copytree(evaluation, tmp_path / "x")
    hostile = "\x1b[31m\x07<script>alert(1)</script>|`x`\r\n[link](javascript:alert(1))\u202e"
    for place in (("job", "suite"), ("job", "seeds")):
        put(INDEX, *place, hostile)(folder)
    put(f"{TASK}/{RECORD}", "title", hostile)(folder)
    put(f"{TASK}/{RECORD}", "tuned", "SGD", "point", {"schedule": hostile, hostile: 1})(folder)
    put(f"{TASK}/{RECORD}", "left_out", {hostile: hostile})(folder)
    evaluation = summary.load(folder)
    text = tables.markdown(evaluation)
    assert "<script" not in text and not set(text) - {"\n"} & set(map(chr, range(32)))
    screen = io.StringIO()
    result = {"evaluation": evaluation, "page": "p", "summary": "s", "figures": []}
    tables.print_summary(result, Console(file=screen, width=300))
    assert not {"\x1b", "\x07", "\r", "\u202e"} & set(screen.getvalue())
