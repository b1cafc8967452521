"""Writes docs/paper_tables.md: the paper's figures beside ours, from recipes/ and benchmarks/paper/.

    python benchmarks/paper_tables.py

``benchmarks/paper/NAME.json`` is the ``results.json`` that ``lcc-lens recipe recipes/NAME.json`` wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lcc_lens.core.reading import read_json
from lcc_lens.evaluation.paper.recipes import PaperRecipe, read_recipe
from lcc_lens.evaluation.paper.tables import Results, recipe_table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "paper_tables.md"
ORDER = (
    "unstructured50", "unstructured50_mse_heads", "unstructured50_kl_heads", "semi_structured24", "structured20",
    "tasks_unstructured60", "tasks_structured40",
)  # fmt: skip

_HEAD = """# The paper's tables

Feng et al., *Restoring Pruned Large Language Models via Lost Component Compensation* (arXiv 2510.21834), Tables 1
and 3. The paper's figures stand beside ours; a row without the paper's is a control or a method that it does not have.
Written by `python benchmarks/paper_tables.py` from `recipes/` and, once they are there, from `benchmarks/paper/`.

**None of these recipes has been run at size** unless its table says so: each was tried in full on a tiny random model
of the same family only, which shows that every step runs and nothing more.

On one H100 with access to the hub; the same command goes on where it stopped:

```
lcc-lens recipe recipes/{first}.json --out runs/{first}
```

Every step on a tiny model, with next to no data:

```
lcc-lens recipe recipes/{first}.json --out runs/dry --dry-run path/to/tiny-llama
```
"""


def paper_page(recipes: Mapping[str, PaperRecipe], results: Mapping[str, Results]) -> str:
    """All recipes' tables as one page; results of dry runs count as none.

    Args:
        results: those of :func:`~lcc_lens.evaluation.paper.run.run_recipe`, by the same names.
    """
    tables = []
    for name, recipe in recipes.items():
        result = results.get(name)
        tables.append(recipe_table(recipe, None if result is None or result["dry_run"] else result))
    return "\n".join([_HEAD.format(first=next(iter(recipes))), *tables])


def page() -> str:
    """The page as it should be."""
    files = {name: ROOT / "benchmarks" / "paper" / f"{name}.json" for name in ORDER}
    results = {name: read_json(file) for name, file in files.items() if file.exists()}
    return paper_page({name: read_recipe(ROOT / "recipes" / f"{name}.json") for name in ORDER}, results)


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
