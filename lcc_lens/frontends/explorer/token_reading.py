"""Loads a run's token tables, or computes them with the pruned model; otherwise says why there are none."""

from __future__ import annotations

import logging

from lcc_lens.core.errors import LensError
from lcc_lens.frontends.explorer.run_contents import RunContents
from lcc_lens.frontends.explorer.token_tables import TokenTables, read_tokens
from lcc_lens.models.loading.hooked import load_hooked

logger = logging.getLogger(__name__)


def find_tokens(run: RunContents, *, read_model: bool) -> tuple[TokenTables | None, str | None]:
    """The token tables of a run, or a sentence that says why there are none.

    Tables that the run does not hold yet are computed with the pruned model and saved there.

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
        return None, "The tokens that components promote were not computed; explore once without --no-tokens."
    try:
        tables = _computed(run)
    except LensError as error:
        logger.warning("the page shows no tokens: %s", error)
        return None, f"The tokens that components promote could not be computed: {error}."
    tables.save(run.path)
    return tables, None


def _computed(run: RunContents) -> TokenTables:
    """Compute the tables with the pruned model that the scan names.

    Raises:
        LensError: the model is missing, its weights have changed, or its architecture is not supported.
    """
    assert run.scan is not None
    record = run.scan.record
    loaded = load_hooked(record.pruned)
    if loaded.identity.sha256 != record.pruned_sha256:
        raise LensError(f"expected the scanned weights in {record.pruned}, got different ones; scan again")
    return read_tokens(loaded.model, loaded.tokenizer, run.scan, run.restoration)
