"""The tables of a study that tell of its arms and their differences."""

from collections.abc import Sequence

from rlhf_exp.report import run_tables
from rlhf_exp.report.contrasts import Contrast
from rlhf_exp.report.estimates import Difference, Estimate
from rlhf_exp.report.findings import Findings
from rlhf_exp.report.layout import Arm, named
from rlhf_exp.report.overoptimization import Summary
from rlhf_exp.report.run_tables import Row, arm_column, known
from rlhf_exp.report.tables import Column, Table

GOLD = (
    Column(key="final", head="final gold", interval=True),
    Column(key="final_iqm", head="final gold, IQM", interval=True),
    Column(key="gain", head="gain", interval=True, signed=True),
    Column(key="relative_gain", head="gain relative to {single}", interval=True, signed=True),
    Column(key="peak", head="peak gold", interval=True),
    Column(key="gap", head="over-optimization gap", interval=True),
    Column(key="peak_step", head="peak at step", interval=True, digits=0),
    Column(key="peak_kl", head="peak at KL", interval=True, digits=2),
)
BEHAVIOR = (
    Column(key="proxy", head="proxy", interval=True),
    Column(key="kl", head="KL (nats)", interval=True, digits=2),
    Column(key="exact", head="exact KL (nats)", interval=True, digits=2),
    Column(key="win", head="win rate (start)", interval=True),
    Column(key="correct", head="accuracy", interval=True),
    Column(key="length", head="length (tokens)", interval=True, digits=1),
    Column(key="ended", head="ended", interval=True),
    Column(key="text/distinct_1", head="distinct 1", interval=True),
    Column(key="text/distinct_2", head="distinct 2", interval=True),
    Column(key="text/distinct_3", head="distinct 3", interval=True),
    Column(key="repetition", head="repetition", interval=True),
    Column(key="text/perplexity", head="perplexity", interval=True, digits=1),
)
DIFFERENCE = (
    Column(key="value", head="value"),
    Column(key="against", head="against"),
    Column(key="stratum", head="where"),
    Column(key="difference", head="difference", interval=True, signed=True),
    Column(key="verdict", head="verdict"),
    Column(key="seeds", head="seeds"),
    Column(key="strata", head="strata", files=True),
    Column(key="prompts", head="prompts", files=True),
    Column(key="scope", head="interval over"),
    Column(key="paired", head="paired", files=True),
    Column(key="improvement", head="P(improvement)", interval=True),
    Column(key="win_rate", head="win rate", interval=True),
    Column(key="more_seeds", head="more seeds needed"),
)


def all_of(findings: Findings) -> dict[str, Table]:
    """Every table by name; those without rows are left out."""
    made = (
        arms(findings),
        behavior(findings),
        contrasts(findings),
        gap_contrasts(findings),
        equal_kl(findings),
        equal_kl_contrasts(findings),
        fits(findings),
        run_tables.runs(findings),
        run_tables.benchmarks(findings),
        run_tables.cost(findings),
        run_tables.circumstances(findings),
    )
    return {table.name: table for table in made if table.rows}


def estimate(found: Summary | Estimate | None) -> Estimate | None:
    """Mean and interval."""
    return found and Estimate(mean=found.mean, low=found.low, high=found.high)


def _summarized(findings: Findings, arm: Arm, columns: Sequence[Column]) -> Row:
    found = findings.summaries[arm.name]
    row: Row = {"arm": arm.name, "seeds": len(arm.records)}
    return row | {c.key: estimate(found[c.key]) for c in columns if c.key in found}


def arms(findings: Findings) -> Table:
    """Gold of each arm over its seeds."""
    rows = []
    for arm in findings.layout.arms:
        row = _summarized(findings, arm, GOLD)
        row["final_iqm"] = findings.summaries[arm.name]["final"].iqm
        relative = findings.relative.get(arm.name)
        rows.append(row | {"relative_gain": relative and relative.gain})
    columns = [Column(**{**vars(c), "head": c.head.format(single=findings.single)}) for c in GOLD]
    note = (
        "Means over seeds [95 % interval over seeds and prompts, of the IQM over seeds]. Gain is "
        "final gold minus the start's; the gap is peak minus final."
    )
    if why := {r.reason for r in findings.relative.values() if r.reason}:
        note += f" No relative gain where: {'; '.join(sorted(why))}."
    return Table(
        name="arms",
        title="Gold by arm",
        note=note,
        columns=[arm_column(findings), Column(key="seeds", head="seeds"), *known(columns, rows)],
        rows=rows,
    )


def behavior(findings: Findings) -> Table:
    """What else became of the policies of each arm."""
    rows = [_summarized(findings, arm, BEHAVIOR) for arm in findings.layout.arms]
    return Table(
        name="behavior",
        title="Proxy, KL and text by arm",
        note="After training, means over seeds [95 % interval]; the win rate is that of gold "
        "against the start policy's completions; win rate, ended, distinct, repetition and "
        "accuracy are shares.",
        columns=[arm_column(findings), Column(key="seeds", head="seeds"), *known(BEHAVIOR, rows)],
        rows=rows,
    )


def contrasts(findings: Findings) -> Table:
    """Differences of final gold: over all strata, then within each."""
    rows = [row for contrast in findings.contrasts for row in _lines(contrast)]
    return Table(
        name="contrasts",
        title="Contrasts of final gold",
        note="Gold of the value minus gold of what it stands against, the other settings being "
        "the same; open: the interval includes 0. P(improvement): that a run of the one scores "
        "above a run of the other; win rate: share of seeds and prompts where it does; more seeds "
        "needed: about how many would settle it, if the difference is real.",
        columns=[Column(key="setting", head="setting"), *DIFFERENCE],
        rows=rows,
    )


def gap_contrasts(findings: Findings) -> Table:
    """Differences of the over-optimization gap: over all strata, then within each."""
    return Table(
        name="gap_contrasts",
        title="Contrasts of the over-optimization gap",
        note="Peak minus final gold, of the value minus of what it stands against: below 0, less "
        "of what was reached is lost again. Read as the contrasts of final gold.",
        columns=[Column(key="setting", head="setting"), *DIFFERENCE],
        rows=[row for contrast in findings.gap_contrasts for row in _lines(contrast)],
    )


def _lines(contrast: Contrast) -> list[Row]:
    """One row over all strata, if there are several, and one for each."""
    told = {"setting": contrast.axis, "value": contrast.value, "against": contrast.against}
    rows = []
    if contrast.overall and len(contrast.strata) != 1:
        where = f"all {contrast.overall.strata} strata"
        rows.append(told | {"stratum": where} | _difference(contrast.overall))
    for stratum in contrast.strata:
        where = named(stratum.settings)
        rows.append(told | {"stratum": where} | _difference(stratum.difference))
    return rows


def _difference(found: Difference) -> Row:
    kept = ("verdict", "seeds", "strata", "prompts", "scope", "paired", "more_seeds")
    return {name: getattr(found, name) for name in kept} | {
        "difference": Estimate(mean=found.mean, low=found.low, high=found.high),
        "improvement": found.improvement,
        "win_rate": found.win_rate,
    }


def equal_kl(findings: Findings) -> Table:
    """Gold of the arms at the same distance from the start."""
    return Table(
        name="equal_kl",
        title="Gold at equal KL",
        note="Gold where the runs of an arm first come to this KL; runs that never do are left "
        "out, and counted.",
        columns=[
            Column(key="kl", head="KL (nats)", digits=2),
            arm_column(findings),
            Column(key="reached", head="runs that get there"),
            Column(key="runs", head="of"),
            Column(key="gold", head="gold", interval=True),
        ],
        rows=[
            {
                "kl": a.kl,
                "arm": a.arm.name,
                "reached": a.reached,
                "runs": len(a.arm.records),
                "gold": a.gold,
            }
            for a in findings.equal_kl
        ],
    )


def equal_kl_contrasts(findings: Findings) -> Table:
    """Differences of gold at equal KL."""
    rows = []
    for contrast in findings.equal_kl_contrasts:
        kl = {"kl": contrast.measure[1]}
        rows += [kl | line for line in _lines(contrast)]
    return Table(
        name="equal_kl_contrasts",
        title=f"Contrasts of {findings.layout.compared} at equal KL",
        note="Read as the contrasts of final gold; gold where runs first come to this KL, of the "
        "runs that get there.",
        columns=[Column(key="kl", head="KL (nats)", digits=2), *DIFFERENCE],
        rows=rows,
    )


def fits(findings: Findings) -> Table:
    """The curves of Gao et al. 2022."""
    rows = [
        {
            "arm": name,
            "form": fit.form,
            "alpha": fit.alpha,
            "beta": fit.beta,
            "r2": fit.r2,
            "peak": fit.peak,
            "reached": fit.reached,
            "points": fit.points,
            "runs": fit.runs,
        }
        for name, fit in findings.fits.items()
    ]
    return Table(
        name="fits",
        title="Gao fits",
        note="Gold minus gold at the start over d = √KL; beta tells how fast more KL turns against "
        "gold. A peak beyond the largest d is extrapolated.",
        columns=[
            arm_column(findings),
            Column(key="form", head="form"),
            Column(key="alpha", head="alpha", interval=True),
            Column(key="beta", head="beta", interval=True),
            Column(key="r2", head="R²"),
            Column(key="peak", head="predicted peak d (√nats)", digits=2),
            Column(key="reached", head="largest d (√nats)", digits=2),
            Column(key="points", head="points"),
            Column(key="runs", head="runs"),
        ],
        rows=rows,
    )
