"""Main functions of model processes that misbehave; what they import costs each process time."""

import signal
import threading


def stalls(connection, folder, options):
    """Is loaded at once, and never ends a pass."""
    del folder, options
    connection.send(("ready", None))
    connection.recv()
    threading.Event().wait()


def is_killed(connection, folder, options):
    """Ends as for lack of memory."""
    del connection, folder, options
    signal.raise_signal(signal.SIGKILL)


def has_a_bug(connection, folder, options):
    """Fails while it loads."""
    del folder, options
    connection.send(("failed", "KeyError: 'weights'"))


def tells_its_signals(connection, folder, options):
    """Tells which signals the process starts with blocked."""
    del folder, options
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    connection.send(("refused", f"blocked: {sorted(map(int, mask))}"))
