"""The zoo: every entry loads, is small and plain, and reaches its recorded bound at home."""

import io

import jax
import numpy as np
import pytest
from rich.console import Console

import metaopt
from metaopt import zoo
from metaopt.cli import main, parse
from metaopt.evaluation.curves import evaluate
from metaopt.evaluation.statistics import final_mean
from metaopt.jobs import zoo as zoo_job
from metaopt.jobs.specialise import SpecialiseJob, choose
from metaopt.jobs.train import TrainJob
from metaopt.tasks import catalog

# Entries whose weights others have published -> sha256 of their file.
PUBLISHED = {
    "celo": "35683c6123069c101d62ec1f8b2e6d70d50a43e67ebe09953b27620a7dcb836b",
    "celo-adam": "99c65fa0218a739c32eac4e8a99523b6fed92e2926d0c5d64e83835637b75d38",
}


def test_entries_are_small_and_plain():
    assert len(zoo.names()) >= 2
    for name in zoo.names():
        files = {path.name: path.stat().st_size for path in zoo.folder(name).iterdir()}
        licence = {"LICENSE"} if name in PUBLISHED else set()
        assert files.keys() == {"spec.json", "theta.safetensors", "card.json"} | licence
        assert sum(files.values()) < 1_000_000


def test_a_name_that_is_not_there():
    with pytest.raises(ValueError, match="did you mean lstm-mlp-mnist"):
        zoo.folder("lstm-mlp-mnst")
    with pytest.raises(metaopt.CheckpointError, match=r"name of the zoo \(.*lstm-mlp-mnist"):
        metaopt.load("lstm-mlp-mnst")


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    there = metaopt.load("lstm-mlp-mnist")
    own = jax.tree.map(lambda x: 2 * x, there.theta)
    metaopt.save(tmp_path / "lstm-mlp-mnist", there.settings, own)
    monkeypatch.chdir(tmp_path)
    loaded = metaopt.load("lstm-mlp-mnist").theta
    for mine, found in zip(jax.tree.leaves(own), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(mine, found)


def test_command_line(capsys):
    assert main(["zoo", "list", "--names"]) == 0
    assert capsys.readouterr().out.split() == zoo.names()
    for name in zoo.names():
        assert main(["zoo", "show", name]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        licence = "Copyright (c) 2025 Abhinav Moudgil" if name in PUBLISHED else "Apache-2.0"
        assert name in shown and licence in shown and zoo.card(name).home.task in shown
    assert main(["zoo", "show", "velo"]) == 2
    assert "unknown zoo entry 'velo'" in capsys.readouterr().err


def test_terminals_show_a_picture_of_the_curves(monkeypatch):
    console = Console(force_terminal=True, file=io.StringIO(), width=120, legacy_windows=False)
    assert zoo_job.can_draw(console) == (console.encoding == "utf-8")
    assert not zoo_job.can_draw(Console(file=io.StringIO()))  # a file or a pipe
    curves = {"mine": [8.0, 4.0, 2.0, 1.0], "Adam": [8.0, 8.0, 1e9, float("nan")]}
    home = zoo.card("celo").home._replace(num_steps=30, steps=[0, 10, 20, 30], curves=curves)
    card = zoo.card("celo")._replace(home=home)
    monkeypatch.setattr(zoo, "card", lambda name: card)
    monkeypatch.setattr(zoo_job, "can_draw", lambda console: True)
    monkeypatch.setattr(zoo_job, "Console", lambda: console)
    zoo_job.run(zoo_job.ZooJob("show", "celo"))
    shown = {line.split()[0]: line for line in console.file.getvalue().splitlines() if line.split()}
    assert "8 to 1" in shown["mine"]
    # log2 of the first curve falls by one from point to point; 1e9 is at the top.
    heights = [zoo_job.BLOCKS.index(c) for c in shown["mine"] if c in zoo_job.BLOCKS]
    assert heights == sorted(heights, reverse=True) and heights[-1] == 0
    assert [c for c in shown["Adam"] if c in zoo_job.BLOCKS][2:] == ["█"]  # no NaN


@pytest.mark.parametrize("name", zoo.names())
def test_a_cards_curves_end_at_its_figures(name):
    home = zoo.card(name).home
    assert list(home.curves) == [*home.baselines, name]
    assert home.steps[0] == 0 and home.steps[-1] == home.num_steps
    ends = {**home.baselines, name: home.loss}
    for label, curve in home.curves.items():
        assert len(curve) == len(home.steps)
        # The last measurements, of which the figure is the mean, differ by noise.
        np.testing.assert_allclose(curve[-1], ends[label], rtol=0.3)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_come_with_their_licence_and_their_origin(name):
    licence = (zoo.folder(name) / "LICENSE").read_text()
    assert "MIT License" in licence and "The above copyright notice" in licence
    assert zoo.card(name).licence == " ".join(licence.split())
    trained = metaopt.load(name).trained
    assert "github.com/amoudgl/celo" in trained["source"] and trained["sha256"] == PUBLISHED[name]


@pytest.mark.parametrize("name", sorted(set(zoo.names()) - set(PUBLISHED)))
def test_the_command_of_a_card_is_the_training_that_its_export_records(name):
    trained = metaopt.load(name).trained
    *earlier, last = zoo.card(name).command.split(" && ")
    for command in (*earlier, last):
        kind, *words = command.removeprefix("metaopt ").split()
        if kind == "specialise":
            job = parse(SpecialiseJob, words, "metaopt specialise")
            if not job.minutes:
                assert metaopt.load(name).settings == choose([], job.base_names, job.any_network)
                search = dict(trained["search"])
                assert search.pop("point") and np.isfinite(search.pop("loss"))
                assert search == {key: getattr(job, key) for key in search} and len(search) == 5
                return
            job = job.training(choose([], job.base_names, job.any_network))
        else:
            job = parse(TrainJob, words, "metaopt train")
        assert job.learned == metaopt.load(name).settings
    fields = job.identity.keys() - ({"warm_start"} if earlier else set())
    assert {key: job.identity[key] for key in fields} == {key: trained[key] for key in fields}


@pytest.mark.optimized
@pytest.mark.parametrize("name", zoo.names())
def test_reaches_its_bound_at_home(name, real_data):
    """The recorded run again, compiled as a user's."""
    home = zoo.card(name).home
    for data in catalog.TASKS[home.task].data:
        real_data(data)
    keys = jax.random.split(jax.random.split(jax.random.key(2**31 - 1))[0], home.seeds)
    task, export = catalog.build(home.task), metaopt.load(name)
    make = lambda num_steps: export.apply(num_steps=num_steps)
    curves = evaluate(make, task, num_steps=home.num_steps, keys=keys)
    assert np.mean(final_mean(curves.loss)) < home.bound < np.mean(curves.loss[:, 0])
