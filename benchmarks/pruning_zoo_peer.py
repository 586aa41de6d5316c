"""torch-pruning 1.6.1 on one architecture of the zoo, in a process of its own; `pruning_zoo.py` calls it.

python benchmarks/pruning_zoo_peer.py resnet18 0.5
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

LIMIT = 60  # seconds a model, imports included


def outcome(name: str, ratio: float) -> dict[str, Any]:
    """Return `{"outcome": "ok" | "FAIL" | "timeout", "kept": share, "error": first line, "seconds": ...}`."""
    command = [sys.executable, str(Path(__file__)), name, str(ratio)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"outcome": "timeout", "error": f"no result in {LIMIT} s", "seconds": LIMIT}
    if done.returncode:
        last = next(iter(reversed(done.stderr.strip().splitlines())), f"exit code {done.returncode}")
        return {"outcome": "FAIL", "error": last[:200], "seconds": None}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main(name: str, ratio: float) -> None:
    """Prune as torch-pruning's README does, run the result, and print one line of JSON."""
    import torch
    import torch_pruning
    from torch import nn

    from featherweight.data import describe, forward
    from featherweight.zoo import architectures
    from featherweight.zoo.images import BOX, CLASSES
    from featherweight.zoo.sequences import WORDS

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    architecture = architectures()[name]
    model, inputs = architecture.build(), architecture.inputs
    before, structure = sum(p.numel() for p in model.parameters()), describe(forward(model, inputs))
    start, result = time.perf_counter(), {"outcome": "ok", "error": ""}
    try:
        outputs = [
            module
            for module in model.modules()
            if (isinstance(module, nn.Linear) and module.out_features in (CLASSES, BOX, WORDS))
            or (isinstance(module, nn.Conv2d) and module.out_channels == CLASSES)
        ]
        pruner = torch_pruning.pruner.BasePruner(
            model,
            inputs,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=outputs,
        )
        pruner.step()
        after = describe(forward(model, inputs))
        if after != structure:
            raise ValueError(f"the output was {structure} and is {after}")
        result["kept"] = round(sum(p.numel() for p in model.parameters()) / before, 4)
    except Exception as error:  # whatever it raises is the result
        line = next(iter(str(error).strip().splitlines()), "")
        result = {"outcome": "FAIL", "error": f"{type(error).__name__}: {line}"[:200]}
    result["seconds"] = round(time.perf_counter() - start, 2)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
