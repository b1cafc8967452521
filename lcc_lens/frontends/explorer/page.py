"""One self-contained HTML file: data, style and script inlined, nothing fetched."""

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
from lcc_lens.frontends.explorer.page_data import EXAMPLE_BYTES, page_data
from lcc_lens.frontends.explorer.results import results_table
from lcc_lens.frontends.explorer.run_contents import RunContents
from lcc_lens.frontends.explorer.token_reading import find_tokens

#: No page is larger, in bytes.
MOST_BYTES = 15_000_000
_STYLES = ("base.css", "charts.css", "layout.css", "map.css", "panel.css", "phone.css")
#: In the order in which they run, all inside one function.
_SCRIPTS = (
    "dom.js", "store.js", "charts.js", "head_map.js", "legend.js", "table.js", "tokens.js", "examples.js", "scores.js",
    "panel.js", "overview.js", "search.js", "theme.js", "controls.js", "keys.js", "main.js",
)  # fmt: skip


def explore(
    run: str | Path,
    out: str | Path | None = None,
    *,
    other: str | Path | None = None,
    results: str | Path | None = None,
    read_model: bool = True,
) -> Path:
    """Write a page to explore a run by layer and head; it opens in any browser with no network.

    It shows what the run holds. The tokens that components promote need the pruned model: they are read on the first
    call and kept in the run as ``explorer.safetensors`` and ``explorer.json``. Where the model cannot be loaded, the
    page shows the rest and says what is missing.

    Args:
        run: a run directory with a scan, a restoration, or both.
        out: the file to write; ``explorer.html`` in the run if not given.
        other: a second run of the same dense model to compare with, head by head.
        results: a ``results.json`` of an evaluation to show as a table.
        read_model: whether the pruned model may be loaded.

    Returns:
        The file that was written.

    Raises:
        RequestError: a run is missing or damaged, the two runs do not belong together, or the page would be too large.

    Example:
        >>> explore("runs/demo/run")  # doctest: +SKIP
        PosixPath('runs/demo/run/explorer.html')
    """
    out = Path(run) / "explorer.html" if out is None else Path(out)
    if out.is_dir():
        raise RequestError(f"expected a file to write the page to, got the folder {out}; name an .html file")
    runs = [RunContents.read(path) for path in ([run] if other is None else [run, other])]
    if len(runs) == 2:
        check_comparable(*runs)
    measured = None if results is None else results_table(Path(results))
    share = EXAMPLE_BYTES // len(runs)
    data = [page_data(run, *find_tokens(run, read_model=read_model), example_bytes=share) for run in runs]
    text = render(data, measured)
    size = len(text.encode())
    if size > MOST_BYTES:
        raise RequestError(
            f"expected a page of up to {MOST_BYTES / 1e6:.0f} MB, got {size / 1e6:.0f} MB; explore one run at a "
            f"time, or "
            "scan again with fewer examples"
        )
    write_text(out, text)
    return out


def check_comparable(first: RunContents, second: RunContents) -> None:
    """Refuse two runs whose heads are not the same dense heads.

    Raises:
        RequestError: a run has no scan, or the two are of different dense models or other heads.
    """
    for run in (first, second):
        if run.scan is None:
            raise RequestError(f"expected a scan in {run.path} to compare heads, got none; run lcc-lens scan first")
    assert first.scan is not None
    assert second.scan is not None
    if first.scan.record.dense_sha256 != second.scan.record.dense_sha256:
        raise RequestError(
            f"expected two runs of one dense model, got {first.scan.record.dense} in {first.path} and "
            f"{second.scan.record.dense} in {second.path}; scan both from the same model"
        )
    if first.scan.head_map.dense_heads != second.scan.head_map.dense_heads:
        raise RequestError(
            f"expected two runs with the same heads, got other heads in {second.path}; heads that moved cannot be "
            "compared place by place"
        )


def render(runs: Sequence[dict[str, Any]], results: dict[str, Any] | None = None) -> str:
    """The page of one run, or of two, with the table of an evaluation.

    Data stand in a JSON script, where no ``<`` is left that could end it; the scripts put them into the page as text
    only. The policy in the page's head lets nothing run but these scripts, and nothing be fetched.
    """
    title, headline, sentences = _words(runs)
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
        data=script_json({"runs": list(runs), "results": results}),
    )


def _words(runs: Sequence[dict[str, Any]]) -> tuple[str, str, list[str]]:
    """Title, headline and sentences of the page."""
    verdicts = [run["verdict"] for run in runs]
    if len(runs) == 1:
        title = f"{runs[0]['source']['pruned_name']}: what pruning took"
        return title, verdicts[0]["headline"], list(verdicts[0]["sentences"])
    headline = " beside ".join(run["name"] for run in runs)
    told = [f"{run['name']}: {' '.join(found['sentences'])}" for run, found in zip(runs, verdicts, strict=True)]
    return headline, headline, told


def script_json(value: Any) -> str:
    """JSON that can stand in a script element whatever its texts hold."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair cannot be written


def _read(name: str) -> str:
    return (files("lcc_lens.frontends.explorer") / "assets" / name).read_text(encoding="utf-8")


def _joined(names: Sequence[str]) -> str:
    return "".join(_read(name) for name in names)


def _hashed(text: str) -> str:
    """A content security policy's name for one inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
