"""The package keeps its shape: imports point down, nothing unsafe is called, and importing it costs little."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.places import ROOT

PACKAGE = ROOT / "lcc_lens"

# The rooms, in the order of the data. A module imports from its own room and from rooms on earlier floors.
FLOORS: list[tuple[str, ...]] = [
    ("core",),
    ("data",),
    ("models",),
    ("pruning", "analysis"),
    ("restoration",),
    ("prompting", "exporters", "evaluation"),
    ("frontends",),
    ("", "__main__"),  # the package itself, which imports on demand, and the command
]
MAX_MODULES_IN_A_FOLDER, MAX_ENTRIES, MAX_LINES_OF_A_MODULE, MAX_LINES_OF_A_FUNCTION = 16, 13, 300, 60
# What takes seconds to import, or is not needed to say --help.
HEAVY = {"torch", "transformers", "transformer_lens", "plotly", "datasets", "pandas", "sklearn", "lm_eval"}
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def module_name(path: Path, package: Path = PACKAGE) -> str:
    """The dotted name below the package: ``pruning.masks``, ``pruning`` for its ``__init__``, "" for the package."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in FILES.items()}
parse = functools.cache(ast.parse)


def is_package(module: str) -> bool:
    return FILES[module].name == "__init__.py"


def room_of(module: str) -> str:
    """The room that a module stands in; "" for the package itself."""
    return module.partition(".")[0]


def floor_of(room: str) -> int | None:
    """The number of a room's floor, from 0; None where the list does not name the room."""
    return next((number for number, rooms in enumerate(FLOORS) if room in rooms), None)


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
    tree = parse(source)
    found: set[str] = set()
    here = ["lcc_lens", *(module.split(".") if module else [])]
    for node in run_on_import(tree) if module == "" else ast.walk(tree):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) + is_package - node.level] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            # `from lcc_lens.core import files` names a module, `from lcc_lens.core.files import read_json` does not.
            named = [".".join([*base, alias.name]) for alias in node.names]
            named = [name if name.removeprefix("lcc_lens.") in known else ".".join(base) for name in named]
        else:
            continue
        found |= {name.partition(".")[2] for name in named if name.split(".")[0] == "lcc_lens"}
    return found - {module}


def upward_imports(source: str, module: str, *, is_package: bool, known: set[str]) -> list[str]:
    """What a module imports from another room that does not stand on an earlier floor."""
    room, floor = room_of(module), floor_of(room_of(module))
    assert floor is not None
    imported = imported_modules(source, module, is_package=is_package, known=known)
    floors = {name: floor_of(room_of(name)) for name in imported if room_of(name) != room}
    return sorted(name or "lcc_lens" for name, other in floors.items() if other is not None and other >= floor)


def find_cycle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first one repeated at the end; empty if there are none."""
    finished: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in finished:
            return []
        for other in sorted(imports.get(module, ())):
            if cycle := visit(other, [*path, module]):
                return cycle
        finished.add(module)
        return []

    return next((cycle for module in sorted(imports) if (cycle := visit(module, []))), [])


def unsafe_calls(source: str) -> list[str]:
    """Lines that could run foreign code on loading, or that assume one kind of device."""
    found = []
    for node in ast.walk(parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"line {line}: import {name}" for name in names if name.split(".")[0] in PICKLES]
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                found += [f"line {line}: torch.load" for alias in node.names if alias.name == "load"]
        elif isinstance(node, ast.Attribute) and node.attr == "load" and ast.unparse(node) == "torch.load":
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


def test_every_room_has_a_floor() -> None:
    strays = {room_of(name) for name in FILES if floor_of(room_of(name)) is None}
    assert not strays, f"add {', '.join(sorted(strays))} to FLOORS in {Path(__file__).name}"


def test_imports_point_down() -> None:
    upward = {
        name or "lcc_lens": found
        for name, text in TEXTS.items()
        if (found := upward_imports(text, name, is_package=is_package(name), known=set(FILES)))
    }
    assert not upward


def test_no_modules_import_each_other_in_a_circle() -> None:
    imports = {
        name: imported_modules(text, name, is_package=is_package(name), known=set(FILES))
        for name, text in TEXTS.items()
    }
    assert find_cycle(imports) == []


def test_a_circle_of_imports_is_found() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_house_stays_small_enough_to_see() -> None:
    folders = {path.parent for path in FILES.values()} - {PACKAGE}
    modules = {folder: [p for p in folder.glob("*.py") if p.name != "__init__.py"] for folder in folders}
    crowded = [folder.name for folder, files in modules.items() if len(files) > MAX_MODULES_IN_A_FOLDER]
    assert not crowded, f"more than {MAX_MODULES_IN_A_FOLDER} modules in {', '.join(crowded)}"
    entries = [entry.name for entry in PACKAGE.iterdir() if entry.name != "__pycache__"]
    assert len(entries) <= MAX_ENTRIES, f"more than {MAX_ENTRIES} entries in lcc_lens: {', '.join(sorted(entries))}"


def test_modules_and_functions_fit_on_a_screen_or_two() -> None:
    long = [name for name, text in TEXTS.items() if text.count("\n") > MAX_LINES_OF_A_MODULE]
    assert not long, f"more than {MAX_LINES_OF_A_MODULE} lines in {', '.join(long)}"
    functions = {
        f"{name}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name, text in TEXTS.items()
        for node in ast.walk(parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    long = [name for name, lines in functions.items() if lines > MAX_LINES_OF_A_FUNCTION]
    assert not long, f"more than {MAX_LINES_OF_A_FUNCTION} lines in {', '.join(long)}"


def test_a_folder_opens_with_what_it_is_for_and_imports_nothing() -> None:
    for name, path in FILES.items():
        if path.name == "__init__.py" and name:
            tree = parse(TEXTS[name])
            assert ast.get_docstring(tree), f"{name} does not say what it is for"
            eager = [node for node in run_on_import(tree) if isinstance(node, ast.ImportFrom | ast.Import)]
            modules = {getattr(node, "module", "") or "" for node in eager}
            assert not any(module.startswith("lcc_lens") for module in modules), f"{name} imports when it is opened"


def test_nothing_unsafe_is_called() -> None:
    unsafe = {name: found for name, text in TEXTS.items() if (found := unsafe_calls(text))}
    assert not unsafe


@pytest.mark.parametrize(
    ("module", "needed"),
    [
        ("lcc_lens", set()),
        ("lcc_lens.frontends.cli.main", set()),
        ("lcc_lens.frontends.explorer.page", {"torch"}),  # a run is shown without the libraries that run models
        ("lcc_lens.frontends.plotting.run_figures", {"torch", "plotly"}),
    ],
)
def test_import_is_light(module: str, needed: set[str]) -> None:
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert HEAVY & set(run.stdout.split()) == needed


def test_transformers_is_silent_though_commands_do_not_import_it() -> None:
    code = (
        "import sys\nfrom lcc_lens.frontends.cli.main import _silence_transformers\n_silence_transformers()\n"
        "assert 'transformers' not in sys.modules\nfrom transformers.utils import logging\n"
        "print(logging.get_verbosity() == logging.ERROR, logging.is_progress_bar_enabled())"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True", "False"]


def test_only_what_always_needs_a_heavy_package_imports_it_at_its_top() -> None:
    """Torch apart, which all computes with: the others cost each command seconds that it may not need."""
    found: dict[str, set[str]] = {}
    for name, text in TEXTS.items():
        nodes = [node for node in run_on_import(parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
        named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        named |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        if heavy := {module.partition(".")[0] for module in named} & HEAVY - {"torch"}:
            found[name] = heavy
    assert found.pop("evaluation.answers.scorer") == {"lm_eval"}  # a subclass of its model
    assert {name.rpartition(".")[0] for name in found} == {"frontends.plotting"}
    assert set.union(*found.values()) == {"plotly"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("data.datasets", "from lcc_lens.models.pair import load_pair"),
        ("data.datasets", "from lcc_lens import models"),
        ("data.datasets", "from lcc_lens import load_pair"),
        ("data.datasets", "import lcc_lens.models.pair as p"),
        ("data.datasets", "from ..models.pair import load_pair"),
        ("data.datasets", "from ..models import pair"),
        ("data.datasets", "def f():\n    from lcc_lens.models.pair import load_pair"),
        ("pruning.jobs", "from lcc_lens.analysis.components import LostComponents"),  # the same floor, another room
    ],
)
def test_an_upward_import_is_found(module: str, source: str) -> None:
    known = {"data", "data.datasets", "models", "models.pair", "pruning.jobs", "analysis.components"}
    assert len(upward_imports(source, module, is_package=False, known=known)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("models.pair", "from lcc_lens.data.datasets import Data\nfrom lcc_lens.core import files\nimport torch"),
        ("models.pair", "from lcc_lens.models.loading.hooked import load_hooked"),
        ("", "def __getattr__(name):\n    from lcc_lens.frontends.demo import run"),
        ("", "if TYPE_CHECKING:\n    from lcc_lens.frontends.demo import run"),
    ],
)
def test_a_downward_import_passes(module: str, source: str) -> None:
    known = {"data.datasets", "core.files", "models.pair", "models.loading.hooked", "frontends.demo"}
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
