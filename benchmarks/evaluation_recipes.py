"""The recipes of `recipes/`, each on the network nearest to its paper's that the data allow, beside what the paper claims.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/evaluation_recipes.py [NAME ...]

Without names all that are missing run, the quick ones first. Each finished recipe is kept at once; one that was killed goes on from its
last epoch. Accuracy is that of the file loaded back, on test data; the ratio is 4 bytes x (parameters + buffers) over the whole file.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import letters
import torch
from originals import cache
from results import keep, kept, record
from torch import nn

import featherweight
from featherweight import Context, Task, load_recipe, run
from featherweight.artifact import package
from featherweight.costs import original_bytes
from featherweight.data import batches
from featherweight.ensembles import ensemble
from featherweight.latency import latencies
from featherweight.portable import assemble, export_graph
from featherweight.scoring import evaluate
from featherweight.selection import likely_positives
from featherweight.synthetic import munge
from featherweight.tasks.training import tensor_loader

NAME = "evaluation_recipes"
FOLDER = Path(__file__).parent.parent / "recipes"
MEMBERS, MULTIPLIER = 5, 4
KNOWN, FOREIGN = (
    0.08,
    20_000,
)  # share of the training data at hand, as in the paper; samples of the pool of another kind


class Reproduction(NamedTuple):
    """A paper's recipe, what the paper says of it, the network here, and what gives task and teacher."""

    recipe: str
    claim: str
    network: str
    setting: Callable[[], tuple[Task, nn.Module]]


def _own(task: Task) -> tuple[Task, nn.Module]:
    return task, task.model


def _letters() -> tuple[Task, nn.Module]:
    return _own(letters.task())


def _lenet300() -> tuple[Task, nn.Module]:
    from featherweight.tasks import find_task

    return _own(find_task("lenet300"))


def _lstm() -> tuple[Task, nn.Module]:
    import speech

    return _own(speech.task())


def _cifar(name: str) -> Callable[[], tuple[Task, nn.Module]]:
    def setting() -> tuple[Task, nn.Module]:
        import cifar

        return _own(cifar.task(name))

    return setting


def _ensemble() -> tuple[Task, nn.Module]:
    """One of five MLPs, taught by all of them on samples near the data."""
    task = letters.task()
    inputs = torch.cat([inputs for inputs, _ in batches(task.data.train, "train")])
    made = torch.cat([inputs, munge(inputs, MULTIPLIER)])
    lesson = tensor_loader(made, torch.zeros(len(made), dtype=torch.long), letters.BATCH, shuffle=True)
    teacher = ensemble(letters.task(seed).model for seed in range(MEMBERS)).eval()
    return Task(task.model, replace(task.data, train=lesson), task.name), teacher


def _pool() -> tuple[Task, nn.Module]:
    """8 % of the letters at hand without labels, the rest hidden in a pool with as many samples of noise."""
    task = letters.task()
    inputs = torch.cat([inputs for inputs, _ in batches(task.data.train, "train")])
    inputs = inputs[torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))]
    count = round(KNOWN * len(inputs))
    known, hidden = inputs[:count], inputs[count:]
    noise = torch.rand(FOREIGN, inputs.shape[1], generator=torch.Generator().manual_seed(1)) * 2 - 1
    pool = torch.cat([hidden, noise])
    prior = len(hidden) / len(pool)
    likely = likely_positives(task.model, list(known.split(500)), list(pool.split(500)), ("0", "2"), prior)
    chosen = torch.cat([known, pool[likely > 0.5]])
    lesson = tensor_loader(chosen, torch.zeros(len(chosen), dtype=torch.long), letters.BATCH, shuffle=True)
    return Task(task.model, replace(task.data, train=lesson), task.name), task.model


REPRODUCTIONS = {
    "bucila": (
        Reproduction(
            "bucila", "about 1000x smaller and faster than the ensemble, negligible loss", "MLP, 5 of them", _ensemble
        ),
    ),
    "pu_compression": (
        Reproduction(
            "pu_compression", "8 % of the data and a pool come near training on all of it (ResNet-34)", "MLP", _pool
        ),
    ),
    "deep_compression": (
        Reproduction("deep_compression", "LeNet-300-100: 40x, error 1.64 to 1.58 %", "LeNet-300-100", _lenet300),
    ),
    "zhu_gupta": (Reproduction("zhu_gupta", "LSTM (PTB): 90 % sparse, perplexity 78.45 to 78.3", "LSTM", _lstm),),
    "antman": (Reproduction("antman", "LSTM: up to 100x less computation, under 1 point lost", "LSTM", _lstm),),
    "tan_wang": (
        Reproduction("tan_wang_structured", "speech networks far smaller without loss of quality", "LSTM", _lstm),
        Reproduction("tan_wang_unstructured", "speech networks far smaller without loss of quality", "LSTM", _lstm),
    ),
    "polino": (
        Reproduction(
            "polino", "CIFAR-10: 4-bit students of 40x fewer bytes, 89.7 to about 88 %", "ResNet-20", _cifar("resnet20")
        ),
    ),
    "zhao": (
        Reproduction(
            "zhao",
            "ResNet-32: 3726 to 1842 KB (2.02x), more accurate than the original",
            "ResNet-20",
            _cifar("resnet20"),
        ),
    ),
    "bao": (Reproduction("bao", "80 % fewer operations for 1 % of accuracy", "ResNet-20", _cifar("resnet20")),),
    "amc": (Reproduction("amc", "ResNet-56: half the multiply-adds, 92.8 to 91.9 %", "ResNet-56", _cifar("resnet56")),),
    "slimnets": (
        Reproduction("slimnets", "VGG-19: 85x at 96 % of the accuracy, 92.4 to 88.7 %", "VGG-19", _cifar("vgg19")),
    ),
}


def carried_out(one: Reproduction) -> dict[str, Any]:
    """Return what a recipe does to its network, measured on the file loaded back."""
    (task, teacher), recipe = one.setting(), load_recipe(FOLDER / f"{one.recipe}.yaml")
    workspace, begin = cache() / f"{NAME}-{one.recipe}.run", time.perf_counter()
    context = Context(data=task.data, teacher=teacher, workspace=workspace, report=_say)
    small, edits = run(recipe, task.model, context)
    seconds = time.perf_counter() - begin
    path = cache() / f"{NAME}-{one.recipe}.fw"
    size = package(small, edits, {"recipe": recipe.to_json(), "seed": 0}, export_graph(small, task.data)).save(path)
    loaded: nn.Module = featherweight.load(path, into=task.model)
    whole = assemble(export_graph(task.model, task.data), task.model.state_dict())
    timed = latencies({"original": whole, "file": featherweight.load(path).onnx_bytes()}, task.data)
    shutil.rmtree(workspace, ignore_errors=True)
    return {
        "recipe": one.recipe,
        "paper claims": one.claim,
        "here on": one.network,
        "original %": round(100 * evaluate(task.model, task.data, "test").value, 2),
        "teacher %": round(100 * evaluate(teacher, task.data, "test").value, 2),
        "compressed %": round(100 * evaluate(loaded, task.data, "test").value, 2),
        "bytes": size,
        "smaller": f"{original_bytes(task.model) / size:.1f}x",
        "than the teacher": f"{original_bytes(teacher) / size:.1f}x",
        "faster": f"{timed['original'].median / timed['file'].median:.2f}x",
        "minutes": round(seconds / 60, 1),
    }


def main() -> None:
    """Carry out what is asked for or missing, and write the claims table."""
    done = kept(NAME)
    for name in sys.argv[1:] or [name for name in REPRODUCTIONS if name not in done]:
        done[name] = [carried_out(one) for one in REPRODUCTIONS[name]]
        keep(NAME, done)
        _say(f"{name}: {done[name]}", 1.0)
    row(done)


def row(done: dict[str, Any]) -> None:
    """Write the row of what is done."""
    table = [line for name in REPRODUCTIONS for line in done.get(name, [])]
    missing = [name for name in REPRODUCTIONS if name not in done]
    note = f"one seed each, on the data at hand; not run yet: {', '.join(missing) or 'none'}"
    record(NAME, "evaluation.recipes", len(done), 1, note, {"table": table})


def _say(message: str, share: float) -> None:
    sys.stderr.write(f"{message} {share:.0%}\n")


if __name__ == "__main__":
    main()
