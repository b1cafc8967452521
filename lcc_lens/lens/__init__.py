"""The lens: what a head's lost component, or any vector in its output, says to the rest of the model.

One reading a file, each with its result; imports point ``answers, checks <- all others``.
"""

from __future__ import annotations

from lcc_lens.lens.answers import Streams, answer_streams
from lcc_lens.lens.direct import DirectEffect, direct_effect
from lcc_lens.lens.exciting import ExcitingExamples, ExcitingToken, Which, exciting_examples
from lcc_lens.lens.gain import LogitGain, logit_gain
from lcc_lens.lens.output_relation import OutputRelation, relation_to_W_O
from lcc_lens.lens.saved import load_lens, save_lens
from lcc_lens.lens.similarity import ComponentSimilarity, component_similarity
from lcc_lens.lens.tokens import PromotedTokens, Side, TokenScore, promoted_tokens

__all__ = [
    "ComponentSimilarity",
    "DirectEffect",
    "ExcitingExamples",
    "ExcitingToken",
    "LogitGain",
    "OutputRelation",
    "PromotedTokens",
    "Side",
    "Streams",
    "TokenScore",
    "Which",
    "answer_streams",
    "component_similarity",
    "direct_effect",
    "exciting_examples",
    "load_lens",
    "logit_gain",
    "promoted_tokens",
    "relation_to_W_O",
    "save_lens",
]
