"""Every script of docs/examples runs as it stands, and what it shows is so.

Each test has the name of its script.
"""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def run(name: str, *arguments):
    """What `main` of the example returns; the same code as `python docs/examples/NAME.py`."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*arguments)


def test_every_example_has_a_test():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert scripts <= tests


def test_flax_train_state(capsys):
    result = run("flax_train_state", [])
    assert result["accuracy"] > 0.6  # guessing: 0.1
    assert "step 200: training" in capsys.readouterr().out


def test_flax_nnx():
    losses = run("flax_nnx")
    assert losses["learned"] < 0.6 * losses["untrained"]
    assert losses["guarded"] < 0.5 * losses["untrained"]
    assert losses["guarded"] < 1.05 * losses["Adam"]


def test_plain_jax(capsys):
    losses = run("plain_jax")
    assert losses["end"] < 0.4 * losses["start"]
    assert "[0, 50]" in capsys.readouterr().out  # the untrained LSTM never wins


def test_guard_adamw_flax_cnn():
    losses = run("guard_adamw_flax_cnn", ["--steps", "100"])
    assert losses["end"] < 0.9 * losses["start"]


def test_flax_batchnorm_dropout():
    results = run("flax_batchnorm_dropout", [])
    assert all(result["accuracy"] > 0.9 for result in results.values())


def test_batchnorm_task():
    results = run("batchnorm_task", [])
    assert all(result["accuracy"] > 0.9 for result in results.values())


def test_flax_nnx_batchnorm_dropout():
    losses = run("flax_nnx_batchnorm_dropout", [])
    assert losses["race(LSTM, AdamW)"] < 1.2 * losses["AdamW"] < 0.2


def test_equinox_batchnorm():
    losses = run("equinox_batchnorm", [])
    assert losses["race(LSTM, AdamW)"] < 1.2 * losses["AdamW"] < 0.3


def test_gradient_accumulation():
    losses = run("gradient_accumulation", [])
    assert losses["race(LSTM, AdamW)"] < losses["AdamW"] < 0.3 * losses["start"]


def test_finetune_partition():
    losses = run("finetune_partition")
    assert losses["after"] < 0.75 * losses["before"]


def test_guard_diagnostics():
    rows = run("guard_diagnostics")
    assert [int(row["windows"]) for row in rows] == list(range(1, len(rows) + 1))
    winners = [int(row["winner"]) for row in rows]
    assert winners[0] == 0 and winners[-1] == 1  # what goes wrong is dropped
    assert rows[-1]["losses"][0] == float("inf")  # and rests
    assert rows[-1]["wins"].tolist() == [winners.count(0), winners.count(1)]
    assert rows[-1]["gradient_evals"] < len(rows) * 2 * 10  # both optimizers, ten steps each
    assert rows[-1]["loss_evals"] == 0


def test_character_language_model(capsys):
    losses = run("character_language_model", [])
    assert losses["end"] < 0.75 * losses["guessing"]
    assert len(capsys.readouterr().out.partition("The ")[2]) >= 100


def test_specialise_own_job(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))  # --task names a module of that folder
    losses = run("specialise_own_job", ["--out", str(tmp_path / "own")])
    adam = [loss for name, loss in losses.items() if name.startswith("Adam")]
    assert len(adam) == 3
    assert losses["L3RS, specialised"] < min(adam)
