"""The record of a reconstruction (``reconstruction.json``) in a few lines, and as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lcc_lens.core.showing import Record

if TYPE_CHECKING:
    import pandas as pd


class ReconstructionReport(Record):
    """The contents of ``reconstruction.json``."""

    def table(self) -> pd.DataFrame:
        """One row per window: its layers, the held-out error before and after its training, and whether it was kept."""
        import pandas as pd

        return pd.DataFrame(self["windows"])

    def _facts(self) -> dict[str, Any]:
        windows, calibration = self["windows"], self["calibration"]
        last = windows[-1]
        return {
            "windows of layers trained, zeros kept": f"{sum(w['is_kept'] for w in windows)} of {len(windows)}",
            "error behind the last window, on held-out sequences": (
                f"{last['error_before']:.3f} before its training, "
                f"{last['error_after' if last['is_kept'] else 'error_before']:.3f} now"
            ),
            "calibration": f"{calibration['data']}, {calibration['sequences']} sequences",
        }
