"""Errors that the user can mend, told apart from bugs.

A command prints a `UserError` as one message without a traceback; every other exception is a bug
and keeps its traceback, whatever its class. A subclass may have a builtin base beside `UserError`,
so that callers of the Python API can catch what they expect (`ValueError`, `FileNotFoundError`).
"""

import errno

# The machine refuses: nothing in the code is wrong. ENOENT is absent on purpose: a file that the
# user names is reported by `MissingFileError`, and one that the code itself expects is a bug.
_MACHINE_ERRORS = frozenset(
    {
        errno.EACCES,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EIO,
        errno.EISDIR,
        errno.EMFILE,
        errno.ENAMETOOLONG,
        errno.ENFILE,
        errno.ENODEV,
        errno.ENOSPC,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
        errno.ESTALE,
        errno.ETXTBSY,
    }
)


class UserError(Exception):
    """Something that the user can mend; the message says what was got, expected, and the fix."""

    exit_code = 1


class UsageError(UserError, ValueError):
    """Flags or a configuration that cannot be run."""

    exit_code = 2


class InputError(UserError, ValueError):
    """Input that cannot be used: contents of a file, or values that do not fit each other."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user named does not exist."""


class AccessError(UserError, OSError):
    """A file, folder or address that exists or could exist, but cannot be used."""


def is_machine_error(error: BaseException) -> bool:
    """Tells whether an OSError says that the machine refuses: full disk, no permission, ..."""
    return isinstance(error, OSError) and error.errno in _MACHINE_ERRORS
