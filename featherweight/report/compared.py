"""`Comparison`: everything a comparison found, as plain JSON types, so that table and page can be made again later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from featherweight.errors import ArtifactError, closest
from featherweight.report.facts import plain

FORMAT = 1


@dataclass
class Comparison:
    """The facts of one comparison.

    Attributes:
        task: what was made small.
        command: the exact command line or Python call that reproduces it.
        created: ISO date of the last run.
        protocol: `epochs`, `tries`, `budgets`, `seeds`, `splits` (samples of each), `device`, `versions`, `commit`, `watts`.
        machine: as `measurement.machine()` gives it; a list where seeds are from machines of several kinds.
        contenders: one a recipe: `name`, `kind`, `about`.
        originals: one a seed: `bytes`, `score`, `macs`, `params`, `peak_bytes`, `sensitivity` by layer, `notes`, `machine`.
        rows: one a cell, as `comparison.cells` makes them.
        ranking: one a contender and budget, over the seeds: means, intervals, and whether it is as good as the best.
        answers: one a budget: `budget`, `allowed`, `recipe`, `text`.
    """

    task: str
    command: str
    created: str
    protocol: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    contenders: list[dict[str, Any]] = field(default_factory=list)
    originals: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    ranking: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as plain JSON types; a number that is not finite becomes None."""
        return {"format": FORMAT, **{item.name: plain(getattr(self, item.name)) for item in fields(self)}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Comparison:
        """Read what `to_dict` wrote.

        Raises:
            ArtifactError: a fact is unknown or missing, or the format is of another version.
        """
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            raise ArtifactError(f"this version reads comparisons of format {FORMAT}, and this is none")
        facts = {name: value for name, value in values.items() if name != "format"}
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(facts) - known):
            raise ArtifactError(f"the comparison has an unknown fact {unknown[0]!r}.{closest(unknown[0], known)}")
        if missing := sorted({"task", "command", "created"} - set(facts)):
            raise ArtifactError(f"the comparison lacks {', '.join(missing)}")
        return cls(**facts)

    def done(self) -> list[dict[str, Any]]:
        """Return the rows of cells that gave a file."""
        return [row for row in self.rows if row["status"] == "done"]
