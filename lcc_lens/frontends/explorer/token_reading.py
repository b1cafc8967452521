"""Where a page's token tables come from: the run, else the pruned model it names, else nowhere, with the reason."""

from __future__ import annotations

import logging

from lcc_lens.core.errors import LensError
from lcc_lens.frontends.explorer.run_contents import RunContents
from lcc_lens.frontends.explorer.token_tables import TokenTables, read_tokens
from lcc_lens.models.loading.hooked import load_hooked

logger = logging.getLogger(__name__)


def find_tokens(run: RunContents, *, read_model: bool) -> tuple[TokenTables | None, str | None]:
    """The token tables of a run, or a sentence that says why there are none.

    Tables that are not in the run yet are read with the pruned model and kept there.

    Args:
        run: the run.
        read_model: whether the model may be loaded.
    """
    if run.scan is None:
        return None, None
    tables = TokenTables.load(run.path)
    if tables is not None:
        return tables, None
    if not read_model:
        return None, "The tokens that components promote were not read; explore once without --no-tokens."
    try:
        tables = _read(run)
    except LensError as error:
        logger.warning("the page shows no tokens: %s", error)
        return None, f"The tokens that components promote could not be read: {error}."
    tables.save(run.path)
    return tables, None


def _read(run: RunContents) -> TokenTables:
    """Read the tables with the pruned model that the scan names.

    Raises:
        LensError: the model is not there, has other weights now, or an architecture that cannot be read.
    """
    assert run.scan is not None
    record = run.scan.record
    loaded = load_hooked(record.pruned)
    if loaded.identity.sha256 != record.pruned_sha256:
        raise LensError(f"expected the weights that were scanned in {record.pruned}, got others; scan again")
    return read_tokens(loaded.model, loaded.tokenizer, run.scan, run.restoration)
