"""Families: a tiny random model of each, taken through the whole method, and the table of what came of it.

``python tests/support/conformance.py`` (``make families``) writes ``docs/families.json`` and ``docs/families.md``;
``python tests/support/conformance.py FAMILY ...`` renews the rows of some.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("LCC_LENS_DTYPE", "float32")  # as in the tests
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
from support.places import ROOT
from support.tiny import PARAGRAPHS, QUESTIONS, save_model
from transformers import AutoConfig, AutoModelForCausalLM

from lcc_lens.analysis.scan.scan import Scan, scan
from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import LensError
from lcc_lens.core.files import write_json, write_text
from lcc_lens.core.heads import Head
from lcc_lens.data.datasets import load_data
from lcc_lens.exporters.huggingface import export
from lcc_lens.exporters.sidecar import load_restored
from lcc_lens.models.architecture.anatomy import find_anatomies
from lcc_lens.models.architecture.bias_slots import find_slots
from lcc_lens.models.architecture.linear_maps import find_matrices
from lcc_lens.models.architecture.zeros import compare_zeros
from lcc_lens.models.hooked.fused_attention import default_attention_gap, fused_attention
from lcc_lens.models.pair import Pair, load_pair
from lcc_lens.pruning.jobs import prune, reconstruct
from lcc_lens.restoration.best import restore_best
from lcc_lens.restoration.restore import restore
from lcc_lens.restoration.result import Restoration

DOCS = ROOT / "docs"
HEADS = [Head(0, 3), Head(1, 0), Head(2, 1), Head(2, 4)]
TOKENS = torch.arange(3, 45)[None]

_COMMON = {"vocab_size": 257, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
_PLAIN = {
    **_COMMON, "hidden_size": 40, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 5,
    "max_position_embeddings": 512,
}  # fmt: skip
# six heads of eight over two key-value heads, in a residual stream that is as wide as neither
_GROUPED = {**_PLAIN, "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
_EVEN = {**_PLAIN, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}
_GPT = {**_COMMON, "n_embd": 40, "n_head": 5, "n_layer": 3, "n_positions": 512}
_SCALE = {"query_pre_attn_scalar": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}

#: By row of the table: the model type and its sizes.
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", _GROUPED),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": None}),
    "mistral, sliding window": ("mistral", {**_GROUPED, "sliding_window": 16}),
    "qwen2": ("qwen2", _EVEN),
    "qwen2, multi-head": ("qwen2", {**_PLAIN, "num_key_value_heads": 5}),
    "qwen3": ("qwen3", _GROUPED),
    "gemma": ("gemma", _GROUPED),
    "gemma2": ("gemma2", {**_GROUPED, **_SCALE}),
    "gemma3 (text)": ("gemma3_text", {**_GROUPED, **_SCALE}),
    "phi": ("phi", _PLAIN),
    "phi3": ("phi3", _EVEN),
    "olmo2": ("olmo2", _EVEN),
    "smollm3": ("smollm3", _EVEN),
    "granite": ("granite", _EVEN),
    "cohere": ("cohere", {**_EVEN, "logit_scale": 1.0}),
    "stablelm": ("stablelm", _EVEN),
    "stablelm, multi-head": ("stablelm", {**_PLAIN, "num_key_value_heads": 5}),
    "gpt2": ("gpt2", _GPT),
    "opt": ("opt", {**_PLAIN, "ffn_dim": 44, "word_embed_proj_dim": 40, "init_std": 0.2}),
    "gpt_neox": ("gpt_neox", {**_PLAIN, "rotary_pct": 0.5}),
    "falcon": ("falcon", _PLAIN),
    "bloom": ("bloom", {**_COMMON, "hidden_size": 40, "n_layer": 3, "n_head": 5}),
    "mpt": ("mpt", {**_COMMON, "d_model": 40, "n_layers": 3, "n_heads": 5, "max_seq_len": 512}),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 4}),
    "mixtral": ("mixtral", {**_GROUPED, "num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}),
    "qwen2_moe": ("qwen2_moe", {**_EVEN, **_EXPERTS, "shared_expert_intermediate_size": 28}),
    "olmoe": ("olmoe", {**_EVEN, **_EXPERTS, "intermediate_size": 20}),
    "granitemoe": ("granitemoe", {**_EVEN, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("gpt_oss", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}),
    "deepseek_v3": ("deepseek_v3", {
        **_PLAIN, **_EXPERTS, "num_key_value_heads": 5, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 7,
        "first_k_dense_replace": 1,
    }),
    "gemma3 (text), sliding window": ("gemma3_text", {**_GROUPED, **_SCALE, "sliding_window": 16}),
    "gemma4 (text), two sizes of heads": ("gemma4_text", {
        **_GROUPED, "sliding_window": 16, "global_head_dim": 12, "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    }),
    "qwen3, one key-value head": ("qwen3", {**_GROUPED, "num_key_value_heads": 1}),
    "llama, zero row of padding": ("llama", {**_GROUPED, "pad_token_id": 1}),
    "llama, dynamic rope": ("llama", {**_GROUPED, "rope_parameters": {
        "rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4,
    }}),
    "phi3, longrope": ("phi3", {**_EVEN, "original_max_position_embeddings": 64, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64,
    }}),
    "falcon, multi-head": ("falcon", {**_PLAIN, "multi_query": False}),
    "falcon, new decoder": ("falcon", {**_EVEN, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, ALiBi": ("falcon", {**_PLAIN, "multi_query": False, "alibi": True}),
}  # fmt: skip


#: Their experts are one tensor, which pruners refuse; so attention alone is pruned here, by size.
MIXTURES = ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "granitemoe", "gpt_oss", "deepseek_v3")
NOT_TRIED = "not tried: no hooks"


@dataclass(frozen=True)
class Conformance:
    """What came of a family.

    ``pruning`` and ``hooks`` are ``yes`` or the reason why not; ``export`` the way in which constants are stored, or
    None with the reason in ``refused``; ``slicing`` whether heads and neurons can be cut out; ``causes`` whose
    differences are divided by cause: ``heads, MLPs``, ``heads``, or None; ``best`` is ``yes`` or the reason why not.
    """

    model_type: str
    hooks: str
    pruning: str
    slicing: str
    fused_attention: bool
    export: str | None
    refused: str | None
    causes: str | None
    best: str


def conform(family: str, folder: Path) -> Conformance:
    """Prune, scan, restore, export and reload; every claim is asserted on the way."""
    kind, _ = FAMILIES[family]
    dense, pruned = save_family(family, folder / "dense"), folder / "pruned"
    text, questions = folder / "text.txt", folder / "questions.jsonl"
    text.write_text("\n\n".join(PARAGRAPHS))
    questions.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS[:8]))
    pruning = prune_family(family, dense, pruned, text)
    slicing = outcome(lambda: find_anatomies(pruned, find_matrices(Checkpoint(pruned))))
    try:
        pair = load_pair(dense, pruned)
    except LensError as error:
        return Conformance(
            kind, reason_of(error).replace(f"{folder}/", ""), pruning, slicing, False, None, NOT_TRIED, None, NOT_TRIED
        )  # fmt: skip
    with fused_attention(pair.pruned) as is_fused:
        pass
    data = load_data(str(questions))
    found = scan(pair, data, selectors=(), causes=True)
    assert ("mlp" in pair.sites) == (family not in MIXTURES)  # several experts have no one post-activation
    way, refused = None, outcome(lambda: find_slots(Checkpoint(pruned), pair.output_projections))
    restoration = restore(pair, found, HEADS, data, method="mean-shift", exportable=refused == "yes")
    expected = logits_of(pair, restoration)
    kernels = "eager" if default_attention_gap(pair.pruned) else None  # where the default computes something else
    assert_equal(load_restored(pruned, restoration, attention=kernels), expected)
    if refused == "yes":
        way = find_slots(Checkpoint(pruned), pair.output_projections).way
        report = export(restoration, pruned, folder / "out")
        assert_equal(AutoModelForCausalLM.from_pretrained(folder / "out", attn_implementation="eager").eval(), expected)
        assert report.identical_tensors + len(report.changed) == len(Checkpoint(pruned).tensors)
    else:
        with pytest.raises(LensError, match="load_restored"):
            export(restoration, pruned, folder / "out")
    best = outcome(lambda: restored_weights(dense, pruned, questions, text, folder))
    return Conformance(
        kind, "yes", pruning, slicing, bool(is_fused), way, None if way else refused, divided(found), best
    )


def restored_weights(dense: Path, pruned: Path, questions: Path, text: Path, folder: Path) -> None:
    """Reconstruct; refit, train all remaining weights and export, which compares the copy's logits with the hooks'."""
    report = reconstruct(
        dense, pruned, folder / "closer", calibration=str(text), n_samples=11, seq_len=40, window=2, lr=3e-3
    )
    assert all(window["is_kept"] for window in report["windows"])
    assert compare_zeros(pruned, folder / "closer").is_equal
    others, run = folder / "others.jsonl", folder / "best"
    others.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS[8:12]))
    data, validation = (load_data(str(file)) for file in (questions, others))
    restoration = restore_best(
        dense, pruned, run, data, validation=validation, calibration=str(text), n_samples=2, seq_len=32
    )
    logits_of(load_pair(dense, run / "refit"), restoration, least=1e-3)
    export(restoration, run / "refit", folder / "best_exported")
    assert compare_zeros(pruned, folder / "best_exported").is_equal


def divided(found: Scan) -> str | None:
    """Whose differences were divided by cause: parts sum to the difference, and the first layer inherits nothing."""
    if found.causes is None:
        return None
    heads, difference = found.causes.heads, found.mean_difference
    assert float((heads.mean.sum(2) - difference).abs().max()) < 1e-5 * max(1.0, float(difference.abs().max()))
    assert float(heads.fraction[0, :, 0].abs().max()) < 1e-6
    return "heads" if found.causes.mlp is None else "heads, MLPs"


def prune_family(family: str, dense: Path, pruned: Path, text: Path) -> str:
    """Prune by wanda; where that is refused, attention by size."""
    found = outcome(lambda: prune(dense, pruned, calibration=str(text), n_samples=2, seq_len=32))
    if found != "yes":
        assert family in MIXTURES, found
        model = AutoModelForCausalLM.from_pretrained(dense)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "self_attn" in name and weight.ndim == 2:
                    weight[weight.abs() < weight.abs().median()] = 0.0
        save_model(model, pruned)
    return found


def outcome(action: Callable[[], object]) -> str:
    """``yes``, or the reason why not."""
    try:
        action()
    except LensError as error:
        return reason_of(error)
    return "yes"


def reason_of(error: LensError) -> str:
    """What an error says was wrong, without what to do about it."""
    return str(error).split("; ")[0]


def save_family(family: str, path: Path) -> Path:
    """A random model of a family, with a tokenizer."""
    kind, settings = FAMILIES[family]
    torch.manual_seed(0)
    return save_model(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval(), path)


def logits_of(pair: Pair, restoration: Restoration, least: float = 0.1) -> torch.Tensor:
    """The hooked pruned model's logits with the restoration, which must move them."""
    with torch.no_grad():
        before = pair.pruned(TOKENS)
        with restoration.applied_to(pair.pruned) as restored:
            after = restored(TOKENS)
    assert float((after - before).abs().max()) > least
    return after


def assert_equal(model: torch.nn.Module, expected: torch.Tensor) -> None:
    with torch.no_grad():
        got = model(TOKENS).logits
    assert float((got - expected).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))


HEADER = """# Families

What each family of models can do. `make families` writes this page: a tiny random model of each goes through prune,
scan, restore, export and a reload by plain transformers, whose logits must equal the hooked model's to 1e-5 (float32),
while the constants move them by more than 0.1. The tests compare with it. Made with transformers {transformers} and
TransformerLens {transformer_lens}.

Nothing here is a list that the package reads. Whether hooks work is checked when a model is loaded; where constants can
be stored is tried on a small random model of the architecture (see [exports](export.md)). So a family that is not in
the table works if the same checks pass, and `lcc-lens doctor MODEL` says which do.

- **hooks**: load, scan, restore, `lcc_lens.load_restored`
- **prune**: all pruners of single weights; of the mixtures attention alone is pruned here, by size
- **slimgpt**: heads and neurons can be removed one by one
- **fused**: the model's own attention kernels run under the hooks
- **constants**: what holds them in an export
- **best**: a refit, then all remaining weights under hooks, exported with the pruned model's zeros; `reconstruct`
  serves the same families
- **causes**: whose differences `scan --causes` divides: those of a mixture's experts, and of MLPs that are no module of
  their own, are not

| family | hooks | prune | slimgpt | fused | constants | best | causes |
|---|---|---|---|---|---|---|---|
"""


def document(results: dict[str, dict[str, object]]) -> str:
    """``docs/families.md``: the table, with reasons below it."""
    lines, notes = [], []

    def cell(value: object) -> str:
        if value == "yes":
            return "yes"
        if value not in notes:
            notes.append(value)
        return f"no [{notes.index(value) + 1}]"

    for name, found in results["families"].items():
        fused = "yes" if found["fused_attention"] else "no: step by step"
        cells = [name, cell(found["hooks"]), cell(found["pruning"]), cell(found["slicing"]), fused]
        sidecar = ": the sidecar" if found["hooks"] == "yes" else ""
        cells.append(found["export"] or cell(found["refused"]) + sidecar)
        cells += [cell(found["best"]), found["causes"] or "none"]
        lines.append(f"| {' | '.join(cells)} |")
    numbered = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return HEADER.format(**results["versions"]) + "\n".join([*lines, "", "What was refused:", "", *numbered, ""])


def main() -> None:
    results = {"versions": {name: version(name.replace("_", "-")) for name in ("transformers", "transformer_lens")}}
    results["families"] = json.loads((DOCS / "families.json").read_text())["families"] if sys.argv[1:] else {}
    for family in sys.argv[1:] or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            results["families"][family] = asdict(conform(family, Path(folder)))
        print(family, results["families"][family]["export"], flush=True)
        write_json(DOCS / "families.json", results)
    results["families"] = {family: results["families"][family] for family in FAMILIES}
    write_json(DOCS / "families.json", results)
    write_text(DOCS / "families.md", document(results))


if __name__ == "__main__":
    main()
