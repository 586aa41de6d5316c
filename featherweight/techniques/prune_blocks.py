"""Depth pruning: remove whole residual blocks and transformer layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.data import batches, example_inputs, forward, select_output, tensors
from featherweight.edits import Swap, apply, module_at
from featherweight.layers.skip import first_tensor
from featherweight.modes import evaluating
from featherweight.technique import Context, Edits, Stage, Technique, setting
from featherweight.techniques.blocks import residual_blocks
from featherweight.techniques.imitation import output_kind
from featherweight.trace import unfused


@final
@dataclass(frozen=True)
class PruneBlocks(Technique):
    """Leave out a share `ratio` of the residual blocks, the least important first; what they were given passes on.

    A block that keeps the shape of its input and adds to it can be left out whole: residual blocks of convolutions, layers
    of a Transformer. Importance `influence` is how far a block turns its input, `1 - cosine(input, output)`, measured once;
    `loss` is how far the model's output moves without the block (Kullback-Leibler divergence where the loss is cross
    entropy, squared error elsewhere), measured again after each block that leaves. One block always stays.

    Paper: Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024 (`influence`);
        Kim et al., "Shortened LLaMA: Depth Pruning for Large Language Models", 2024 (`loss`).
    Use when: latency matters most: fewer layers are faster on every device, at any batch size; heal with `distill`.
    Costs: `batches` forward passes for `influence`; as many for each block and each removal for `loss`.
    """

    stage: ClassVar[Stage | None] = Stage.CUT
    needs: ClassVar[frozenset[str]] = frozenset({"calibrate"})
    ratio: float = setting(0.25, low=0.0, high=0.99)
    importance: str = setting("influence", choices=("influence", "loss"))
    batches: int = setting(8, low=1, high=100_000)

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Swap by a skip for each block that leaves, the least important first."""
        blocks = residual_blocks(model, example_inputs(context.data, context.device))
        blocks = {path: swap for path, swap in blocks.items() if context.in_scope(path)}
        wanted = min(round(self.ratio * len(blocks)), len(blocks) - 1)
        if not blocks:
            context.leave("", "no module in scope adds to its input and keeps its shape, so none can be left out")
        elif wanted == 0 < self.ratio:
            context.leave("", f"{self.ratio:.0%} of {len(blocks)} blocks is none that could leave: {', '.join(blocks)}")
        if wanted <= 0:
            return
        inputs = [
            given for given, _ in islice(batches(context.data.calibrate, "calibrate", context.device), self.batches)
        ]
        by_loss = self.importance == "loss"
        whole = _outputs(model, inputs, context) if by_loss else []
        scores = {} if by_loss else _influence(model, blocks, inputs)
        while wanted and blocks:
            if by_loss:
                scores = {path: _divergence(model, swap, inputs, whole, context) for path, swap in blocks.items()}
            path = min(blocks, key=scores.__getitem__)
            wanted -= yield blocks.pop(path)

    def mildest(self) -> Technique:
        """Return a cut that keeps every block."""
        return PruneBlocks(ratio=0.0)


def _influence(model: nn.Module, blocks: dict[str, Swap], inputs: list[Any]) -> dict[str, float]:
    """`1 - cosine` of what enters and leaves each block, mean over samples: 0 where nothing changes."""
    entered: dict[str, Tensor] = {}
    turned: dict[str, list[Tensor]] = {path: [] for path in blocks}
    handles: list[Any] = []

    def watch(path: str) -> None:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = first_tensor(args, kwargs)
            if given is not None:
                entered[path] = given.clone()  # the block may write into it

        def leave(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            before, after = entered.pop(path).double(), next(tensors(output)).double()
            turned[path].append(1 - F.cosine_similarity(before.flatten(1), after.flatten(1)))

        module = module_at(model, path)
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))

    try:
        for path in blocks:
            watch(path)
        with evaluating(model), unfused():
            for given in inputs:
                forward(model, given)
    finally:
        for handle in handles:
            handle.remove()
    return {path: float(torch.cat(values).nan_to_num(torch.inf).mean()) for path, values in turned.items()}


def _divergence(model: nn.Module, swap: Swap, inputs: list[Any], whole: list[Tensor], context: Context) -> float:
    """How far the outputs move from `whole` without one block, mean over samples; infinite where the model fails."""
    with _without(model, swap):
        try:
            outputs = _outputs(model, inputs, context)
        except Exception:  # whatever the user's forward raises: then the block is left for last, and `run` says why
            return torch.inf
    classes = output_kind(context.data.loss) == "classes"
    apart = torch.cat([_apart(old, new, classes) for old, new in zip(whole, outputs, strict=True)])
    return float(apart.nan_to_num(torch.inf).mean())


def _apart(old: Tensor, new: Tensor, classes: bool) -> Tensor:
    """The divergence of each sample, `[batch]`."""
    if not classes:
        return (old - new).square().flatten(1).mean(1)
    old, new = F.log_softmax(old, 1), F.log_softmax(new, 1)
    return (old.exp() * (old - new)).sum(1).reshape(len(old), -1).mean(1)


def _outputs(model: nn.Module, inputs: list[Any], context: Context) -> list[Tensor]:
    with evaluating(model):
        return [select_output(forward(model, given), context.data.output).double() for given in inputs]


@contextmanager
def _without(model: nn.Module, swap: Swap) -> Iterator[None]:
    undo = apply(model, swap)
    try:
        yield
    finally:
        undo()
