"""What a study says in sentences, made from its data; nothing is claimed where an interval
includes 0.
"""

import re
from collections import Counter
from collections.abc import Sequence

from rlhf_exp.report.contrasts import Contrast
from rlhf_exp.report.findings import Findings
from rlhf_exp.report.page import Said
from rlhf_exp.report.tables import MINUS

TOLD = 6  # contrasts of either kind in the first paragraphs; the table holds all
NAMED = 6  # arms in a sentence


def title(findings: Findings) -> str:
    """What is compared, and over what."""
    axes = [name.rsplit(".", 1)[-1] for name in findings.layout.axes]
    what = " and ".join([", ".join(axes[:-1]), axes[-1]] if len(axes) > 1 else axes)
    return f"Gold, proxy and KL by {what}" if what else "Gold, proxy and KL"


def lead(findings: Findings) -> list[Said]:
    """How many runs, what is settled and what is open."""
    arms = findings.layout.arms
    counts = sorted({len(arm.records) for arm in arms})
    seeds = counted(counts[0], "seed") if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    left = len(findings.left_out)
    out = f"; {counted(left, 'directory', 'directories')} left out, named below" if left else ""
    runs = counted(len(findings.records), "finished run")
    first = f"{runs}: {counted(len(arms), 'arm')} of {seeds}{out}."
    known = [c for c in findings.contrasts if c.overall is not None]
    if not known:
        return [(f"{first} No two arms differ in one setting alone, so nothing is compared.", [])]
    settled = [c for c in known if c.overall and c.overall.verdict != "open"]
    still_open = [c for c in known if c.overall and c.overall.verdict == "open"]
    return [(first, []), _settled(settled, len(known)), *_open(still_open), *_gaps(findings)]


def _settled(found: Sequence[Contrast], count: int) -> Said:
    whole = f"Of {counted(count, 'contrast')} of final gold"
    if not found:
        return f"{whole}, none has an interval that excludes 0.", []
    have = "has an interval that excludes 0" if len(found) == 1 else "have intervals that exclude 0"
    return f"{whole}, {len(found)} {have}:", _several(found)


def _open(found: Sequence[Contrast]) -> list[Said]:
    if not found:
        return []
    return [(f"{len(found)} {'is' if len(found) == 1 else 'are'} open:", _several(found))]


def _gaps(findings: Findings) -> list[Said]:
    """What became of the over-optimization gap."""
    known = [c for c in findings.gap_contrasts if c.overall is not None]
    what = "The over-optimization gap (peak minus final gold; lower: less is lost again):"
    return [(what, _several(known))] if known else []


def _several(found: Sequence[Contrast]) -> list[str]:
    """The largest, as seen from 0."""
    ordered = sorted(found, key=lambda c: -abs(c.overall.mean) if c.overall else 0.0)
    more = len(found) - TOLD
    rest = [f"and {more} more in the table"] if more > 0 else []
    return [*map(_told, ordered[:TOLD]), *rest]


def _told(contrast: Contrast) -> str:
    assert contrast.overall is not None
    what = f"{contrast.axis}, {contrast.value} {MINUS} {contrast.against}"
    return f"{what}: {re.sub(r'-(?=[0-9])', MINUS, contrast.overall.told)}"


def cautions(findings: Findings) -> list[str]:
    """Where arms are not alike."""
    arms = findings.layout.arms
    most = max(len(arm.records) for arm in arms)
    fewer = [f"{arm.name} ({len(arm.records)})" for arm in arms if len(arm.records) < most]
    found = [f"Arms with fewer than {most} seeds: {_listed(fewer)}."] if fewer else []
    if most == 1:
        found.append("One seed per arm: intervals are over prompts and say nothing of other seeds.")
    prompts = Counter(record.prompts for record in findings.records)
    if len(prompts) > 1:
        found.append(
            f"The runs were evaluated on {len(prompts)} different sets of held-out prompts; arms "
            "that differ in them are not paired."
        )
    return found


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def notes(findings: Findings) -> list[str]:
    """What the contrasts could not use."""
    told = dict.fromkeys(note for c in findings.contrasts for note in c.notes)
    return [_listed(list(told)) + "."] if told else []


def shared(findings: Findings) -> list[str]:
    """What no interval tells of."""
    if not findings.shared:
        return []
    return [
        f"Seeds that stand still in all runs: {', '.join(findings.shared)}; what other values of "
        "theirs would do is not known."
    ]


def counted(count: int, one: str, many: str = "") -> str:
    """1 run, 2 runs"""
    return f"{count} {one if count == 1 else many or one + 's'}"
