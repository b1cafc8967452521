"""Writes docs/paper_tables.md: the paper's figures beside ours, from recipes/ and benchmarks/paper/.

    python benchmarks/paper_tables.py

``benchmarks/paper/NAME.json`` is the ``results.json`` that ``lcc-lens recipe recipes/NAME.json`` wrote.
"""

from __future__ import annotations

from pathlib import Path

from lcc_lens.core.reading import read_json
from lcc_lens.evaluation.paper.recipes import read_recipe
from lcc_lens.evaluation.paper.tables import paper_page

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "paper_tables.md"
ORDER = (
    "unstructured50", "unstructured50_mse_heads", "unstructured50_kl_heads", "semi_structured24", "structured20",
    "tasks_unstructured60", "tasks_structured40",
)  # fmt: skip


def page() -> str:
    """The page as it should be."""
    files = {name: ROOT / "benchmarks" / "paper" / f"{name}.json" for name in ORDER}
    results = {name: read_json(file) for name, file in files.items() if file.exists()}
    return paper_page({name: read_recipe(ROOT / "recipes" / f"{name}.json") for name in ORDER}, results)


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
