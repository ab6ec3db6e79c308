"""The colour of a token by the layer at which it was chosen, in page and terminal alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class DepthColour:
    """Background and text colour of tokens chosen at one layer, on a light and a dark page."""

    layer: int
    light: tuple[str, str]
    dark: tuple[str, str]


def depth_colours(layers: Sequence[int]) -> list[DepthColour]:
    """A sequential scale, one hue: the deeper, the stronger against the page."""
    light = ((234, 242, 250), (150, 194, 230), (28, 88, 146))
    dark = ((24, 36, 48), (38, 92, 140), (140, 200, 245))
    scale = []
    for index, layer in enumerate(layers):
        share = index / (len(layers) - 1) if len(layers) > 1 else 1.0
        pairs = [_blend(anchors, share) for anchors in (light, dark)]
        scale.append(DepthColour(layer, pairs[0], pairs[1]))
    return scale


def _blend(anchors: Sequence[tuple[int, int, int]], share: float) -> tuple[str, str]:
    position = share * (len(anchors) - 1)
    start = min(int(position), len(anchors) - 2)
    pairs = zip(anchors[start], anchors[start + 1], strict=True)
    red, green, blue = (round(a + (position - start) * (b - a)) for a, b in pairs)
    bright = 0.299 * red + 0.587 * green + 0.114 * blue > 125
    return f"#{red:02x}{green:02x}{blue:02x}", "#10161c" if bright else "#f6f9fc"
