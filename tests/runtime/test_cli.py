"""The command runner: exit codes, one line for the user's errors, a traceback for bugs."""

import argparse
import ast
import errno
import importlib
import os
import pathlib

import pytest

from alphagrpo_jax.runtime import cli, errors

ROOT = pathlib.Path(__file__).parents[2]
COMMANDS = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for folder in ("alphagrpo_jax", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)
BY_ABSL = "alphagrpo_jax.train"  # whose flags are a configuration's fields


def run(command, *flags: str) -> int:
    def parse_flags(arguments):
        parser = cli.Parser()
        parser.add_argument("--top-p", type=float, default=1.0)
        return parser.parse_args(arguments)

    return cli.run(parse_flags, command, flags)


def test_codes_of_commands_are_passed_on():
    assert run(lambda options: None) == cli.DONE == 0
    assert run(lambda options: cli.STOPPED) == 75
    assert run(lambda options: int(10 * options.top_p), "--top-p", "0.3") == 3


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UserError("wrong"), 1),
        (errors.InputError("wrong"), 1),
        (errors.MissingFileError("wrong"), 1),
        (errors.AccessError("wrong"), 1),
        (errors.UsageError("wrong"), 2),
    ],
)
def test_an_error_of_the_user_is_one_line(error, code, capsys):
    def command(options):
        raise error

    assert run(command) == code
    assert capsys.readouterr().err == "error: wrong\n"


def test_errors_keep_a_builtin_base():
    assert issubclass(errors.InputError, ValueError)
    assert issubclass(errors.UsageError, ValueError)
    assert issubclass(errors.MissingFileError, FileNotFoundError)
    assert issubclass(errors.AccessError, OSError)


@pytest.mark.parametrize(
    "bug",
    [
        lambda: int("x"),
        lambda: {}["x"],
        lambda: list(zip([1], [], strict=True)),
        lambda: os.stat("no/such/file"),
        lambda: os.kill(2**30, 0),
        lambda: [][0],
        lambda: None + 1,
    ],
    ids=[
        "ValueError",
        "KeyError",
        "zip",
        "FileNotFoundError",
        "OSError",
        "IndexError",
        "TypeError",
    ],
)
def test_a_bug_keeps_its_traceback(bug, capsys):
    with pytest.raises(Exception) as caught:  # noqa: PT011 (of any class)
        run(lambda options: bug())
    assert caught.traceback[-1].frame.f_globals["__name__"] in (__name__, "os")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
def test_a_machine_that_refuses_is_one_line(number, capsys):
    def command(options):
        raise OSError(number, os.strerror(number), "some/file")

    assert run(command) == 1
    message = f"error: [Errno {number}] {os.strerror(number)}: 'some/file'\n"
    assert capsys.readouterr().err == message


def test_an_interrupt_is_one_line(capsys):
    def command(options):
        raise KeyboardInterrupt

    assert run(command) == 1
    assert capsys.readouterr().err == "error: interrupted\n"


def test_wrong_flags_have_the_same_prefix(capsys):
    with pytest.raises(SystemExit) as stopped:
        run(lambda options: None, "--top-p", "much")
    assert stopped.value.code == 2
    usage, error = capsys.readouterr().err.strip().split("\n")
    assert usage.startswith("usage: ")
    assert error == "error: argument --top-p: got 'much', expected a finite number"


def test_the_old_spelling_of_flags_is_accepted():
    parser = cli.Parser()
    parser.add_argument("--top-p")
    parser.add_argument("--text-file")
    parser.add_argument("words", nargs="*")

    def parsed(*flags: str) -> tuple:
        options = parser.parse_args(flags)
        return options.top_p, options.text_file, options.words

    assert parsed("--top_p", "1") == parsed("--top-p", "1") == parsed("--top_p=1")
    assert parsed("--top_p=a_b", "--text_file=--c_d") == ("a_b", "--c_d", [])
    assert parsed("--text_f=x", "e_f") == (None, "x", ["e_f"])  # shortened, as argparse allows
    assert parsed("--top-p=1", "--", "--text_file") == ("1", None, ["--text_file"])
    with pytest.raises(SystemExit):
        parser.parse_args(["--un_known=1"])


def parser_of(name: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser of a command, which is asked to parse and does no more than that."""
    parsers = []

    def stop(parser, *_, **__):
        parsers.append(parser)
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(InterruptedError):
            importlib.import_module(name).main([])
    return parsers[0]


def test_the_commands_are_found():
    assert len(COMMANDS) >= 21
    assert {BY_ABSL, "alphagrpo_jax.generate", "benchmarks.policy_speed"} < set(COMMANDS)


@pytest.mark.parametrize("name", sorted({*COMMANDS} - {BY_ABSL}))
def test_every_command_takes_both_spellings_and_shows_hyphens(name, monkeypatch):
    parser = parser_of(name, monkeypatch)
    assert isinstance(parser, cli.Parser)
    for group in parser._mutually_exclusive_groups:
        group.required = False
    for action in parser._actions:
        assert not [flag for flag in action.option_strings if "_" in flag]
        action.required = False
        if action.nargs == "+" and not action.option_strings:
            action.nargs = "*"
    for action in parser._actions:
        if action.option_strings in ([], ["-h", "--help"]):
            continue
        (flag,) = action.option_strings
        value = "NAME=1" if name.endswith("srr") and flag == "--run" else "1"
        values = [] if action.nargs == 0 else [(action.choices or [value])[0]]
        old = f"--{flag[2:].replace('-', '_')}"
        assert parser.parse_args([old, *values]) == parser.parse_args([flag, *values])


@pytest.mark.parametrize("name", sorted({*COMMANDS} - {BY_ABSL}))
def test_no_command_takes_numbers_that_are_none(name, monkeypatch, capsys):
    parser = parser_of(name, monkeypatch)
    for action in parser._actions:
        assert action.type not in (int, float), f"{action.option_strings}: see the types of cli"
        action.required = False
    numeric = [action for action in parser._actions if action.type is not None]
    for action in numeric:
        if action.type is cli.number:
            wrong = ("nan", "NaN", "inf", "-inf", "1e999", "many")
        elif "integer" in getattr(action.type, "__qualname__", ""):
            wrong = ("nan", "1.5", "-1", "many", "1e3")
        else:
            continue
        (flag,) = action.option_strings
        for value in wrong:
            with pytest.raises(SystemExit) as stopped:
                parser.parse_args([f"{flag}={value}"])
            assert stopped.value.code == 2
            assert f"argument {flag}: got " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "good", "wrong"),
    [
        (cli.COUNT, {"1": 1, "70": 70}, ("0", "-3")),
        (cli.AMOUNT, {"0": 0}, ("-1",)),
        (cli.SEED, {"0": 0, "4294967295": 2**32 - 1}, ("-1", "4294967296")),
        (cli.number, {"-1e3": -1000.0, "0": 0.0}, ("nan", "-inf")),
    ],
)
def test_types_of_flags(kind, good, wrong):
    assert {text: kind(text) for text in good} == good
    for text in wrong:
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)


@pytest.mark.parametrize("name", sorted({*COMMANDS} - {BY_ABSL}))
def test_every_command_is_run_by_the_runner(name):
    tree = ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text())
    (main,) = (node for node in tree.body if getattr(node, "name", "") == "main")
    assert ast.unparse(main.body[-1]) == "return cli.run(parse_flags, run, arguments)"
    # Where a thread may still be at work, the process does not wait for it.
    ends = ("sys.exit(main())", "stopping.leave(main())")
    assert ast.unparse(tree.body[-1].body[0]) in ends
    prints = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and str(node.value).startswith("error: ")
    ]
    assert not prints, "only the runner writes the prefix"


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("int('x')", "ValueError: invalid literal"),
        ("list(zip([1], [], strict=True))", "ValueError: zip()"),
    ],
)
def test_the_process_of_a_bug_ends_with_one_and_a_traceback(statement, message, run_python):
    program = (
        "import argparse, sys; from alphagrpo_jax.runtime import cli\n"
        f"def command(options): {statement}\n"
        "sys.exit(cli.run(lambda _: argparse.Namespace(), command))"
    )
    process = run_python("-c", program)
    assert process.returncode == 1
    assert process.stderr.startswith("Traceback (most recent call last)")
    assert message in process.stderr
    assert "error: " not in process.stderr
