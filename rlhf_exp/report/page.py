"""A self-contained page from its sections: no script, style, font or image comes from elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

Said = tuple[str, list[str]]  # a sentence, and items below it
TEMPLATES = Path(__file__).parent / "template"


@dataclass(frozen=True, kw_only=True)
class Section:
    """One heading of the page and what stands below it."""

    name: str  # its anchor
    title: str
    text: Sequence[str] = ()  # paragraphs, escaped
    parts: Sequence[Markup] = ()  # tables, figures and whatever else is HTML already
    alert: bool = False  # set apart, so that nobody overlooks it


def render(title: str, lead: Sequence[Said], sections: Sequence[Section]) -> str:
    """The page: title, what it says in a few sentences, contents, sections."""
    style, script = ((TEMPLATES / name).read_text() for name in ("report.css", "report.js"))
    return template("report.html").render(
        title=title, lead=lead, sections=sections, style=Markup(style), script=Markup(script)
    )


def template(name: str) -> Template:
    """A template of this folder; whatever is put into it is escaped."""
    return _environment().get_template(name)


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
