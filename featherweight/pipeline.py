"""`compress`: the whole story, from a trained model and a budget to one file and the report that proves it."""

from __future__ import annotations

import time
from pathlib import Path

from torch import nn

from featherweight.artifact import Artifact
from featherweight.budget import Budget
from featherweight.candidates import Candidates
from featherweight.data import Data
from featherweight.errors import BudgetError
from featherweight.job import Job, Progress
from featherweight.latency import DEFAULT
from featherweight.preflight import Request, find_clock, find_clocked, find_device, writable
from featherweight.proof import prove
from featherweight.technique import Recipe, Technique
from featherweight.techniques import together


def compress(
    model: nn.Module,
    data: Data,
    budget: Budget | str,
    recipe: Technique | None = None,
    *,
    teacher: nn.Module | None = None,
    trials: int = 20,
    epochs: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    out: str | Path | None = None,
    resume: bool = False,
    latency_table: str | Path | None = None,
    runtime: str = DEFAULT,
    device_command: str | None = None,
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
        recipe: what to do; when missing, one integer program picks it from damage and cost tables, for strengths that a search
            tries on validation data. Where there is no training data nothing is cut, and weights are rounded as far as limits on
            size, latency and drop ask.
        teacher: whose outputs healing follows; the model itself when missing.
        trials: most candidates that a search trains, besides the mixes of families that it compares first.
        epochs: most of one candidate's training, all its steps together, at least 2; when missing, what the network's size
            allows. A candidate that loses too much is trained twice as long once. A recipe has its own.
        seed: of every random draw; one seed gives one file, byte for byte.
        device: `"cpu"`, `"cuda"` or `"mps"`, for training.
        out: where the file goes; when missing it is not kept on disk. Checkpoints live beside it in `OUT.run/`.
        resume: continue from `OUT.run/` after a kill.
        latency_table: JSON file of measured seconds to read and extend, so that choices by time can be repeated.
        runtime: whose latency the budget means: `"onnxruntime"`, `"openvino"` or `"openvino_bf16"`.
        device_command: times an exported file where it shall run, such as `"sh time_on_board.sh {model} {inputs}"`, and prints
            the seconds of one call; the latency limit, which must be there, is then kept on that device. See `DeviceCommand`.
        strict: raise `BudgetError` with the closest artifact when the budget is missed.
        name: what the model is called in the report.
        command: how to reproduce this, for the report.
        progress: called with a message and the share done.

    Returns:
        the artifact, with `report`; `report.verdict` says whether the budget is met.

    Raises:
        BudgetError: the budget cannot be read or is impossible, or with `strict` was missed.
        RecipeError: `epochs` is less than 2; a limit needs cuts and there is nothing to heal them on; `device_command` has no
            `{model}`, no program or no latency limit; besides what is wrong with a recipe.
        DataError, ModelError, ExportError, ArtifactError: see there; the message says what would work.
    """
    begin = time.perf_counter()
    limits = Budget.parse(budget) if isinstance(budget, str) else budget
    request = Request(
        budget=limits,
        recipe=recipe,
        trials=trials,
        epochs=epochs,
        seed=seed,
        device=find_device(device),
        out=writable(out),
        resume=resume,
        latency_table=Path(latency_table) if latency_table is not None else None,
        runtime=find_clocked(runtime),
        clock=find_clock(device_command, runtime, limits),
    )
    job = Job.start(model, data, teacher, request, progress if together.first() else lambda message, done: None)

    def proven() -> Artifact:
        made = [] if recipe is not None else Candidates(job).search()
        chosen = recipe if recipe is not None else made[-1].recipe
        result = job.execute(chosen if isinstance(chosen, Recipe) else Recipe((chosen,)), by_user=recipe is not None)
        artifact = prove(job, result, [trial.to_dict() for trial in made], name, command)
        artifact.report.seconds = time.perf_counter() - begin
        job.tidy()
        return artifact

    artifact = together.told(proven, follow=lambda order: job.execute(*order))
    if strict and not artifact.report.verdict["met"]:
        raise BudgetError(f"the budget {request.budget} was missed: {artifact.report.verdict['text']}", artifact)
    return artifact
