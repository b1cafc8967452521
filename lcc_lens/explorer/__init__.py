"""The explorer: one self-contained page of a run, which opens with no network.

One step a file: ``run_contents`` reads a run, ``token_tables`` what its components say, ``views`` and ``verdict`` turn
that into numbers and words, ``page_data`` gathers them, ``page`` writes the HTML around them.
"""

from __future__ import annotations

from lcc_lens.explorer.page import explore
from lcc_lens.explorer.token_tables import TokenTables

__all__ = ["TokenTables", "explore"]
