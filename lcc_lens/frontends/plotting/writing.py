"""Writes figures as HTML that opens without a network, and as PNG, SVG and PDF through kaleido."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.files import atomic_path, write_text
from lcc_lens.core.ranges import ranged

if TYPE_CHECKING:
    import plotly.graph_objects as go

IMAGES = (".png", ".svg", ".pdf")
#: PNG pixels per figure pixel: 240 per inch at the column width of a paper.
_SCALE = 2
_LIBRARY = "plotly.min.js"
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_KEYWORD = b"lcc_lens figure"


@ranged
def write_html(figure: go.Figure, path: str | Path, *, alone: bool = True) -> None:
    """Write an interactive page that opens without a network.

    Args:
        figure: the figure.
        path: of the page.
        alone: include Plotly (5 MB) in the page; otherwise in a file beside it, which the pages of a folder share.
    """
    path = Path(path)
    if not alone and not (path.parent / _LIBRARY).exists():
        from plotly.offline import get_plotlyjs

        write_text(path.parent / _LIBRARY, get_plotlyjs())
    write_text(path, figure.to_html(include_plotlyjs=True if alone else _LIBRARY, full_html=True))


@ranged
def write_image(figure: go.Figure, path: str | Path) -> None:
    """Write PNG, SVG or PDF (by suffix) through kaleido.

    Raises:
        RequestError: another suffix.
        LensError: kaleido or a Chromium browser is missing.
    """
    write_images({Path(path): figure})


def write_images(figures: Mapping[Path, go.Figure]) -> None:
    """Write several images with one browser; a PNG also stores the hash of its figure."""
    import plotly.io

    for path in figures:
        if path.suffix not in IMAGES:
            raise RequestError(f"expected a file name that ends in {', '.join(IMAGES)}, got {path.name}")
    if not figures:
        return
    with TemporaryDirectory() as folder:
        drafts = [Path(folder) / f"{number}{path.suffix}" for number, path in enumerate(figures)]
        try:
            drawn = list(figures.values())
            plotly.io.write_images(
                fig=drawn, file=drafts, scale=[_SCALE] * len(drawn), width=[f.layout.width for f in drawn],
                height=[f.layout.height for f in drawn],
            )  # fmt: skip
        except (ValueError, RuntimeError, ImportError, OSError) as error:
            raise LensError(
                f"expected kaleido and a Chromium browser to draw {next(iter(figures)).name}, got none that works "
                f"({str(error).strip().splitlines()[0][:100]}); install them, or write HTML instead"
            ) from error
        for draft, (path, figure) in zip(drafts, figures.items(), strict=True):
            content = draft.read_bytes()
            with atomic_path(path) as part:
                part.write_bytes(_named(content, figure_sha256(figure)) if path.suffix == ".png" else content)


def figure_json(figure: go.Figure) -> str:
    """The figure as JSON text; equal figures give equal text."""
    return json.dumps(json.loads(figure.to_json()), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def figure_sha256(figure: go.Figure) -> str:
    """The SHA-256 of :func:`figure_json`."""
    return hashlib.sha256(figure_json(figure).encode()).hexdigest()


def drawn_from(png: Path) -> str | None:
    """Hash of the figure in a PNG of :func:`write_images`; None for other files.

    The pixels depend on a machine's fonts, the hash does not.
    """
    content, place = png.read_bytes(), len(_SIGNATURE)
    while content.startswith(_SIGNATURE) and place + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[place : place + 8])
        keyword, _, text = content[place + 8 : place + 8 + length].partition(b"\0")
        if (kind, keyword) == (b"tEXt", _KEYWORD):
            return text.decode("ascii")
        place += length + 12
    return None


def _named(png: bytes, sha256: str) -> bytes:
    """The PNG with the hash in a tEXt chunk after its header chunk."""
    end = len(_SIGNATURE) + 12 + struct.unpack(">I", png[8:12])[0]
    chunk = b"tEXt" + _KEYWORD + b"\0" + sha256.encode("ascii")
    return png[:end] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[end:]
