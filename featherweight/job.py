"""One compression: what is asked for, checked and measured, and a recipe carried out step by step."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featherweight import measurement as measuring
from featherweight.agreement import Agreement
from featherweight.allocation import Healing
from featherweight.artifact import compact, package
from featherweight.costs import parameters
from featherweight.data import Data, Shortened, batches, samples
from featherweight.edits import Edit, Write, to_json
from featherweight.errors import BudgetError, FeatherweightError, RecipeError
from featherweight.latency import latencies
from featherweight.latency_table import LatencyTable
from featherweight.measurement import Measurement
from featherweight.modes import answering
from featherweight.portable import Graph, assemble, export_graph
from featherweight.preflight import Request, open_workspace, opened
from featherweight.running import run
from featherweight.scoring import Score, evaluate
from featherweight.technique import Context, Recipe, Stage, Technique, Untouched
from featherweight.techniques import FoldBatchNorm, together

Progress = Callable[[str, float], None]
MARGIN = 2.0  # standard errors: the pick of several trials looks better on validation than it is
_USUAL_AGREEMENT = Agreement(9.537e-06, 139.6, 1.0)
_DIGITS = 12  # bytes by which the final facts may be longer
_STEPS = 8000  # optimizer steps that the gradual pruning of a trial aims at
_MOST_MACS = 4e12  # forward multiply-adds that it may take: minutes on two cores
_SEVERAL = 14  # whole trainings: what comparing mixes by long ones takes, about
_FEWEST_EPOCHS, _MOST_EPOCHS = 2, 60
_HELD = 12  # cut and factored models that are kept: what a few mixes at two strengths need


@dataclass(frozen=True)
class Cut:
    """A recipe after its cuts and factors, before anything that candidates differ in: training, zeros and widths."""

    model: nn.Module
    edits: list[Edit]
    untouched: list[Untouched]
    sparse: set[str]


@dataclass
class Result:
    """A recipe carried out: the model, the edits, what was left alone, one row a step, and who exports the graph.

    `score` is on validation data, of a recipe that was measured.
    """

    recipe: Recipe
    model: nn.Module
    edits: list[Edit]
    untouched: list[Untouched]
    steps: list[dict[str, Any]]
    export: Callable[[nn.Module, list[Edit]], Graph]
    score: Score | None = None

    @property
    def graph(self) -> Graph:
        """The model's graph; exporting takes seconds, and most candidates are never asked."""
        return self.export(self.model, self.edits)


@dataclass
class Job:
    """One compression: what every part of it reads."""

    model: nn.Module
    data: Data
    notes: tuple[str, ...]
    request: Request
    teacher: nn.Module
    workspace: Path
    temporary: tempfile.TemporaryDirectory[str] | None
    table: LatencyTable
    progress: Progress
    before: Measurement
    score: Score
    original: Graph
    epochs: int
    graphs: dict[str, Graph]
    cuts: dict[tuple[Technique, ...], Cut]
    measured: dict[Recipe, Result]

    @classmethod
    def start(
        cls, model: nn.Module, data: Data, teacher: nn.Module | None, request: Request, progress: Progress
    ) -> Job:
        """Check everything that can be checked before any work starts, and measure the original.

        Raises:
            BudgetError, DataError, ModelError, RecipeError, ArtifactError: what cannot work; nothing is left behind.
        """
        model, complete_data, notes = opened(model, data)
        temporary = tempfile.TemporaryDirectory() if request.out is None and together.first() else None

        def started() -> Path:
            folder = Path(temporary.name) if temporary is not None else request.workspace
            open_workspace(folder, request)
            return folder

        workspace = together.told(started)
        try:
            table = LatencyTable(request.latency_table or workspace / "latency.json", request.runtime, request.clock)
            progress("measuring the original", 0.0)
            before = measuring.structure(model, complete_data)
            job = cls(
                model=model,
                data=complete_data,
                notes=notes if request.clock is None else (*notes, request.clock.note),
                request=request,
                teacher=answering(model if teacher is None else teacher, request.device),
                workspace=workspace,
                temporary=temporary,
                table=table,
                progress=progress,
                before=before,
                score=evaluate(model, complete_data, "validate"),
                original=export_graph(model, complete_data),
                epochs=training_epochs(complete_data, before.macs or 0, request.epochs),
                graphs={},
                cuts={},
                measured={},
            )
            job.refuse_impossible()
        except FeatherweightError:
            if not request.resume:
                _remove(workspace, temporary)
            raise
        return job

    def refuse_impossible(self) -> None:
        """Raise when not even a file without information in its weights would be small enough.

        Raises:
            BudgetError: the size limit is below that.
        """
        limit = self.request.budget.limit("size")
        if limit is None:
            return
        allowed = limit.allowed(self.before.size_bytes)
        floor = file_floor(self.model, [], self.original)
        if floor > allowed:  # a network full of norms may still fit once they are folded
            folded, edits = run(FoldBatchNorm(), self.model, Context(data=self.data))
            floor = min(floor, file_floor(folded, edits, export_graph(folded, self.data)))
        if floor > allowed:
            raise BudgetError(
                f"the budget {limit} is impossible: the graph and the manifest of this model alone take {floor:,} bytes; "
                f"ask for at least size<={floor * 2 // 1000 + 1}KB"
            )

    @property
    def quick(self) -> bool:
        """Whether as many trainings as a comparison of mixes wants take no longer than one may."""
        return _SEVERAL * self.epochs <= affordable_epochs(self.data, self.before.macs or 0)

    def size(self, result: Result) -> int:
        """Bytes of the file, its scores and agreement standing for those that are known at the end."""
        facts = self.facts(result, self.score, self.score, _USUAL_AGREEMENT)
        return len(package(result.model, result.edits, facts, result.graph).to_bytes()) + _DIGITS

    def execute(self, recipe: Recipe, by_user: bool, measure: bool = True, steps: int | None = None) -> Result:
        """Carry out a recipe step by step on a private copy, from checkpoints where there are any, in all processes together.

        Args:
            recipe: what to do.
            by_user: whether the user wrote it.
            measure: whether to measure the model after each step.
            steps: of each epoch, to try a recipe on a part of the training data; all of them when None.

        Raises:
            RecipeError: a step that the user wrote found nothing to do.
        """
        if measure and recipe in self.measured:
            return self.measured[recipe]
        together.ask((recipe, by_user, measure, steps))
        data, workspace = self.data, self.workspace
        if steps is not None and data.train is not None:
            data, workspace = replace(data, train=Shortened(data.train, steps)), workspace / f"first-{steps}"
        context = Context(
            data=data,
            teacher=self.teacher,
            device=self.request.device,
            seed=self.request.seed,
            workspace=workspace,
            report=self.progress,
        )
        model: nn.Module = copy.deepcopy(self.model)
        edits: list[Edit] = []
        graph = self.original
        score = self.score
        row = partial(self._row, "original", model, graph, edits, 0.0, "", score)
        rows = [together.told(row)] if measure else []
        head = () if measure else _head(recipe)  # a model that is measured is measured after every step
        known_cut = self.cuts.get(head)
        if known_cut is not None:
            model, edits = known_cut.model, list(known_cut.edits)  # `run` works on a copy
            context.untouched, context.sparse = list(known_cut.untouched), set(known_cut.sparse)
        for position, step in enumerate(recipe.steps):
            if known_cut is not None and position < len(head):
                continue
            begin = time.perf_counter()
            known = len(context.untouched)
            context.step, context.position = str(step), position
            model, done = run(step, model, context)
            together.same(f"what {step} did", to_json(done))
            edits += done
            note = "" if done else "found nothing to do"
            if by_user and not done:
                raise RecipeError(f"{step} found nothing to do: {_instead(model, context.untouched[known:])}")
            if measure:
                seconds, plain = time.perf_counter() - begin, copy.deepcopy(model).cpu()
                if done:
                    graph, score = self.graph_of(plain, edits), evaluate(plain, self.data, "validate")
                rows.append(together.told(partial(self._row, str(step), plain, graph, edits, seconds, note, score)))
            if position + 1 == len(head):
                self._hold(head, Cut(model, list(edits), list(context.untouched), set(context.sparse)))
        result = Result(recipe, model.cpu(), edits, context.untouched, rows, self.graph_of, score if measure else None)
        if measure:
            self.measured[recipe] = result
        return result

    def _hold(self, head: tuple[Technique, ...], cut: Cut) -> None:
        """Keep a cut model for the candidates that begin like it; the oldest goes when there are many."""
        self.cuts[head] = cut
        if len(self.cuts) > _HELD:
            del self.cuts[next(iter(self.cuts))]

    def graph_of(self, model: nn.Module, edits: list[Edit]) -> Graph:
        """Return a model's graph, which holds no weights: exported once for all candidates of the same structure."""
        structure = [edit for edit in compact(edits) if not isinstance(edit, Write)]
        if not structure:
            return self.original
        key = json.dumps(to_json(structure))
        if key not in self.graphs:
            self.graphs[key] = export_graph(model, self.data)
        return self.graphs[key]

    def _row(
        self, step: str, model: nn.Module, graph: Graph, edits: list[Edit], seconds: float, note: str, score: Score
    ) -> dict[str, Any]:
        """What one step did: score, bytes and milliseconds of the model, on the CPU, as it stands after it."""
        size = len(package(model, edits, {}, graph).to_bytes())
        original, now = self._timed(assemble(graph, model.state_dict()))
        return {
            "step": step,
            "score": score.value,
            "size_bytes": size,
            "latency_seconds": now,
            "speedup": original / now,
            "macs": measuring.structure(model, self.data).macs,
            "seconds": seconds,
            "note": note,
        }

    def _timed(self, model: bytes) -> tuple[float, float]:
        """Seconds of the original and of a model, serialized ONNX, taken in turn here, or by the table's clock."""
        original = assemble(self.original, self.model.state_dict())
        if self.table.clock is not None:
            return self.table.original(original, self.data), self.table.candidate(model, original, self.data)
        timed = latencies({"original": original, "now": model}, self.data, 0.2, self.request.runtime)
        return timed["original"].median, timed["now"].median

    def facts(self, result: Result, before: Score, after: Score, agreed: Agreement) -> dict[str, Any]:
        """What the file says of itself: reproducible, so never a time, a date or a path."""
        elements, nonzero = parameters(result.model)
        facts: dict[str, Any] = {
            "class": type(self.model).__name__,
            "recipe": result.recipe.to_json(),
            "seed": self.request.seed,
            "original_bytes": self.before.size_bytes,
            "parameters": elements,
            "nonzero": nonzero,
            "macs": measuring.structure(result.model, self.data).macs,
            "score": after.name,
            "score_before": before.value,
            "score_after": after.value,
            "agreement": agreed.to_dict(),
        }
        if (
            self.request.recipe is None and self.request.budget.limit("latency") is not None
        ):  # nothing else chooses by time
            facts["latency_table"] = self.table.digest()
        return facts

    def tidy(self) -> None:
        """Remove the checkpoints of a finished job."""
        _remove(self.workspace, self.temporary)


def _remove(workspace: Path, temporary: tempfile.TemporaryDirectory[str] | None) -> None:
    if temporary is not None:
        temporary.cleanup()
    else:
        shutil.rmtree(workspace, ignore_errors=True)


def _head(recipe: Recipe) -> tuple[Technique, ...]:
    """The steps before the first one that trains, zeroes or rounds."""
    steps = takewhile(lambda step: step.stage is not None and step.stage <= Stage.FACTOR, recipe.steps)
    return tuple(steps)


def file_floor(model: nn.Module, edits: list[Edit], graph: Graph, kept: Collection[str] = ()) -> int:
    """Bytes of the file when every weight is zero, but for those whose names are kept."""
    empty = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in empty.state_dict().items():
            if name not in kept:
                tensor.zero_()
    return len(package(empty, edits, {}, graph).to_bytes())


def training_epochs(data: Data, macs: int, most: int | None = None) -> int:
    """Epochs of gradual pruning in a trial: enough steps to settle, within what the network's size allows.

    Args:
        data: with the training loader.
        macs: multiply-adds of a sample.
        most: of a trial in all, with the half more that follow quantization; at least 2.
    """
    if data.train is None:
        return 0
    if most is not None:
        return max(epochs for epochs in range(1, most) if Healing.of(epochs).total <= most)
    enough = min(_STEPS / _steps(data), affordable_epochs(data, macs))
    return round(min(_MOST_EPOCHS, max(_FEWEST_EPOCHS, enough)))


def affordable_epochs(data: Data, macs: int) -> float:
    """Return how many epochs a network's size allows.

    Args:
        data: with the training loader.
        macs: multiply-adds of a sample.
    """
    inputs, _ = next(batches(data.train, "train"))
    return _MOST_MACS / max(1, macs * _steps(data) * samples(inputs))


def _steps(data: Data) -> int:
    """Optimizer steps of an epoch; a hundred where the loader does not say."""
    loader: Any = data.train
    return max(1, len(loader)) if hasattr(loader, "__len__") else 100


def _instead(model: nn.Module, left: list[Untouched]) -> str:
    if left:
        return "; ".join(f"{item.path}: {item.reason}" for item in left[:4])
    kinds = sorted({type(module).__name__ for module in model.modules() if not list(module.children())})
    return f"the model in its scope has only {', '.join(kinds)}"
