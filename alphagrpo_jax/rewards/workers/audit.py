"""Audit log: JSON Lines with an entry for every answer that a pool returns."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from alphagrpo_jax.runtime.errors import AccessError


class AuditLog:
    """Appends rows to a file, unbuffered, one JSON object per line.

    The rows of a process that is killed are in the file, except that the last may be torn.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        """Opens the file and creates it if it does not exist.

        Raises:
          AccessError: it cannot be opened.
          OSError: it cannot be written.
        """
        self.path = pathlib.Path(path)
        # Unbuffered: a row must outlive a process that is killed right behind `write`. Without an
        # fsync it need not outlive the machine.
        try:
            self._file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise AccessError(
                f"the audit log {path} cannot be opened ({error}); choose another file or none "
                "(verifier.audit)"
            ) from error
        # A killed process may have left a torn row. The next row starts a line of its own, so that
        # a reader loses only the torn one. Devices and pipes have no last byte to look at.
        if self._file.seekable() and self._file.seek(0, os.SEEK_END):
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._write(b"\n")

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row.

        Raises:
          OSError: the row is not completely in the file, e.g. because the disk is full.
        """
        self._write(json.dumps(row).encode() + b"\n")

    def close(self) -> None:
        """Closes the file. May be called twice."""
        self._file.close()

    def _write(self, line: bytes) -> None:
        while line:  # an unbuffered write may take fewer bytes than it was given
            line = line[self._file.write(line) :]
