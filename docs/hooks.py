"""Site hooks: pages and figures from the rest of the repository, and equations as MathML.

The README is the first page and the figures are the committed ones; nothing is copied. Equations become MathML when
the site is built, which browsers render without a script or a network.
"""

from __future__ import annotations

import html
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
_MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_TAG = re.compile(r"\\tag\{(\d+)\}")
_ROLE = re.compile(r":(?:class|func|meth|data|mod|attr):<code>~?([^<]*)</code>")


def on_files(files: Files, config: Any) -> Files:
    """Add the repository's pages and figures to the site."""
    for address, path in PAGES.items():
        files.append(File.generated(config, address, abs_src_path=str(ROOT / path)))
    for picture in sorted((ROOT / "figures").glob("*.png")):
        files.append(File.generated(config, f"figures/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **context: Any) -> str:
    """Rewrite the repository's links for the site, whose root is ``docs/``."""
    if page.file.src_uri == "index.md":
        return markdown.replace("](docs/", "](").replace('src="docs/', 'src="')
    depth = page.file.src_uri.count("/")
    return _OUTSIDE.sub("](" + "../" * depth, markdown)


def on_page_content(content: str, **context: Any) -> str:
    """Convert equations to MathML, and Sphinx roles to plain code."""
    return _ROLE.sub(lambda match: f"<code>{match[1].rsplit('.', 1)[-1]}</code>", _MATH.sub(_mathml, content))


def _mathml(match: re.Match[str]) -> str:
    equation = _TAG.sub(r"\\qquad\\text{(\1)}", html.unescape(match[3]).strip())  # space before the equation number
    return convert(equation, display="block" if match[2] == "[" else "inline")
