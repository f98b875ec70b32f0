"""What the documentation site needs beside its Markdown: formulas, pages of examples, one SVG.

Formulas are written in docstrings as in optax (``.. math::`` and ``:math:`x```); they become
MathML, which browsers draw without a script. Pages of examples are made from the scripts.
"""

import ast
import re
from pathlib import Path

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


def mathml(formula: str, display: str = "inline") -> str:
    return convert(formula.replace(r"\arg\min", r"\operatorname{argmin}"), display=display)


class BlockFormulas(Preprocessor):
    """A ``.. math::`` block, up to the next empty line, as MathML on a line of its own."""

    def run(self, lines: list[str]) -> list[str]:
        done, rest = [], iter(lines)
        for line in rest:
            start, found, formula = line.partition(".. math::")
            if not found or start.strip():
                done.append(line)
                continue
            parts = [formula]
            for more in rest:
                if not more.strip():
                    break
                parts.append(more)
            drawn = mathml(" ".join(part.strip() for part in parts), display="block")
            done += ["", self.md.htmlStash.store(f'<div class="formula">{drawn}</div>'), ""]
        return done


class InlineFormula(InlineProcessor):
    """``:math:`x``` as MathML within the line."""

    def handleMatch(self, m, data):
        return self.md.htmlStash.store(mathml(m.group(1))), m.start(0), m.end(0)


class Formulas(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(BlockFormulas(md), "block_formulas", 25)
        md.inlinePatterns.register(InlineFormula(r":math:`([^`]+)`", md), "inline_formula", 200)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.markdown_extensions.append(Formulas())  # type: ignore
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for every script of docs/examples, and the list of changes."""
    docs = Path(config.docs_dir)
    for script in sorted((docs / "examples").glob("*.py")):
        page = File.generated(config, f"examples/{script.stem}.md", content=example_page(script))
        files.append(page)
    changes = (docs.parent / "CHANGELOG.md").read_text()
    files.append(File.generated(config, "changelog.md", content=changes))
    return files


def example_page(script: Path) -> str:
    """The script's docstring as text, its code below."""
    source = script.read_text()
    docstring = ast.get_docstring(ast.parse(source)) or ""
    title, _, text = docstring.partition("\n")
    code = source.split('"""', 2)[2].strip()
    link = f"[{script.name}]({script.name}){{ download }}"
    return f"# {title.rstrip('.')}\n{text}\n\nThe file: {link}\n\n```python\n{code}\n```\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to example scripts, which other readers of the Markdown follow, lead to their pages."""
    if page.file.src_uri.startswith("examples/") and page.file.generated_by:
        return markdown
    return re.sub(r"\]\(((?:\.\./)*(?:examples/)?\w+)\.py\)", r"](\1.md)", markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Drawings in SVG stand in the page itself, where they follow its light or dark colours."""

    def inline(match: re.Match) -> str:
        drawing = Path(page.file.abs_src_path or "").parent / match.group(1)
        if not drawing.is_file():
            return match.group(0)
        return f'<div class="drawing">{drawing.read_text()}</div>'

    return re.sub(r'<img [^>]*?src="([^"]+\.svg)"[^>]*>', inline, html)
