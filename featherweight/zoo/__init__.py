"""Models to test compression on: tiny ones that each hold one trap, and one of every architecture people compress."""

from __future__ import annotations

from featherweight.zoo.catalog import Architecture, architectures
from featherweight.zoo.small import Plain, randomise, small_models

__all__ = ["Architecture", "Plain", "architectures", "randomise", "small_models"]
