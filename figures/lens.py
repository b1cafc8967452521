"""Save the lens results of the top heads of a run, for the figures: python figures/lens.py DENSE PRUNED RUN."""

from __future__ import annotations

import sys

import lcc_lens as lcc


def main(dense: str, pruned: str, run: str) -> None:
    pair, scan = lcc.load_pair(dense, pruned), lcc.Scan.load(run)
    questions = lcc.load_data("arc_easy", n=64, role="probe")
    scores = scan.scores("patching").value
    heads = [lcc.Head(*divmod(int(place), scores.shape[1])) for place in scores.flatten().topk(2).indices]
    gains = [lcc.logit_gain(pair, questions, head, scan.components, max_length=96) for head in heads]
    restored = lcc.Restoration.load(run)
    learned = dict(zip(restored.heads, restored.constants, strict=True))
    promoted = [lcc.promoted_tokens(pair.pruned, pair.tokenizer, head, learned[head], k=8) for head in heads]
    lcc.save_lens(run, gains=gains, promoted=promoted)


if __name__ == "__main__":
    main(*sys.argv[1:])
