"""How every figure and page looks: fonts and grid, colors that the color-blind tell apart."""

from collections.abc import Sequence
from typing import Any

LOOK: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}
GOLD, PROXY, GREY = "#b8860b", "#1f5fa8", "#8a8a8a"
# Okabe and Ito (2008) without the yellow and the black that vanish on white and on dark
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8a8a", "#9467bd")
MARKERS = "osD^vPX*"  # tell apart values whose colors are the same
Look = dict[str, Any]


def looks(values: Sequence[str]) -> dict[str, Look]:
    """Color and marker of each value, in order; the 9th has the first color and another marker."""
    return {
        value: {
            "color": PALETTE[i % len(PALETTE)],
            "marker": MARKERS[i // len(PALETTE) % len(MARKERS)],
        }
        for i, value in enumerate(dict.fromkeys(values))
    }
