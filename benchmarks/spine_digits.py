"""`make demo` as a user runs it, after installation: how long it takes, and how small the file is at what loss.

python benchmarks/spine_digits.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from results import record

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Run the demo, read the facts from the file it wrote, and write the rows."""
    subprocess.run(["make", ".venv/.demo"], cwd=ROOT, check=True)
    start = time.perf_counter()
    subprocess.run(["make", "demo"], cwd=ROOT, check=True)
    minutes = (time.perf_counter() - start) / 60
    command = [sys.executable, "-m", "featherweight", "inspect", "demo/model.fw", "--json"]
    facts = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
    size = (ROOT / "demo" / "model.fw").stat().st_size
    lost = 100 * (facts["score_before"] - facts["score_after"])
    ratio = facts["original_bytes"] / size
    note = (
        f"whole file {size:,} bytes of {facts['original_bytes']:,}; test accuracy {facts['score_before']:.4f} to "
        f"{facts['score_after']:.4f} ({lost:.2f} points lost, 360 images); graph and manifest take "
        f"{facts['bytes_by_part']['graph'] + facts['bytes_by_part']['manifest']} bytes"
    )
    record("spine_digits", "spine.digits.ratio", round(ratio, 1) if lost <= 1 else None, 1, note, facts)
    record(
        "spine_digits",
        "spine.digits.minutes",
        round(minutes, 2),
        1,
        "make demo after installation, wall clock, 2 cores",
    )


if __name__ == "__main__":
    main()
