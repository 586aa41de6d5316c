"""LeNet-300-100 on full MNIST with 95 % of its weights removed: points of test accuracy lost, over three originals.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/pruning_lenet300.py

Each seed trains its own original. A seed that is done is kept, so the script may be stopped and started again.
"""

from __future__ import annotations

import statistics
import sys

from originals import original
from results import keep, kept, record

from featherweight import Context
from featherweight.running import run
from featherweight.scoring import evaluate
from featherweight.tasks.mnist import data, lenet300
from featherweight.techniques import PruneWeights
from featherweight.techniques.train import Training

NAME = "pruning_lenet300"
TRAINING = Training(epochs=20, learning_rate=1e-3, weight_decay=5e-2)
PRUNING = PruneWeights(ratio=0.95, ranking="lamp", epochs=20, learning_rate=2e-3)


def main() -> None:
    """Run the seeds that are missing, and write the row."""
    done = kept(NAME)
    mnist = data()
    for seed in range(3):
        if str(seed) in done:
            continue
        model = original("lenet300", seed, lenet300, mnist, TRAINING)
        context = Context(data=mnist, teacher=model, seed=seed, report=_say)
        pruned, _ = run(PRUNING, model, context)
        weights = [pruned.get_parameter(name) for name in context.sparse]
        before, after = (evaluate(one, mnist, "test") for one in (model, pruned))
        done[str(seed)] = {
            "score_before": before.value,
            "score_after": after.value,
            "drop_error": before.drop_error(after),
            "sparsity": sum(int((weight == 0).sum()) for weight in weights) / sum(w.numel() for w in weights),
            "left": {name: int((pruned.get_parameter(name) != 0).sum()) for name in sorted(context.sparse)},
        }
        keep(NAME, done)
    drops = [100 * (row["score_before"] - row["score_after"]) for row in done.values()]
    note = (
        f"mean paired difference; by seed {', '.join(f'{drop:.2f}' for drop in drops)}; originals "
        f"{', '.join(format(row['score_before'], '.4f') for row in done.values())}; zeros of all weight matrices "
        f"{min(row['sparsity'] for row in done.values()):.2%}; {PRUNING}, the original as teacher"
    )
    record(NAME, "pruning.lenet300.s95.drop", round(statistics.mean(drops), 3), len(done), note, done)


def _say(message: str, share: float) -> None:
    sys.stderr.write(f"{message} ({share:.0%})\n")


if __name__ == "__main__":
    main()
