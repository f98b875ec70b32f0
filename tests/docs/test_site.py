"""The site builds without warnings, from this folder alone, and its API pages are complete."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from notebooks import notebook

import metaopt
from metaopt import datasets, guards, meta, optimizers, tasks
from metaopt.tasks import networks

ROOT = Path(__file__).parents[2]
API = ROOT / "docs" / "api"


class Resources(HTMLParser):
    """What a page loads without being asked."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag in ("img", "script", "iframe", "source", "video"):
            self.found.append(given.get("src") or "")
        elif tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.found.append(given.get("href") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    # Not --quiet, which hides warnings from --strict too.
    command = (sys.executable, "-m", "mkdocs", "build", "--strict")
    done = subprocess.run(
        [*command, "-f", str(ROOT / ".config" / "mkdocs.yml"), "-d", str(folder)],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_no_page_loads_anything_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        resources = Resources()
        resources.feed(page.read_text())
        assert resources.found
        for address in resources.found:
            assert not re.match(r"(\w+:)?//", address), (page, address)
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//", sheet.read_text()), sheet


def test_formulas_of_docstrings_are_drawn(site):
    for page in (site / "api").glob("*.html"):
        text = page.read_text()
        assert ":math:" not in text and ".. math::" not in text, page
        for formula in re.findall(r"<math.*?</math>", text, re.S):
            assert "\\" not in formula, (page, formula)  # a command that was not understood
    assert "<math" in (site / "api" / "guards.html").read_text()


def test_every_example_has_a_page(site):
    for script in (ROOT / "docs" / "examples").glob("*.py"):
        page = (site / "examples" / f"{script.stem}.html").read_text()
        assert "def main" in re.sub(r"<[^>]+>", "", page)


def test_every_tutorial_links_to_its_notebook(site):
    for page in (ROOT / "docs" / "tutorials").glob("*.md"):
        built = site / "tutorials" / page.stem
        assert f'href="{page.stem}.ipynb"' in built.with_suffix(".html").read_text()
        assert built.with_suffix(".ipynb").read_text() == notebook(page.read_text())


PACKAGES = [metaopt, guards, optimizers, meta, tasks, networks, datasets]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_public_name_is_on_an_api_page(package):
    source = Path(package.__file__).read_text()
    names = re.findall(r"^ *from \S+ import \w+ as (\w+)", source, re.M)  # also for type checkers
    public = {name for name in names if not name.startswith("_")}
    pages = "".join(page.read_text() for page in API.glob("*.md"))
    documented = set(re.findall(r"^::: \S*?\b(\w+)$", pages, re.M))
    missing = public - documented - {path.stem for path in API.glob("*.md")}
    assert not missing


def test_signatures_and_arguments_are_on_the_pages(site):
    text = re.sub(r"<[^>]+>", "", (site / "api" / "guards.html").read_text())
    assert "patience: int = " in text
    assert "Parameters" in text and "Args:" not in text
