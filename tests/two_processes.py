"""What `test_together.py` has two processes do, started by torchrun; each writes what it has come to into a folder of its own.

One process alone, the test itself, calls the same functions.
"""

import contextlib
import io
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import featherweight.pipeline
from featherweight import Context, Data, run
from featherweight.edits import named_tensors
from featherweight.errors import RecipeError
from featherweight.techniques import PenalizeEntropy, PruneVariational, PruneWeights, QuantizeAware
from featherweight.techniques.train import Training, fit


class Partly(nn.Module):
    """A classifier with a layer that no output depends on."""

    def __init__(self):
        super().__init__()
        self.used = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 4))
        self.unused = nn.Linear(2, 2)

    def forward(self, values):
        return self.used(values)


def network(kind=Partly):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind().eval()


def normed():
    """The statistics of this batch norm depend on the data alone."""
    return nn.Sequential(nn.BatchNorm1d(10), nn.Dropout(0.5), nn.Linear(10, 4))


def data(*sizes):
    """Batches of some sizes, whose labels a linear layer could learn."""
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randn(size, 10, generator=draw) for size in sizes]
    teach = torch.randn(10, 4, generator=draw)
    loader = [(values, (values @ teach).argmax(1)) for values in rows]
    return Data(rows[0][:1], train=loader, calibrate=loader, validate=loader, test=loader)


UNEVEN = (33, 32, 7, 3)  # the last is too small to be taken apart


def fitted(model, sizes, **how):
    """Train, let nothing but the last epoch be what comes back, and return the tensors and the first gradient seen."""
    seen = []

    def look(parameters):
        seen.append({f"gradient/{name}": p.grad.clone() for name, p in parameters.items() if p.grad is not None})

    fit(
        model,
        Context(data(*sizes), **how),
        Training(2, 1e-2, weight_decay=0.5),
        lambda before, done: False,
        after_backward=look,
    )
    return {**named_tensors(model), **(seen[0] if seen else {})}


class Stop(Exception):  # noqa: N818 - stands for a kill
    pass


def resumed(folder):
    """Train with checkpoints, end in the second epoch, and start again."""

    def report(message, done):
        if "epoch 2" in message:
            raise Stop

    with contextlib.suppress(Stop):
        fitted(network(), UNEVEN, workspace=folder, report=report)
    said = []
    made = fitted(network(), UNEVEN, workspace=folder, report=lambda message, done: said.append(message))
    return {name: tensor for name, tensor in made.items() if "gradient" not in name}, said


def stepped(technique):
    return named_tensors(run(technique, network(), Context(data(*UNEVEN), teacher=network())).model)


CASES = {
    "fitted": lambda: fitted(network(), UNEVEN),
    "normed": lambda: fitted(network(normed), (32, 16)),
    "pruned": lambda: stepped(PruneWeights(ratio=0.5, epochs=2, learning_rate=1e-2)),
    "noisy": lambda: stepped(PruneVariational(rate=30.0, threshold=-2.0, epochs=2, learning_rate=1e-2)),
    "entropy": lambda: stepped(PenalizeEntropy(epochs=2, learning_rate=1e-2)),
    "quantized": lambda: stepped(QuantizeAware(epochs=1)),
}


def compressed(options):
    """The exit code of the command, what it printed, and the file's bytes as its artifact holds them."""
    kept, compress = [], featherweight.pipeline.compress
    featherweight.pipeline.compress = lambda *given, **named: kept.append(compress(*given, **named)) or kept[0]
    sys.argv = ["featherweight", *options]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        from featherweight.cli import main

        main()
    featherweight.pipeline.compress = compress
    return out.getvalue(), kept[0].to_bytes(), kept[0].report.verdict["text"]


def refused():
    """The message of an error that only the first process can meet."""
    from featherweight.techniques import together

    def fail():
        raise RecipeError("the first process cannot do it")

    try:
        together.told(fail)
    except RecipeError as error:
        return str(error)


def main(shared, *options):
    rank = os.environ["RANK"]
    folder = Path(shared) / rank
    folder.mkdir()
    for name, case in CASES.items():
        save_file({key: value.detach().contiguous() for key, value in case().items()}, folder / f"{name}.safetensors")
    tensors, said = resumed(Path(shared) / "run")
    save_file({key: value.detach().contiguous() for key, value in tensors.items()}, folder / "resumed.safetensors")
    (folder / "said.txt").write_text("\n".join(said))
    (folder / "refused.txt").write_text(refused())
    out, file, verdict = compressed(options)
    (folder / "out.txt").write_text(out)
    (folder / "model.fw").write_bytes(file)
    (folder / "verdict.txt").write_text(verdict)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
