"""The restored model of a study: a restoration's run, a model, or an object in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lcc_lens.analysis.lens.prompt import Applicable
from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import sha256_file
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.loading.hooked import load_hooked, load_tokenizer
from lcc_lens.models.loading.references import resolve
from lcc_lens.restoration.result import RESTORATION_TENSORS, Restoration

Restored = Applicable | str | Path


def check_restored(restored: Restored | None, pruned: Path) -> None:
    """Refuse a restoration of another pruned model, and a model with another tokenizer, before any is measured.

    Args:
        pruned: the pruned model's directory.

    Raises:
        RequestError: see above; or neither a run with a restoration nor a model is there.
    """
    restoration = _loaded(restored)
    if isinstance(restoration, Restoration):
        record, sha256 = restoration.record, Checkpoint(pruned).sha256
        if record.pruned_sha256 and record.pruned_sha256 != sha256:
            raise RequestError(
                f"expected a restoration of {pruned} (SHA-256 {sha256[:12]}…), got one of {record.pruned} "
                f"({record.pruned_sha256[:12]}…); name the model that was restored"
            )
    elif isinstance(restoration, str | Path):
        own, other = (load_tokenizer(path).get_vocab() for path in (pruned, resolve(restoration)))
        if own != other:
            raise RequestError(
                f"expected a restored model with the pair's tokenizer, got another one in {restored}; name the model"
            )


def restored_sha256(restored: str | Path | None) -> str | None:
    """The hash of a run's restoration or of a model's weights."""
    if restored is None:
        return None
    return sha256_file(_file(restored)) if _file(restored).exists() else Checkpoint(resolve(restored)).sha256


@contextmanager
def restored_model(restored: Restored, pruned: HookedModel) -> Iterator[HookedModel]:
    """The restored model inside the block: the pruned one with a restoration applied, or a model of its own."""
    restoration = _loaded(restored)
    assert restoration is not None
    if isinstance(restoration, str | Path):
        yield load_hooked(restoration).model
    else:
        with restoration.applied_to(pruned) as model:
            yield model


def _loaded(restored: Restored | None) -> Restored | None:
    """The restoration of a run; anything else as it is."""
    if isinstance(restored, str | Path) and _file(restored).exists():
        return Restoration.load(restored)
    return restored


def _file(run: str | Path) -> Path:
    return Path(run) / RESTORATION_TENSORS
