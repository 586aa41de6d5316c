"""Six int8 networks through export to ONNX, OpenVINO, LiteRT and ExecuTorch: each agrees with PyTorch, or the table says why not.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/quantization_export.py [mlp lstm resnet20 efficientnet vgg19 minilm]

Needs the extras `bench`, `openvino`, `litert` and `executorch`. Each network is folded and made int8 by `quantize_static` with its
defaults, exported, run on its calibration data and compared with PyTorch: at least 25 dB. A pair is explained when the export
refuses in words; anything else that goes wrong is not. A cell that is done is kept.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from quantization_ptq import NETWORKS
from results import keep, kept, record

from featherweight import Context, Recipe, run
from featherweight.agreement import expected_outputs
from featherweight.data import batches
from featherweight.delivery import deliver, subject
from featherweight.errors import DataError, ExportError
from featherweight.runtimes import FORMATS
from featherweight.techniques import FoldBatchNorm, QuantizeStatic

NAME = "quantization_export"
RUNTIMES = ("onnx", "openvino", "litert", "executorch")
ORDER = ("mlp", "lstm", "resnet20", "efficientnet", "vgg19", "minilm")
MOST = 16  # samples to compare on


def cells(name: str) -> dict[str, Any]:
    """Return what became of one network on each runtime."""
    task = NETWORKS[name]()
    recipe = Recipe((FoldBatchNorm(), QuantizeStatic())) if name != "minilm" else Recipe((QuantizeStatic(),))
    model = run(recipe, task.model.eval(), Context(data=task.data)).model
    whole = subject(model, task.data)
    read, _ = next(batches(task.data.calibrate, "calibrate"))
    inputs = tuple(part[:MOST] for part in read) if isinstance(read, tuple) else read[:MOST]
    expected = expected_outputs(model, inputs)
    found: dict[str, Any] = {}
    for form in RUNTIMES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                made = deliver(whole, FORMATS[form], Path(folder), inputs, expected, model).to_dict()
                found[form] = {key: made[key] for key in ("file_bytes", "agreement", "layers")}
                found[form]["not_int8"] = [f"{row['path']}: {row['runs']}" for row in made["asked_int8_but_not"]]
            except (ExportError, DataError) as error:
                found[form] = {"reason": str(error)}
            except Exception as error:  # what nobody has foreseen is what is counted
                found[form] = {"unexplained": f"{type(error).__name__}: {error}"[:500]}
        sys.stderr.write(f"{name} {form}: {found[form]}\n")
    return found


def main() -> None:
    """Measure what is missing, and write the row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("networks", nargs="*", default=list(ORDER))
    torch.set_num_threads(1)
    for name in parser.parse_args().networks:
        if name not in kept(NAME):
            keep(NAME, {**kept(NAME), name: cells(name)})
    done = kept(NAME)
    pairs = {f"{name} {form}": cell for name in done for form, cell in done[name].items()}
    lost = [pair for pair, cell in pairs.items() if "unexplained" in cell]
    refused = "".join(f"; {pair}: {cell['reason']}" for pair, cell in pairs.items() if "reason" in cell)
    agree = sum("agreement" in cell for cell in pairs.values())
    floats = {pair: len(cell["not_int8"]) for pair, cell in pairs.items() if cell.get("not_int8")}
    note = (
        f"{len(done)} of {len(ORDER)} networks, {agree} of {len(pairs)} pairs agree with PyTorch by 25 dB or more{refused}; "
        f"layers that were to be int8 and are not, by pair: {floats or 'none'}"
    )
    got = len(lost) if len(done) == len(ORDER) else None
    record(NAME, "quantization.export.unexplained", got, 1, f"{'; '.join(lost)}{'; ' if lost else ''}{note}", done)


if __name__ == "__main__":
    main()
