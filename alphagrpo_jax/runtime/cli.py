"""Runs a command: parses its flags, explains the user's errors, returns the exit code."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from alphagrpo_jax.runtime.device_memory import is_shortage
from alphagrpo_jax.runtime.errors import UserError, is_machine_error

# Exit codes of all commands. STOPPED: a signal ended it with everything saved, and the same command
# continues.
DONE, FAILED, WRONG_USAGE, STOPPED = 0, 1, 2, 75


MAX_SEED = (1 << 32) - 1


def number(text: str) -> float:
    """Parses a number; NaN and the infinities are none, though `float` takes them.

    A comparison with NaN is false, so that it would pass every check of a range.

    Raises:
      ArgumentTypeError: the text is no such number.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a finite number")
    return value


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """Returns a type of flags: integers from `least` to `most` (None: without end)."""
    bounds = f"at least {least}" if most is None else f"between {least} and {most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            message = f"got {text!r}, expected an integer; it must be {bounds}"
            raise argparse.ArgumentTypeError(message) from None
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"got {text}, it must be {bounds}")
        return value

    return parse


COUNT, AMOUNT, SEED = integer(1), integer(0), integer(0, MAX_SEED)  # types of flags


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with the error prefix of all commands.

    Flags are declared with hyphens; with underscores, as they were once spelled, they are accepted
    too. Flags of the type float are finite numbers.
    """

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Declares a flag; as of any ArgumentParser."""
        if options.get("type") is float:
            options["type"] = number
        return super().add_argument(*names, **options)

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parses arguments; `parse_args` calls it."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)  # what follows is no flag
        spelled = [self._with_hyphens(word) for word in words[:end]]
        # The stub is generic over the namespace: with None it is argparse's own.
        return super().parse_known_args(spelled + words[end:], namespace)  # pyright: ignore[reportReturnType]

    def _with_hyphens(self, word: str) -> str:
        name, equals, value = word.partition("=")
        hyphens = name.replace("_", "-")
        is_flag = any(flag.startswith(hyphens) for flag in self._option_string_actions)
        return f"{hyphens}{equals}{value}" if name.startswith("--") and is_flag else word

    def error(self, message: str) -> NoReturn:
        """Ends the process with the usage and a message on stderr."""
        self.print_usage(sys.stderr)
        self.exit(WRONG_USAGE, f"error: {message}\n")


def run(
    parse_flags: Callable[[Sequence[str] | None], argparse.Namespace],
    command: Callable[[argparse.Namespace], int | None],
    arguments: Sequence[str] | None = None,
) -> int:
    """Runs a command and returns its exit code.

    An error that the user can mend ends as one message on stderr. A bug propagates, so that it
    keeps its traceback, whatever its class; the process then ends with 1 too.

    Args:
      parse_flags: reads the flags; ends the process with 2 if they are wrong.
      command: does the work; None counts as 0.
      arguments: flags; None: those of the process.
    """
    options = parse_flags(arguments)
    return exit_code_of(lambda: command(options))


def exit_code_of(command: Callable[[], int | None]) -> int:
    """Calls a command and explains the user's errors; see `run`."""
    try:
        return command() or DONE
    except KeyboardInterrupt:
        return report("interrupted")
    except UserError as error:
        return report(error)
    except Exception as error:
        if is_shortage(error):
            return report(f"too little memory on a device: {_first_line(error)}; {_remedy(error)}")
        if not is_machine_error(error):
            raise
        return report(error)


def _remedy(error: BaseException) -> str:
    if type(error).__name__ in ("OutOfMemoryError", "AcceleratorError"):  # PyTorch's: a verifier
        return (
            "give the verifier more devices (--device auto), weights of less precision "
            "(--dtype bfloat16) or fewer questions at a time (--max-batch of serve_verifier)"
        )
    return (
        "work on fewer rows at a time (--n of generate, or the configuration's rollout.micro_batch "
        "and eval.micro_batch), on smaller images or on more devices (mesh.fsdp, mesh.tensor); "
        "python -m alphagrpo_jax.plan says what every function needs"
    )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason")


def report(error: BaseException | str) -> int:
    """Prints an error as every command does, and returns its exit code."""
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code if isinstance(error, UserError) else FAILED
