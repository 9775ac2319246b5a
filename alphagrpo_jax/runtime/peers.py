"""Ends all processes of a run with the true cause where one of them fails: none waits for the dead.

Process 0 listens, and each other process keeps a connection to it. The kernel closes the
connection of a process that ends, whatever ended it, and breaks the one to a machine that no longer
answers; what a process fails by is sent before it ends. No thread of a healthy process has to
prove that it lives, so that neither a long compilation nor a slow disk is taken for a death.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import secrets
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from alphagrpo_jax.runtime import cli, distributed
from alphagrpo_jax.runtime.errors import UserError, is_machine_error
from alphagrpo_jax.runtime.stopping import leave

ADDRESS_KEY = "alphagrpo_jax/peers"  # in the store that all processes share
JOIN_SECONDS = 20.0  # for the address of process 0, and for its answer
REACT_SECONDS = 3.0  # for the main thread to end by itself once another process has failed
CAUSE_SECONDS = 5.0  # in which another process's failure explains an error of this one
# Of a connection whose other machine is silent: 5 s + 3 questions in 9 s until the kernel gives up.
SILENT_SECONDS, QUESTION_SECONDS, QUESTIONS = 5, 3, 3
LONGEST = 4000  # characters of a cause
KILLED = (
    "it ended without a word: something killed it (kill -9, or no memory left: see the log of "
    "its host), or its machine is gone"
)


class PeerError(UserError, RuntimeError):
    """Another process of the run has failed, so that this one cannot go on."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """Failure of a process that ends the run.

    Attributes:
      name: of the process that failed.
      cause: what it said, or that it said nothing.
    """

    name: str
    cause: str

    def error(self) -> PeerError:
        """Returns the error that all other processes end with."""
        return PeerError(
            f"{self.name} of the run has failed, and all others end with it: {self.cause}; mend "
            "that, then run the same command again on all processes: it continues from the last "
            "checkpoint"
        )


class Peers:
    """Connections to the other processes of a run. Thread-safe."""

    def __init__(self, rank: int, end_process: Callable[[UserError], None]) -> None:
        """Prepares; `listen` or `join` connects.

        Args:
          rank: number of this process.
          end_process: called on another thread if the main thread does not end by itself once
            a process has failed.
        """
        self._rank = rank
        self._end_process = end_process
        self._lock = threading.Lock()
        self._failure: Failure | None = None
        self._own_error: UserError | None = None
        self._failed, self._ending = threading.Event(), threading.Event()
        self._connections: dict[int, socket.socket] = {}
        self._names = {rank: f"process {rank} (host {socket.gethostname()}, pid {os.getpid()})"}
        self._silenced: set[int] = set()  # whose ends say nothing new
        _start(self._end_in_time)

    @property
    def name(self) -> str:
        """Name of this process in messages."""
        return self._names[self._rank]

    def listen(self) -> tuple[int, str]:
        """Waits for the others' connections in the background; returns port and password."""
        server = socket.create_server(("", 0), backlog=1024)
        password = secrets.token_hex(16)
        _start(lambda: self._accept(server, password))
        return server.getsockname()[1], password

    def join(self, address: tuple[str, int], password: str) -> None:
        """Connects to process 0.

        Raises:
          OSError: it cannot be reached.
        """
        connection = socket.create_connection(address, timeout=JOIN_SECONDS)
        _send(connection, {"rank": self._rank, "name": self.name, "password": password})
        lines = connection.makefile("rb")
        greeting = json.loads(lines.readline())
        self._names[0] = greeting["name"]
        _keep_alive(connection)
        self._connections[0] = connection
        _start(lambda: self._read(0, lines))

    def report(self, cause: str) -> None:
        """Tells the others what this process fails by, unless another failed before."""
        self._ending.set()
        self._take(self._rank, Failure(self.name, cause[:LONGEST]))

    def fail(self, error: UserError) -> None:
        """Ends the run by an error that the main thread does not wait for.

        Args:
          error: this process ends with it, unless another failed before.
        """
        self._own_error = error
        self._take(self._rank, Failure(self.name, str(error)[:LONGEST]))

    def error(self, failure: Failure) -> UserError:
        """Returns what this process ends with after the run's failure."""
        if self._own_error is not None and failure.name == self.name:
            return self._own_error
        return failure.error()

    def say_goodbye(self) -> None:
        """Tells the others that this process ends as it should; it still hears of failures."""
        self._broadcast({"bye": self._rank})

    def failure(self, seconds: float) -> Failure | None:
        """Waits so long for a failure that ends the run; returns it, None if there is none."""
        self._failed.wait(seconds)
        return self._failure

    def leave_alone(self) -> None:
        """The caller ends this process; `end_process` is not called any more."""
        self._ending.set()

    # On threads of their own.

    def _accept(self, server: socket.socket, password: str) -> None:
        """Takes connections of processes that know the password."""
        while True:
            connection, _ = server.accept()
            _start(lambda connection=connection: self._greet(connection, password))

    def _greet(self, connection: socket.socket, password: str) -> None:
        """Takes a connection and reads it to its end."""
        connection.settimeout(JOIN_SECONDS)
        lines = connection.makefile("rb")
        try:
            hello = json.loads(lines.readline(LONGEST))
            if not secrets.compare_digest(hello["password"], password):
                raise ValueError("another run's password")
            rank, name = int(hello["rank"]), str(hello["name"])
            _send(connection, {"name": self.name})
        except (OSError, ValueError, KeyError, TypeError):  # no process of this run
            connection.close()
            return
        _keep_alive(connection)
        with self._lock:
            self._names[rank] = name
            self._connections[rank] = connection
        if self._failure is not None:  # it came late
            self._broadcast(_message(rank, self._failure))
        self._read(rank, lines)

    def _read(self, rank: int, lines: Any) -> None:
        """Reads what a process says, until its end."""
        with contextlib.suppress(OSError):
            for line in lines:
                message = json.loads(line)
                if "bye" in message:
                    self._silenced.add(message["bye"])
                else:
                    self._take(message["rank"], Failure(message["name"], message["cause"]))
        if rank not in self._silenced:
            self._take(rank, Failure(self._names[rank], KILLED))

    def _take(self, rank: int, failure: Failure) -> None:
        """Keeps the first failure, and process 0 tells it to all."""
        with self._lock:
            self._silenced.add(rank)
            if self._failure is not None:
                return
            self._failure = failure
        self._broadcast(_message(rank, failure))
        self._failed.set()

    def _broadcast(self, message: Mapping[str, Any]) -> None:
        """Sends to all that are connected: process 0 to the others, they to process 0."""
        with self._lock:
            connections = list(self._connections.values())
        for connection in connections:
            with contextlib.suppress(OSError):  # it has ended: its reader sees that
                _send(connection, message)

    def _end_in_time(self) -> None:
        """Ends the process once the main thread has let a failure pass."""
        self._failed.wait()
        if not self._ending.wait(REACT_SECONDS) and self._failure is not None:
            self._end_process(self.error(self._failure))


_current: Peers | None = None


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Ends all processes of the run if one fails in the block; nothing if there is only one.

    A process that fails, or whose run another has ended, prints the cause and ends without waiting
    for the others.
    """
    global _current
    if not distributed.is_joined():
        yield
        return
    rank = distributed.process_number()
    peers = _current = Peers(rank, _end_by)
    _connect(peers, rank)
    _delay_aborts()
    try:
        yield
    except BaseException as error:
        code = cli.FAILED
        with contextlib.suppress(OSError):  # stderr may be a file on a full disk
            code = _report(peers, error)
        leave(code)
    peers.say_goodbye()


def announce_end(code: int) -> None:
    """Tells the other processes that this one ends at once; called from any thread."""
    if _current is None:
        return
    _current.leave_alone()
    if code in (cli.DONE, cli.STOPPED):
        _current.say_goodbye()
    else:
        _current.report(f"it was ended by a signal (exit code {code})")


def fail(error: UserError) -> None:
    """Ends all processes by an error of this one; called from any thread.

    The main thread has some seconds to end by itself. Nothing happens if there is one process.
    """
    if _current is not None:
        _current.fail(error)


def _connect(peers: Peers, rank: int) -> None:
    """Connects the processes by an address in the store that they share."""
    try:
        if rank == 0:
            port, password = peers.listen()
            distributed.publish(ADDRESS_KEY, json.dumps([port, password]))
        else:
            port, password = json.loads(distributed.published(ADDRESS_KEY, JOIN_SECONDS))
            peers.join((distributed.coordinator_host(), port), password)
    except (OSError, RuntimeError, ValueError) as error:
        _write(
            f"notice: {peers.name} cannot reach process 0 on a port of its own ({error}): if "
            "another process fails, this one may wait for minutes, and cannot say why; open the "
            "ports between the hosts"
        )


def _delay_aborts() -> None:
    """Lets a C++ abort wait, so that the cause is told before.

    JAX's client aborts the process within milliseconds of the end of process 0, and says neither
    who nor why. `sleep` is safe as a signal's handler; its argument is the signal's number, so
    that the aborting thread sleeps for 6 s and then goes on with its abort.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        library.signal.argtypes, library.signal.restype = (
            [ctypes.c_int, ctypes.c_void_p],
            ctypes.c_void_p,
        )
        library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))


def _report(peers: Peers, error: BaseException) -> int:
    """Prints what ends this process, tells the others; returns the exit code."""
    failure = peers.failure(0.0 if _is_own(error) else CAUSE_SECONDS)
    peers.leave_alone()
    if failure is not None and not _is_own(error):
        return cli.report(peers.error(failure))
    if isinstance(error, UserError) or is_machine_error(error):
        peers.report(str(error))
        return cli.report(error)
    if isinstance(error, KeyboardInterrupt):
        peers.report("it was ended by Ctrl-C")
        return cli.report("interrupted")
    peers.report(f"a bug ({type(error).__name__}: {error}); its traceback is in its own log")
    traceback.print_exception(error)
    return cli.FAILED


def _is_own(error: BaseException) -> bool:
    """Tells if an error has come up in this process for sure, and is not the end of a collective.

    Collectives fail with exceptions of many classes, and a checkpoint's may have such a cause.
    """
    source = error
    while source.__cause__ is not None:
        source = source.__cause__
    return is_machine_error(source) or isinstance(source, UserError | KeyboardInterrupt)


def _end_by(error: UserError) -> None:
    """Ends the process, whose main thread may wait for ever for another one."""
    _write(f"error: {error}")
    os._exit(error.exit_code)


def _message(rank: int, failure: Failure) -> dict[str, Any]:
    return {"rank": rank, **dataclasses.asdict(failure)}


def _send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _keep_alive(connection: socket.socket) -> None:
    """Lets the kernel ask whether a silent machine is still there."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", SILENT_SECONDS),
        ("TCP_KEEPINTVL", QUESTION_SECONDS),
        ("TCP_KEEPCNT", QUESTIONS),
    ):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _start(function: Callable[[], None]) -> None:
    threading.Thread(target=function, daemon=True, name="peers").start()


def _write(line: str) -> None:
    """Writes to stderr past Python's buffer, whose lock the main thread may hold."""
    with contextlib.suppress(OSError):  # a file on a full disk
        os.write(2, f"\n{line}\n".encode())
