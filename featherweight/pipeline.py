"""`compress`: the whole story, from a trained model and a budget to one file and the report that proves it."""

from __future__ import annotations

import copy
import datetime
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featherweight import measurement as measuring
from featherweight.artifact import Artifact, load, package
from featherweight.budget import Budget
from featherweight.costs import parameters
from featherweight.data import Data, as_call, batches, complete
from featherweight.edits import Edit, module_at
from featherweight.errors import ArtifactError, BudgetError, RecipeError
from featherweight.latency import LatencyTable, latencies
from featherweight.layers import QuantizedLayer
from featherweight.measurement import Measurement
from featherweight.portable import Graph, assemble, export_graph
from featherweight.preflight import check, find_device, open_workspace, writable
from featherweight.recipe_files import recipe_to_yaml
from featherweight.report.facts import Report
from featherweight.running import run
from featherweight.scoring import Score, evaluate
from featherweight.search import Strength, Trial, default_recipe, search
from featherweight.technique import Context, Recipe, Technique, Untouched
from featherweight.techniques import FoldBatchNorm

Progress = Callable[[str, float], None]
MARGIN = 2.0  # standard errors: the pick of several trials looks better on validation than it is
_STEPS = 8000  # optimizer steps that the gradual pruning of a trial aims at
_MOST_MACS = 1e13  # forward multiply-adds that it may take
_FEWEST_EPOCHS, _MOST_EPOCHS = 2, 60


def compress(
    model: nn.Module,
    data: Data,
    budget: Budget | str,
    recipe: Technique | None = None,
    *,
    teacher: nn.Module | None = None,
    trials: int = 20,
    seed: int = 0,
    device: str = "cpu",
    out: str | Path | None = None,
    resume: bool = False,
    latency_table: str | Path | None = None,
    strict: bool = False,
    name: str = "model",
    command: str = "",
    progress: Progress = lambda message, done: None,
) -> Artifact:
    """Compress a trained model until it keeps a budget, and write one file that runs by itself.

    Args:
        model: the trained model; it is never changed.
        data: example, loaders, loss and score; what is missing is split off or left out, and the report says so.
        budget: limits such as `"size<=2%, drop<=1pt"`; see `Budget.parse`.
        recipe: what to do; when missing, the default recipe at strengths that a search picks on validation data.
        teacher: whose outputs healing follows; the model itself when missing.
        trials: most candidates that a search trains.
        seed: of every random draw; one seed gives one file, byte for byte.
        device: `"cpu"`, `"cuda"` or `"mps"`, for training.
        out: where the file goes; when missing it is not kept on disk. Checkpoints live beside it in `OUT.run/`.
        resume: continue from `OUT.run/` after a kill.
        latency_table: JSON file of measured seconds to read and extend, so that choices by time can be repeated.
        strict: raise `BudgetError` with the closest artifact when the budget is missed.
        name: what the model is called in the report.
        command: how to reproduce this, for the report.
        progress: called with a message and the share done.

    Returns:
        the artifact, with `report`; `report.verdict` says whether the budget is met.

    Raises:
        BudgetError: the budget cannot be read or is impossible, or with `strict` was missed.
        DataError, RecipeError, ModelError, ExportError, ArtifactError: see there; the message says what would work.
    """
    wanted = Budget.parse(budget) if isinstance(budget, str) else budget
    job = _Job.start(model, data, wanted, teacher, seed, device, out, resume, latency_table, recipe, trials, progress)
    begin = time.perf_counter()
    made = [] if recipe is not None else job.search(trials)
    chosen = recipe if recipe is not None else made[-1].recipe
    result = job.execute(chosen if isinstance(chosen, Recipe) else Recipe((chosen,)), by_user=recipe is not None)
    artifact = job.finish(result, [trial.to_dict() for trial in made], name, command)
    artifact.report.seconds = time.perf_counter() - begin
    job.tidy()
    if strict and not artifact.report.verdict["met"]:
        raise BudgetError(f"the budget {wanted} was missed: {artifact.report.verdict['text']}", artifact)
    return artifact


@dataclass
class _Result:
    """A recipe carried out: the model, its graph, the edits, what was left alone, and one row a step."""

    recipe: Recipe
    model: nn.Module
    graph: Graph
    edits: list[Edit]
    untouched: list[Untouched]
    steps: list[dict[str, Any]]


@dataclass
class _Job:
    """One compression: what every part of it reads."""

    model: nn.Module
    data: Data
    notes: tuple[str, ...]
    budget: Budget
    teacher: nn.Module
    seed: int
    device: torch.device
    out: Path | None
    workspace: Path
    temporary: tempfile.TemporaryDirectory[str] | None
    table: LatencyTable
    progress: Progress
    before: Measurement
    score: Score
    original: Graph
    epochs: int

    @classmethod
    def start(
        cls,
        model: nn.Module,
        data: Data,
        budget: Budget,
        teacher: nn.Module | None,
        seed: int,
        device: str,
        out: str | Path | None,
        resume: bool,
        latency_table: str | Path | None,
        recipe: Technique | None,
        trials: int,
        progress: Progress,
    ) -> _Job:
        """Check everything that can be checked before any work starts, and measure the original."""
        target = find_device(device)
        path = writable(out)
        complete_data, notes = complete(data)
        check(model, complete_data)
        temporary = None if path is not None else tempfile.TemporaryDirectory()
        workspace = path.with_name(path.name + ".run") if path is not None else Path(temporary.name)  # type: ignore[union-attr]
        open_workspace(
            workspace, resume, {"budget": str(budget), "seed": seed, "trials": trials, "recipe": str(recipe)}
        )
        table = LatencyTable(Path(latency_table) if latency_table is not None else workspace / "latency.json")
        progress("measuring the original", 0.0)
        before = measuring.structure(model, complete_data)
        original = export_graph(model, complete_data)
        job = cls(
            model=model,
            data=complete_data,
            notes=notes,
            budget=budget,
            teacher=copy.deepcopy(model if teacher is None else teacher).to(target).eval(),
            seed=seed,
            device=target,
            out=path,
            workspace=workspace,
            temporary=temporary,
            table=table,
            progress=progress,
            before=before,
            score=evaluate(model, complete_data, "validate"),
            original=original,
            epochs=_epochs(complete_data, before.macs or 0),
        )
        job.refuse_impossible()
        return job

    def refuse_impossible(self) -> None:
        """Raise when not even a file without information in its weights would be small enough.

        Raises:
            BudgetError: the size limit is below that.
        """
        limit = self.budget.limit("size")
        if limit is None:
            return
        allowed = limit.allowed(self.before.size_bytes)
        floor = _floor(self.model, [], self.original)
        if floor > allowed:  # a network full of norms may still fit once they are folded
            folded, edits = run(FoldBatchNorm(), self.model, Context(data=self.data))
            floor = min(floor, _floor(folded, edits, export_graph(folded, self.data)))
        if floor > allowed:
            raise BudgetError(
                f"the budget {limit} is impossible: the graph and the manifest of this model alone take {floor:,} bytes; "
                f"ask for at least size<={floor * 2 // 1000 + 1}KB"
            )

    def search(self, trials: int) -> list[Trial]:
        """Return the trials of the default recipe, the best last.

        Raises:
            BudgetError: there is no training data, so nothing can be searched over.
        """
        if self.data.train is None:
            raise RecipeError(
                "the default recipe heals by training and Data(train=...) is missing: give it, or a recipe"
            )
        base = {"size": self.before.size_bytes, "params": self.before.params, "macs": self.before.macs or 0}
        original = {key: float(value) for key, value in base.items()}
        whole = assemble(self.original, self.model.state_dict())
        if self.budget.limit("latency") is not None:
            original["latency"] = self.table.original(whole, self.data)
        if self.budget.limit("memory") is not None:
            original["memory"] = float(measuring.peak_bytes(whole, self.data))
        return search(self.budget, original, self._cheap, self._full, self.epochs, trials)

    def _cheap(self, strength: Strength) -> dict[str, float]:
        self.progress(f"estimating {strength.factor:g}x, {strength.cut:.0%} of the channels cut", 0.0)
        result = self.execute(default_recipe(strength, trains=False), by_user=False, measure=False)
        facts = measuring.structure(result.model, self.data)
        costs = {"size": float(self._size(result)), "params": float(facts.params), "macs": float(facts.macs or 0)}
        whole = assemble(result.graph, result.model.state_dict())
        if self.budget.limit("latency") is not None:
            original = assemble(self.original, self.model.state_dict())
            costs["latency"] = self.table.candidate(result.graph.skeleton, whole, original, self.data)
        if self.budget.limit("memory") is not None:
            costs["memory"] = float(measuring.peak_bytes(whole, self.data))
        return costs

    def _full(self, strength: Strength) -> Trial:
        begin = time.perf_counter()
        recipe = default_recipe(strength)
        result = self.execute(recipe, by_user=False, measure=False)
        size = self._size(result)
        score = evaluate(result.model, self.data, "validate", self.device)
        drop, error = self.score.drop(score), self.score.drop_error(score)
        limits = {name: self.budget.limit(name) for name in ("size", "drop")}
        fits = limits["size"] is None or size <= limits["size"].allowed(self.before.size_bytes)
        margin = MARGIN * error if math.isfinite(error) else 0.0  # a score that is one number has no error to go by
        good = limits["drop"] is None or drop + margin <= limits["drop"].allowed(self.score.value) + 1e-12
        trial = Trial(strength, recipe, size, score, drop, error, fits, good, time.perf_counter() - begin)
        self.progress(f"trial {strength.factor:g}x: {size:,} bytes, drop {drop:.4f} on validation", 1.0)
        return trial

    def _size(self, result: _Result) -> int:
        """Bytes of the file, but for the scores in its facts."""
        return len(package(result.model, result.edits, self._facts(result, None, None, None), result.graph).to_bytes())

    def execute(self, recipe: Recipe, by_user: bool, measure: bool = True) -> _Result:
        """Carry out a recipe step by step on a private copy, from checkpoints where there are any.

        Raises:
            RecipeError: a step that the user wrote found nothing to do.
        """
        context = Context(
            data=self.data,
            teacher=self.teacher,
            device=self.device,
            seed=self.seed,
            workspace=self.workspace,
            report=self.progress,
        )
        model: nn.Module = copy.deepcopy(self.model)
        edits: list[Edit] = []
        graph = self.original
        rows = [self._row("original", model, graph, edits, 0.0, "")] if measure else []
        for position, step in enumerate(recipe.steps):
            begin = time.perf_counter()
            known = len(context.untouched)
            context.step, context.position = str(step), position
            model, done = run(step, model, context)
            edits += done
            note = "" if done else "found nothing to do"
            if by_user and not done:
                raise RecipeError(f"{step} found nothing to do: {_instead(model, context.untouched[known:])}")
            if measure:
                seconds, plain = time.perf_counter() - begin, copy.deepcopy(model).cpu()
                graph = export_graph(plain, self.data) if done else graph
                rows.append(self._row(str(step), plain, graph, edits, seconds, note))
        model = model.cpu()
        return _Result(
            recipe, model, graph if measure else export_graph(model, self.data), edits, context.untouched, rows
        )

    def _row(
        self, step: str, model: nn.Module, graph: Graph, edits: list[Edit], seconds: float, note: str
    ) -> dict[str, Any]:
        """What one step did: score, bytes and milliseconds of the model, on the CPU, as it stands after it."""
        size = len(package(model, edits, {}, graph).to_bytes())
        score = evaluate(model, self.data, "validate")
        models = {
            "original": assemble(self.original, self.model.state_dict()),
            "now": assemble(graph, model.state_dict()),
        }
        timed = latencies(models, self.data, seconds=0.2)
        speed = timed["original"].median / timed["now"].median
        return {
            "step": step,
            "score": score.value,
            "size_bytes": size,
            "latency_seconds": timed["now"].median,
            "speedup": speed,
            "macs": measuring.structure(model, self.data).macs,
            "seconds": seconds,
            "note": note,
        }

    def finish(self, result: _Result, trials: list[dict[str, Any]], name: str, command: str) -> Artifact:
        """Write the file, run it in a fresh process, measure it beside the original, and judge."""
        self.progress("exporting and measuring", 0.0)
        draft = package(result.model, result.edits, {}, result.graph)
        inputs, _ = next(batches(self.data.validate, "validate"))
        agreed = measuring.agreement(result.model, draft, inputs)
        before_score = evaluate(self.model, self.data, "test")
        after_score = measuring.score_of(draft.run, self.model, self.data)
        facts = self._facts(result, before_score, after_score, agreed)
        artifact = package(result.model, result.edits, facts, result.graph)
        path = self.out if self.out is not None else self.workspace / "model.fw"
        size = artifact.save(path)
        fresh = self._fresh_score(path)
        if abs(fresh.value - after_score.value) > 1e-9:
            raise ArtifactError(
                f"{path} scores {fresh.value} in a fresh process and {after_score.value} here: the runtime is not stable"
            )
        loaded: Artifact = load(path)
        after = replace(measuring.structure(result.model, self.data), size_bytes=size)
        before, after = measuring.with_score(self.before, before_score), measuring.with_score(after, fresh)
        before, after = self._timed(before, after, loaded.onnx_bytes())
        verdict = self.budget.judge(before, after)
        loaded.report = Report(
            task=name,
            command=command,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            machine=measuring.machine(),
            seed=self.seed,
            budget=str(self.budget),
            verdict={**verdict.to_dict(), "met": verdict.met, "text": str(verdict)},
            before=before.to_dict(),
            after=after.to_dict(),
            agreement=agreed.to_dict(),
            recipe=recipe_to_yaml(result.recipe),
            steps=result.steps,
            parts=loaded.bytes_by_part(),
            layers=_layers(result.model, loaded.bytes_by_part()),
            untouched=[{"path": item.path, "step": item.step, "reason": item.reason} for item in result.untouched],
            trials=trials,
            notes=list(self.notes),
        )
        if self.out is None:
            loaded.path = None
        return loaded

    def _timed(self, before: Measurement, after: Measurement, whole: bytes) -> tuple[Measurement, Measurement]:
        original = assemble(self.original, self.model.state_dict())
        models: dict[str, nn.Module | bytes] = {"pytorch": self.model, "original": original, "artifact": whole}
        timed = latencies(models, self.data)
        before = replace(
            before,
            latency={"onnxruntime": timed["original"], "pytorch": timed["pytorch"]},
            peak_bytes=measuring.peak_bytes(original, self.data),
        )
        return before, replace(
            after, latency={"onnxruntime": timed["artifact"]}, peak_bytes=measuring.peak_bytes(whole, self.data)
        )

    def _fresh_score(self, path: Path) -> Score:
        read = [inputs for inputs, _ in batches(self.data.test, "test")]
        sizes = [_samples(inputs) for inputs in read]
        outputs = [
            torch.split(torch.from_numpy(value), sizes) for value in measuring.fresh_outputs(path, read, max(sizes))
        ]
        parts = iter(zip(*outputs, strict=True))
        return measuring.score_of(lambda batch: next(parts), self.model, self.data)

    def _facts(
        self, result: _Result, before: Score | None, after: Score | None, agreed: measuring.Agreement | None
    ) -> dict[str, Any]:
        """What the file says of itself: reproducible, so never a time, a date or a path."""
        elements, nonzero = parameters(result.model)
        facts: dict[str, Any] = {
            "class": type(self.model).__name__,
            "recipe": result.recipe.to_json(),
            "seed": self.seed,
            "original_bytes": self.before.size_bytes,
            "parameters": elements,
            "nonzero": nonzero,
            "macs": measuring.structure(result.model, self.data).macs,
        }
        if before is not None and after is not None and agreed is not None:
            facts |= {"score": after.name, "score_before": before.value, "score_after": after.value}
            facts["agreement"] = agreed.to_dict()
        if self.budget.limit("latency") is not None:
            facts["latency_table"] = self.table.digest()
        return facts

    def tidy(self) -> None:
        """Remove the checkpoints of a finished job."""
        if self.temporary is not None:
            self.temporary.cleanup()
        else:
            shutil.rmtree(self.workspace, ignore_errors=True)


def _floor(model: nn.Module, edits: list[Edit], graph: Graph) -> int:
    """Bytes of the file when every weight is zero."""
    empty = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in empty.state_dict().values():
            tensor.zero_()
    return len(package(empty, edits, {}, graph).to_bytes())


def _epochs(data: Data, macs: int) -> int:
    """Epochs of gradual pruning in a trial: enough steps to settle, within what the network's size allows."""
    if data.train is None:
        return 0
    loader: Any = data.train
    steps = len(loader) if hasattr(loader, "__len__") else 100
    inputs, _ = next(batches(data.train, "train"))
    allowed = _MOST_MACS / max(1, macs * steps * _samples(inputs))
    return round(min(_MOST_EPOCHS, max(_FEWEST_EPOCHS, min(_STEPS / max(1, steps), allowed))))


def _samples(inputs: Any) -> int:
    args, kwargs = as_call(inputs)
    first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return int(first.shape[0])


def _instead(model: nn.Module, left: list[Untouched]) -> str:
    if left:
        return "; ".join(f"{item.path}: {item.reason}" for item in left[:4])
    kinds = sorted({type(module).__name__ for module in model.modules() if not list(module.children())})
    return f"the model in its scope has only {', '.join(kinds)}"


def _layers(model: nn.Module, parts: dict[str, int]) -> list[dict[str, Any]]:
    """One row a layer that holds tensors: kind, elements, those not zero, bits of a weight, bytes in the file."""
    owners: dict[str, list[tuple[str, Tensor]]] = {}
    for name, tensor in model.state_dict().items():
        owners.setdefault(name.rpartition(".")[0], []).append((name, tensor))
    rows = []
    for path, held in owners.items():
        layer = module_at(model, path) if path else model
        rows.append(
            {
                "path": path or type(model).__name__,
                "kind": type(layer).__name__,
                "parameters": sum(tensor.numel() for _, tensor in held),
                "nonzero": sum(int(tensor.count_nonzero()) for _, tensor in held),
                "bits": layer.bits if isinstance(layer, QuantizedLayer) else 32,
                "bytes": sum(parts.get(name, 0) for name, _ in held),
            }
        )
    return rows
