"""What a model is trained, calibrated and judged on: `Data`, and `Task`, a model with its data.

A loader is any re-iterable of batches. A batch is `(inputs, target)`, or `inputs` alone when there are no labels;
`inputs` is a tensor, a tuple of tensors (positional arguments) or a dict of tensors (keyword arguments).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, Subset

from featherweight.errors import DataError

Inputs = Tensor | tuple[Any, ...] | dict[str, Any]
Loader = Iterable[Any]
LossLike = str | Callable[[Any, Any], Tensor]
SPLITS = ("train", "calibrate", "validate", "test")


@dataclass(frozen=True)
class Data:
    """Everything a compression needs to know beside the model.

    Attributes:
        example: inputs of one call, as a tensor, a tuple or a dict; dimension 0 of each tensor is the batch.
        train: batches to heal on; without it nothing is trained.
        calibrate: batches for ranges and statistics; the start of `train` when missing.
        validate: batches every choice is made on; split off `train` when missing.
        test: batches read once, for the verdict; split off `train` when missing.
        loss: `"cross_entropy"`, `"binary_cross_entropy"` (of logits, one or several labels a sample), `"mse"`, `"l1"`, or a
            callable `(output, target) -> scalar tensor`.
        score: `"accuracy"`, `"binary_accuracy"`, `"mse"`, `"mae"`, or a callable `(output, target) -> tensor`, one value a sample
            or a mean; higher is better unless wrapped in `lower(...)`.
        step: `(model, batch) -> loss`, in place of `loss`, for losses that need more than output and target.
        output: which part of a structured output the loss and the score see: an index, a key, a field or a callable.
        dynamic: names of further dynamic dimensions, for example `{"tokens": {1: "time"}}`.
    """

    example: Any
    train: Loader | None = None
    calibrate: Loader | None = None
    validate: Loader | None = None
    test: Loader | None = None
    loss: LossLike = "cross_entropy"
    score: Any = "accuracy"
    step: Callable[[nn.Module, Any], Tensor] | None = None
    output: int | str | Callable[[Any], Tensor] | None = None
    dynamic: Mapping[str, Mapping[int, str]] | None = None


@dataclass(frozen=True)
class Task:
    """A trained model with its data: what the command line compresses, compares and measures."""

    model: nn.Module
    data: Data
    name: str = field(default="task")


class Shortened:
    """The first batches of a loader, as it would give them, with the generator that it draws their order from.

    Args:
        loader: of training data, with a length.
        steps: how many batches, at least 1.
    """

    def __init__(self, loader: Loader, steps: int) -> None:
        self._loader, self._steps = loader, steps
        self.generator = getattr(loader, "generator", None)
        self.sampler = getattr(loader, "sampler", None)

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._loader), self._steps)

    def __len__(self) -> int:
        loader: Any = self._loader
        return min(self._steps, len(loader))


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Return `(inputs, target)` of one batch; the target is None when the batch has inputs alone."""
    if isinstance(batch, list | tuple) and len(batch) == 2:
        inputs = tuple(batch[0]) if isinstance(batch[0], list) else batch[0]
        return inputs, batch[1]
    return batch, None


def move(value: Any, device: torch.device | str) -> Any:
    """Return `value` (tensor, or tuples, lists and dicts of tensors) on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: move(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(move(item, device) for item in value)
    return value


def as_call(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments with which a model is called on `inputs`."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def forward(model: nn.Module, inputs: Inputs) -> Any:
    """Call the model on the inputs of one batch."""
    args, kwargs = as_call(inputs)
    return model(*args, **kwargs)


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in a nested structure of tuples, lists, dicts and dataclass-like mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def samples(inputs: Inputs) -> int:
    """Return how many samples one batch of inputs has."""
    return next(int(tensor.shape[0]) for tensor in tensors(inputs) if tensor.dim())


def rebuild(template: Any, values: Sequence[Tensor]) -> Any:
    """Return `values` in the structure of `template`: the inverse of `tensors`."""
    remaining = iter(values)

    def walk(part: Any) -> Any:
        if isinstance(part, Tensor):
            return next(remaining)
        if isinstance(part, Mapping):
            return {key: walk(item) for key, item in part.items()}
        if isinstance(part, list | tuple):
            return tuple(walk(item) for item in part)
        return part

    return walk(template)


def select_output(output: Any, choice: int | str | Callable[[Any], Tensor] | None) -> Tensor:
    """Return the part of a model's output that the loss and the score see; an output that is one tensor is that part.

    So `0` or `"logits"` also does for a network that returns its auxiliary heads in training alone.

    Raises:
        DataError: the output has several parts and no `output=` was given, or the choice is not in it.
    """
    if callable(choice):
        return choice(output)
    if isinstance(output, Tensor):
        return output
    if choice is not None:
        try:
            if isinstance(choice, str) and isinstance(output, tuple):
                return getattr(output, choice)  # type: ignore[no-any-return]
            return output[choice]  # type: ignore[no-any-return]
        except (AttributeError, KeyError, IndexError, TypeError) as error:
            raise DataError(
                f"Data(output={choice!r}): the model returned {describe(output)}, which has no such part"
            ) from error
    raise DataError(
        f"the model returned {describe(output)} and the loss and the score take one tensor: "
        "name the part to use with Data(output=0), Data(output='logits') or a callable"
    )


def describe(value: Any) -> str:
    """Return a short description of a nested value, `tuple(Tensor[2, 10], Tensor[2, 4])`, for messages."""
    if isinstance(value, Tensor):
        return f"Tensor{list(value.shape)}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__}({', '.join(f'{key}={describe(item)}' for key, item in value.items())})"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(describe(item) for item in value)})"
    return type(value).__name__


def batches(loader: Loader | None, name: str, device: torch.device | str = "cpu") -> Iterator[tuple[Any, Any]]:
    """Yield `(inputs, target)` of every batch on the device, and refuse what no later step could explain.

    Raises:
        DataError: the loader is missing or yields nothing, or a batch has NaN or infinity; it names loader and batch.
    """
    if loader is None:
        raise DataError(f"Data has no {name} loader and this step reads it: give Data({name}=...)")
    index = -1
    for index, batch in enumerate(loader):
        inputs, target = (move(part, device) for part in split_batch(batch))
        for tensor in tensors(inputs):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise DataError(
                    f"Data.{name}: batch {index} has NaN or infinity in its inputs {describe(inputs)}: clean it first"
                )
        yield inputs, target
    if index < 0:
        raise DataError(
            f"Data.{name} is empty: it yields no batch; every loader must give at least one, each time it is read"
        )


def example_inputs(data: Data, device: torch.device | str = "cpu", batch: int = 2) -> Inputs:
    """Return the example with every tensor repeated along dimension 0 to `batch` samples, on the device.

    Two samples, because a traced size of 1 would be taken for a constant.
    """

    def grow(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0:
            raise DataError("Data.example has a tensor without dimensions; dimension 0 of every input is the batch")
        repeats = -(-batch // max(1, tensor.shape[0]))
        return torch.cat([tensor] * repeats)[:batch]

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            return grow(value.to(device))
        if isinstance(value, Mapping):
            return {key: walk(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return tuple(walk(item) for item in value)
        return value

    grown: Inputs = walk(data.example)
    if not any(True for _ in tensors(grown)):
        raise DataError(f"Data.example holds no tensor but {describe(data.example)}: give the inputs of one call")
    return grown


def complete(data: Data) -> tuple[Data, tuple[str, ...]]:
    """Fill in the loaders that are missing by splitting them off the training loader, and say so.

    A tenth of the training samples validates and a tenth tests; calibration reads the start of training.

    Returns:
        the data with `validate`, `test` and `calibrate` set, and one sentence for each part that was made.

    Raises:
        DataError: there is no loader at all, or one is needed and the training loader cannot be split.
    """
    notes: list[str] = []
    if all(getattr(data, split) is None for split in SPLITS):
        raise DataError("Data has no loader: give at least one of train, validate or test")
    given = {split: getattr(data, split) for split in SPLITS}
    missing = [split for split in ("validate", "test") if given[split] is None]
    if missing and given["train"] is not None:
        given["train"], parts = _hold_out(given["train"], len(missing))
        for split, part in zip(missing, parts, strict=True):
            given[split] = part
            notes.append(f"no {split} loader was given: a tenth of train was held out for it")
    elif missing:
        other = given["validate"] if given["validate"] is not None else given["test"]
        for split in missing:
            given[split] = other if other is not None else given["calibrate"]
            notes.append(f"no {split} loader and no train to split: the verdict and the choices share one loader")
    if given["calibrate"] is None:
        given["calibrate"] = given["train"] if given["train"] is not None else given["validate"]
        notes.append(
            f"no calibrate loader: the start of {'train' if given['train'] is not None else 'validate'} is used"
        )
    if given["train"] is None:
        notes.append("no train loader: steps that heal by training are left out")
    return replace(data, **given), tuple(notes)


def _part(loader: DataLoader[Any], samples: Subset[Any], trains: bool) -> DataLoader[Any]:
    """A loader over some of the samples that batches, collates and (for training) shuffles like the one it is part of."""
    order: Any = loader.sampler
    options: dict[str, Any] = {"collate_fn": loader.collate_fn, "num_workers": loader.num_workers}
    if loader.batch_size is None and isinstance(order, BatchSampler):  # whole batches are fetched by a list of indices
        shuffle = trains and isinstance(order.sampler, RandomSampler)
        inner = RandomSampler(samples) if shuffle else SequentialSampler(samples)
        return DataLoader(
            samples, batch_size=None, sampler=BatchSampler(inner, order.batch_size, drop_last=False), **options
        )
    if loader.batch_size is None:
        raise DataError(
            "Data.train makes its batches in a way that cannot be split: give Data(validate=..., test=...) too"
        )
    return DataLoader(
        samples, batch_size=loader.batch_size, shuffle=trains and isinstance(order, RandomSampler), **options
    )


def _hold_out(loader: Loader, parts: int) -> tuple[Loader, list[Loader]]:
    """Split `parts` tenths off a loader whose samples can be addressed; a fixed seed, so that every run agrees."""
    if isinstance(loader, DataLoader) and hasattr(loader.dataset, "__getitem__") and hasattr(loader.dataset, "__len__"):
        count = len(loader.dataset)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
        tenth = max(1, count // 10)
        chunks = [sorted(order[i * tenth : (i + 1) * tenth]) for i in range(parts)] + [sorted(order[parts * tenth :])]
        if not chunks[-1]:
            raise DataError(f"Data.train has {count} samples, too few to split: give validate and test loaders")
        made = [_part(loader, Subset(loader.dataset, chunk), chunk is chunks[-1]) for chunk in chunks]
        return made[-1], list(made[:-1])
    if isinstance(loader, Sequence):
        tenth = max(1, len(loader) // 10)
        if len(loader) <= parts * tenth:
            raise DataError(f"Data.train has {len(loader)} batches, too few to split: give validate and test loaders")
        return loader[parts * tenth :], [loader[i * tenth : (i + 1) * tenth] for i in range(parts)]
    raise DataError(
        f"validation or test samples cannot be split off a {type(loader).__name__}: "
        "give Data(validate=..., test=...), or train as a DataLoader over a map-style data set or a list of batches"
    )
