"""ResNet-20 on CIFAR-10 (JPEG copy), half its channels cut: healed by the teacher alone, by labels, and by both.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/distillation_unlabelled.py

Recovery is what the teacher alone wins back on test data over what the better of the two healings with labels does. A run
that is done is kept, and one that was killed goes on from its last epoch.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
import statistics
import sys
from collections.abc import Iterator
from typing import Any

from cifar import task
from originals import cache, device, trainer
from results import keep, kept, record
from torch import Tensor

from featherweight import Context, Data
from featherweight.data import Loader
from featherweight.running import run
from featherweight.scoring import evaluate
from featherweight.techniques import Distill, PruneChannels

NAME = "distillation_unlabelled"
SEEDS, EPOCHS, RATE = 3, 2, 2e-3
CUT = PruneChannels(ratio=0.5)
HEALINGS = {
    "teacher": Distill(epochs=EPOCHS, learning_rate=RATE, teacher_share=1.0),
    "labels": Distill(epochs=EPOCHS, learning_rate=RATE, teacher_share=0.0),
    "both": Distill(epochs=EPOCHS, learning_rate=RATE),
}


class Unlabelled:
    """The inputs of a loader, without the labels."""

    def __init__(self, loader: Loader) -> None:
        self.loader: Any = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Tensor]:
        return (inputs for inputs, _ in self.loader)


def healed(how: str, seed: int, epochs: int = EPOCHS) -> dict[str, Any]:
    """Return the test accuracies of the original, of the cut network and of the healed one, and what trained it.

    Args:
        how: a name in `HEALINGS`.
        seed: of the healing; the original is one for all.
        epochs: of the healing.
    """
    made = task("resnet20")
    images: Data = made.data
    train = Unlabelled(images.train or ()) if how == "teacher" else images.train
    workspace = cache() / f"{NAME}-{how}-{seed}.run"
    context = Context(
        data=dataclasses.replace(images, train=train),
        teacher=copy.deepcopy(made.model).to(device()),
        device=device(),
        seed=seed,
        workspace=workspace,
        report=lambda message, _: _say(f"{how}, seed {seed}: {message}"),
    )
    cut = run(CUT, made.model, context).model
    result = run(dataclasses.replace(HEALINGS[how], epochs=epochs), cut, context).model.cpu()
    shutil.rmtree(workspace, ignore_errors=True)
    names = ("original", "cut", "healed")
    networks = zip(names, (made.model, cut.cpu(), result), strict=True)
    return {name: evaluate(one, images, "test").value for name, one in networks} | {"trained_on": trainer()}


def recovery(rows: dict[str, dict[str, float]], seed: int) -> float:
    """Return the share of the better labelled healing's gain that the teacher alone has."""
    gains = {how: rows[f"{how}-{seed}"]["healed"] - rows[f"{how}-{seed}"]["cut"] for how in HEALINGS}
    return gains["teacher"] / max(gains["labels"], gains["both"])


def main() -> None:
    """Run what is missing, and write the row."""
    done = kept(NAME)
    for seed in range(SEEDS):
        for how in HEALINGS:
            if f"{how}-{seed}" not in done:
                done[f"{how}-{seed}"] = healed(how, seed)
                keep(NAME, done)
                _say(f"{how}, seed {seed}: {done[f'{how}-{seed}']}")
    shares = [recovery(done, seed) for seed in range(SEEDS)]
    means = {how: statistics.mean(done[f"{how}-{seed}"]["healed"] for seed in range(SEEDS)) for how in HEALINGS}
    before = statistics.mean(done[f"teacher-{seed}"]["original"] for seed in range(SEEDS))
    after = statistics.mean(done[f"teacher-{seed}"]["cut"] for seed in range(SEEDS))
    trained = ", ".join(done[f"teacher-{seed}"]["trained_on"] for seed in range(SEEDS))
    note = (
        f"mean of {', '.join(f'{share:.3f}' for share in shares)} by seed; mean test accuracy: original {before:.4f}, after "
        f"{CUT} {after:.4f}, healed by {', '.join(f'{how} {mean:.4f}' for how, mean in means.items())}; {EPOCHS} epochs each, "
        f"the better of the two healings with labels is what the teacher alone is held against; trained on {trained}"
    )
    record(NAME, "distillation.unlabelled.recovery", round(statistics.mean(shares), 4), SEEDS, note, done)


def _say(message: str) -> None:
    sys.stderr.write(f"{message}\n")


if __name__ == "__main__":
    main()
