"""A matplotlib figure as part of the page and as files: text stays text, ids are its own, and the
same numbers give the same bytes.
"""

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from rlhf_exp.artifacts import write_text
from rlhf_exp.report.look import LOOK
from rlhf_exp.report.page import template

INK = "#010203"  # stands for the color of the text around the figure, light or dark
DRAWN: dict[Any, Any] = LOOK | {
    "font.family": "DejaVu Sans",  # comes with matplotlib; the page puts its own in place
    "svg.fonttype": "none",
    "text.parse_math": False,  # a setting may hold a $
    "svg.hashsalt": "rlhf_exp",
    "grid.alpha": 0.14,
    "grid.color": INK,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of the page, also <name>.png and <name>.svg."""

    name: str
    title: str
    caption: str
    svg: Markup

    def to_html(self) -> Markup:
        """The figure with title and caption."""
        return Markup(template("figure.html").render(figure=self))


def save(drawn: Any, folder: Path, name: str, title: str, caption: str) -> Figure:
    """Write the matplotlib figure `drawn` to `folder` and close it."""
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    drawn.savefig(folder / f"{name}.png", dpi=150, facecolor="white")
    svg = _svg(drawn, name)
    write_text(folder / f"{name}.svg", svg)
    plt.close(drawn)
    return Figure(name=name, title=title, caption=caption, svg=Markup(svg))


def _svg(drawn: Any, name: str) -> str:
    """Its SVG element: no date, no background, ids that begin with `name`, ink from the page."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    drawn.savefig(file, format="svg", metadata=nothing, transparent=True)
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'(?<=\bid=")', f"{name}-", text)
    return re.sub(r'(?<=href="#)|(?<=url\(#)', f"{name}-", text)
