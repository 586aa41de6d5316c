"""A newcomer's path from the README alone, timed: a fresh environment, a network of one's own, a budget, a file on ONNX Runtime.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/evaluation_newcomer.py

The installation is the README's, into an empty virtual environment, from a clone. The newcomer's program trains a CNN of its own
class on MNIST with a plain PyTorch loop, and then does what the README's ten lines do. Its time counts from the clone to the
outputs of the exported file in an ONNX Runtime that knows nothing of Featherweight.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from originals import folder
from results import record

NAME = "evaluation_newcomer"
ROOT = Path(__file__).parents[1]
BUDGET = "size<=10%, drop<=1pt"
PROGRAM = """
import json, sys
import numpy as np
import torch
from torch import nn
from featherweight import Data, compress, load

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.see = nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2))
        self.say = nn.Sequential(nn.Flatten(), nn.Linear(800, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x):
        return self.say(self.see(x))

torch.manual_seed(0)
arrays = np.load(sys.argv[1])
def part(name):
    images = torch.from_numpy(arrays["x_" + name]).float().reshape(-1, 1, 28, 28) / 255
    return images, torch.from_numpy(arrays["y_" + name]).long()
(images, labels), (test, test_labels) = part("train"), part("test")
batches = [(images[i : i + 100], labels[i : i + 100]) for i in range(0, len(images), 100)]

model, loss = Own(), nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), 1e-3)
for inputs, targets in batches:
    optimizer.zero_grad()
    loss(model(inputs), targets).backward()
    optimizer.step()

data = Data(example=(images[:1],), train=batches, loss="cross_entropy", score="accuracy")
artifact = compress(model.eval(), data, sys.argv[2], trials=2, out="model.fw")
outputs = load("model.fw").run(test)
right = float((torch.as_tensor(np.asarray(outputs)).argmax(-1).flatten() == test_labels).float().mean())
with torch.no_grad():
    before = float((model(test).argmax(1) == test_labels).float().mean())
np.savez("test.npz", images=test.numpy(), labels=test_labels.numpy())
print(json.dumps({"verdict": artifact.report.verdict, "before": before, "after": right}))
"""
ALONE = """
import sys
import numpy as np, onnxruntime
session, arrays = onnxruntime.InferenceSession(sys.argv[1]), np.load("test.npz")
given = session.run(None, {session.get_inputs()[0].name: arrays["images"]})[0]
print((given.argmax(1) == arrays["labels"]).mean())
"""


def main() -> None:
    """Walk the path in an empty folder, and write the row."""
    begin, marks = time.perf_counter(), dict[str, float]()

    def step(name: str, *command: str, cwd: Path) -> str:
        sys.stderr.write(f"{name}: {' '.join(command)[:100]}\n")
        done = subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True)
        marks[name] = round((time.perf_counter() - begin) / 60, 2)
        return done.stdout

    with tempfile.TemporaryDirectory() as place:
        here = Path(place)
        step("clone", "git", "clone", "--quiet", str(ROOT), "featherweight", cwd=here)
        step("environment", sys.executable, "-m", "venv", "env", cwd=here)
        python = str(here / "env" / "bin" / "python")
        pip = (python, "-m", "pip", "install", "--quiet", "--constraint", "featherweight/constraints.txt")
        step("torch", *pip, "torch", "numpy", cwd=here)
        step("featherweight", *pip, "./featherweight", cwd=here)
        (here / "own.py").write_text(PROGRAM)
        (here / "alone.py").write_text(ALONE)
        found = json.loads(step("compressed", python, "own.py", str(folder() / "mnist.npz"), BUDGET, cwd=here))
        command = str(here / "env" / "bin" / "featherweight")
        step("exported", command, "export", "model.fw", "--to", "onnx", "--out", "exported", cwd=here)
        exported = next((here / "exported").rglob("*.onnx"))
        alone = float(step("run", python, "alone.py", str(exported), cwd=here))
        size = (here / "model.fw").stat().st_size
    met = found["verdict"]["met"] and abs(alone - found["after"]) < 1e-3
    note = (
        f"{BUDGET}: {found['verdict']['text']}; file {size:,} bytes, test accuracy {found['before']:.4f} before, {found['after']:.4f} "
        f"after, {alone:.4f} in ONNX Runtime alone; minutes from the start: "
        + ", ".join(f"{name} {minutes}" for name, minutes in marks.items())
    )
    record(NAME, "evaluation.newcomer.minutes", marks["run"] if met else None, 1, note)


if __name__ == "__main__":
    main()
