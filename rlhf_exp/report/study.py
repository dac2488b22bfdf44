"""The report of a study: one page, its figures and its tables, from the stored files of its runs.

    python -m rlhf_exp stages=[report] runs='multirun/2026-11-22/12-00-00/*'

Needs no model, no network and no torch; the same runs give the same bytes.
"""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_exp.artifacts import write_text
from rlhf_exp.report.statistics import RESAMPLES

if TYPE_CHECKING:
    from rlhf_exp.report.findings import Findings
    from rlhf_exp.report.records import Record

logger = logging.getLogger(__name__)
FEWEST = 100  # resamples below which a quantile at 95 % means nothing


@dataclass(kw_only=True)
class Report:
    """What the report holds, and where it goes."""

    folder: str | None = None  # null: report/ in the directory of this command, or beside a sweep
    baseline: dict[str, str] | None = None  # setting -> value; null: every pair
    kl: list[float] | None = None  # nats of the equal-KL comparison; null: chosen from the data
    samples: int = 3  # prompts whose completions are shown side by side
    title: str | None = None
    resamples: int = RESAMPLES  # of the bootstrap
    after_sweep: bool = True  # write it at the end of a sweep, beside its runs

    def __post_init__(self) -> None:
        if self.resamples < FEWEST:
            raise ValueError(
                f"report.resamples={self.resamples} is too few for an interval: give at least "
                f"{FEWEST}"
            )
        if self.samples < 0:
            raise ValueError(f"report.samples={self.samples} must be at least 0")
        if wrong := [kl for kl in self.kl or () if not (kl > 0 and math.isfinite(kl))]:
            raise ValueError(
                f"report.kl={wrong[0]} is no KL at which arms can be compared: give nats above 0"
            )

    def write(self, patterns: Sequence[str], folder: Path) -> Path:
        """Write report.html, figures/ and tables/ of the runs that the patterns name to
        `self.folder`, or else to `folder`; returns the path of report.html. FileNotFoundError or
        ValueError of one sentence where there is nothing to report.
        """
        from rlhf_exp.report.findings import Findings
        from rlhf_exp.report.records import read

        records, left_out = read(patterns)
        findings = Findings(
            records=sorted(records, key=_in_order),
            left_out=left_out,
            baseline={name: str(value) for name, value in (self.baseline or {}).items()},
            kl=self.kl,
            resamples=self.resamples,
        )
        target = Path(self.folder).expanduser() if self.folder else folder
        path = target / "report.html"
        write_text(path, self.page(findings, target))
        logger.info("report of %d runs: %s", len(records), path)
        return path

    def page(self, findings: "Findings", folder: Path) -> str:
        """The page; its figures and tables are written to `folder` on the way."""
        from rlhf_exp.report import contents, page, study_figures, study_tables, words

        _ = findings.layout  # a wrong baseline ends it here
        tables = study_tables.all_of(findings)
        figures = study_figures.draw(folder / "figures", findings)
        for table in tables.values():
            table.write(folder / "tables")
        sections = contents.sections(findings, tables, figures, self.samples)
        return page.render(self.title or words.title(findings), words.lead(findings), sections)


def _in_order(record: "Record") -> list[str | int]:
    """Directories as people count: 2 before 10."""
    parts = re.split(r"(\d+)", str(record.run.directory))
    return [int(part) if part.isdigit() else part for part in parts]
