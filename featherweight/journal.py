"""An append-only file of JSON lines that survives a kill at any moment: what was written stays, a torn last line goes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from featherweight.errors import ArtifactError

try:
    import fcntl
except ImportError:  # Windows: two searches on one journal are then the user's own care
    fcntl = None  # type: ignore[assignment]

Row = dict[str, Any]


def read_rows(path: Path) -> tuple[list[Row], int]:
    """Return the complete rows of a journal, and how many bytes they take; a torn last line is left out.

    Safe while another process appends.

    Raises:
        ArtifactError: there is no such file, or a line before the last is no JSON object.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read as a journal: {error.strerror or error}") from error
    whole = content[: content.rfind(b"\n") + 1]
    rows: list[Row] = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ArtifactError(f"{path} is damaged: line {number} is no JSON object: {line[:60]!r}")
        rows.append(row)
    return rows, len(whole)


class Journal:
    """A journal open for appending, by one process at a time.

    Attributes:
        path: of the file.
        rows: everything in it, in order.
    """

    def __init__(self, path: Path) -> None:
        """Open a journal, or start one; a line that a kill tore is cut off.

        Raises:
            ArtifactError: another process has it open, it cannot be written, or it is damaged.
        """
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise ArtifactError(f"{path} cannot be written: {error.strerror or error}") from error
        try:
            if fcntl is not None:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.rows, length = read_rows(path)
            os.ftruncate(self._file, length)
        except BlockingIOError as error:
            os.close(self._file)
            raise ArtifactError(f"{path} is in use by another search that still runs") from error
        except ArtifactError:
            os.close(self._file)
            raise

    def append(self, row: Row) -> None:
        """Add a row; when this returns, it is on the disk."""
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        os.write(self._file, line)
        os.fsync(self._file)
        self.rows.append(row)

    def close(self) -> None:
        """Let others open it."""
        os.close(self._file)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
