"""The whole method as one function: prune, scan, select, restore, export, evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lcc_lens.analysis.scan.scan import scan
from lcc_lens.core.outputs.places import writing_run
from lcc_lens.core.ranges import Count, Length, Seed, Share, Sparsity, ranged
from lcc_lens.data.checks import or_mix
from lcc_lens.evaluation.evaluate import check_tasks, evaluate
from lcc_lens.exporters.huggingface import export
from lcc_lens.models.pair import load_pair
from lcc_lens.pruning.jobs import prune
from lcc_lens.restoration.restore import restore
from lcc_lens.restoration.settings import SCAN_DATA, SCAN_EXAMPLES, TRAIN_DATA, TRAIN_EXAMPLES, HeadRequest
from lcc_lens.restoration.training_data import load_role, run_writer


@ranged
def prune_and_restore(
    model: str | Path,
    folder: str | Path,
    tasks: Sequence[str] | None = None,
    *,
    sparsity: Sparsity = 0.5,
    calibration: str | None = None,
    n_samples: Count = 128,
    seq_len: Length | None = None,
    scan_data: str = SCAN_DATA,
    selector: str = HeadRequest.selector,
    heads: Share = HeadRequest.fraction,
    train_data: str | None = None,
    method: str = "lcc",
    limit: Count | None = None,
    seed: Seed = 0,
) -> dict[str, Any]:
    """Prune a model by Wanda, restore it, export the result, and evaluate all three models.

    Args:
        model: reference of the dense model.
        folder: receives ``pruned`` and ``restored`` (Hugging Face directories) and ``run``.
        tasks: what to evaluate on (wikitext if not given, or wikipedia where it cannot be had).
        limit: blocks, responses or items of each at most.
        sparsity: fraction of the weights to remove; ``calibration``, ``n_samples``, ``seq_len``: see ``prune``.
        scan_data: questions that the pair is scanned on; ``selector``, ``heads``: how many heads they choose, and how.
        train_data: what to train on (alpaca if not given, or the mix where that lacks); ``method``: see ``restore``.

    Returns:
        The contents of ``results.json``: every task of the dense, the pruned and the restored model.
    """
    pruned, run, restored = (Path(folder) / name for name in ("pruned", "run", "restored"))
    tasks = tasks or or_mix("wikitext", instead="wikipedia")
    check_tasks(tasks)
    writer = run_writer(model, run, max(SCAN_EXAMPLES, TRAIN_EXAMPLES))
    with writing_run(run):
        probe = load_role(scan_data, SCAN_EXAMPLES, "probe", seed, writer)
        training = load_role(train_data or "+".join(or_mix(TRAIN_DATA)), TRAIN_EXAMPLES, "train", seed, writer)
        prune(
            model, pruned, sparsity=sparsity, calibration=calibration, n_samples=n_samples, seq_len=seq_len, seed=seed
        )
        pair = load_pair(model, pruned)
        differences = scan(pair, probe, limit=SCAN_EXAMPLES, seed=seed, run=run)
        chosen = differences.select(selector, share=heads, seed=seed)
        restoration = restore(pair, differences, chosen, training, method=method, limit=TRAIN_EXAMPLES, run=run)
    export(restoration, pruned, restored)
    return evaluate([model, pruned, restored], tasks, limit=limit)
