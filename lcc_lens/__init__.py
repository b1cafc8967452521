"""lcc_lens: see what pruning took from each attention head of a language model, and put it back.

    import lcc_lens as lcc

    pair = lcc.load_pair("smollm2", "out/wanda50")
    scan = lcc.scan(pair, lcc.load_data("boolq", n=256, role="probe"))
    heads = scan.select("probe", share=0.25)
    restoration = lcc.restore(pair, scan, heads, lcc.load_data("alpaca", n=480, role="train"))
    lcc.export(restoration, "out/wanda50", "out/restored")

Every name is imported when it is first used, so that ``import lcc_lens`` itself costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lcc_lens.best import restore_best
    from lcc_lens.compare import compare
    from lcc_lens.compare_config import CompareConfig
    from lcc_lens.components import LostComponents, components_from_moments, extract_lost_components
    from lcc_lens.data import Data, load_data
    from lcc_lens.doctor import Examination, examine
    from lcc_lens.drawing import draw_figures
    from lcc_lens.errors import LensError, RequestError
    from lcc_lens.evaluation import evaluate
    from lcc_lens.explorer import explore
    from lcc_lens.export import export
    from lcc_lens.gguf_export import export_gguf
    from lcc_lens.heads import Head
    from lcc_lens.headscores import HeadScores
    from lcc_lens.hub import push_to_hub
    from lcc_lens.in_memory import stored_model
    from lcc_lens.injections import Composite, Injection, LccInjection, MeanShift, OffsetInjection, WeightInjection
    from lcc_lens.lens import (
        answer_streams,
        component_similarity,
        direct_effect,
        exciting_examples,
        load_lens,
        logit_gain,
        promoted_tokens,
        relation_to_W_O,
        save_lens,
    )
    from lcc_lens.metrics import share_recovered
    from lcc_lens.models import load_hooked
    from lcc_lens.objectives import Objective
    from lcc_lens.pair import Pair, load_pair
    from lcc_lens.paper_recipes import read_recipe
    from lcc_lens.paper_run import run_recipe
    from lcc_lens.plotting import (
        plot_comparison,
        plot_inference_cost,
        plot_logit_gain,
        plot_loss_map,
        plot_promoted_tokens,
        plot_pruning_quality,
        plot_recovery,
        plot_report,
        plot_selector_study,
        plot_selectors,
        plot_spectra,
        plot_tasks,
        plot_training,
        recovery_by_selector,
        recovery_points,
        write_html,
        write_image,
    )
    from lcc_lens.progress import shown
    from lcc_lens.pruning_jobs import prune, refit
    from lcc_lens.recipe import restore
    from lcc_lens.report import report
    from lcc_lens.restoration import Restoration
    from lcc_lens.scan import Scan, scan
    from lcc_lens.session import RestoreSession
    from lcc_lens.sidecar import load_restored
    from lcc_lens.statistics import DifferenceStatistics
    from lcc_lens.task_recovery import TaskMeasures, load_task_data
    from lcc_lens.token_loss import TokenLoss
    from lcc_lens.training import Step, TrainConfig, train
    from lcc_lens.widget import RestoreWidget

_HOMES = {
    "bench": ("CompareConfig",),
    "best": ("restore_best",),
    "compare": ("compare",),
    "components": ("LostComponents", "components_from_moments", "extract_lost_components"),
    "data": ("Data", "load_data"),
    "doctor": ("Examination", "examine"),
    "drawing": ("draw_figures",),
    "errors": ("LensError", "RequestError"),
    "evaluation": ("evaluate",),
    "explorer": ("explore",),
    "export": ("export",),
    "gguf_export": ("export_gguf",),
    "heads": ("Head",),
    "headscores": ("HeadScores",),
    "hub": ("push_to_hub",),
    "in_memory": ("stored_model",),
    "injections": ("Composite", "Injection", "LccInjection", "MeanShift", "OffsetInjection", "WeightInjection"),
    "lens": (
        "answer_streams",
        "component_similarity",
        "direct_effect",
        "exciting_examples",
        "load_lens",
        "logit_gain",
        "promoted_tokens",
        "relation_to_W_O",
        "save_lens",
    ),
    "metrics": ("share_recovered",),
    "models": ("load_hooked",),
    "objectives": ("Objective",),
    "pair": ("Pair", "load_pair"),
    "plotting": (
        "plot_comparison",
        "plot_inference_cost",
        "plot_logit_gain",
        "plot_loss_map",
        "plot_promoted_tokens",
        "plot_pruning_quality",
        "plot_recovery",
        "plot_report",
        "plot_selector_study",
        "plot_selectors",
        "plot_spectra",
        "plot_tasks",
        "plot_training",
        "recovery_by_selector",
        "recovery_points",
        "write_html",
        "write_image",
    ),
    "progress": ("shown",),
    "pruning_jobs": ("prune", "refit"),
    "recipe": ("restore",),
    "report": ("report",),
    "restoration": ("Restoration",),
    "scan": ("Scan", "scan"),
    "session": ("RestoreSession",),
    "sidecar": ("load_restored",),
    "statistics": ("DifferenceStatistics",),
    "token_loss": ("TokenLoss",),
    "paper_recipes": ("read_recipe",),
    "paper_run": ("run_recipe",),
    "task_recovery": ("TaskMeasures", "load_task_data"),
    "training": ("Step", "TrainConfig", "train"),
    "widget": ("RestoreWidget",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "CompareConfig",
    "Composite",
    "Data",
    "DifferenceStatistics",
    "Examination",
    "Head",
    "HeadScores",
    "Injection",
    "LccInjection",
    "LensError",
    "LostComponents",
    "MeanShift",
    "Objective",
    "OffsetInjection",
    "Pair",
    "RequestError",
    "Restoration",
    "RestoreSession",
    "RestoreWidget",
    "Scan",
    "Step",
    "TaskMeasures",
    "TokenLoss",
    "TrainConfig",
    "WeightInjection",
    "answer_streams",
    "compare",
    "component_similarity",
    "components_from_moments",
    "direct_effect",
    "draw_figures",
    "evaluate",
    "examine",
    "exciting_examples",
    "explore",
    "export",
    "export_gguf",
    "extract_lost_components",
    "load_data",
    "load_hooked",
    "load_lens",
    "load_pair",
    "load_restored",
    "load_task_data",
    "logit_gain",
    "plot_comparison",
    "plot_inference_cost",
    "plot_logit_gain",
    "plot_loss_map",
    "plot_promoted_tokens",
    "plot_pruning_quality",
    "plot_recovery",
    "plot_report",
    "plot_selector_study",
    "plot_selectors",
    "plot_spectra",
    "plot_tasks",
    "plot_training",
    "promoted_tokens",
    "prune",
    "push_to_hub",
    "read_recipe",
    "recovery_by_selector",
    "recovery_points",
    "refit",
    "relation_to_W_O",
    "report",
    "restore",
    "restore_best",
    "run_recipe",
    "save_lens",
    "scan",
    "share_recovered",
    "shown",
    "stored_model",
    "train",
    "write_html",
    "write_image",
]


class _Package(ModuleType):
    """The package itself: importing the module ``lcc_lens.scan`` must not hide the function of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in _HOME_OF):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'lcc_lens' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lcc_lens.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
