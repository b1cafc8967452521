"""Writes the page as one HTML file with data, styles and scripts inlined; nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import write_text
from lcc_lens.core.outputs.places import require_file
from lcc_lens.core.ranges import ranged
from lcc_lens.frontends.explorer.page_data import EXAMPLE_BYTES, page_data
from lcc_lens.frontends.explorer.results import results_table
from lcc_lens.frontends.explorer.texts import find_texts
from lcc_lens.frontends.explorer.token_tables import find_tokens
from lcc_lens.frontends.run_contents import RunContents

#: Largest page, in bytes.
MOST_BYTES = 15_000_000
_STYLES = ("base.css", "charts.css", "layout.css", "map.css", "panel.css", "texts.css", "phone.css")
#: In the order in which they run, all in one function.
_SCRIPTS = (
    "dom.js", "store.js", "charts.js", "head_map.js", "legend.js", "table.js", "downloads.js", "tokens.js",
    "examples.js", "patterns.js", "texts.js", "scores.js", "panel.js", "layer.js", "overview.js", "search.js",
    "theme.js", "controls.js", "keys.js", "main.js",
)  # fmt: skip


@ranged
def explore(
    run: str | Path,
    out: str | Path | None = None,
    *,
    other: str | Path | None = None,
    results: str | Path | None = None,
    prompts: str | Sequence[str] = (),
    docs: str | None = None,
    read_model: bool = True,
) -> Path:
    """Write an HTML page to explore a run by layer and head; it opens in any browser without a network.

    The first call computes what needs the models and stores it in the run: the tokens that components promote
    (``explorer.safetensors`` and ``.json``), and a few texts in the dense, the pruned and the restored model with their
    attention patterns (``explorer_texts.safetensors`` and ``.json``). If a model cannot be loaded, the page shows
    everything else and says what is missing.

    Args:
        run: a run folder with a scan, a restoration, or both.
        out: the file to write; ``explorer.html`` in the run if not given.
        other: a second run of the same dense model, to compare head by head.
        results: a ``results.json`` of an evaluation, shown as a table.
        prompts: one or several texts of your own: their next tokens, and what changed in every head on them. Those of
            the last call if none are given.
        docs: address or folder of the built documentation, which the page then links to.
        read_model: whether models may be loaded.

    Returns:
        The file written.

    Raises:
        RequestError: a run is missing or damaged, the two runs do not belong together, a prompt cannot be read, or the
            page would be too large; the documentation is not there, or the page's name does not end in .html.

    Example:
        >>> explore("runs/demo/run")  # doctest: +SKIP
        PosixPath('runs/demo/run/explorer.html')
    """
    out = Path(run) / "explorer.html" if out is None else Path(out)
    if out.suffix != ".html" and not out.is_dir():
        raise RequestError(f"expected a file ending in .html to write the page to, got {out}; name one")
    require_file(out, begins=(b"<!doctype html>",))
    docs = None if docs is None else _address(docs)
    runs = [RunContents.read(path) for path in ([run] if other is None else [run, other])]
    if len(runs) == 2:
        check_comparable(*runs)
    table = None if results is None else results_table(Path(results))
    budget = EXAMPLE_BYTES // len(runs)
    prompts = [prompts] if isinstance(prompts, str) else prompts
    data = [_gathered(one, prompts, read_model, budget) for one in runs]
    text = render(data, table, docs)
    size = len(text.encode())
    if size > MOST_BYTES:
        raise RequestError(
            f"expected a page of at most {MOST_BYTES / 1e6:.0f} MB, got {size / 1e6:.0f} MB; explore one run at a "
            "time, or scan again with fewer examples"
        )
    write_text(out, text)
    return out


def _address(docs: str) -> str:
    """The address of a documentation that is named by its own or by its folder."""
    if Path(docs).is_dir():
        return Path(docs).resolve().as_uri()
    if not docs.startswith(("https://", "http://", "file://")):
        raise RequestError(
            f"expected an address (https://...) or the folder of the built documentation, got {docs}, which is not "
            "there; build it with make docs, or name its address"
        )
    return docs


def _gathered(run: RunContents, prompts: Sequence[str], read_model: bool, example_bytes: int) -> dict[str, Any]:
    """What the page shows of a run; what needs its models is computed if they may be loaded."""
    tokens, no_tokens = find_tokens(run, read_model=read_model)
    texts, no_texts = find_texts(run, prompts, read_model=read_model)
    missing = [note for note in (no_tokens, no_texts) if note]
    return page_data(run, tokens, missing, texts=texts, example_bytes=example_bytes)


def check_comparable(first: RunContents, second: RunContents) -> None:
    """Refuse two runs whose heads do not correspond.

    Raises:
        RequestError: a run has no scan, or their dense models or their heads differ.
    """
    if first.scan is None or second.scan is None:
        path = first.path if first.scan is None else second.path
        raise RequestError(f"expected a scan in {path} to compare heads, got none; run lcc-lens scan first")
    if first.scan.record.dense_sha256 != second.scan.record.dense_sha256:
        raise RequestError(
            f"expected two runs of one dense model, got {first.scan.record.dense} in {first.path} and "
            f"{second.scan.record.dense} in {second.path}; scan both from the same model"
        )
    if first.scan.head_map.dense_heads != second.scan.head_map.dense_heads:
        raise RequestError(
            f"expected two runs with the same heads, got different heads in {first.path} and {second.path}; compare "
            "runs whose pruning left the same heads"
        )


def render(runs: Sequence[dict[str, Any]], results: dict[str, Any] | None = None, docs: str | None = None) -> str:
    """The page of one or two runs, with the table of an evaluation and links to a documentation.

    The data are a JSON script in which every ``<`` is escaped, and the scripts insert them as text only. The content
    security policy allows these scripts alone and fetches nothing.
    """
    title, headline, sentences = _summary(runs)
    style, script = _joined(_STYLES), "(() => {\n'use strict';\n" + _joined(_SCRIPTS) + "})();\n"
    boot = _read("boot.js")
    policy = (
        f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src {_hashed(style)}; "
        f"script-src {_hashed(boot)} {_hashed(script)}"
    )
    return Template(_read("page.html")).substitute(
        policy=policy,
        title=html.escape(title),
        headline=html.escape(headline),
        sentences="".join(f"<p>{html.escape(text)}</p>" for text in sentences),
        style=style,
        boot=boot,
        script=script,
        data=script_json({"runs": list(runs), "results": results, "docs": docs}),
    )


def _summary(runs: Sequence[dict[str, Any]]) -> tuple[str, str, list[str]]:
    """Title, headline and sentences of the page."""
    if len(runs) == 1:
        verdict = runs[0]["verdict"]
        return f"{runs[0]['source']['pruned_name']}: effect of pruning", verdict["headline"], list(verdict["sentences"])
    headline = " beside ".join(run["name"] for run in runs)
    return headline, headline, [f"{run['name']}: {' '.join(run['verdict']['sentences'])}" for run in runs]


def script_json(value: Any) -> str:
    """JSON that is safe inside a script element, whatever its strings contain."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate has no UTF-8


def _read(name: str) -> str:
    return (files("lcc_lens.frontends.explorer") / "assets" / name).read_text(encoding="utf-8")


def _joined(names: Sequence[str]) -> str:
    return "".join(_read(name) for name in names)


def _hashed(text: str) -> str:
    """The source expression that allows one inline text in a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
