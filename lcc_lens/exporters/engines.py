"""What serving engines make of an export's biases: a loader that does not know a bias drops it without a word."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from lcc_lens.core.errors import RequestError
from lcc_lens.models.architecture.joint_bias_slots import JointSlots

logger = logging.getLogger(__name__)
EngineName = Literal["vllm", "sglang"]
#: The layers whose biases hold constants: the attention's output, the MLP's output, and the values.
Layer = Literal["attention", "mlp", "value"]
_ALL: tuple[Layer, ...] = get_args(Layer)
_OF_ATTENTION: tuple[Layer, ...] = ("attention", "value")
_OF_VALUES: tuple[Layer, ...] = ("value",)
_OF_MLPS: tuple[Layer, ...] = ("mlp",)
_NONE: tuple[Layer, ...] = ()


@dataclass(frozen=True)
class Engine:
    """A serving engine: by architecture, the layers whose biases its loader keeps.

    Read from the sources of one version. Architectures that an engine runs by transformers' own modules keep all.
    """

    name: str
    version: str
    keeps: Mapping[str, Collection[Layer]]


ENGINES: Mapping[str, Engine] = {
    "vllm": Engine(
        "vLLM", "0.33.0",
        {
            "LlamaForCausalLM": _ALL, "GraniteForCausalLM": _ALL, "GPT2LMHeadModel": _ALL, "OPTForCausalLM": _ALL,
            "BloomForCausalLM": _ALL, "FalconForCausalLM": _ALL,
            "SmolLM3ForCausalLM": _ALL, "Olmo2ForCausalLM": _ALL, "PhiForCausalLM": _ALL, "GPTNeoXForCausalLM": _ALL,
            "Gemma2ForCausalLM": _OF_ATTENTION, "Gemma3ForCausalLM": _OF_ATTENTION,
            "GptOssForCausalLM": _OF_ATTENTION, "GPTJForCausalLM": _OF_MLPS,
            "Qwen2ForCausalLM": _OF_VALUES, "Qwen3ForCausalLM": _OF_VALUES, "Qwen3MoeForCausalLM": _OF_VALUES,
            "StableLmForCausalLM": _OF_VALUES,
            "GemmaForCausalLM": _NONE, "CohereForCausalLM": _NONE, "OlmoeForCausalLM": _NONE,
            "GraniteMoeForCausalLM": _NONE,
        },
    ),
    "sglang": Engine(
        "SGLang", "0.5.23",
        {
            "GPT2LMHeadModel": _ALL, "OPTForCausalLM": _ALL, "PhiForCausalLM": _ALL,
            "SmolLM3ForCausalLM": _ALL, "GPTNeoXForCausalLM": _ALL, "BloomForCausalLM": _ALL, "GPTJForCausalLM": _ALL,
            "FalconForCausalLM": _ALL,
            "LlamaForCausalLM": _OF_ATTENTION, "Qwen3ForCausalLM": _OF_ATTENTION,
            "Qwen3MoeForCausalLM": _OF_ATTENTION, "Olmo2ForCausalLM": _OF_ATTENTION,
            "Gemma2ForCausalLM": _OF_ATTENTION, "Gemma3ForCausalLM": _OF_ATTENTION,
            "GptOssForCausalLM": _OF_ATTENTION,
            "Qwen2ForCausalLM": _OF_VALUES, "StableLmForCausalLM": _OF_VALUES,
            "GraniteForCausalLM": _NONE, "GemmaForCausalLM": _NONE, "CohereForCausalLM": _NONE,
            "OlmoeForCausalLM": _NONE, "GraniteMoeForCausalLM": _NONE,
        },
    ),
}  # fmt: skip


def require_served(engine: EngineName, architecture: str, slots: JointSlots) -> None:
    """Refuse an export whose constants an engine would drop; warn where it is not known.

    Args:
        engine: one of :data:`ENGINES`.
        architecture: the class that the exported ``config.json`` names.
        slots: the biases that hold the constants; without any, every engine serves the export.

    Raises:
        RequestError: the engine drops a bias.
    """
    known, needed = ENGINES[engine], sorted({_layer(site, own.place) for site, own in slots.by_site.items()})
    if not needed:
        return
    about = f"{known.name} {known.version}"
    if architecture not in known.keeps:
        logger.warning(
            "not known whether %s keeps the biases of %s (%s); compare a few logits with transformers' before you "
            "serve it", about, architecture, ", ".join(needed),
        )  # fmt: skip
    elif dropped := [layer for layer in needed if layer not in known.keeps[architecture]]:
        raise RequestError(
            f"expected an export whose biases {about} keeps, got {architecture}, whose bias of the {dropped[0]} output "
            f"it drops; serve it by {known.name}'s --model-impl transformers and export without --for, or restore by a "
            "method that changes weights alone"
        )


def _layer(site: str, place: str) -> Layer:
    """The layer whose bias holds a site's constants."""
    if place == "value":
        return "value"
    return "attention" if (site == "z") == (place == "output") else "mlp"
