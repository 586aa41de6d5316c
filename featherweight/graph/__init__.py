"""Coupled groups: which slices of which parameters must leave a model together."""

from __future__ import annotations

from featherweight.graph.groups import CoupledGroup, Pinned, coupled_groups

__all__ = ["CoupledGroup", "Pinned", "coupled_groups"]
