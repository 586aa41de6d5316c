"""Ten SIGKILLs at random moments of a search with two worker processes: no finished trial is lost, none is run twice.

Every trial writes a line to a file of its own when it ends; the journal is compared with it. The search and its trials (which
sleep for a quarter of a second) run in processes of their own, and a killed search is started again.

python benchmarks/budget_kill.py
"""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from budget_trials import Sleeping, ended, plan, space
from results import record

from featherweight.journal import Journal, read_rows
from featherweight.study import Study
from featherweight.workers.processes import Processes

KILLS, TRIALS, SECONDS = 10, 64, 0.25


def main() -> None:
    """Kill and start again until the search is through, and write the rows."""
    if len(sys.argv) > 1:
        search(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder, draw, kills = Path(name), random.Random(0), 0  # noqa: S311
        while True:
            process = subprocess.Popen([sys.executable, __file__, str(folder)], stderr=subprocess.DEVNULL)
            if kills == KILLS:
                process.wait()
                break
            before = len(ended(folder))
            while len(ended(folder)) == before and process.poll() is None:  # it works again
                time.sleep(0.01)
            time.sleep(draw.uniform(0.0, 4 * SECONDS))
            if process.poll() is None:
                process.kill()
                kills += 1
            process.wait()
        rows = [row for row in read_rows(folder / "journal.jsonl")[0] if "recipe" in row]
        finished = Counter(ended(folder))
    written = Counter(row["trial"] for row in rows)
    lost = [trial for trial in finished if trial not in written]
    repeated = [trial for trial, count in finished.items() if count > 1]
    note = f"{KILLS} SIGKILLs, {len(written)} trials of {SECONDS} s on two worker processes, {sum(finished.values())} runs that ended"
    details: dict[str, Any] = {"kills": kills, "trials": TRIALS, "twice": repeated, "in_the_journal": len(written)}
    if len(written) != TRIALS or kills != KILLS:
        raise RuntimeError(f"the search ended with {details}")
    record("budget_kill", "budget.kill.lost", len(lost), 1, note, details)
    record("budget_kill", "budget.kill.repeated", len(repeated), 1, note, details)


def search(folder: Path) -> None:
    """Carry out the search, or go on with it."""
    workers = Processes(functools.partial(Sleeping, SECONDS, folder), 2, folder / "results")
    with Journal(folder / "journal.jsonl") as journal:
        Study(space, plan(TRIALS), journal).run(workers)
    os._exit(0)  # the workers go with it


if __name__ == "__main__":
    main()
