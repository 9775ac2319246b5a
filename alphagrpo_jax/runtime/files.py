"""Replaces files as a whole: a reader, or a crash at any moment, sees the old or the new one."""

import contextlib
import errno
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

from alphagrpo_jax.runtime.errors import AccessError, UserError

_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)  # of file systems that cannot sync a folder


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens a file that takes the place of `path` when the block ends.

    It is written beside `path`, with ".new" at its name's end, and synced before it is renamed;
    then the folder is synced, so that the new name survives a power cut too. If the block fails,
    `path` stays as it was.

    Args:
      path: of the file; its folder exists.
    Raises:
      AccessError: the file cannot be written, e.g. because the disk is full.
    """
    path = pathlib.Path(path)
    new = path.with_name(path.name + ".new")
    try:
        try:
            with new.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error counts
                new.unlink()  # on a full disk its room is wanted
            raise
        sync_folder(path.parent)
    except UserError:
        raise
    except OSError as error:
        raise AccessError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another "
            "place, then run the same command again"
        ) from error


def replace_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file, see `replacing`."""
    with replacing(path) as file:
        file.write(content)


def replace_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 file, see `replacing`."""
    replace_bytes(path, text.encode())


def sync_folder(folder: str | os.PathLike) -> None:
    """Makes names of new files in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)
