"""The indices of a model's parameters, which of them leave together, and which never can."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from featherweight.graph.labels import Value, collapse, varying


class Atoms:
    """All atoms of a model, which of them leave together, and which never can."""

    def __init__(self, attention: str = "heads") -> None:
        self.attention = attention
        self.blocks: list[tuple[str, int, int, int]] = []  # tensor, dim, first atom, size
        self.size = 1  # atom 0 is the constant
        self.reasons: list[str] = []
        self._pins: list[tuple[np.ndarray, int]] = []
        self._edges: list[np.ndarray] = []
        self._sources: list[np.ndarray] = []
        self._split: list[tuple[Tensor, int | None, str]] = []
        self.lines: list[tuple[str, np.ndarray]] = []  # the layers and directions of a recurrent layer share one size

    def tensor(self, name: str, shape: Sequence[int]) -> Value:
        """Give every index of every dimension of a parameter an atom; a dimension of size 1 cannot be cut."""
        layers = []
        for dim, size in enumerate(shape):
            if size > 1:
                labels = torch.arange(self.size, self.size + size, dtype=torch.int32)
                layers.append(labels.reshape([-1 if d == dim else 1 for d in range(len(shape))]))
                self.blocks.append((name, dim, self.size, size))
                self.size += size
        return Value(tuple(shape), tuple(layers), static=True)

    def pin(self, labels: Tensor, why: str) -> None:
        """Forbid the removal of these atoms; the first reason given is the one reported."""
        ids = np.unique(labels.numpy())
        if ids[ids > 0].size:
            if not self.reasons or self.reasons[-1] != why:
                self.reasons.append(why)
            self._pins.append((ids[ids > 0], len(self.reasons) - 1))

    def tie(self, left: Tensor, right: Tensor, why: str) -> None:
        """Let two label arrays leave together element by element; a label that meets a constant is pinned."""
        shape = np.broadcast_shapes(left.shape, right.shape)
        left, right = left.expand(shape), right.expand(shape)
        apart = left != right
        if apart.any():
            pairs = torch.stack((left[apart], right[apart]))
            meets_constant = (pairs == 0).any(0)
            self.pin(pairs[:, meets_constant], why)
            if not meets_constant.all():
                self._edges.append(pairs[:, ~meets_constant].numpy())

    def tie_along(self, labels: Tensor, dims: Iterable[int], why: str) -> Tensor:
        """Let all elements along these dimensions leave together; the layer comes back with size 1 there."""
        for dim in dims:
            if labels.shape[dim] > 1:
                self.tie(labels, labels.narrow(dim, 0, 1), why)
                labels = labels.amax(dim, keepdim=True)
        return labels

    def source(self, labels: Tensor) -> None:
        """Mark atoms as output channels of a layer: only groups that hold one can be cut."""
        self._sources.append(labels.numpy().ravel())

    def split(self, labels: Tensor, why: str, shrinks: int | None = None) -> None:
        """Remember a tensor whose labels vary along several dimensions; `solve` lets only one of them shrink."""
        if len(varying(labels)) > 1:
            self._split.append((labels, shrinks, why))

    def line(self, size: str, labels: Tensor) -> None:
        """Name the size that this line of atoms shares with others: each must lose as many."""
        self.lines.append((size, labels.numpy().ravel()))

    def solve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return for every atom its component, the component's first reason (-1: free), and whether it is a source.

        What is left of a tensor after a removal must be rectangular. Where components vary along several dimensions of
        one tensor (a view that splits the channels, as in a channel shuffle), the one written as -1, or else the last, shrinks.
        """
        root = _components(self.size, self._edges)
        changed = True
        while changed:
            before = len(self._edges)
            for labels, shrinks, why in self._split:
                now = collapse(torch.from_numpy(root)[labels.long()])
                dims = sorted(varying(now))
                if len(dims) > 1:
                    self.tie_along(now, set(dims) - {shrinks if shrinks in dims else dims[-1]}, why)
            changed = len(self._edges) > before
            root = _components(self.size, self._edges) if changed else root
        reason = np.full(self.size, len(self.reasons), dtype=np.int64)
        for ids, index in self._pins:
            np.minimum.at(reason, root[ids], index)
        reason = reason[root]
        reason[reason == len(self.reasons)] = -1
        source = np.zeros(self.size, dtype=bool)
        source[np.concatenate([np.zeros(1, dtype=np.int32), *self._sources])] = True
        source[0] = False
        return root, reason, source


def _components(size: int, edges: Sequence[np.ndarray]) -> np.ndarray:
    """Return the smallest atom connected with each atom, by hooking roots together and halving the paths."""
    root = np.arange(size, dtype=np.int32)
    left, right = np.concatenate([np.zeros((2, 0), dtype=np.int32), *edges], axis=1)
    while left.size:
        np.minimum.at(root, np.maximum(root[left], root[right]), np.minimum(root[left], root[right]))
        while not np.array_equal(root, root[root]):
            root = root[root]
        apart = root[left] != root[right]
        left, right = left[apart], right[apart]
    return root
