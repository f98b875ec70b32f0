"""The page, the Markdown and the figures as files: complete, self-contained and safe."""

import base64
import gzip
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from evaluations import HOSTILE, contenders, curves, descend, write_index, write_task
from rich.console import Console

from metaopt.evaluation import records
from metaopt.report import looks, page, print_summary, report, summary


@pytest.fixture(scope="module")
def result(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "copy"
    shutil.copytree(folder, out)
    return report(out)


@pytest.fixture(scope="module")
def html(result) -> str:
    return result["page"].read_text()


class Reader(HTMLParser):
    """Collects tags, attributes that could load something, and texts."""

    def __init__(self):
        super().__init__()
        self.tags, self.loads, self.text, self.scripts = [""], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href") and not v.startswith("#")]

    def handle_data(self, data):
        (self.scripts if self.tags[-1] == "script" else self.text).append(data)


@pytest.fixture(scope="module")
def content(html) -> Reader:
    reader = Reader()
    reader.feed(html)
    return reader


def test_the_page_loads_nothing(html, content):
    assert content.loads == []
    assert "default-src 'none'" in html
    assert not {"link", "img", "iframe"} & set(content.tags)
    css = re.search(r"<style>(.*?)</style>", html, re.S).group(1)
    assert "url(" not in css and "@import" not in css


def test_names_are_text_everywhere(html, content):
    assert HOSTILE not in html
    assert content.tags.count("script") == 3  # the data, Bokeh, page.js
    text = " ".join(content.text)
    assert f"RACE({HOSTILE}, SGD)" in text and f"second {HOSTILE}" in text
    assert f"Left out: Other: theta was made for layers {HOSTILE}." in text


def test_markdown_keeps_names_as_text(result):
    text = result["summary"].read_text()
    assert "<script>" not in text and "&lt;script>alert(1)" in text
    assert "SGD was tuned on the validation split over 3 points x 8 seeds: 24 runs, 1,440" in text


def test_every_comparison_names_its_grid_and_cost(content):
    text = " ".join(" ".join(content.text).split())
    assert "SGD was tuned on the validation split over 3 points x 8 seeds: 24 runs" in text
    assert "1,440 gradient evaluations, 1.5 s. Chosen: lr 1, constant." in text
    losses = [descend(rate)[:, -1].mean() for rate in (0.1, 0.3, 1.0)]
    for rate, loss in zip(("0.1", "0.3", "1"), losses, strict=True):
        shown = f"{loss:.4f}" if loss > 1e-3 else f"{loss:.1e}"
        assert re.search(rf"lr {rate}, constant\s+{re.escape(shown)}", text)


def test_the_page_says_how_to_reproduce_it(content):
    text = " ".join(content.text)
    assert f"metaopt evaluate '{HOSTILE}'" in text and "metaopt report" in text
    assert "3.11.9" in text and "quadratics" in text
    assert "60 steps per run, measured every 5 steps." in text


def columns_of(html: str) -> list[dict[str, np.ndarray]]:
    """Columns of the first chart's data sources, as Bokeh reads them."""
    data = json.loads(re.search(r'id="page">(.*?)</script>', html, re.S).group(1))
    sources = []

    def visit(value):
        if isinstance(value, list):
            for part in value:
                visit(part)
        elif isinstance(value, dict):
            if value.get("name") == "ColumnDataSource":
                entries = value["attributes"]["data"]["entries"]
                sources.append({k: array(v) for k, v in entries if isinstance(v, dict)})
            for part in value.values():
                visit(part)

    def array(value):
        raw = gzip.decompress(base64.b64decode(value["array"]["data"]))
        return np.frombuffer(raw, value["dtype"]).reshape(value["shape"])

    visit(data["charts"][0]["item"])
    return sources


def test_curves_on_the_page_are_the_recorded_ones(html):
    sgd = descend(0.3)
    source = next(
        c for c in columns_of(html) if "loss" in c and np.isclose(c["loss"][-1], sgd[:, -1].mean())
    )
    np.testing.assert_allclose(source["loss"], sgd.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(source["loss_range_low"], sgd.min(axis=0), rtol=1e-5)
    np.testing.assert_allclose(source["loss_range_high"], sgd.max(axis=0), rtol=1e-5)
    assert (source["loss_ci_low"] < source["loss"]).all()
    assert (source["loss"] < source["loss_ci_high"]).all()
    np.testing.assert_array_equal(source["grad_evals"], source["steps"])


def test_the_switching_line_is_the_share_of_seeds(html):
    share = next(c for c in columns_of(html) if "share" in c)
    windows = np.arange(12)
    np.testing.assert_allclose(share["share"], np.minimum(windows, 8) / 8)
    np.testing.assert_array_equal(share["grad_evals"], 2 * 5 * (windows + 1))


def test_a_curve_that_leaves_the_chart_ends_in_a_cross(html):
    crosses = [c for c in columns_of(html) if len(c.get("steps", ())) == 1]
    drawn = [c for c in crosses if np.isfinite(c["loss"][0])]
    assert len(crosses) == 5 and len(drawn) == 1  # only Wild leaves it
    wild = descend(2.2).mean(axis=0)
    last = np.flatnonzero(wild <= 1e3 * wild[0])[-1]
    assert drawn[0]["steps"][0] == 5 * last
    np.testing.assert_allclose(drawn[0]["loss"][0], wild[last], rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_axes_ignore_runs_that_diverged(bad):
    good = np.array([2.0, 1.0, 0.5])
    low, high, logarithmic = looks.loss_bounds([good, np.array([2.0, bad, bad])])
    assert logarithmic and 0.1 < low < 0.5 and 2.0 < high < 10.0
    drawn, left = looks.visible_part(np.array([2.0, 1.0, bad]))
    assert left == 1 and np.isnan(drawn[2])
    assert looks.visible_part(np.array([2.0, bad, 1.0]))[1] is None  # the curve comes back


def test_axes_of_losses_below_zero_are_linear():
    low, high, logarithmic = looks.loss_bounds([np.array([1.0, -1.0])])
    assert not logarithmic and low < -1.0 and high > 1.0


@pytest.mark.parametrize("first", [2.0, 1e30])
def test_the_axis_of_a_meta_training_ignores_explosions(first):
    """It covers the usual losses, all held-out losses, and the first loss unless it exploded."""
    loss = np.array([first, 1e30, *[0.1, 1e9, 0.02, np.nan] * 10])
    held_out = np.full(len(loss), np.nan)
    held_out[[5, 20]] = 4.0, 0.01
    low, high, logarithmic = looks.meta_loss_bounds(
        {"meta_loss": loss, "validation_loss": held_out}
    )
    assert logarithmic and low < 0.01 and 4.0 < high < 1e6
    assert looks.meta_loss_bounds({"meta_loss": np.full(3, np.nan)}) == (0.1, 1.0, True)


def test_looks_tell_optimizers_apart():
    entry = lambda name, kind, **parts: (name, records.CurveRecord("", kind, **parts))
    entries = dict(entry(f"base {i}", "baseline") for i in range(8))
    entries |= dict(entry(f"L{i}", "learned", learned=f"L{i}") for i in range(4))
    for guard in ("LGL2O", "RACE"):
        for i in range(4):
            name = f"{guard}(L{i}, SGD)"
            entries |= dict([entry(name, "guarded", learned=f"L{i}", guard=guard)])
    chosen = looks.choose_looks(entries)
    assert len(set(chosen.values())) == len(entries) == 20
    for i in range(4):
        assert chosen[f"RACE(L{i}, SGD)"].colour == chosen[f"L{i}"].colour


def test_guards_of_one_optimizer_have_colours_of_their_own():
    guarded = lambda guard, fallback: records.CurveRecord(
        "", "guarded", learned="L", guard=guard, fallback=fallback
    )
    entries = {name: records.CurveRecord("", "baseline") for name in ("SGD", "Adam")}
    entries["L"] = records.CurveRecord("", "learned", learned="L")
    pairs = [(guard, fallback) for guard in ("GL2O", "RACE") for fallback in ("SGD", "Adam")]
    entries |= {f"{guard}(L, {fallback})": guarded(guard, fallback) for guard, fallback in pairs}
    chosen = looks.choose_looks(entries)
    assert len(set(chosen.values())) == len(entries)
    assert (
        chosen["RACE(L, SGD)"].colour
        == chosen["RACE(L, Adam)"].colour
        != chosen["GL2O(L, SGD)"].colour
    )
    assert (
        chosen["RACE(L, SGD)"].dash == chosen["GL2O(L, SGD)"].dash != chosen["RACE(L, Adam)"].dash
    )
    colours = [chosen[name].colour for name in ("SGD", "Adam", "L", "GL2O(L, SGD)", "RACE(L, SGD)")]
    assert len(set(colours)) == 5


def test_optimizers_that_never_meet_may_look_alike():
    panels = [[f"base {task} {i}" for i in range(20)] for task in range(3)]
    entries = {name: records.CurveRecord("", "baseline") for panel in panels for name in panel}
    chosen = looks.choose_looks(entries, panels)
    for panel in panels:
        assert len({chosen[name] for name in panel}) == len(panel)
    # Two that share a panel differ, whatever the order.
    chosen = looks.choose_looks(entries, [*panels, [panels[0][0], panels[2][0]]])
    assert chosen[panels[0][0]] != chosen[panels[2][0]]


def test_a_wide_comparison_stays_small(tmp_path):
    # One of twelve tasks with 12 optimizers, 25 seeds and 1000 measurements: the whole page, with
    # 1.4 MB of scripts, stays below 6 MB.
    entry = records.CurveRecord("", "baseline")
    steps = np.arange(1001)
    rng = np.random.default_rng(0)
    contenders = {}
    for name in ["Adam", *(f"optimizer {i}" for i in range(11))]:
        loss = np.exp(-steps / 300) * rng.lognormal(0.0, 0.3, (25, 1001))
        long = curves(descend(0.3))._replace(
            steps=steps,
            grad_evals=steps,
            seconds=1e-3 * steps,
            loss=loss,
            accuracy=rng.random(loss.shape),
            train_loss=loss,
        )
        contenders[name] = (entry, long)
    write_task(tmp_path / "0", "wide", contenders)
    write_index(tmp_path, ["0"])
    text = page.render(summary.load(tmp_path), tmp_path)
    data = re.search(r'id="page">(.*?)</script>', text, re.S).group(1)
    assert len(data) < (6e6 - 1.4e6) / 12
    assert len(text) - len(data) < 1.4e6


def test_a_page_without_accuracy_offers_no_accuracy(tmp_path):
    entry, arrays = contenders(0)["SGD"]
    bare = arrays._replace(accuracy=np.full_like(arrays.accuracy, np.nan))
    write_task(tmp_path / "0", "bare", {"SGD": (entry, bare)})
    write_index(tmp_path, ["0"], environment={})
    text = page.render(summary.load(tmp_path), tmp_path)
    assert '<option value="loss">' in text and '<option value="accuracy">' not in text


def test_all_figures_are_written(result):
    stems = {path.stem for path in result["figures"]}
    assert stems == {
        "comparison",
        "comparison-gradients",
        "aggregate",
        "meta_training",
        "mixture-script-alert-1-script",
    }
    for path in result["figures"]:
        start = {".png": b"\x89PNG", ".pdf": b"%PDF"}[path.suffix]
        assert path.read_bytes().startswith(start)


def test_the_terminal_shows_the_tables_and_the_files(result):
    out = io.StringIO()
    print_summary(result, Console(file=out, width=100))
    output = out.getvalue()
    assert f"{HOSTILE} is the fastest" in " ".join(output.split())
    assert "first quadratic" in output and str(result["page"]) in output
    assert max(len(line) for line in output.splitlines() if "/" not in line) <= 100
