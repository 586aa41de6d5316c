"""Several processes on one training, each on a device of its own, started by torchrun: all of them run the same program.

Each takes its share of every batch, torch's DistributedDataParallel averages the gradients, and so all take the same steps. What
must be decided once, by a clock or a file, the first process decides and tells the others. A process on its own does none of it.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from featherweight.data import rebuild, samples
from featherweight.errors import FeatherweightError, ModelError, RecipeError
from featherweight.techniques.seeding import seeded

Made = TypeVar("Made")
Loss = Callable[[Any, Any, float], Tensor]
"""Takes inputs, target and the share of the training done; returns a scalar."""
_PATIENCE = timedelta(days=30)  # the others wait while the first measures and searches; torchrun ends them if it dies


def processes() -> int:
    """Return how many processes train together; 1 unless torchrun, or the like, has set `WORLD_SIZE`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def place() -> int:
    """Return which of them this one is, from 0."""
    return int(os.environ.get("RANK", "0")) if processes() > 1 else 0


def first() -> bool:
    """Whether this process decides, measures, writes and prints: the first one does, and one on its own."""
    return place() == 0


def refuse(what: str, instead: str) -> None:
    """Refuse what several processes would only do several times.

    Raises:
        RecipeError: there are several.
    """
    if processes() > 1:
        raise RecipeError(f"{what} does not run under torchrun (WORLD_SIZE={processes()}): {instead}")


def own(device: torch.device) -> torch.device:
    """Return this process's own device of a kind: `cuda` is a GPU each.

    Raises:
        ModelError: several processes cannot train on this kind.
    """
    if processes() == 1 or device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise ModelError(f"{processes()} processes train on 'cuda', a GPU each, or on 'cpu'; not on {str(device)!r}")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def told(make: Callable[[], Made], follow: Callable[[Any], object] = lambda order: None) -> Made:
    """Return in every process what `make` gives in the first one, or raise what it raises.

    Args:
        make: called in the first process only.
        follow: called in the others with each order that the first one gives by `ask` meanwhile.
    """
    if processes() == 1:
        return make()
    if first():
        try:
            made = make()
        except FeatherweightError as error:
            _passed_on("error", error)
            raise
        _passed_on("made", made)
        return made
    while True:
        kind, value = _passed_on()
        if kind == "made":
            return value  # type: ignore[no-any-return]
        if kind == "error":
            raise value
        order, drawn = value
        torch.set_rng_state(drawn)
        with suppress(FeatherweightError):  # the first process meets it too, and says what becomes of it
            follow(order)


def ask(order: object) -> None:
    """Have the other processes, which wait in `told`, do with the first one what comes next, from its random numbers on."""
    if processes() > 1 and first():
        _passed_on("order", (order, torch.get_rng_state()))


def even(tensors: Iterable[Tensor]) -> None:
    """Write the first process's values into these tensors of all processes."""
    if processes() == 1:
        return
    _join()
    with torch.no_grad():
        for tensor in tensors:
            value = tensor.detach().contiguous()
            dist.broadcast(value, 0)
            tensor.copy_(value)


def same(what: str, value: object) -> None:
    """Refuse to go on where the processes have come to different values, such as by data that each draws for itself.

    Raises:
        ModelError: they have, in all of them.
    """
    if processes() == 1:
        return
    _join()
    values: list[object] = [None] * processes()
    dist.all_gather_object(values, value)
    if any(other != values[0] for other in values):
        raise ModelError(f"{what} differs between processes: loaders must give each the same batches in the same order")


def mean(value: Tensor) -> Tensor:
    """Return the mean of a tensor over the processes, `[...]` like it."""
    if processes() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / processes()


def agree(norms: Iterable[_BatchNorm]) -> None:
    """Give batch norms in training the mean of the processes' running statistics, each of which saw its own shares."""
    for norm in norms:
        if processes() > 1 and norm.training and norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.copy_(mean(norm.running_mean))
            norm.running_var.copy_(mean(norm.running_var))


def share(inputs: Any, target: Any) -> tuple[Any, Any, float]:
    """Return this process's samples of a batch, and the weight of their mean loss in the mean over the processes.

    A batch of fewer than two samples a process, which no batch norm could take apart, and one with tensors that do not have a row
    for each sample, are every process's whole, at weight 1.

    Args:
        inputs: a tensor, or a tuple or dict of them.
        target: likewise, or None.
    """
    parts = [item for value in (inputs, target) for item in _items(value)]
    rows = {item.shape[0] if isinstance(item, Tensor) and item.dim() else None for item in parts}
    count, of = samples(inputs), processes()
    if rows != {count} or count < 2 * of:
        return inputs, target, 1.0
    start, end = (count * edge // of for edge in (place(), place() + 1))
    cut = [rebuild(value, [item[start:end] for item in _items(value)]) for value in (inputs, target)]
    return cut[0], cut[1], (end - start) * of / count


def divided(loss: Loss, model: nn.Module, beside: Iterable[nn.Parameter], draw: Callable[..., int]) -> Loss:
    """Return a loss of a batch of which each process computes its share; their gradients are means over the processes.

    Alone, it is `loss`. Where not, what is drawn at random in it, such as dropout, is drawn anew for each share, and the
    generators are afterwards as they were, alike in all processes.

    Args:
        loss: a mean over samples.
        model: what is trained.
        beside: parameters that are trained along.
        draw: gives a seed for anything, alike in all processes.
    """
    if processes() == 1:
        return loss
    _join()
    # what a loss does not reach keeps no gradient, as in one process, so that no weight decay touches it
    whole = DistributedDataParallel(_Lesson(loss, model, beside), find_unused_parameters=True)
    whole.broadcast_buffers = False  # see `agree`; as an argument some versions of torch warn of it
    gpus = sorted({parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"})

    def shared(inputs: Any, target: Any, done: float) -> Tensor:
        inputs, target, weight = share(inputs, target)
        with torch.random.fork_rng(gpus), seeded(draw("share", done, place())):
            return whole(inputs, target, done) * weight  # type: ignore[no-any-return]

    return shared


class _Lesson(nn.Module):
    """A loss as a module that holds all that is trained, which is what DistributedDataParallel takes."""

    def __init__(self, loss: Loss, model: nn.Module, beside: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.model, self.beside, self._loss = model, nn.ParameterList(beside), loss
        self.unreached = nn.Parameter(torch.zeros(()))  # DDP warns when it has looked for such in vain

    def forward(self, inputs: Any, target: Any, done: float) -> Tensor:
        return self._loss(inputs, target, done)


def _items(value: Any) -> list[Any]:
    """What a batch's inputs or target consist of; None of nothing."""
    if value is None:
        return []
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, tuple) else [value]


def _passed_on(*said: object) -> Any:
    """What the first process hands in, in all; the others hand in nothing."""
    _join()
    box: list[Any] = [said]
    dist.broadcast_object_list(box, 0)
    return box[0]


def _join() -> None:
    """Meet the other processes, once.

    Raises:
        ModelError: they are on several machines, which do not see the same checkpoints.
    """
    if dist.is_initialized():
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes()))
    if here != processes():
        raise ModelError(f"only {here} of {processes()} processes are on this machine: train on one machine")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)
    atexit.register(dist.destroy_process_group)
