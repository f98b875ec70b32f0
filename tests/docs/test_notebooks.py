"""Tutorial pages become notebooks that hold the same code and stand alone."""

import json
import re
from pathlib import Path

import pytest
from notebooks import notebook
from test_pages import blocks

TUTORIALS = sorted((Path(__file__).parents[2] / "docs" / "tutorials").glob("*.md"))

PAGE = """\
# A title

Read [a page](../page.md#part){ .big } or [the web](https://docs.jax.dev), [x] or `a[0](b)`.

![A picture](../images/a.png)

<!-- skip: needs a network, which tests do not have -->
```python
download()
```

<!-- needs: params -->
```python
x = 1

y = 2
```
    pip install .

```python
z = 3
```
"""


def cells_of(page: str, kind: str) -> list[str]:
    cells = json.loads(notebook(page))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def test_a_page_becomes_cells():
    assert cells_of(PAGE, "code") == ["x = 1\n\ny = 2", "z = 3"]
    title, install, text, command = cells_of(PAGE, "markdown")
    assert title == "# A title"
    assert "pip install '.[all]'" in install
    assert text == (
        "Read a page or [the web](https://docs.jax.dev), [x] or `a[0](b)`.\n\n"
        "```python\ndownload()\n```"
    )
    assert command == "    pip install ."


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_is_a_notebook_of_format_4(path):
    page = path.read_text()
    content = json.loads(notebook(page))
    assert notebook(page) == notebook(page)
    # What the JSON schema of nbformat 4.5 requires, and nothing that it does not know.
    assert content.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert content["metadata"]["kernelspec"].keys() == {"name", "display_name", "language"}
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    keys = {"id", "cell_type", "metadata", "source"}
    for cell in content["cells"]:
        is_code = cell["cell_type"] == "code"
        assert cell.keys() == (keys | {"execution_count", "outputs"} if is_code else keys)
        assert is_code or cell["cell_type"] == "markdown"
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"])
        lines = cell["source"]
        assert lines and all(line.endswith("\n") for line in lines[:-1])
        assert not is_code or (cell["execution_count"] is None and cell["outputs"] == [])
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_notebook_has_the_code_that_the_page_runs_and_no_link_into_the_site(path):
    page = path.read_text()
    executed = [block.code.strip("\n") for block in blocks(path) if block.note != "skip"]
    assert cells_of(page, "code") == executed
    text = "\n".join(cells_of(page, "markdown"))
    assert "<!--" not in text
    assert all(target.startswith("https://") for target in re.findall(r"\]\(([^)]*)\)", text))


def test_there_are_tutorials():
    assert len(TUTORIALS) >= 4
