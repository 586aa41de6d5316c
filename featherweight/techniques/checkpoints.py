"""What a killed training run continues from: tables of tensors and a few facts, in one safetensors file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Tables = dict[str, dict[str, Tensor]]


def named(folder: Path, settings: object, tables: Iterable[Mapping[str, Tensor]]) -> Path:
    """Return a file in `folder`, which is made, named by settings and values: no other run picks it up by mistake.

    Args:
        folder: of all checkpoints.
        settings: anything whose `repr` says what it is.
        tables: tensors by name that the result depends on.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for table in tables:
        for name, tensor in sorted(table.items()):
            digest.update(name.encode())
            if tensor.numel():
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"train-{digest.hexdigest()[:20]}.safetensors"


def save(path: Path, tables: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> None:
    """Write a checkpoint, all or nothing.

    Args:
        path: from `named`.
        tables: tensors by table and name; a table's own name has no slash.
        facts: JSON-able.
    """
    held = {
        f"{table}/{name}": tensor.detach().cpu().clone().contiguous()
        for table, tensors in tables.items()
        for name, tensor in tensors.items()
    }
    part = path.with_suffix(".part")
    metadata = {"facts": json.dumps(facts), "tables": json.dumps(list(tables)), "torch": torch.__version__}
    save_file(held, part, metadata)
    os.replace(part, path)


def restored(path: Path, device: torch.device) -> tuple[Tables, dict[str, Any]] | None:
    """Return tables and facts, or None: a damaged checkpoint costs its training run, never a wrong result."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as stored:
            metadata = stored.metadata()
            facts = dict(json.loads(metadata["facts"]))
            tables: Tables = {name: {} for name in json.loads(metadata["tables"])}
            for key in stored.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                table, _, name = key.partition("/")
                tables[table][name] = stored.get_tensor(key).to(device)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError):
        return None
    return tables, facts
