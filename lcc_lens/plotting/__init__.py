"""Figures: data in, Plotly Figure out; no model, no recomputation. One look, fixed colours, units, n and seeds."""

from lcc_lens.plotting.comparisons import plot_comparison, plot_inference_cost, plot_tasks
from lcc_lens.plotting.components import plot_logit_gain, plot_promoted_tokens, plot_spectra
from lcc_lens.plotting.head_maps import plot_loss_map, plot_selectors
from lcc_lens.plotting.recoveries import Recovery, plot_recovery, recovery_by_selector, recovery_points
from lcc_lens.plotting.reports import plot_report
from lcc_lens.plotting.studies import plot_pruning_quality, plot_selector_study
from lcc_lens.plotting.theme import COLORS, COLUMN, PAGE, SEQUENTIAL
from lcc_lens.plotting.training import plot_training
from lcc_lens.plotting.writing import drawn_from, figure_json, figure_sha256, write_html, write_image, write_images

__all__ = [
    "COLORS", "COLUMN", "PAGE", "SEQUENTIAL", "Recovery", "drawn_from", "figure_json", "figure_sha256",
    "plot_comparison", "plot_inference_cost", "plot_logit_gain", "plot_loss_map", "plot_promoted_tokens",
    "plot_pruning_quality", "plot_recovery", "plot_report", "plot_selector_study", "plot_selectors", "plot_spectra",
    "plot_tasks", "plot_training", "recovery_by_selector", "recovery_points", "write_html", "write_image",
    "write_images",
]  # fmt: skip
