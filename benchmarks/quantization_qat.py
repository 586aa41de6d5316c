"""Quantization-aware training at 4, 2, 1.6 and 1 bits a weight, and with 4-bit inputs: accuracy lost, bits in the file.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/quantization_qat.py [NETWORK [SCHEME [SEED]]]

Without arguments every cell that is missing is measured, the first seed of everything before the second. Accuracy is that of the
saved file in ONNX Runtime. A killed cell goes on from its last epoch. MiniLM at 4 bits starts from codes of compensated
rounding, all others from the nearest; with 4-bit inputs it starts smoothed and follows the teacher layer by layer. Needs the
extra `bench`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import shutil
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from codes import stored
from originals import cache, device, trainer
from results import keep, kept, record
from torch import Tensor

import featherweight
from featherweight import Context, Recipe, Task, post_training, run
from featherweight.artifact import package
from featherweight.costs import original_bytes
from featherweight.data import batches, forward, move
from featherweight.portable import export_graph
from featherweight.technique import Technique
from featherweight.techniques import BinarizeWeights, QuantizeAware, SmoothActivations, TernarizeWeights
from featherweight.techniques.seeding import seeded

NAME = "quantization_qat"


def original(network: str, seed: int) -> Task:
    """Return a network, trained, and its data; what it imports is needed for that network alone. Images have one for all seeds."""
    if network == "mlp":
        import letters

        return letters.task(seed)
    if network == "lstm":
        import speech

        return speech.task(seed)
    if network == "minilm":
        import sentiment

        return sentiment.task()
    import cifar

    return cifar.task(network)


SEEDS = {"mlp": 3, "lstm": 3, "resnet20": 3, "minilm": 1, "vgg19": 1}
SCHEMES: dict[str, Technique] = {
    "qat_w4": QuantizeAware(bits=4),
    "qat_w4a4": QuantizeAware(bits=4, activations=4),
    "qat_w2": QuantizeAware(bits=2),
    "ternary": TernarizeWeights(),
    "binary": BinarizeWeights(gradient="polynomial"),
}
MUST = {"qat_w4": 0.3, "qat_w4a4": 0.5, "qat_w2": 2.0}
EPOCHS = {
    "mlp": (15, 15, 15, 15, 15),
    "lstm": (3, 6, 8, 8, 10),
    "resnet20": (1, 2, 6, 6, 10),
    "minilm": (2, 3, 6, 6, 8),
    "vgg19": (2, 3, 4, 4, 6),
}
RATES = {"mlp": 1e-3, "lstm": 1e-3, "resnet20": 1e-3, "minilm": 1e-4, "vgg19": 5e-4}
BATCHES = 96  # of the training data, that codes are compensated on
FROM_CODES = ("minilm", "qat_w4")
LIKE = " + ".join(["logits", *(f"1 * hint encoder.encoder.layer.{layer}" for layer in range(6))])
RECIPES = {  # in place of the technique alone
    FROM_CODES: Recipe(
        (
            *post_training(4, integers=False, batches=BATCHES).steps,
            QuantizeAware(bits=4, epochs=2, learning_rate=4e-5, teacher_share=1.0, loss="logits"),
        )
    ),
    # channels of a Transformer differ in size by more than 16 codes can tell
    ("minilm", "qat_w4a4"): Recipe(
        (
            SmoothActivations(batches=16, multiply=True),
            QuantizeAware(bits=4, activations=4, epochs=8, learning_rate=1e-4, teacher_share=1.0, loss=LIKE),
        )
    ),
}
WIDTHS = {
    "qat_w4": 4,
    "qat_w4a4": 4,
    "qat_w2": 2,
    "ternary": 2,
    "binary": 1,
}  # of all layers but the first and the last


def technique(network: str, scheme: str) -> Recipe:
    """Return what a cell runs."""
    if (network, scheme) in RECIPES:
        return RECIPES[network, scheme]
    epochs, rate = EPOCHS[network][list(SCHEMES).index(scheme)], RATES[network]
    return Recipe((replace(SCHEMES[scheme], epochs=epochs, learning_rate=rate),))  # type: ignore[call-arg]


def measured(network: str, scheme: str, seed: int) -> dict[str, Any]:
    """Train one cell and return what its file gives."""
    made, started = original(network, seed), time.process_time()
    model = made.model.to(memory_format=torch.channels_last) if network == "vgg19" else made.model
    place = cache() / f"{NAME}-{network}-{scheme}-{seed}"
    teacher = copy.deepcopy(model).to(device())
    with seeded(seed):
        read = list(itertools.islice(made.data.train or (), BATCHES))
    data = replace(made.data, calibrate=read) if (network, scheme) == FROM_CODES else made.data
    context = Context(data, teacher, device(), seed, workspace=place.with_suffix(".run"), report=_say)
    small, edits = run(technique(network, scheme), model, context)
    small.cpu()
    seconds = time.process_time() - started
    size = package(small, edits, {}, export_graph(small, made.data)).save(place.with_suffix(".fw"))
    artifact = featherweight.load(place.with_suffix(".fw"))
    wanted, given, right, kept_right = [], [], [], []
    for inputs, labels in batches(made.data.test, "test"):
        with torch.no_grad():
            wanted.append(forward(teacher.eval(), move(inputs, device())).cpu())
        given.append(torch.from_numpy(artifact.run(inputs)[0]))
        right.append(wanted[-1].argmax(1) == labels)
        kept_right.append(given[-1].argmax(1) == labels)
    lost = torch.cat(right).double() - torch.cat(kept_right).double()
    shutil.rmtree(place.with_suffix(".run"), ignore_errors=True)
    return {
        "original": 100 * float(torch.cat(right).double().mean()),
        "quantized": 100 * float(torch.cat(kept_right).double().mean()),
        "drop": 100 * float(lost.mean()),
        "margin": 196 * float(lost.std()) / math.sqrt(len(lost)),  # half the paired 95 % interval over the samples
        "samples": len(lost),
        "sqnr_db": sqnr(torch.cat(wanted), torch.cat(given)),
        "bytes": size,
        "ratio": original_bytes(made.model) / size,
        "technique": str(technique(network, scheme)),
        "untouched": sorted({f"{left.path}: {left.reason}" for left in context.untouched}),
        "cpu_seconds": round(seconds),
        "trained_on": trainer(),
        "inner_bits": stored(small, WIDTHS[scheme])["bits"],
        **stored(small),
    }


def sqnr(wanted: Tensor, given: Tensor) -> float:
    """Return the signal to noise ratio of logits in dB."""
    noise = (given - wanted).double().square().sum()
    return 10 * math.log10(float(wanted.double().square().sum() / noise)) if noise else 200.0


def row(network: str, scheme: str, cells: list[dict[str, Any]]) -> None:
    """Write the row of one network and scheme over the seeds that are done."""
    drops = [cell["drop"] for cell in cells]
    mean, quality = statistics.mean(drops), min(cell["sqnr_db"] for cell in cells)
    spread = statistics.stdev(drops) if len(drops) > 1 else None
    # Student's 97.5 % quantiles; with one seed the interval is over the test samples
    margin = cells[0]["margin"] if spread is None else {2: 12.71, 3: 4.303}[len(drops)] * spread / math.sqrt(len(drops))
    must = MUST.get(scheme)
    met = must is None or mean <= must or (abs(mean) <= margin and quality >= 25)
    told = ", ".join(f"{cell['original']:.2f} to {cell['quantized']:.2f}" for cell in cells)
    verdict = "" if must is None else f"; {'met' if met else 'NOT met'} (at most {must:g})"
    left = sorted({reason for cell in cells for reason in cell["untouched"]})
    trained = ", ".join(cell.get("trained_on", "CPU") for cell in cells)
    note = (
        f"test accuracy by seed {told} (n = {cells[0]['samples']}), {mean:+.2f} +- {margin:.2f} points lost (95 %), SQNR of the logits "
        f"{quality:.1f} dB{verdict}; {cells[0]['technique']}; codes {max(cell['inner_bits'] for cell in cells):.3f} bits a weight "
        f"({max(cell['bits'] for cell in cells):.3f} with the first and the last layer), file "
        f"{min(cell['ratio'] for cell in cells):.1f} times smaller; trained on {trained}"
        + (f"; left: {'; '.join(left)}" if left else "")
    )
    record(NAME, f"quantization.{network}.{scheme}.drop", round(mean, 3), len(cells), note, cells)


def bits_row(done: dict[str, Any]) -> None:
    """Write the row of the ternary codes' bits; edges of 8 bits do not count."""
    rows = {key: cell["inner_bits"] for key, cell in done.items() if "/ternary/" in key}
    if rows:
        worst = max(rows, key=rows.__getitem__)
        note = f"the largest of {len(rows)} trained networks ({worst}); all layers but the first and the last, which have 8 bits"
        record(NAME, "quantization.bits.ternary", round(rows[worst], 4), len(rows), note, rows)


def main() -> None:
    """Measure the cells asked for, and write the rows of all that are done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", nargs="?", choices=SEEDS)
    parser.add_argument("scheme", nargs="?", choices=SCHEMES)
    parser.add_argument("seed", nargs="?", type=int)
    asked = parser.parse_args()
    for seed in range(max(SEEDS.values())):
        for network in SEEDS:
            for scheme in SCHEMES:
                key, wanted = f"{network}/{scheme}/{seed}", (asked.network, asked.scheme, asked.seed)
                fits = all(a is None or a == b for a, b in zip(wanted, (network, scheme, seed), strict=True))
                if seed < SEEDS[network] and fits and key not in kept(NAME):
                    cell = measured(network, scheme, seed)
                    keep(NAME, {**kept(NAME), key: {name: _rounded(value) for name, value in cell.items()}})
                    _say(f"{key}: {cell}", 1.0)
    done = kept(NAME)
    for network in SEEDS:
        for scheme in SCHEMES if asked.network in (None, network) else ():
            cells = [done[key] for seed in range(3) if (key := f"{network}/{scheme}/{seed}") in done]
            if cells:
                row(network, scheme, cells)
    bits_row(done)


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _say(message: str, share: float) -> None:
    sys.stderr.write(f"{message} {share:.0%}\n")


if __name__ == "__main__":
    main()
