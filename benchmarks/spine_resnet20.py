"""ResNet-20 on CIFAR-10 (JPEG copy): channels halved and int8, against the original on ONNX Runtime, interleaved.

FEATHERWEIGHT_DATA=../shared/data python benchmarks/spine_resnet20.py
"""

from __future__ import annotations

import copy
import sys

from cifar import data, folder
from networks import resnet20
from results import record

from featherweight import Context, Recipe, compress, run
from featherweight.measurement import machine
from featherweight.runtimes.onnxruntime import audit
from featherweight.scoring import evaluate
from featherweight.techniques import Distill, FoldBatchNorm, PruneChannels, QuantizeStatic

TUNE = Distill(epochs=1, learning_rate=1e-3, teacher_share=0.0)
RECIPE = Recipe(
    (PruneChannels(ratio=0.5), Distill(epochs=3, learning_rate=2e-3), FoldBatchNorm(), QuantizeStatic()), any_order=True
)


def main() -> None:
    """Fine-tune the original on the JPEG copy, compress, and write the row."""
    cifar = data()
    original = run(TUNE, resnet20(folder()), Context(data=cifar, seed=0, report=_say)).model.eval()
    sys.stderr.write(f"original: {evaluate(original, cifar, 'test').value:.4f}, {machine()}\n")
    artifact = compress(copy.deepcopy(original), cifar, "latency<=80%", RECIPE, name="resnet20", progress=_say)
    report = artifact.report
    before, after = report.before["latency"]["onnxruntime"], report.after["latency"]["onnxruntime"]
    speed = before["median"] / after["median"]
    note = (
        f"{before['median'] * 1e3:.3f} ms ({before['low'] * 1e3:.3f} to {before['high'] * 1e3:.3f}) against "
        f"{after['median'] * 1e3:.3f} ms ({after['low'] * 1e3:.3f} to {after['high'] * 1e3:.3f}), medians and quartiles of "
        f"{after['runs']} interleaved calls; MACs {report.before['macs']:,} to {report.after['macs']:,}; test accuracy "
        f"{report.before['score']:.4f} to {report.after['score']:.4f}; agreement with PyTorch {report.agreement}; "
        "the residual stream keeps the channels that option-A shortcuts pad with zeros"
    )
    details = {
        "audit": audit(artifact.onnx_bytes()),
        "file_bytes": report.after["size_bytes"],
        "untouched": report.untouched,
    }
    record("spine_resnet20", "spine.resnet20.speed", round(speed, 2), 1, note, details)


def _say(message: str, share: float) -> None:
    sys.stderr.write(f"{message} {share:.0%}\n")


if __name__ == "__main__":
    main()
