"""The record of a refit (``refit.json``) in a few lines, and as a table."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from lcc_lens.core.showing import Record

if TYPE_CHECKING:
    import pandas as pd


class RefitReport(Record):
    """The contents of ``refit.json``."""

    def table(self) -> pd.DataFrame:
        """One row per matrix: the squared error left on the calibration inputs, relative to the pruned weights'."""
        import pandas as pd

        return pd.DataFrame(self["error_left"].items(), columns=["matrix", "error_left"])

    def _facts(self) -> dict[str, Any]:
        left, calibration = sorted(self["error_left"].values()), self["calibration"]
        return {
            "matrices refitted, zeros kept": len(left),
            "squared error left on the calibration inputs, median": f"{median(left):.3f}",
            "least and most": f"{left[0]:.3f} and {left[-1]:.3f}",
            "calibration": f"{calibration['data']}, {calibration['sequences']} sequences",
        }
