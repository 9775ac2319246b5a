"""The audit log: JSON Lines that account for every number a pool hands out."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any


class AuditLog:
    """Appends rows to a file, each in one piece and at once: nothing waits in a buffer.

    A process that is killed may leave a torn row; the next one starts a line of its own, so that a
    reader loses nothing else.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        """Opens the file, new or to be continued.

        Raises:
          OSError: it cannot be opened or written.
        """
        self.path = pathlib.Path(path)
        self._file = self.path.open("a+b", buffering=0)
        if self._file.seekable() and self._file.seek(0, os.SEEK_END):
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._write(b"\n")

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row.

        Raises:
          OSError: it is not whole in the file, e.g. because the disk is full.
        """
        self._write(json.dumps(row).encode() + b"\n")

    def close(self) -> None:
        """Closes the file. May be called twice."""
        self._file.close()

    def _write(self, line: bytes) -> None:
        while line:  # a file system may take a part only
            line = line[self._file.write(line) :]
