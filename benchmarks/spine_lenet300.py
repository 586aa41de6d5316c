"""LeNet-300-100 on full MNIST with the default recipe: file bytes, graph and all, at no more than 0.5 points lost.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/spine_lenet300.py

Each seed trains its own original. A seed that is done is kept, so the script may be stopped and started again.
"""

from __future__ import annotations

import statistics
import sys

from results import keep, kept, record

from featherweight import compress
from featherweight.tasks.mnist import lenet300_task

NAME = "spine_lenet300"
BUDGET = "size<=0.95%, drop<=0.5pt"


def main() -> None:
    """Run the seeds that are missing, and write the row."""
    done = kept(NAME)
    for seed in range(3):
        if str(seed) in done:
            continue
        task = lenet300_task(seed)
        report = compress(task.model, task.data, BUDGET, seed=seed, trials=2, name=task.name, progress=_say).report
        done[str(seed)] = {
            "ratio": report.before["size_bytes"] / report.after["size_bytes"],
            "file_bytes": report.after["size_bytes"],
            "score_before": report.before["score"],
            "score_after": report.after["score"],
            "recipe": report.recipe,
            "trials": report.trials,
        }
        keep(NAME, done)
    ratio = statistics.mean(row["ratio"] for row in done.values())
    drops = [100 * (row["score_before"] - row["score_after"]) for row in done.values()]
    met = statistics.mean(drops) <= 0.5
    note = (
        f"mean ratio of whole files; test accuracy lost, points, by seed: {', '.join(f'{drop:.2f}' for drop in drops)} "
        f"(mean {statistics.mean(drops):.2f}); originals {', '.join(format(row['score_before'], '.4f') for row in done.values())}; "
        f"budget asked: {BUDGET}"
    )
    record(NAME, "spine.lenet300.ratio", round(ratio, 1) if met else None, len(done), note, done)


def _say(message: str, share: float) -> None:
    if "epoch" not in message:
        sys.stderr.write(message + "\n")


if __name__ == "__main__":
    main()
