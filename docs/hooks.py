"""What the site takes from elsewhere in the repository, and equations that need no script.

The README is the first page, and the figures are the committed ones: nothing is copied. Equations become MathML while
the site is built, which browsers draw themselves: the pages need neither a network nor a script for them.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
#: By address on the site: the file that it shows.
PAGES = {
    "index.md": "README.md", "ARCHITECTURE.md": "ARCHITECTURE.md", "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}  # fmt: skip
#: The way out of ``docs/`` to a page or picture that lies in the site's root.
_OUTSIDE = re.compile(r"\]\((?:\.\./)+(?=figures/|ARCHITECTURE|CONTRIBUTING|CHANGELOG)")
_MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_TAG = re.compile(r"\\tag\{(\d+)\}")
_ROLE = re.compile(r":(?:class|func|meth|data|mod|attr):<code>~?([^<]*)</code>")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures of the repository."""
    for address, path in PAGES.items():
        files.append(File.generated(config, address, abs_src_path=str(ROOT / path)))
    for picture in sorted((ROOT / "figures").glob("*.png")):
        files.append(File.generated(config, f"figures/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **context: Any) -> str:
    """Lead links of the repository to where they lie on the site, whose root is ``docs/``."""
    if page.file.src_uri == "index.md":
        return markdown.replace("](docs/", "](").replace('src="docs/', 'src="')
    depth = page.file.src_uri.count("/")
    return _OUTSIDE.sub("](" + "../" * depth, markdown)


def on_page_content(content: str, **context: Any) -> str:
    """Draw equations, and write the roles of docstrings as plain code."""
    return _ROLE.sub(lambda found: f"<code>{found[1].rsplit('.', 1)[-1]}</code>", _MATH.sub(_mathml, content))


def _mathml(found: re.Match[str]) -> str:
    equation = _TAG.sub(r"\\qquad\\text{(\1)}", html.unescape(found[3]).strip())  # numbers keep their distance
    return convert(equation, display="block" if found[2] == "[" else "inline")
