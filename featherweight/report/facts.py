"""`Report`: everything a compression has to tell, as plain JSON types, so that any renderer can be run again later."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from featherweight.errors import ArtifactError, closest

FORMAT = 1


@dataclass
class Report:
    """The facts of one compression; a part that was not measured or did not happen stays empty.

    Attributes:
        task: what was compressed, in a word or two.
        command: the exact command line or Python call that reproduces it.
        created: ISO date.
        machine: as `measurement.machine()` gives it.
        seed: of every random draw.
        budget: the budget's text.
        verdict: as `Verdict.to_dict()` gives it.
        before: the original, as `Measurement.to_dict()` gives it.
        after: the delivered file, likewise.
        agreement: exported against PyTorch model: `max_abs`, `sqnr_db` (decibels), `top1` (share, 0 to 1).
        recipe: the chosen recipe, YAML.
        steps: one a step, the first the original: `step`, `score`, `size_bytes`, `latency_seconds`, `macs`, `seconds`
            (what the step took), `note`, and if timed beside the original `speedup`.
        parts: bytes of the file by part: manifest, graph, container and each tensor by name.
        layers: one a layer: `path`, `kind`, `parameters`, `nonzero`, `bits`, `bytes`.
        untouched: layers a step left alone: `path`, `step`, `reason`.
        trials: one a candidate of the search: `recipe`, `size_bytes`, `score`, `drop`, `met`, `seconds`.
        notes: what was split off, left out or assumed, in sentences.
        seconds: the whole of it took.
    """

    task: str
    command: str
    created: str
    machine: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    budget: str = ""
    verdict: dict[str, Any] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    agreement: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""
    steps: list[dict[str, Any]] = field(default_factory=list)
    parts: dict[str, int] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    untouched: list[dict[str, Any]] = field(default_factory=list)
    trials: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as plain JSON types; a number that is not finite becomes None."""
        return {"format": FORMAT, **{item.name: plain(getattr(self, item.name)) for item in fields(self)}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """Read what `to_dict` wrote.

        Raises:
            ArtifactError: a fact is unknown, missing or of another type, or the format is of another version.
        """
        if not isinstance(values, Mapping):
            raise ArtifactError(f"a report is a mapping of facts, not {type(values).__name__}")
        if values.get("format") != FORMAT:
            raise ArtifactError(f"this version reads reports of format {FORMAT}, not {values.get('format')!r}")
        facts = {name: value for name, value in values.items() if name != "format"}
        known = {item.name: str(item.type) for item in fields(cls)}
        for name, value in facts.items():
            if name not in known:
                raise ArtifactError(f"the report has an unknown fact {name!r}.{closest(str(name), known)}")
            wanted = {"str": str, "int": int, "float": float, "dict": dict, "list": list}[known[name].partition("[")[0]]
            if not isinstance(value, wanted):
                raise ArtifactError(
                    f"{name} of a report is {wanted.__name__}, not {type(value).__name__} {value!r:.80}"
                )
        if missing := [name for name in ("task", "command", "created") if name not in facts]:
            raise ArtifactError(f"the report lacks {', '.join(missing)}")
        return cls(**facts)


def plain(value: Any) -> Any:
    """Return JSON types for what may hold NumPy scalars, tuples and infinities."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if not isinstance(value, bool | int | float | str) and hasattr(value, "item"):
        return plain(value.item())
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
