"""Site hooks: pages, notebooks and figures from the rest of the repository, and equations as MathML.

The README is the first page, and the notebooks and figures are the committed ones; nothing is copied or executed.
Equations become MathML when the site is built, which browsers render without a script or a network.
"""

from __future__ import annotations

import base64
import html
import json
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
#: File of every page from outside docs/, by its address on the site.
PAGES = {
    "index.md": "README.md", "ARCHITECTURE.md": "ARCHITECTURE.md", "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}  # fmt: skip
#: A relative link out of ``docs/`` to a page or figure at the root of the site.
_OUTSIDE = re.compile(r"\]\((?:\.\./)+(?=figures/|ARCHITECTURE|CONTRIBUTING|CHANGELOG)")
_BADGE = re.compile(r"\[!\[([^\]]+)\]\(https?:[^)]+\)\]")
_WORKER = "https://unpkg.com/iframe-worker/shim"
_STYLE = re.compile(r"<style scoped>.*?</style>", re.DOTALL)
_MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_TAG = re.compile(r"\\tag\{(\d+)\}")
_ROLE = re.compile(r":(?:class|func|meth|data|mod|attr):<code>~?([^<]*)</code>")


def on_files(files: Files, config: Any) -> Files:
    """Add the repository's pages and figures to the site."""
    for address, path in PAGES.items():
        files.append(File.generated(config, address, abs_src_path=str(ROOT / path)))
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        markdown, pictures = notebook_page(json.loads(notebook.read_text(encoding="utf-8")), notebook.stem)
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=markdown))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    for picture in sorted((ROOT / "figures").glob("*.png")):
        files.append(File.generated(config, f"figures/{picture.name}", abs_src_path=str(picture)))
    return files


def notebook_page(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown with the outputs it was saved with, and its pictures by file name."""
    parts, pictures = [], dict[str, bytes]()
    for cell in notebook["cells"]:
        if cell["id"] == "install":  # what Colab needs says nothing to a reader
            continue
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                picture = f"{name}_{len(pictures) + 1}.png"
                pictures[picture] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![Figure {len(pictures)} of the notebook]({picture})")
            elif "text/markdown" in data:
                parts.append("".join(data["text/markdown"]))
            elif "text/html" in data:
                parts.append(_STYLE.sub("", "".join(data["text/html"])))
            else:
                parts.append(f"```text\n{''.join(data['text/plain']).rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures


def on_page_markdown(markdown: str, page: Any, **context: Any) -> str:
    """Rewrite the repository's links for the site, whose root is ``docs/``; a badge becomes text and is not fetched."""
    markdown = _BADGE.sub(r"[\1]", markdown)
    if page.file.src_uri == "index.md":
        return markdown.replace("](docs/", "](").replace('src="docs/', 'src="')
    depth = page.file.src_uri.count("/")
    return _OUTSIDE.sub("](" + "../" * depth, markdown)


def on_page_content(content: str, **context: Any) -> str:
    """Convert equations to MathML, and Sphinx roles to plain code."""
    return _ROLE.sub(lambda match: f"<code>{match[1].rsplit('.', 1)[-1]}</code>", _MATH.sub(_mathml, content))


def on_post_page(output: str, page: Any, **context: Any) -> str:
    """Take the search's stand-in for workers from the site itself: opened from disk, it fetches nothing."""
    return output.replace(_WORKER, "../" * page.file.src_uri.count("/") + "frame_worker.js")


def on_post_template(output_content: str, template_name: str, config: Any) -> str:
    """The same in pages of the theme."""
    return output_content.replace(_WORKER, "frame_worker.js")


def _mathml(match: re.Match[str]) -> str:
    equation = _TAG.sub(r"\\qquad\\text{(\1)}", html.unescape(match[3]).strip())  # space before the equation number
    return convert(equation, display="block" if match[2] == "[" else "inline")
