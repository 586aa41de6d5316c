"""Open the dense 4-bit VGG-19 in a fresh process: seconds and peak memory, `torch.load` of the original beside it.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/bytes_open.py

Needs the extra `speed`. Imports of torch and Featherweight are done before the clock starts; the compiler's is not, and
its machine code is on disk, as after any first use; the time of that first use is in the details.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from networks import VGG, vgg19
from results import record

from featherweight import Context, Data
from featherweight.artifact import package
from featherweight.portable import export_graph
from featherweight.running import run
from featherweight.techniques import QuantizeWeights

NAME = "bytes_open"
ROUNDS = 5
OPENERS = ("ours", "plain", "torch")


def opened(opener: str, path: Path) -> dict[str, float]:
    """Return what opening a file took in a fresh process: seconds, CPU seconds, peak growth and model in bytes."""
    command = [sys.executable, __file__, "--open", opener, str(path)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def open_here(opener: str, path: Path) -> None:
    """Open a file and print what it took."""
    import time

    import featherweight
    from featherweight.coding import machine

    torch.set_num_threads(1)
    if opener == "plain":
        machine.has_compiler = lambda: False
    model: Any = VGG()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: imports had one of their own
    before, start, cpu = _status("VmRSS"), time.perf_counter(), time.process_time()
    if opener == "torch":
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        model = featherweight.load(path, into=model)
    seconds, busy = time.perf_counter() - start, time.process_time() - cpu
    peak = _status("VmHWM") - before
    size = sum(value.nbytes for value in model.state_dict().values())
    sys.stdout.write(json.dumps({"seconds": seconds, "cpu": busy, "peak": peak, "model": size}))


def _status(name: str) -> int:
    """Return bytes that the kernel reports of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    """Pack the network, open it several times in turn with the original, and write the rows."""
    model = vgg19(Path(os.environ["FEATHERWEIGHT_DATA"]))
    data = Data(example=torch.zeros(1, 3, 32, 32))
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "model.fw", Path(folder) / "model.pt"
        small, edits = run(QuantizeWeights(bits=4), model, Context(data=data))
        size = package(small, edits, {}, export_graph(small, data)).save(ours)
        torch.save(model.state_dict(), theirs)
        first = opened("ours", ours)
        rounds = [{"ours": opened("ours", ours), "torch": opened("torch", theirs)} for _ in range(ROUNDS)]
        plain = opened("plain", ours)
    middle = {
        name: {key: statistics.median(each[name][key] for each in rounds) for key in first}
        for name in ("ours", "torch")
    }
    mine, original = middle["ours"], middle["torch"]
    details = {"file_bytes": size, "first": first, "plain": plain, "median": middle, "rounds": rounds}
    note = (
        f"file of {size:,} bytes, 20 M weights; median of {ROUNDS} fresh processes, {mine['cpu']:.2f} s of them CPU; the machine "
        f"was shared; torch.load of the original in turn: {original['seconds']:.2f} s ({original['cpu']:.2f} s CPU); without the "
        f"extra: {plain['cpu']:.0f} s CPU"
    )
    record(NAME, "bytes.open.seconds", round(mine["seconds"], 2), 1, note, details)
    note = (
        f"growth of the process at its peak, {mine['peak'] / 1e6:.0f} MB with the compiler in it, over the model's float32 "
        f"weights, {original['model'] / 1e6:.0f} MB; over its {mine['model'] / 1e6:.0f} MB as int8 codes: "
        f"{mine['peak'] / mine['model']:.1f}, without the compiler {plain['peak'] / mine['model']:.1f}; "
        f"torch.load grows by {original['peak'] / 1e6:.0f} MB"
    )
    record(NAME, "bytes.open.peak", round(mine["peak"] / original["model"], 2), 1, note, details)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--open"]:
        open_here(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
