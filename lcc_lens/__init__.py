"""lcc_lens: see what pruning took from each attention head of a language model, and put it back.

    import lcc_lens as lcc

    pair = lcc.load_pair("smollm2", "out/wanda50")
    scan = lcc.scan(pair, lcc.load_data("boolq", n=256, role="probe"))
    heads = scan.select("attribution", share=0.25)
    restoration = lcc.restore(pair, scan, heads, lcc.load_data("alpaca", n=480, role="train"))
    lcc.export(restoration, "out/wanda50", "out/restored")

Every public name is imported when it is first used, so ``import lcc_lens`` itself loads no module of the package.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

# The public names, each written once: type checkers read this block, and `_public_names` reads it at run time.
if TYPE_CHECKING:
    from lcc_lens.analysis.causes.upstream import Upstream as Upstream
    from lcc_lens.analysis.causes.upstream import trace_upstream as trace_upstream
    from lcc_lens.analysis.components import LostComponents as LostComponents
    from lcc_lens.analysis.components import components_from_moments as components_from_moments
    from lcc_lens.analysis.components import extract_lost_components as extract_lost_components
    from lcc_lens.analysis.head_scores import HeadScores as HeadScores
    from lcc_lens.analysis.head_types.circuit_task import CircuitTask as CircuitTask
    from lcc_lens.analysis.head_types.circuit_task import circuit_task as circuit_task
    from lcc_lens.analysis.head_types.head_types import head_types as head_types
    from lcc_lens.analysis.head_types.result import HeadTypes as HeadTypes
    from lcc_lens.analysis.lens.answers import answer_streams as answer_streams
    from lcc_lens.analysis.lens.direct import direct_effect as direct_effect
    from lcc_lens.analysis.lens.exciting import exciting_examples as exciting_examples
    from lcc_lens.analysis.lens.gain import logit_gain as logit_gain
    from lcc_lens.analysis.lens.output_relation import relation_to_W_O as relation_to_W_O
    from lcc_lens.analysis.lens.prompt import PromptComparison as PromptComparison
    from lcc_lens.analysis.lens.prompt import compare_prompt as compare_prompt
    from lcc_lens.analysis.lens.saved import load_lens as load_lens
    from lcc_lens.analysis.lens.saved import save_lens as save_lens
    from lcc_lens.analysis.lens.similarity import component_similarity as component_similarity
    from lcc_lens.analysis.lens.tokens import promoted_tokens as promoted_tokens
    from lcc_lens.analysis.scan.scan import Scan as Scan
    from lcc_lens.analysis.scan.scan import scan as scan
    from lcc_lens.analysis.scan.token_differences import TokenLoss as TokenLoss
    from lcc_lens.analysis.selectors.registry import register_selector as register_selector
    from lcc_lens.analysis.statistics import DifferenceStatistics as DifferenceStatistics
    from lcc_lens.core.errors import LensError as LensError
    from lcc_lens.core.errors import RequestError as RequestError
    from lcc_lens.core.heads import Head as Head
    from lcc_lens.core.metrics import share_recovered as share_recovered
    from lcc_lens.core.progress import shown as shown
    from lcc_lens.data.datasets import Data as Data
    from lcc_lens.data.datasets import load_data as load_data
    from lcc_lens.data.prompts import Example as Example
    from lcc_lens.data.prompts import Item as Item
    from lcc_lens.data.registry import DatasetSpec as DatasetSpec
    from lcc_lens.data.registry import register_dataset as register_dataset
    from lcc_lens.evaluation.comparison.compare import compare as compare
    from lcc_lens.evaluation.comparison.config import CompareConfig as CompareConfig
    from lcc_lens.evaluation.doctor import Examination as Examination
    from lcc_lens.evaluation.doctor import examine as examine
    from lcc_lens.evaluation.efficiency.report import report as report
    from lcc_lens.evaluation.evaluate import evaluate as evaluate
    from lcc_lens.evaluation.paper.recipes import read_recipe as read_recipe
    from lcc_lens.evaluation.paper.run import run_recipe as run_recipe
    from lcc_lens.evaluation.task_recovery import TaskMeasures as TaskMeasures
    from lcc_lens.evaluation.task_recovery import load_task_data as load_task_data
    from lcc_lens.exporters.components import save_components as save_components
    from lcc_lens.exporters.eval_results import add_evaluation as add_evaluation
    from lcc_lens.exporters.gguf import export_gguf as export_gguf
    from lcc_lens.exporters.hub import push_to_hub as push_to_hub
    from lcc_lens.exporters.huggingface import export as export
    from lcc_lens.exporters.sidecar import load_restored as load_restored
    from lcc_lens.frontends.explorer.page import explore as explore
    from lcc_lens.frontends.pipeline import prune_and_restore as prune_and_restore
    from lcc_lens.frontends.plotting.causes import plot_causes as plot_causes
    from lcc_lens.frontends.plotting.causes import plot_head_types as plot_head_types
    from lcc_lens.frontends.plotting.causes import plot_recovered as plot_recovered
    from lcc_lens.frontends.plotting.causes import plot_upstream as plot_upstream
    from lcc_lens.frontends.plotting.comparisons import plot_comparison as plot_comparison
    from lcc_lens.frontends.plotting.comparisons import plot_inference_cost as plot_inference_cost
    from lcc_lens.frontends.plotting.comparisons import plot_tasks as plot_tasks
    from lcc_lens.frontends.plotting.components import plot_logit_gain as plot_logit_gain
    from lcc_lens.frontends.plotting.components import plot_promoted_tokens as plot_promoted_tokens
    from lcc_lens.frontends.plotting.components import plot_spectra as plot_spectra
    from lcc_lens.frontends.plotting.domains import plot_domains as plot_domains
    from lcc_lens.frontends.plotting.head_maps import plot_loss_map as plot_loss_map
    from lcc_lens.frontends.plotting.head_maps import plot_selectors as plot_selectors
    from lcc_lens.frontends.plotting.prompts import plot_attention as plot_attention
    from lcc_lens.frontends.plotting.prompts import plot_prompt as plot_prompt
    from lcc_lens.frontends.plotting.recoveries import plot_recovery as plot_recovery
    from lcc_lens.frontends.plotting.recoveries import recovery_by_selector as recovery_by_selector
    from lcc_lens.frontends.plotting.recoveries import recovery_points as recovery_points
    from lcc_lens.frontends.plotting.reports import plot_report as plot_report
    from lcc_lens.frontends.plotting.run_figures import draw_figures as draw_figures
    from lcc_lens.frontends.plotting.studies import plot_prompt_study as plot_prompt_study
    from lcc_lens.frontends.plotting.studies import plot_pruning_quality as plot_pruning_quality
    from lcc_lens.frontends.plotting.studies import plot_selector_study as plot_selector_study
    from lcc_lens.frontends.plotting.training import plot_training as plot_training
    from lcc_lens.frontends.plotting.writing import write_html as write_html
    from lcc_lens.frontends.plotting.writing import write_image as write_image
    from lcc_lens.frontends.session.session import RestoreSession as RestoreSession
    from lcc_lens.frontends.widget import RestoreWidget as RestoreWidget
    from lcc_lens.models.loading.hooked import load_hooked as load_hooked
    from lcc_lens.models.loading.in_memory import stored_model as stored_model
    from lcc_lens.models.pair import Pair as Pair
    from lcc_lens.models.pair import load_pair as load_pair
    from lcc_lens.prompting.measuring import prompt_study as prompt_study
    from lcc_lens.prompting.merits import Merits as Merits
    from lcc_lens.prompting.merits import merits as merits
    from lcc_lens.prompting.rewriting.fitting import fit_rewriter as fit_rewriter
    from lcc_lens.prompting.rewriting.preferences import Preferences as Preferences
    from lcc_lens.prompting.rewriting.preferences import preference_pairs as preference_pairs
    from lcc_lens.prompting.rewriting.rewriter import Rewriter as Rewriter
    from lcc_lens.prompting.rewriting.rewrites import Rewrites as Rewrites
    from lcc_lens.prompting.rewriting.rewrites import rewrite_prompt as rewrite_prompt
    from lcc_lens.prompting.rewriting.settings import RewriterSettings as RewriterSettings
    from lcc_lens.prompting.rewriting.writing import candidate_prompts as candidate_prompts
    from lcc_lens.prompting.soft_prompt import fit_soft_prompt as fit_soft_prompt
    from lcc_lens.prompting.study import PromptStudy as PromptStudy
    from lcc_lens.prompting.variants import prompt_variants as prompt_variants
    from lcc_lens.pruning.jobs import prune as prune
    from lcc_lens.pruning.jobs import reconstruct as reconstruct
    from lcc_lens.pruning.jobs import refit as refit
    from lcc_lens.pruning.methods.registry import register_pruner as register_pruner
    from lcc_lens.restoration.best import restore_best as restore_best
    from lcc_lens.restoration.budget import BudgetPlan as BudgetPlan
    from lcc_lens.restoration.budget import plan_budget as plan_budget
    from lcc_lens.restoration.injections.base import Composite as Composite
    from lcc_lens.restoration.injections.base import Injection as Injection
    from lcc_lens.restoration.injections.constants import LccInjection as LccInjection
    from lcc_lens.restoration.injections.constants import MeanShift as MeanShift
    from lcc_lens.restoration.injections.constants import OffsetInjection as OffsetInjection
    from lcc_lens.restoration.injections.methods import Method as Method
    from lcc_lens.restoration.injections.methods import Preset as Preset
    from lcc_lens.restoration.injections.methods import register_method as register_method
    from lcc_lens.restoration.injections.weights import WeightInjection as WeightInjection
    from lcc_lens.restoration.jobs import restore_models as restore_models
    from lcc_lens.restoration.restore import restore as restore
    from lcc_lens.restoration.result import Restoration as Restoration
    from lcc_lens.restoration.settings import HeadRequest as HeadRequest
    from lcc_lens.restoration.settings import RefitRequest as RefitRequest
    from lcc_lens.restoration.settings import RestoreSettings as RestoreSettings
    from lcc_lens.restoration.training.config import Step as Step
    from lcc_lens.restoration.training.config import TrainConfig as TrainConfig
    from lcc_lens.restoration.training.loop import train as train
    from lcc_lens.restoration.training.objectives import Objective as Objective


__version__: str  # read when it is asked for, as the public names are


def _public_names() -> dict[str, str]:
    """Maps each public name to the module that defines it, read from the ``TYPE_CHECKING`` block above."""
    source = pkgutil.get_data(__name__, "__init__.py")
    block = next(node for node in ast.parse(source or b"").body if isinstance(node, ast.If))
    return {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
    }


_MODULE_OF = _public_names()
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("lcc_lens.core.config").package_version()
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'lcc_lens' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
