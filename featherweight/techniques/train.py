"""The one training loop: every heal, distillation, gradual pruning and quantization-aware step runs through `fit`.

The teacher is the original model (Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015). The
best epoch on validation data wins, the starting point included, so that training never returns anything worse. Each
epoch draws from a seed of its own and leaves a checkpoint: a killed run continues and ends with the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from featherweight.data import batches
from featherweight.data import tensors as all_tensors
from featherweight.edits import named_tensors
from featherweight.errors import DivergedError
from featherweight.layers import QuantizedLayer
from featherweight.scoring import evaluate
from featherweight.technique import Context
from featherweight.techniques import together
from featherweight.techniques.checkpoints import named, restored, save
from featherweight.techniques.guidance import Guidance, Lesson
from featherweight.techniques.seeding import reseeded, seeded


@dataclass(frozen=True)
class Training:
    """How long and how to train.

    Attributes:
        epochs: passes over the training loader.
        learning_rate: peak rate of AdamW; warmed up, then cosine to zero (Loshchilov & Hutter, 2019).
        teacher_share: weight of the teacher's part of the loss, 0 to 1; 1 needs no labels.
        temperature: softness of the teacher's probabilities.
        weight_decay: of AdamW; scales and one-dimensional tensors have none.
        patience: epochs without a better validation score before stopping; 0 never stops early.
    """

    epochs: int
    learning_rate: float
    teacher_share: float = 0.7
    temperature: float = 3.0
    weight_decay: float = 1e-4
    patience: int = 0


Schedule = Callable[[float, float], bool]
"""Called before each step with the shares of training done before the last step and this one, 0 to 1; returns whether
its target has been reached. It holds no state of its own, so that a resumed run repeats it exactly."""
AfterBackward = Callable[[dict[str, nn.Parameter]], None]
"""Called between the backward pass and the step with the parameters that are trained, by name; it reads their gradients and
may change them in place."""


def fit(
    model: nn.Module,
    context: Context,
    training: Training,
    schedule: Schedule | None = None,
    masks: dict[str, Tensor] | None = None,
    after_backward: AfterBackward | None = None,
    memory: dict[str, Tensor] | None = None,
    guidance: Guidance | None = None,
    settle: float = 0.0,
    latents: Mapping[str, Tensor] | None = None,
    dropout: bool = True,
) -> None:
    """Train the model in place on `context.data.train`, with the context's teacher, and keep the best epoch.

    Quantized layers are thawed for it and frozen again. Zeros of the tensors in `context.sparse` stay zero. What is out of
    the context's scope keeps its values, statistics included. Where several processes train together, each computes its share of
    every batch, and all end with the same bits.

    Args:
        model: a plain model, changed in place.
        context: data, teacher, seed, sparse tensors, workspace for checkpoints.
        training: how long and how.
        schedule: a change that goes on during training, such as gradual pruning; epochs before it reports its target
            reached are not candidates for the best.
        masks: boolean masks by tensor name that the schedule updates; applied after every step.
        after_backward: sees, and may change, the gradients of each step, such as by those of a penalty.
        memory: tensors that schedule and after_backward write to in place; checkpoints hold them.
        guidance: how the teacher is followed; its soft targets, with a fixed weight, when None.
        settle: share of the epochs, the last ones, in which batch norms keep their statistics, 0 to 1.
        latents: float weights of quantized layers by name, to start from in place of what their codes stand for.
        dropout: False leaves all but batch norms and quantized layers in evaluation mode, where nothing is dropped at random.

    Raises:
        DataError: the training data is empty, has NaN, or its labels are out of range; or features are to be matched and
            there is no teacher.
        DivergedError: the loss stopped being finite.
        ModelError: features cannot be matched.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer) and module.codes is not None]
    for layer in layers:
        layer.thaw()
    tensors = named_tensors(model)
    for name, value in (latents or {}).items():
        tensors[name].data = value.clone()  # channels-last where it was
    modes = [(module, module.training) for module in model.modules()]
    held = dict(_sparse_masks(model, context.sparse))
    held.update(masks if masks is not None else {})
    try:
        hooks = _Hooks(schedule, after_backward, held, memory or {})
        _Loop(model, context, training, guidance or Guidance(), hooks, settle, dropout).run()
    finally:
        for module, mode in modes:
            module.training = mode
        for layer in layers:
            layer.freeze()
        for parameter in model.parameters():
            parameter.grad = None


def _sparse_masks(model: nn.Module, sparse: set[str]) -> Iterator[tuple[str, Tensor]]:
    tensors = named_tensors(model)
    for name in sparse:
        if name in tensors:
            yield name, tensors[name].detach() != 0


@dataclass(frozen=True)
class _Hooks:
    """What the caller does before and within each step, and the tensors that it writes to."""

    schedule: Schedule | None
    after_backward: AfterBackward | None
    masks: dict[str, Tensor]
    memory: dict[str, Tensor]


class _Loop:
    """The state of one training run: what a checkpoint holds, and nothing that outlives `fit`."""

    def __init__(
        self,
        model: nn.Module,
        context: Context,
        training: Training,
        guidance: Guidance,
        hooks: _Hooks,
        settle: float,
        dropout: bool,
    ) -> None:
        self.model, self.context, self.training = model, context, training
        self.schedule, self.after_backward, self.masks = hooks.schedule, hooks.after_backward, hooks.masks
        outside = [module for path, module in model.named_modules() if not context.in_scope(path)]
        held = {id(parameter) for module in outside for parameter in module._parameters.values()}
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
        self.parameters = {name: p for name, p in trainable.items() if id(p) not in held}
        # Statistics are still in evaluation mode; a quantized layer has none, and passes gradients in training mode only.
        self.still = [module for module in outside if not isinstance(module, QuantizedLayer)]
        if not dropout:  # recurrent layers pass no gradients on a GPU unless they train
            self.still += [m for m in model.modules() if not isinstance(m, QuantizedLayer | _BatchNorm | nn.RNNBase)]
        self.settled = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self.settling = (1 - settle) * training.epochs
        thawed = [module for module in model.modules() if isinstance(module, QuantizedLayer) and module.codes is None]
        steps = {id(p) for layer in thawed for p in layer.steps_in_training()}
        slow = [p for p in self.parameters.values() if id(p) in steps]
        flat = [p for p in self.parameters.values() if id(p) not in steps and p.dim() < 2]
        full = [p for p in self.parameters.values() if id(p) not in steps and p.dim() >= 2]
        self.lesson = Lesson(model, context, guidance, training.teacher_share, training.temperature)
        self.companions = {f"companion.{name}": p for name, p in self.lesson.named_parameters()}
        self.memory = hooks.memory | {name: p.detach() for name, p in self.companions.items()}
        rate, decay = training.learning_rate, training.weight_decay
        groups = [
            {"params": full, "lr": rate, "weight_decay": decay},
            {"params": flat, "lr": rate, "weight_decay": 0.0},
            {"params": slow, "lr": rate / 10, "weight_decay": 0.0},
            {"params": list(self.companions.values()), "lr": rate, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]] or [torch.zeros(())])
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.epoch = 0
        self.waited = 0
        self.best_score = -math.inf
        self.best: dict[str, Tensor] = {}
        self.steps = steps_per_epoch(context)
        how = (training, guidance, hooks.schedule is not None, settle, dropout)
        self.path = together.told(lambda: _checkpoint(model, context, how))

    def run(self) -> None:
        """Train from the last checkpoint, or from the start, to the end."""
        if not self.parameters:
            self.context.leave("the model", "no parameter in scope can be trained")
            return
        resumed = self._restore()
        loss = together.divided(self.lesson.loss, self.model, self.companions.values(), self.context.draw)
        together.even([*named_tensors(self.model).values(), *self.masks.values(), *self.memory.values()])
        if not resumed and self.schedule is None:
            self._consider()
        label = self.context.step or "training"
        while self.epoch < self.training.epochs:
            if self.training.patience and self.waited >= self.training.patience:
                break
            self.context.report(
                f"{label}: epoch {self.epoch + 1}/{self.training.epochs}", self.epoch / self.training.epochs
            )
            ready = self._train_epoch(loss)
            self.epoch += 1
            if ready or self.epoch == self.training.epochs:
                self._consider()
            self._save()
        if self.best:
            self._load(self.best)
        self._apply_masks()
        together.even(named_tensors(self.model).values())

    def _train_epoch(self, share: together.Loss) -> bool:
        self.model.train()
        for module in [*self.still, *(self.settled if self.epoch >= self.settling else ())]:
            module.training = False
        ready = self.schedule is None
        total = self.training.epochs * self.steps
        seed = self.context.draw("epoch", self.epoch)
        with seeded(seed), reseeded(self.context.data.train, seed):
            for index, (inputs, target) in enumerate(batches(self.context.data.train, "train", self.context.device)):
                done = min(1.0, (self.epoch * self.steps + index) / total)
                if self.schedule is not None:
                    ready = self.schedule(max(0.0, done - 1 / total), done)
                factor = min(1.0, (done + 1e-3) / 0.05) * 0.5 * (1 + math.cos(math.pi * done))
                for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                    group["lr"] = rate * factor
                self._apply_masks()
                loss = share(inputs, target, done)
                whole = together.mean(loss)
                if not bool(torch.isfinite(whole)):
                    raise DivergedError(
                        f"the loss became {whole.item()} at epoch {self.epoch + 1}, batch {index}: "
                        f"lower the learning rate (now {self.training.learning_rate}) or check the training targets"
                    )
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                if self.after_backward is not None:
                    self.after_backward(self.parameters)
                self.optimizer.step()
        self._apply_masks()
        together.agree(self.settled)
        return ready

    def _apply_masks(self) -> None:
        tensors = named_tensors(self.model) if self.masks else {}
        with torch.no_grad():
            for name, mask in self.masks.items():
                tensors[name].masked_fill_(~mask, 0.0)  # a product would leave -0.0

    def _consider(self) -> None:
        if not self.best and self.epoch == self.training.epochs:
            return  # the only candidate, which no score need tell from others
        score = together.told(lambda: evaluate(self.model, self.context.data, "validate", self.context.device))
        value = score.value if score.higher_is_better else -score.value
        self.waited += 1
        if value > self.best_score or not self.best:
            self.best_score, self.waited = value, 0
            self.best = {name: tensor.detach().clone() for name, tensor in named_tensors(self.model).items()}

    def _load(self, values: dict[str, Tensor]) -> None:
        tensors = named_tensors(self.model)
        with torch.no_grad():
            for name, value in values.items():
                tensors[name].copy_(value)

    def _save(self) -> None:
        if self.path is None or not together.first():
            return
        trained = self.parameters | self.companions
        moments = {
            f"{name}/{key}": value for name, p in trained.items() for key, value in self.optimizer.state[p].items()
        }
        tables = {
            "model": named_tensors(self.model),
            "best": self.best,
            "mask": self.masks,
            "memory": self.memory,
            "optimizer": moments,
        }
        save(self.path, tables, {"epoch": self.epoch, "waited": self.waited, "best_score": self.best_score})

    def _restore(self) -> bool:
        stored = restored(self.path, self.context.device) if self.path is not None else None
        if stored is None:
            return False
        tables, facts = stored
        self._load(tables["model"])
        self.best = tables["best"]
        for table, held in ((self.masks, tables["mask"]), (self.memory, tables["memory"])):
            for name, tensor in held.items():
                table[name].copy_(tensor)  # in place: the schedule goes on writing to these very tensors
        for name, value in tables["optimizer"].items():
            owner, _, key = name.rpartition("/")
            self.optimizer.state[(self.parameters | self.companions)[owner]][key] = (
                value.cpu() if key == "step" else value
            )
        self.epoch, self.waited, self.best_score = facts["epoch"], facts["waited"], facts["best_score"]
        return True


def steps_per_epoch(context: Context) -> int:
    """Return how many batches the training loader has; one without a length is read through."""
    loader: Any = context.data.train
    try:
        return max(1, len(loader))
    except TypeError:
        return max(1, sum(1 for _ in loader))


def _checkpoint(model: nn.Module, context: Context, how: tuple[object, ...]) -> Path | None:
    """A file named by everything the result depends on, or None without a workspace."""
    if context.workspace is None:
        return None
    settings = (
        context.seed,
        context.position,
        context.step,
        context.scope,
        sorted(context.sparse),
        *how,
        *([together.processes()] if together.processes() > 1 else []),  # whose sums differ in the last digits
    )
    with seeded(0), reseeded(context.data.train, 0):
        first = next(iter(context.data.train or ()), None)
    read = {f"batch {index}": tensor for index, tensor in enumerate(all_tensors(first))}
    taught = named_tensors(context.teacher) if context.teacher is not None else {}
    return named(context.workspace, settings, (named_tensors(model), taught, read))
