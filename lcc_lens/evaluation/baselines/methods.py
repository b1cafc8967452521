"""The baselines as methods of comparisons, for the registry of restoration methods."""

from __future__ import annotations

from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.evaluation.baselines.eora import eora
from lcc_lens.evaluation.baselines.flap import flap
from lcc_lens.evaluation.baselines.lofit import LOFIT_LR, lofit_heads
from lcc_lens.models.hooked.sites import CONSTANT_SITES
from lcc_lens.restoration.injections.adapters import ADAPTERS, adapters
from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.injections.ingredients import Ingredients
from lcc_lens.restoration.injections.methods import HeadSearch, Method, Preset
from lcc_lens.restoration.injections.weights import masked_low_rank


def _adapter(name: str, does: str) -> Method:
    kind, targets = ADAPTERS[name]

    def build(inputs: Ingredients) -> Injection:
        return adapters(inputs.model, kind=kind, rank=inputs.adapter_rank, targets=targets, seed=inputs.seed)

    return Method(build, does, "r (n_in + n_out) per linear layer", compare_only=True, package="peft")


def _lofit_heads(search: HeadSearch) -> list[Head]:
    if not search.heads:
        raise RequestError("expected heads for LoFiT to choose from, got none; scan the pair first")
    return lofit_heads(
        search.model, search.projections, search.heads, search.sequences, search.validation, search.config,
        fraction=search.fraction, teacher=search.teacher,
    )  # fmt: skip


LORA = _adapter("lora", "LoRA beside the attention's projections")
DORA = _adapter("dora", "DoRA beside the attention's projections")
LORA_ALL = _adapter("lora-all", "LoRA beside every projection of attention and MLP")
LORA_VO = _adapter("lora-vo", "LoRA beside the value and output projections")
DORA_VO = _adapter("dora-vo", "DoRA beside the value and output projections")
EORA = Method(
    lambda inputs: eora(inputs.model, inputs.both().dense, inputs.sequences, rank=inputs.adapter_rank),
    "EoRA beside every linear layer, in closed form", None, source="sequences", compare_only=True,
)  # fmt: skip
FLAP = Method(
    lambda inputs: flap(inputs.both(), inputs.sequences, model=inputs.model),
    "FLAP's bias compensation, in closed form", None, CONSTANT_SITES, source="sequences", compare_only=True,
)  # fmt: skip
LOFIT = Preset("offset", "LoFiT: heads chosen by gains, then an offset at each", lr=LOFIT_LR, choose_heads=_lofit_heads)
#: PERP (arXiv 2312.15230) trains what is cheap: biases and norms (an offset at a site is a bias of the linear layer
#: behind it), or LoRA under the mask, here at LoRA's rank.
PERP = Preset("norms+offset+mlp-offset", "PERP: biases and norms", all_heads=True)
PERP_LORA = Method(
    lambda inputs: masked_low_rank(inputs.model, rank=inputs.adapter_rank, seed=inputs.seed),
    "PERP: LoRA under the mask", "r (n_in + n_out) per linear layer",
)  # fmt: skip

BASELINES: dict[str, Method | Preset] = {
    "lora": LORA, "dora": DORA, "lora-all": LORA_ALL, "lora-vo": LORA_VO, "dora-vo": DORA_VO, "lofit": LOFIT,
    "eora": EORA, "flap": FLAP, "perp": PERP, "perp-lora": PERP_LORA,
}  # fmt: skip
