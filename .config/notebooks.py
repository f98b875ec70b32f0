"""Tutorial pages as Jupyter notebooks: Markdown in, the JSON of nbformat 4 out.

A page is the only source. Its ``python`` blocks become code cells, what lies between them becomes
Markdown cells. Blocks that the tests leave out (``<!-- skip: ... -->``) stay Markdown, as do shell
commands. A notebook is read away from the site, so links to other pages become their text, and
pictures go: the code draws them.
"""

import json
import re

BLOCK = re.compile(
    r"(?:^<!-- (?P<note>[^\n]*?) -->\n)?^```python\n(?P<code>.*?)^```$\n?", re.M | re.S
)
PICTURE = re.compile(r"^!\[[^\]]*\]\([^)]*\)(?:\{[^}]*\})?\n?", re.M)
LINK = re.compile(r"(?<![\w`])\[([^\]]+)\]\((?!https?://)[^)]*\)(?:\{[^}]*\})?")
COMMENT = re.compile(r"^<!--.*?-->\n?", re.M | re.S)
INSTALL = """\
This notebook needs metaopt with all extras, which is installed from a copy of its repository:

    pip install '.[all]'
"""


def notebook(page: str) -> str:
    """The notebook of a page, as JSON that depends on nothing but the page.

    Args:
      page: the Markdown of the page.

    Returns:
      The text of an ``.ipynb`` file of nbformat 4.5.
    """
    cells, end = [], 0
    for block in BLOCK.finditer(page):
        text = page[end : block.start()]
        end = block.end()
        if (block["note"] or "").startswith("skip:"):
            cells.append(_markdown(f"{_readable(text)}\n\n```python\n{block['code']}```"))
        else:
            cells += [_markdown(_readable(text)), _code(block["code"])]
    cells.append(_markdown(_readable(page[end:])))
    title, _, rest = "".join(cells[0]["source"]).partition("\n")
    cells[:1] = [_markdown(title), _markdown(INSTALL), _markdown(rest)]
    cells = [cell for cell in cells if cell["source"]]
    content = {
        "cells": [{"id": f"cell-{number}", **cell} for number, cell in enumerate(cells)],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _readable(text: str) -> str:
    """Markdown that stands alone: no comments, no pictures, no links to other pages."""
    text = LINK.sub(r"\1", PICTURE.sub("", COMMENT.sub("", text)))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def _markdown(text: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": _lines(text)}


def _code(code: str) -> dict:
    empty = {"execution_count": None, "metadata": {}, "outputs": []}
    return {"cell_type": "code", **empty, "source": _lines(code)}


def _lines(text: str) -> list[str]:
    return text.strip("\n").splitlines(keepends=True)
