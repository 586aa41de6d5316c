"""One seed and one latency table give one file, byte for byte: run twice, and run with a SIGKILL in the middle.

python benchmarks/spine_repeatable.py
"""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import record

REQUEST = ["compress", "digits", "--budget", "size<=5%, latency<=150%, drop<=2pt", "--trials", "2", "--seed", "7"]
NAME = "spine_repeatable"


def main() -> None:
    """Run the three compressions and write the rows."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "latency.json"
        first = _run(Path(folder) / "first.fw", table)
        second = _run(Path(folder) / "second.fw", table)
        killed = Path(folder) / "killed.fw"
        process = subprocess.Popen(_command(killed, table), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        checkpoints = _wait_for_training(killed.with_name("killed.fw.run"), process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        resumed = _run(killed, table, "--resume")
    note = f"sha256 {first[:16]} and {second[:16]}, {' '.join(REQUEST)}"
    record(NAME, "spine.same_bytes", int(first == second), 1, note)
    note = f"killed with {checkpoints} checkpoints written, in training; sha256 {resumed[:16]} against {first[:16]}"
    record(NAME, "spine.resume_same_bytes", int(resumed == first), 1, note)


def _command(out: Path, table: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "featherweight", *REQUEST, "--out", str(out), "--latency-table", str(table), *more]


def _run(out: Path, table: Path, *more: str) -> str:
    done = subprocess.run(_command(out, table, *more), check=False)
    if done.returncode not in (0, 2):
        raise RuntimeError(f"compress ended with {done.returncode}")
    return hashlib.sha256(out.read_bytes()).hexdigest()


def _wait_for_training(workspace: Path, process: subprocess.Popen[bytes]) -> int:
    """Wait until a second training run has left a checkpoint, and a moment longer, so that the kill falls inside it."""
    while process.poll() is None:
        found = len(list(workspace.glob("train-*.safetensors")))
        if found >= 2:
            time.sleep(1.0)
            return found
        time.sleep(0.05)
    raise RuntimeError("the run ended before it could be killed")


if __name__ == "__main__":
    main()
