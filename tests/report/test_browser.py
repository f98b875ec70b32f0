"""The page in a browser: no errors, no network, controls, small screens, dark mode."""

import io
import shutil

import numpy as np
import pytest
from evaluations import HOSTILE
from PIL import Image

from metaopt.report import looks, page, summary

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium on the PATH")

WILD = looks.COLOURS[3]  # the only orange curve
GUARDED = looks.COLOURS[4]  # the only guard; it lies over its learned optimizer


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def path(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "report.html"
    out.write_text(page.render(summary.load(folder), folder))
    return out


@pytest.fixture
def visit(browser, path):
    """Opens the page; the test fails on an error, a warning, a dialog or a request."""
    problems, contexts = [], []

    def go(width=1000, height=800, colour_scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=colour_scheme, offline=True
        )
        context.set_default_timeout(120_000)  # milliseconds, for machines under load
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda m: problems.append(m.text) if m.type in PROBLEMS else None)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("dialog", lambda dialog: problems.append("a name ran as a script"))
        tab.on("request", lambda r: None if r.url == path.as_uri() else problems.append(r.url))
        tab.goto(path.as_uri())
        tab.locator("#task-1").scroll_into_view_if_needed()
        tab.wait_for_selector("#chart-0[data-drawn]")
        return tab

    yield go
    for context in contexts:
        context.close()
    assert problems == []


PROBLEMS = ("error", "warning")


def pixels(tab, selector: str = "#chart-0") -> np.ndarray:
    """A screenshot of an element, ``[H, W, 3]``, taken after the plot has been painted."""
    tab.evaluate("() => new Promise((done) => setTimeout(() => requestAnimationFrame(done), 150))")
    image = Image.open(io.BytesIO(tab.locator(selector).screenshot())).convert("RGB")
    return np.asarray(image, np.int64)


def count(image: np.ndarray, colour: str) -> int:
    """Number of pixels of a colour."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(image - wanted).max(axis=-1) <= 8).sum())


def brightness(image: np.ndarray) -> float:
    return float(np.median(image))


def axis(tab, place: str, row: int = 0) -> str:
    """The label of the visible axis."""
    script = f"drawn.get(0).at({row}).{place}.find((axis) => axis.visible).axis_label"
    return tab.evaluate(script)


def test_a_click_on_the_legend_hides_a_curve(visit):
    tab = visit()
    visible = count(pixels(tab), WILD)
    assert visible > 50
    for colour in (looks.COLOURS[0], GUARDED):
        assert count(pixels(tab), colour) > 50
    key = tab.locator("#task-1 .legend button", has_text="Wild").first
    key.click()
    assert count(pixels(tab), WILD) == 0
    assert key.get_attribute("aria-pressed") == "false"
    key.click()
    assert count(pixels(tab), WILD) == visible


def test_a_double_click_on_the_legend_leaves_one_curve(visit):
    tab = visit()
    key = tab.locator("#task-1 .legend button", has_text="Wild").first
    key.dblclick()
    alone = pixels(tab)
    assert count(alone, WILD) > 50 and count(alone, GUARDED) == 0
    key.dblclick()
    assert count(pixels(tab), GUARDED) > 50


def test_the_x_axis_can_be_chosen(visit):
    tab = visit()
    assert axis(tab, "below", -1) == "optimizer steps"
    before = pixels(tab)
    tab.select_option("[name=x]", "grad_evals")
    assert axis(tab, "below", -1) == "gradient evaluations"
    end = tab.evaluate("drawn.get(0)[0].x_range.end")
    assert 120 <= end <= 125  # the guard pays two gradients for each of 60 steps
    assert (pixels(tab) != before).any()
    tab.select_option("[name=x]", "seconds")
    assert axis(tab, "below", -1) == "seconds"
    tab.check("[name=logx]")
    assert tab.evaluate("drawn.get(0)[0].x_scale.type") == "LogScale"
    assert 0 < tab.evaluate("drawn.get(0)[0].x_range.start") <= 5e-4  # the first measurement


def test_loss_or_accuracy_logarithmic_or_not(visit):
    tab = visit()
    assert axis(tab, "left") == "test loss"
    assert tab.evaluate("drawn.get(0)[0].y_scale.type") == "LogScale"
    tab.select_option("[name=y]", "accuracy")
    assert axis(tab, "left") == "test accuracy"
    assert tab.evaluate("drawn.get(0)[0].y_scale.type") == "LinearScale"
    assert tab.evaluate("drawn.get(0)[0].y_range.end") <= 1.05
    tab.select_option("[name=y]", "loss")
    tab.uncheck("[name=logy]")
    assert tab.evaluate("drawn.get(0)[0].y_scale.type") == "LinearScale"


def test_bands_can_be_chosen_and_hidden(visit):
    tab = visit()
    interval = pixels(tab)
    tab.select_option("[name=band]", "range")
    extent = pixels(tab)
    tab.select_option("[name=band]", "off")
    off = pixels(tab)
    white = lambda image: int((image.min(axis=-1) > 250).sum())
    assert white(extent) < white(interval) < white(off)  # the range is wider than the interval


def test_pointing_at_a_curve_shows_its_values(visit):
    tab = visit()
    box = tab.locator("#chart-0").bounding_box()
    text = ""
    for y in range(30, 330, 6):
        tab.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + y)
        tooltip = tab.locator(".bk-tooltip-content")
        if tooltip.count() and HOSTILE in tooltip.first.inner_text():
            text = tooltip.first.inner_text()
            break
    for word in ("optimizer steps", "gradient evaluations", "test loss", "95% CI", "min – max"):
        assert word in text


def test_a_folded_chart_is_drawn_when_it_is_opened(visit):
    tab = visit()
    drawn = lambda: tab.locator("[data-drawn]").count()
    before = drawn()
    tab.locator("details summary").first.click()
    tab.locator("[data-drawn]").nth(before).wait_for(state="attached")
    chart = tab.locator("details [data-drawn]").first.get_attribute("id")
    assert count(pixels(tab, f"#{chart}"), looks.COLOURS[0]) > 20


@pytest.mark.parametrize("width", [400, 1000])
def test_nothing_is_wider_than_the_screen(visit, width):
    tab = visit(width=width)
    tab.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    tab.evaluate("Promise.all(boxes.map(draw))")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.locator("#chart-0").bounding_box()["width"] > (0.85 * width if width < 1000 else 0)
    assert count(pixels(tab), WILD) > 20


def test_dark_mode_is_dark_in_the_plots_too(visit):
    tab = visit(colour_scheme="dark")
    assert brightness(pixels(tab, "header")) < 50 and brightness(pixels(tab)) < 50
    assert count(pixels(tab), "#E8EAED") > 50  # Adam's curve is black on white, white on black
    tab.emulate_media(color_scheme="light")
    tab.wait_for_selector("#chart-0[data-drawn]")
    assert brightness(pixels(tab, "header")) > 200 and brightness(pixels(tab)) > 200
    assert count(pixels(tab), "#E8EAED") < count(pixels(tab), "#FFFFFF")
