"""A map of all heads for a terminal with colours: the first picture of a scan, before any page is opened."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from lcc_lens.frontends.plotting.theme import SEQUENTIAL, largest_change

if TYPE_CHECKING:
    from rich.text import Text

_HALF = "▀"  # its ink is the upper half of a character, and its ground the lower one
_REMOVED = "grey37"


def terminal_map(
    relative_loss: Float[Tensor, "layer head"], removed: Sequence[Collection[int]], columns: int
) -> Text | None:
    """Each head as a coloured cell, two layers in a line, with a scale below.

    Args:
        relative_loss: how much each head changed, as a fraction.
        removed: by layer, the heads that were removed; they are grey.
        columns: the terminal's width.

    Returns:
        The map; None if the heads do not fit the width.
    """
    from plotly.colors import sample_colorscale
    from rich.style import Style
    from rich.text import Text

    n_layers, n_heads = relative_loss.shape
    margin = len(str(n_layers - 1)) + 1
    wide = 2 if margin + 2 * n_heads <= columns else 1
    if margin + wide * n_heads > columns:
        return None
    largest = largest_change(relative_loss)

    def color(share: float) -> str:
        (sampled,) = sample_colorscale(SEQUENTIAL, [min(max(share, 0.0), 1.0)])
        return str(sampled).replace(" ", "")

    colors = [
        [_REMOVED if head in removed[layer] else color(share) for head, share in enumerate(row)]
        for layer, row in enumerate((relative_loss / largest).tolist())
    ]
    picture = Text(no_wrap=True)
    for layer in range(0, n_layers, 2):
        picture.append(f"{layer:>{margin - 1}} ")
        grounds = colors[layer + 1] if layer + 1 < n_layers else [None] * n_heads
        for ink, ground in zip(colors[layer], grounds, strict=True):
            picture.append(_HALF * wide, Style(color=ink, bgcolor=ground))
        picture.append("\n")
    picture.append(f"{'':{margin}}layer x head, 0 ")
    for step in range(12):
        picture.append(" ", Style(bgcolor=color(step / 11)))
    picture.append(f" {100 * largest:.0f} % changed")
    return picture
