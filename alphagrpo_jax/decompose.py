"""Turns prompts into records of atomic yes/no questions, or checks a file of such records.

    python -m alphagrpo_jax.decompose --input prompts.txt --output train.jsonl --llm shapes
    python -m alphagrpo_jax.decompose --input prompts.txt --output train.jsonl \
        --llm openai:http://127.0.0.1:8000/v1 --model Qwen3-30B --api-key-env KEY --concurrency 16
    python -m alphagrpo_jax.decompose --check train.jsonl --verifier package:verifier \
        --image-side 256

The input is a text file with one prompt per line, or a *.jsonl file of objects with "prompt" (and
maybe "id"). Stopped or killed at any moment, the same command continues; prompts that failed are
tried again. Beside the output stands a report, OUTPUT.report.json.
"""

import argparse
import contextlib
import dataclasses
import functools
import pathlib
import threading
from collections.abc import Iterator, Sequence

from alphagrpo_jax.decomposition import check, models, running
from alphagrpo_jax.decomposition.journal import Journal, read_prompts
from alphagrpo_jax.decomposition.limits import Pace, PatientModel
from alphagrpo_jax.decomposition.pipeline import TRIES, DecompositionError
from alphagrpo_jax.rewards.verifiers.chat.base import LanguageModelError
from alphagrpo_jax.rewards.verifiers.instructions import AUDIT_INSTRUCTION
from alphagrpo_jax.runtime import cli, stopping
from alphagrpo_jax.runtime.errors import InputError
from alphagrpo_jax.runtime.paths import model_folder
from alphagrpo_jax.runtime.stopping import StopFlag
from alphagrpo_jax.runtime.texts import printable
from alphagrpo_jax.shapes import grammar

LARGEST_SIDE = 1024  # pixels, of what BAGEL draws
LONGEST_SIDE = 4096  # pixels, the most that a configuration may have
GRACE_SECONDS = 8.0  # of requests under way when a stop is requested


def decompose_by_grammar(prompt: str) -> running.NewRecord:
    """Makes the record of a prompt of the shapes world, exact and without a language model."""
    try:
        return running.NewRecord(grammar.record(prompt), {"by": "shapes"})
    except grammar.GrammarError as error:
        raise DecompositionError("grammar", str(error), kind="refused") from error


@contextlib.contextmanager
def open_decomposer(options: argparse.Namespace, pace: Pace) -> Iterator[running.Decomposer]:
    """Opens the decomposer that the flags name, and closes it with the context.

    Raises:
      UsageError: flags that do not fit each other.
      LanguageModelError: a local model cannot be loaded.
    """
    if options.llm == "shapes":
        yield decompose_by_grammar
        return
    names = [field.name for field in dataclasses.fields(models.LanguageModelOptions)]
    model_options = models.LanguageModelOptions(**{name: vars(options)[name] for name in names})
    kind, _, location = options.llm.partition(":")
    name = options.model if kind == "openai" else pathlib.Path(location).name
    with models.open_model(options.llm, model_options) as model:
        patient = PatientModel(model, pace)
        yield running.model_decomposer(patient, name=f"{kind}:{name}", tries=options.attempts)


def decompose(options: argparse.Namespace) -> int:
    """Makes the records that are missing, writes a report, and returns the exit code.

    Raises:
      JournalError: input or output cannot be used.
      LanguageModelError: a local model cannot be loaded, or the model is away.
      UsageError: flags that do not fit each other.
      InputError: more prompts failed than are allowed.
    """
    flag, halt = StopFlag(grace_seconds=GRACE_SECONDS), threading.Event()

    def stopped() -> bool:
        return flag.requested or halt.is_set()

    prompts = read_prompts(options.input)
    with Journal(options.output, prompts) as journal:
        pace = Pace(options.requests_per_minute, stopped=stopped, overdue=lambda: flag.overdue)
        with open_decomposer(options, pace) as decompose_prompt:
            summary = running.decompose_all(
                journal, decompose_prompt, threads=options.concurrency, stopped=stopped, halt=halt
            )
        report = running.report(prompts, journal, summary)
        if not report["not_tried"]:
            journal.sort()
        running.write_report(pathlib.Path(f"{options.output}.report.json"), report)
    print(running.summary(report))
    if summary.model_away:
        raise LanguageModelError(
            f"the language model was away for {running.MAX_SILENT} prompts in a row: "
            f"{summary.failed[-1][1]}\nMend this and run the same command again.",
            kind="silent",
            retryable=True,
        )
    if report["not_tried"]:
        return cli.STOPPED
    if report["failed"] > options.allow_failures:
        raise InputError(
            f"{report['failed']} prompts failed, at most {options.allow_failures} allowed "
            "(--allow-failures); the same command tries them again"
        )
    return cli.DONE


def check_file(path: str, verifier: str | None, instruction: str, image_side: int) -> int:
    """Prints the findings about a file of records; returns the exit code.

    Args:
      path: of the file.
      verifier: a folder, package:NAME or ORG/NAME of the verifier that is to be asked; None: it is
        not known.
      instruction, image_side: with what it is asked, and about how large an image, in pixels.
    Raises:
      VerifierLoadError, MissingFileError: there is no such verifier.
    """
    refusal = None
    if verifier is not None:
        # PyTorch takes seconds to load; no other use of this command needs it.
        from alphagrpo_jax.rewards.verifiers.prompt_limits import PromptLimits

        limits = PromptLimits.from_folder(model_folder(verifier))
        refusal = functools.partial(limits.refusal, instruction=instruction, side=image_side)
    findings, count = check.check_file(path, refusal)
    errors = sum(finding.severity == "error" for finding in findings)
    for finding in findings:
        print(printable(str(finding)))
    print(f"{path}: {count} records, {errors} errors, {len(findings) - errors} warnings")
    return cli.FAILED if errors else cli.DONE


def run(options: argparse.Namespace) -> int:
    """Checks a file or decomposes prompts, as the flags say; returns the exit code."""
    if options.check:
        return check_file(
            options.check,
            options.verifier,
            AUDIT_INSTRUCTION if options.instruction is None else options.instruction,
            options.image_side or LARGEST_SIDE,
        )
    return decompose(options)


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(
        prog="python -m alphagrpo_jax.decompose",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--input", help="prompts, one per line, or *.jsonl")
    add("--output", help="the file of records to write or to continue")
    add("--check", metavar="FILE", help="only check this file of records")
    add("--verifier", metavar="PATH", help="of --check: the verifier (a folder, package:NAME or "
        "ORG/NAME) that is to be asked; finds questions that it cannot be asked")  # fmt: skip
    add("--instruction", metavar="TEXT", help="of --verifier: what the run sets as "
        "verifier.instruction; by default its default")  # fmt: skip
    add("--image-side", metavar="PIXELS", type=cli.integer(1, LONGEST_SIDE), help="of --verifier: "
        f"the side of the images that it judges, {LARGEST_SIDE} by default")  # fmt: skip
    add("--llm", default="shapes", help="openai:URL[,URL...], hf:FOLDER or shapes (the default)")
    add("--model", default="", help="of openai: the name that the servers know it by")
    add("--api-key-env", default="", help="of openai: environment variable that holds the key")
    add("--timeout-seconds", type=float, default=120.0, help="of openai: of one request")
    add("--max-tokens", type=cli.COUNT, default=4096, help="of one reply")
    json_help = "of openai: servers decode by each reply's JSON schema, where they can"
    add("--json-schema", action="store_true", help=json_help)
    add("--device", default="cpu", help="of hf")
    add("--dtype", default="auto", help="of hf: float32, bfloat16 or auto")
    add("--concurrency", type=cli.COUNT, default=8, help="prompts under way at once")
    add("--requests-per-minute", type=float, default=0.0, help="to the model; 0: no limit")
    add("--attempts", type=cli.COUNT, default=TRIES, help="decompositions of a prompt, at most")
    add(
        "--allow-failures",
        type=cli.AMOUNT,
        default=0,
        help="failed prompts above which the code is 1",
    )
    options = parser.parse_args(arguments)
    for flag in ("instruction", "image_side"):
        if getattr(options, flag) is not None and options.verifier is None:
            parser.error(f"--{flag.replace('_', '-')} needs --check FILE --verifier PATH")
    if options.instruction and not options.instruction.strip():
        parser.error("--instruction: got blanks, expected a text, or an empty one for none")
    if options.check is not None:
        if options.input or options.output:
            parser.error("--check stands alone: it reads one file and writes none")
        return options
    if options.verifier is not None:
        parser.error("--verifier needs --check FILE")
    if not (options.input and options.output):
        parser.error("--input and --output are needed (or --check FILE)")
    if options.timeout_seconds <= 0:
        parser.error("--timeout-seconds must be positive")
    if options.requests_per_minute < 0:
        parser.error("--requests-per-minute must not be negative")
    served = options.llm.startswith("openai:")
    if served and not options.model:
        parser.error("--llm openai:URL needs --model NAME")
    if options.json_schema and not served:
        parser.error("--json-schema needs --llm openai:URL")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    stopping.leave(main())
