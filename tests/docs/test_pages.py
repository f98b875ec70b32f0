"""The Python in README and docs runs as it is printed.

The blocks of a page run one after the other in one namespace, which is empty at the start, in an
empty folder that holds what `make run` leaves. HTML comments in front of a block say what else is
true: ``<!-- needs: learned, params -->`` takes those names from `a_problem`, and
``<!-- skip: reason -->`` leaves the block out.
"""

import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

import metaopt
from metaopt import guards, optimizers

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- (needs|skip): (.*?) -->\n)?^```python\n(.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    line: int
    note: str
    value: str
    code: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(text[: m.start(3)].count("\n") + 1, m[1] or "", m[2] or "", m[3])
        for m in BLOCK.finditer(text)
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with what `make run` and `metaopt train` would have left in it."""
    monkeypatch.chdir(tmp_path)
    params = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
    for path, settings in (
        ("runs/digits/L3RS/export", optimizers.L3RS(variant="none")),
        ("runs/mine/export", optimizers.L3RS(variant="none")),
        ("runs/myjob/export", optimizers.L3RS(variant="none")),
    ):
        theta = settings.build().init(jax.random.key(0), params)
        metaopt.save(path, settings, theta)
    return tmp_path


def velo_file(folder: Path) -> None:
    """A small VeLO in the format of the published file."""
    theta = optimizers.velo(hidden=4, bank=3).init(jax.random.key(0), {})
    plain = jax.tree.map(np.asarray, theta)
    (folder / "params").write_bytes(serialization.msgpack_serialize({"params": plain}))


def a_problem(folder: Path) -> dict:
    """Names that blocks may need: a small regression, and a learned optimizer for it."""
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    batch = {"x": jnp.asarray(x), "y": jnp.asarray(x[:, :2] + 1)}
    params = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
    lstm = optimizers.lstm(4)
    learned, loss_fn = lstm.apply(lstm.init(jax.random.key(0), params)), squared_error
    return {
        "metaopt": metaopt,
        "guards": guards,
        "jax": jax,
        "jnp": jnp,
        "optax": optax,
        "params": params,
        "batch": batch,
        "batches": [batch] * 4,  # called op by op, each step compiles its branches
        "loss_fn": loss_fn,
        "learned": learned,
        "new_optimizer": learned,
        "trusted_one": optax.sgd(0.1),
        "state": guards.race(learned, optax.adam(1e-3)).init(params),
        "grads": jax.grad(loss_fn)(params, batch),
        "tmp_path": folder,
    }


def squared_error(params, batch):
    return jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p)], ids=lambda p: str(p.relative_to(ROOT))
)
def test_python_of_a_page_runs_as_it_is_printed(page, folder):
    names: dict = {}
    for block in blocks(page):
        if block.note == "skip":
            continue
        if block.note == "needs":
            problem = a_problem(folder)
            wanted = block.value.split(", ")
            if "velo_file" in wanted:
                velo_file(folder)
            names |= {name: problem[name] for name in wanted if name != "velo_file"}
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        exec(code, names)


def test_every_reason_to_skip_a_block_says_something():
    skipped = [block for page in PAGES for block in blocks(page) if block.note == "skip"]
    assert all(len(block.value) > 20 for block in skipped)
    assert len(skipped) <= 5  # the exception
