"""Hooks of the documentation site's build.

- Formulas in docstrings are written as in optax (``.. math::`` and ``:math:`x```). They become
  MathML, which browsers draw without a script.
- The figures of docs/results are not in the repository. The build draws them from the records.
- Each script of docs/examples becomes a page. CHANGELOG.md and CONTRIBUTING.md, which lie at the
  root of the repository, become pages too.
- Each page of docs/tutorials is also a Jupyter notebook, which the page links to.
- SVG drawings become part of the page, so that they follow its light or dark colours.
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
from notebooks import notebook

ROOT = Path(__file__).parents[1]
FIGURE = re.compile(r"\]\(([\w/-]+)/figures/([\w-]+)\.png\)")


def mathml(formula: str, display: str = "inline") -> str:
    return convert(formula.replace(r"\arg\min", r"\operatorname{argmin}"), display=display)


class BlockFormulas(Preprocessor):
    """Replaces a ``.. math::`` block, which ends at the next empty line, by one line of MathML."""

    def run(self, lines: list[str]) -> list[str]:
        output, remaining = [], iter(lines)
        for line in remaining:
            indent, directive, formula = line.partition(".. math::")
            if not directive or indent.strip():
                output.append(line)
                continue
            parts = [formula]
            for part in remaining:
                if not part.strip():
                    break
                parts.append(part)
            markup = mathml(" ".join(part.strip() for part in parts), display="block")
            output += ["", self.md.htmlStash.store(f'<div class="formula">{markup}</div>'), ""]
        return output


class InlineFormula(InlineProcessor):
    """Replaces ``:math:`x``` by MathML within the line."""

    def handleMatch(self, m, data):
        return self.md.htmlStash.store(mathml(m.group(1))), m.start(0), m.end(0)


class Formulas(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(BlockFormulas(md), "block_formulas", 25)
        md.inlinePatterns.register(InlineFormula(r":math:`([^`]+)`", md), "inline_formula", 200)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.markdown_extensions.append(Formulas())  # type: ignore
    return config


def on_pre_build(config: MkDocsConfig) -> None:
    """Draws the figures that docs/results/README.md shows."""
    draw_figures(Path(config.docs_dir) / "results", lock=ROOT / "build" / "figures.lock")


def draw_figures(results: Path, lock: Path) -> None:
    """Draws the figures of the page `results`/README.md that are older than their records.

    Args:
      results: a folder with one evaluation per subfolder.
      lock: two builds at the same time draw one after the other; the second finds all figures.
    """
    from metaopt.core.files import one_at_a_time
    from metaopt.report import figures, summary

    shown: dict[Path, list[str]] = {}
    for folder, name in FIGURE.findall((results / "README.md").read_text()):
        shown.setdefault(results / folder, []).append(name)
    with one_at_a_time(lock):
        for folder, names in shown.items():
            records = [*folder.rglob("*.json"), *folder.rglob("*.npz")]
            newest = max(path.stat().st_mtime for path in records)
            paths = {name: folder / "figures" / name for name in names}
            old = [name for name in names if _modified(paths[name].with_suffix(".png")) < newest]
            drawings = figures.drawings(summary.load(folder)) if old else {}
            for name in old:
                figures.save(drawings[name](), paths[name], formats=["png"])


def _modified(path: Path) -> float:
    return path.stat().st_mtime if path.is_file() else 0.0


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds pages for scripts of docs/examples, CHANGELOG.md, CONTRIBUTING.md, and the notebooks."""
    for script in sorted((ROOT / "docs" / "examples").glob("*.py")):
        page = File.generated(config, f"examples/{script.stem}.md", content=example_page(script))
        files.append(page)
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        text = root_page((ROOT / name).read_text())
        files.append(File.generated(config, name.lower(), content=text))
    for page in sorted((ROOT / "docs" / "tutorials").glob("*.md")):
        content = notebook(page.read_text())
        name = f"tutorials/{page.stem}.ipynb"
        files.append(File.generated(config, name, content=content))
    return files


def root_page(text: str) -> str:
    """A page of the repository's root as a page of docs: links into docs/ become relative to it."""
    return text.replace("](docs/", "](")


def example_page(script: Path) -> str:
    """The script's docstring as text, and its code below."""
    source = script.read_text()
    docstring = ast.get_docstring(ast.parse(source)) or ""
    title, _, text = docstring.partition("\n")
    code = source.split('"""', 2)[2].strip()
    link = f"[{script.name}]({script.name}){{ download }}"
    return f"# {title.rstrip('.')}\n{text}\n\nThe file: {link}\n\n```python\n{code}\n```\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Directs links to example scripts and to pages of the root to their pages on the site."""
    if page.file.src_uri.startswith("examples/") and page.file.generated_by:
        return markdown  # its link is the download of the script
    if page.file.src_uri.startswith("tutorials/"):
        markdown = with_download(markdown, page.file.name)
    markdown = re.sub(r"\]\(((?:\.\./)*(?:examples/)?\w+)\.py\)", r"](\1.md)", markdown)
    from_root = r"\]\(((?:\.\./)*)\.\./(CHANGELOG|CONTRIBUTING)\.md"
    return re.sub(from_root, lambda match: f"]({match[1]}{match[2].lower()}.md", markdown)


def with_download(tutorial: str, name: str) -> str:
    """The page of a tutorial with a link to its notebook below the title.

    The link is not in the page itself, since the notebook is not in the repository.
    """
    title, _, rest = tutorial.lstrip().partition("\n")
    return f"{title}\n\n[Download as a notebook]({name}.ipynb){{ download }}\n{rest}"


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts SVG drawings into the page itself."""

    def inline(match: re.Match) -> str:
        drawing = Path(page.file.abs_src_path or "").parent / match.group(1)
        if not drawing.is_file():
            return match.group(0)
        return f'<div class="drawing">{drawing.read_text()}</div>'

    return re.sub(r'<img [^>]*?src="([^"]+\.svg)"[^>]*>', inline, html)
