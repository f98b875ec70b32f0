"""Docstrings as Markdown for the site's API pages.

Ours are Google-style with two habits that parsers of that style do not know: several names that
share a line (``n_t, n_c: ...``), and sections that begin on the line of their title.
"""

import re
from collections.abc import Iterator
from typing import Any

import griffe

TITLES = {
    "Args": "Arguments",
    "Attributes": "Attributes",
    "Returns": "Returns",
    "Yields": "Yields",
    "Raises": "Raises",
    "Notes": "Notes",
    "References": "References",
}
LISTS = ("Args", "Attributes", "Raises")
SECTION = re.compile(rf"^({'|'.join(TITLES)}):\s*(.*)$")
ENTRY = re.compile(r"^ {1,4}(\*{0,2}\w+(?:, \*{0,2}\w+)*): (.*)$")


class MarkdownDocstrings(griffe.Extension):
    """Rewrites every docstring as it is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = "\n".join(markdown(obj.docstring.value.splitlines(), obj))


def markdown(lines: list[str], obj: griffe.Object) -> Iterator[str]:
    """The docstring's lines with its sections as titles, lists and paragraphs."""
    section = ""
    for line in lines:
        if match := SECTION.match(line):
            section, first = match.groups()
            yield from ("", f"**{TITLES[section]}**", "")
            if ENTRY.match(f"  {first}"):
                yield from _entry(f"  {first}", section, obj)
            elif first:
                yield first
        elif section and line and not line.startswith(" "):
            section = ""
            yield from ("", line)
        elif section in LISTS and ENTRY.match(line):
            yield from _entry(line, section, obj)
        elif section:
            yield ("    " if section in LISTS else "") + line.strip()
        else:
            yield line


def _entry(line: str, section: str, obj: griffe.Object) -> Iterator[str]:
    names, text = ENTRY.match(line).groups()  # type: ignore[union-attr]
    quoted = []
    for name in names.split(", "):
        found = obj.members.get(name) if section == "Attributes" else None
        annotation = getattr(found, "annotation", None)
        quoted.append(f"`{name}`" + (f" (`{annotation}`)" if annotation else ""))
    yield f"- {', '.join(quoted)}: {text}"
