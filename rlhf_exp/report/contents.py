"""What stands on a study's page, in order."""

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from rlhf_exp.report import words
from rlhf_exp.report.drawing import Figure
from rlhf_exp.report.findings import Findings
from rlhf_exp.report.page import Section, template
from rlhf_exp.report.side_by_side import completions, configs
from rlhf_exp.report.tables import Table

PLACES = (  # anchor, title, tables
    ("arms", "Arms", ("arms", "behavior")),
    ("contrasts", "Contrasts", ("contrasts", "gap_contrasts")),
    ("equal-kl", "At equal KL", ("equal_kl", "equal_kl_contrasts", "fits")),
    ("runs", "Runs", ("runs",)),
    ("benchmarks", "Benchmarks", ("benchmarks",)),
)


def sections(
    findings: Findings, tables: Mapping[str, Table], figures: Sequence[Figure], samples: int
) -> list[Section]:
    """Every section that has something to say."""
    found = [_left_out(findings)] if findings.left_out or words.cautions(findings) else []
    found.append(
        Section(name="figures", title="Gold, proxy and KL", parts=[f.to_html() for f in figures])
    )
    for name, title, held in PLACES:
        if parts := [tables[table].to_html() for table in held if table in tables]:
            text = words.notes(findings) if name == "contrasts" else ()
            found.append(Section(name=name, title=title, text=text, parts=parts))
    if samples:
        found.append(_samples(findings, samples))
    made = tables["circumstances"].to_html() if "circumstances" in tables else Markup("")
    found.append(Section(name="settings", title="Settings", parts=[configs(findings.layout), made]))
    found.append(Section(name="cost", title="Cost", parts=[tables["cost"].to_html()]))
    return [*found, _methods(findings)]


def _left_out(findings: Findings) -> Section:
    left = findings.left_out
    many = f"{words.counted(len(left), 'directory was', 'directories were')} left out"
    told = Markup(template("left_out.html").render(many=many, left_out=left)) if left else Markup()
    text = words.cautions(findings)
    return Section(name="left-out", title="Before you read on", text=text, parts=[told], alert=True)


def _samples(findings: Findings, count: int) -> Section:
    text = (
        f"The first {count} held-out prompts, not picked, with what the start policy and the first "
        "seed of each arm answered, and what gold and proxy make of it. For best-of-n, the numbers "
        "are expected values."
    )
    shown = completions(findings.layout, count)
    return Section(name="completions", title="Completions", text=[text], parts=[shown])


def _methods(findings: Findings) -> Section:
    shown = Markup(template("methods.html").render(limits=words.shared(findings)))
    return Section(name="methods", title="How it was computed", parts=[shown])
