"""The package keeps its shape: imports point down, nothing unsafe is called, and importing it costs little."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lcc_lens"

# A module imports from its own layer or from those above it in this list. "" is the package itself, the facade.
LAYERS: list[tuple[str, ...]] = [
    (
        "errors",
        "heads",
        "headmap",
        "progress",
        "config",
        "files",
        "rewriting",
        "memory",
        "processes",
        "interruption",
        "locking",
        "timeline",
    ),
    (
        "components",
        "statistics",
        "headscores",
        "probes",
        "pair_probes",
        "kernel_probes",
        "metrics",
        "token_losses",
        "pruning.scores",
        "pruning.masks",
        "pruning.obs",
        "pruning.least_squares",
        "pruning.structured",
    ),
    (
        "data",
        "tasks",
        "negatives",
        "embedding",
        "sources",
        "user_files",
        "sequences",
        "machine",
        "models",
        "offloading",
        "references",
        "in_memory",
        "hooked_transformer",
        "copied_maps",
        "pair",
        "readout",
        "head_writer",
        "norm",
        "wiring",
        "embedded",
        "hooks",
        "plain_models",
        "plain_modules",
        "reading_maps",
        "layerwise",
        "sequential",
        "running",
        "retyping",
        "slots",
        "joint_slots",
        "twins",
        "recomputing",
        "kept_states",
        "contrast",
        "prefix",
        "passes",
        "activations",
        "outcome",
        "pruning",
        "pruning.*",
    ),
    (
        "scan",
        "scanned",
        "scan_state",
        "scan_work",
        "scan_request",
        "token_loss",
        "selectors",
        "selectors.*",
        "injections",
        "injections.*",
        "objectives",
        "reuse",
        "restoration",
        "training",
        "session_state",
        "side_by_side",
        "reshaping",
        "train_config",
        "training_state",
        "validation",
        "lr_range",
        "baselines",
        "baselines.*",
    ),
    (
        "",
        "accuracies",
        "answer_scoring",
        "comparison_tables",
        "evaluation",
        "harness",
        "export",
        "folding",
        "gguf_comparison",
        "gguf_export",
        "hub",
        "model_card",
        "drawing",
        "plotting",
        "plotting.*",
        "score_text",
        "bench",
        "compare_config",
        "comparison_data",
        "comparison_file",
        "best",
        "compare",
        "doctor",
        "entries",
        "measures",
        "merging",
        "inference_cost",
        "pruning_jobs",
        "recipe",
        "restore_checks",
        "job_data",
        "run_folder",
        "trained_numbers",
        "session",
        "workbench",
        "lens",
        "lens.*",
        "latency",
        "speed",
        "report",
        "report_text",
        "sidecar",
        "task_recovery",
        "paper_recipes",
        "paper_run",
        "paper_tables",
    ),
    ("cli", "cli.*", "show", "demo", "__main__", "explorer", "explorer.*", "widget", "widget.*"),
]
# What takes seconds to import, or is not needed to say --help.
HEAVY = {"torch", "transformers", "transformer_lens", "plotly", "datasets", "pandas", "sklearn", "lm_eval"}
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def module_name(path: Path, package: Path = PACKAGE) -> str:
    """The dotted name below the package: ``pruning.masks``, ``pruning`` for its ``__init__``, "" for the package."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer_of(module: str) -> int | None:
    """The number of a module's layer: the layer that names it, else the one whose pattern fits; None for neither."""
    for fits in (str.__eq__, fnmatchcase):
        for number, names in enumerate(LAYERS):
            if any(fits(module, name) for name in names):
                return number
    return None


def run_on_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: none in functions, none under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from run_on_import(node)


def imported_modules(source: str, module: str, *, is_package: bool, known: set[str]) -> set[str]:
    """The modules of the package that a module imports, wherever in the file.

    The package itself is the exception: it imports on demand (``__getattr__``), so only what runs at once counts.
    """
    tree = ast.parse(source)
    found: set[str] = set()
    here = ["lcc_lens", *(module.split(".") if module else [])]
    for node in run_on_import(tree) if module == "" else ast.walk(tree):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) + is_package - node.level] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            # `from lcc_lens.pruning import masks` names a module, `from lcc_lens.pruning import prune` does not.
            named = [".".join([*base, alias.name]) for alias in node.names]
            named = [name if name.removeprefix("lcc_lens.") in known else ".".join(base) for name in named]
        else:
            continue
        found |= {name.partition(".")[2] for name in named if name.split(".")[0] == "lcc_lens"}
    return found - {module}


def upward_imports(source: str, module: str, *, is_package: bool, known: set[str]) -> list[str]:
    own = layer_of(module)
    assert own is not None
    imported = imported_modules(source, module, is_package=is_package, known=known)
    layers = {name: layer_of(name) for name in imported}
    return sorted(name or "lcc_lens" for name, layer in layers.items() if layer is not None and layer > own)


def unsafe_calls(source: str) -> list[str]:
    """Lines that could run foreign code on loading, or that assume one kind of device."""
    found = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"line {line}: import {name}" for name in names if name.split(".")[0] in PICKLES]
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                found += [f"line {line}: torch.load" for alias in node.names if alias.name == "load"]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            found.append(f"line {line}: torch.load")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            found.append(f"line {line}: .cuda(")
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and not is_false(node.value):
            found.append(f"line {line}: trust_remote_code")
        elif isinstance(node, ast.Dict):
            pairs = zip(map(is_remote_code, node.keys), node.values, strict=True)
            found += [f"line {line}: trust_remote_code" for named, value in pairs if named and not is_false(value)]
    return found


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def is_remote_code(key: ast.expr | None) -> bool:
    return isinstance(key, ast.Constant) and key.value == "trust_remote_code"


def test_every_module_has_a_layer() -> None:
    strays = [name for name in FILES if layer_of(name) is None]
    assert not strays, f"add {', '.join(strays)} to LAYERS in {Path(__file__).name}"


@pytest.mark.parametrize("module", [name for name in FILES if layer_of(name) is not None])
def test_imports_point_down(module: str) -> None:
    path = FILES[module]
    upward = upward_imports(
        path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py", known=set(FILES)
    )
    assert not upward, f"{module or 'lcc_lens'} (layer {layer_of(module)}) imports {', '.join(upward)} from above it"


@pytest.mark.parametrize("module", FILES)
def test_nothing_unsafe_is_called(module: str) -> None:
    found = unsafe_calls(FILES[module].read_text(encoding="utf-8"))
    assert not found, f"{FILES[module].relative_to(ROOT)}: {'; '.join(found)}"


@pytest.mark.parametrize("module", ["lcc_lens", "lcc_lens.cli"])
def test_import_is_light(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not HEAVY & set(run.stdout.split())


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("components", "from lcc_lens.analysis.scan.scan import scan"),
        ("components", "from lcc_lens import scan"),
        ("components", "from lcc_lens import load_pair"),
        ("components", "import lcc_lens.analysis.scan.scan as s"),
        ("components", "from .scan import scan"),
        ("components", "from . import scan"),
        ("components", "def f():\n    from lcc_lens.analysis.scan.scan import scan"),
        ("pruning.masks", "from ..scan import scan"),
        ("pruning.masks", "from .apply import prune"),
        ("", "from lcc_lens.cli import main"),
    ],
)
def test_an_upward_import_is_found(module: str, source: str) -> None:
    known = {"components", "scan", "cli", "pruning", "pruning.masks", "pruning.apply"}
    assert len(upward_imports(source, module, is_package=module == "", known=known)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("scan", "from lcc_lens.analysis.components import LostComponents\nfrom lcc_lens import files\nimport torch"),
        ("scan", "from lcc_lens.restoration.training.loop import train"),
        ("demo", "import lcc_lens as lcc"),
        ("", "def __getattr__(name):\n    from lcc_lens.cli import main"),
        ("", "if TYPE_CHECKING:\n    from lcc_lens.cli import main"),
    ],
)
def test_a_downward_import_passes(module: str, source: str) -> None:
    known = {"components", "scan", "files", "training", "cli", "demo"}
    assert upward_imports(source, module, is_package=module == "", known=known) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import load",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "model.cuda()",
        "f(x, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
    ],
)
def test_an_unsafe_call_is_found(source: str) -> None:
    assert len(unsafe_calls(source)) == 1
    assert unsafe_calls("f(x, trust_remote_code=False)\nprint('a pickle, torch.load')") == []
