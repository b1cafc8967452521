"""Sample text from a plain causal language model, from many starts, leaving out texts that repeat themselves."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lcc_lens.core.errors import LensError
from lcc_lens.core.progress import track
from lcc_lens.data.batches import special_prefix
from lcc_lens.models.architecture.caches import cache_name, cache_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: A text that repeats more of its 4-grams than this is sampled again.
MAX_REPETITION = 0.5
#: Tokens of a text at least.
SHORTEST = 16
#: Sequences that are sampled side by side: by models of up to a billion weights, and by larger ones.
MOST_AT_ONCE, _MOST_OF_LARGE, _LARGE = 64, 16, 10**9
#: Give up after so many sampled tokens per token that was asked for.
_PATIENCE = 4
_SEEDS = (
    "The", "A", "In", "How to", "What is", "Why", "When", "Once upon", "According to", "def ", "import ", "class ",
    "#include", "Question:", "Answer:", "Dear", "Chapter", "Step 1", "History of", "Scientists", "Today", "I",
    "She said", "He was", "You can", "If", "For example", "Theorem", "Recipe", "Breaking news", "Review:", "1.", "- ",
    "# ", "<html>", "{", "SELECT", "$",
)  # fmt: skip


@dataclass(frozen=True)
class Sampled:
    """Sampled texts.

    Args:
        texts: the texts.
        n_tokens: of all texts together, tokenised again.
        n_repeated: how many texts were sampled again since they repeated themselves.
    """

    texts: list[str]
    n_tokens: int
    n_repeated: int


def sample_texts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    n_tokens: int,
    *,
    length: int = 512,
    temperature: float = 1.0,
    seed: int = 0,
) -> Sampled:
    """Sample texts of ``length`` tokens until there are ``n_tokens``, in batches with a KV cache.

    A third of the texts begin at the beginning-of-text token, a third at a random token, a third at a few words. A text
    that ends early is followed by another one in the same sequence, as in pretraining.

    Args:
        model: a plain transformers model.
        tokenizer: its tokenizer.
        n_tokens: how many tokens the texts have at least, tokenised again.
        length: tokens of a sequence.
        temperature: divides the logits.
        seed: of starts and samples.

    Raises:
        LensError: logits are not finite, or most texts repeat themselves.

    Reference:
        LLM-QAT's data-free data (arXiv 2305.17888).
    """
    device = next(model.parameters()).device
    batch = MOST_AT_ONCE if sum(p.numel() for p in model.parameters()) <= _LARGE else _MOST_OF_LARGE
    starts, draw = torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed)
    texts: dict[str, int] = {}
    n_repeated = n_sampled = 0
    while (n_missing := n_tokens - sum(texts.values())) > 0:
        if n_sampled > _PATIENCE * n_tokens + batch * length:
            raise LensError(
                f"expected {n_tokens} tokens of text from the dense model, got {n_tokens - n_missing} and {n_repeated} "
                "texts that repeat themselves; raise the temperature or name other data"
            )
        begun = _starts(tokenizer, min(-(-n_missing // length) + 1, batch), starts)
        rows = _continued(model, begun, length, temperature, len(tokenizer), draw)
        n_sampled += sum(map(len, rows))
        for piece in (piece for row in rows for piece in _pieces(row, tokenizer)):
            is_repeated = repetition(piece) > MAX_REPETITION
            n_repeated += is_repeated
            text = tokenizer.decode(piece, skip_special_tokens=True).strip("\ufffd ")
            if text and not is_repeated:
                texts[text] = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return Sampled(list(texts), sum(texts.values()), n_repeated)


def repetition(tokens: Sequence[int]) -> float:
    """The fraction of a text's 4-grams that occurred in it before; 0 for one without any."""
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def writing_seconds(model: Any, *, n_tokens: int = 4) -> tuple[float, float]:
    """Seconds of one more token of a batch of texts: a fixed part, and a part for each text; measured here."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)

    def taken(n_texts: int) -> float:
        start = time.perf_counter()
        _continued(model, [[0]] * n_texts, 1 + n_tokens, 1.0, int(model.config.get_text_config().vocab_size), generator)
        return (time.perf_counter() - start) / n_tokens

    taken(1)  # warm up
    few, many = taken(4), taken(32)
    each = max(many - few, 0.0) / 28
    return max(few - 4 * each, 0.0), each


def _starts(tokenizer: PreTrainedTokenizerBase, n: int, generator: torch.Generator) -> list[list[int]]:
    """The first tokens of ``n`` sequences."""
    lead, special = special_prefix(tokenizer), set(tokenizer.all_special_ids)
    first = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)
    plain = [token for token in range(len(tokenizer)) if token not in special]

    def drawn(choices: Sequence[Any]) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    kinds = (
        lambda: lead or [first],
        lambda: [*lead, drawn(plain)],
        lambda: [*lead, *tokenizer(drawn(_SEEDS), add_special_tokens=False)["input_ids"]],
    )
    return [kinds[number % len(kinds)]() for number in range(n)]


@torch.inference_mode()
def _continued(
    model: Any,
    starts: Sequence[Sequence[int]],
    length: int,
    temperature: float,
    n_vocab: int,
    generator: torch.Generator,
) -> list[list[int]]:
    """Sample on from a batch of starts up to a length; the tokens of longer starts replace samples."""
    device = generator.device
    tokens, cache = torch.tensor([[start[0]] for start in starts], device=device), None
    name = cache_name(model.forward)
    for position in track(range(1, length), length - 1, "writing text"):
        # a model without a cache reads everything again
        read = tokens if cache is None else tokens[:, -1:]
        output = model(read, **{name: cache}, use_cache=True)
        cache = cache_of(output)
        logits = output.logits[:, -1, :n_vocab].float() / temperature
        if not bool(torch.isfinite(logits).all()):
            raise LensError("expected finite logits of the dense model, got NaN or infinity; check its weights")
        chosen = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        for row, start in enumerate(starts):
            if position < len(start):
                chosen[row, 0] = start[position]
        tokens = torch.cat([tokens, chosen], dim=1)
    rows: list[list[int]] = tokens.tolist()
    return rows


def _pieces(row: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The texts of a sequence, which end-of-text tokens separate."""
    piece: list[int] = []
    for token in [*row, tokenizer.eos_token_id]:
        if token != tokenizer.eos_token_id:
            piece.append(token)
        elif piece:
            if len(piece) >= SHORTEST:
                yield piece
            piece = []
