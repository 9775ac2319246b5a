"""Scores a folder of images by DVReward and explains every score, question by question.

    python -m alphagrpo_jax.score --images DIR --records records.jsonl --out report.html
    python -m alphagrpo_jax.score --images DIR --records records.jsonl --verifier FOLDER --out x.csv
    python -m alphagrpo_jax.score --images DIR --records records.jsonl --out report.json \
        --verifier openai:http://127.0.0.1:8000/v1 --model Qwen3-VL --api-key-env KEY \
        --verifier-option read=after_thinking --verifier-option max_tokens=512
    python -m alphagrpo_jax.score --images DIR --records records.jsonl --out report.csv \
        --verifier-of RUN

An image belongs to the record that its file name says: ID.png, where ID is the record's "id", or
NUMBER.png, the place of the record in the file, counted from 0. Several images of one record are
ID_0.png, ID_1.png, ... or NUMBER_0.png, ... The ending of --out (.html, .csv or .json) says in what
form the report is written; an image that the verifier cannot judge has a stated failure in it, and
no score. Files that are no images, or of a format that is not read, are named. Of an animation or
of several pages the first is read, and such files are named too.

Exit codes: 0 done, 1 a failure explained in one message, also if more images than --allow-failures
have no score (the report is written all the same), 2 wrong usage.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import numpy as np
from PIL import Image

from alphagrpo_jax import config_checks, tasks
from alphagrpo_jax.config import Aggregate, Config, VerifierOptions
from alphagrpo_jax.config_checks import from_config_dict
from alphagrpo_jax.rewards import report, scoring
from alphagrpo_jax.runtime import cli
from alphagrpo_jax.runtime import images as images_lib
from alphagrpo_jax.runtime.errors import InputError, UserError
from alphagrpo_jax.runtime.files import replace_text
from alphagrpo_jax.runtime.records import Record, read_jsonl
from alphagrpo_jax.runtime.texts import printable
from alphagrpo_jax.training import options as options_lib
from alphagrpo_jax.training import run_folder
from alphagrpo_jax.training import verifiers as verifiers_lib

QUEUE_SECONDS = 1e6  # many images wait for long; no rollout waits for them
DEFAULT_VERIFIER = "package:verifier"  # as in configs/grpo.py
REPORT_SIDE = 512  # pixels; larger images are made smaller in the report, never for the verifier


class ImageMatches(NamedTuple):
    """Pairs of images and records, and those of both that belong to none."""

    pairs: list[tuple[pathlib.Path, int]]  # image, number of its record
    images: list[str]  # names of those without a record
    records: list[int]  # numbers of those without an image


def match_images(paths: Sequence[pathlib.Path], records: Sequence[Record]) -> ImageMatches:
    """Pairs images with records by file name; see this file's docstring.

    A name that is an id as it stands goes before one with a number behind it, and ids go before
    places in the file.

    Raises:
      InputError: two records have the same id.
    """
    by_id: dict[str, int] = {}
    for number, record in enumerate(records):
        if record.id is not None and by_id.setdefault(record.id, number) != number:
            raise InputError(
                f"records {by_id[record.id]} and {number} (from 0) both have the id {record.id!r}; "
                "ids must differ, since images are matched by them"
            )

    def record_number(stem: str) -> int | None:
        base, _, tail = stem.rpartition("_")
        names = [stem, base] if base and _is_number(tail) else [stem]
        for name in names:
            if name in by_id:
                return by_id[name]
        for name in names:
            if _is_number(name) and int(name) < len(records):
                return int(name)
        return None

    numbered = [(path, record_number(path.stem)) for path in paths]
    pairs = [(path, number) for path, number in numbered if number is not None]
    used = {number for _, number in pairs}
    return ImageMatches(
        pairs,
        [path.name for path, number in numbered if number is None],
        [number for number in range(len(records)) if number not in used],
    )


def list_images(folder: str) -> tuple[list[pathlib.Path], list[str]]:
    """Lists the image files of a folder, sorted by name, and the names of what else is in it.

    Hidden files are left out of both.

    Raises:
      InputError: no such folder, or no images in it.
    """
    path = pathlib.Path(folder)
    if not path.is_dir():
        raise InputError(f"--images {folder}: expected a folder of images, there is none")
    endings = images_lib.readable_endings()
    contents = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    paths = [file for file in contents if file.suffix.lower() in endings and not file.is_dir()]
    passed_over = [
        f"{file.name}/" if file.is_dir() else file.name for file in contents if file not in paths
    ]
    if not paths:
        got = f"got {passed_over[:5]}" if passed_over else "got an empty folder"
        raise InputError(
            f"--images {folder}: no image in it: {got}, expected files {', '.join(endings)}"
        )
    return paths, passed_over


def verifier_config(options: argparse.Namespace) -> Config:
    """Builds the configuration of pool and reward that the flags describe.

    What no flag says is as in the run of --verifier-of, else as in configs/grpo.py.

    Raises:
      ConfigError: values that are wrong or do not go together.
      MissingFileError, InputError: --verifier-of names no run that can be read.
    """
    fields = dataclasses.asdict(config_checks.read_config())
    if options.verifier_of is not None:
        config = run_folder.run_config(options.verifier_of)
        # One verifier judges here, and the run's own log gets no lines of others.
        unused = {"second": "", "audit": ""}
        fields["verifier"] = dataclasses.asdict(config.verifier) | unused
    if options.verifier is not None:
        kind, _, location = options.verifier.partition(":")
        remote = kind == "openai"
        fields["verifier"] |= {
            "kind": kind if kind in ("openai", "callable") else "hf",
            "path": location if kind == "callable" else "" if remote else options.verifier,
            "endpoints": tuple(location.split(",")) if remote else (),
        }
    flags = {
        "model": options.model,
        "api_key_env": options.api_key_env,
        "workers": options.workers,
        "device": options.device,
        "dtype": options.dtype,
        "max_attempts": options.attempts,
        "cache_size": options.cache_size,
    }
    fields["verifier"] |= {name: value for name, value in flags.items() if value is not None}
    fields["verifier"] |= {"total_seconds": QUEUE_SECONDS} | {
        name: _field_value(name, text) for name, text in options.verifier_option.items()
    }
    fields["reward"] |= {
        "score": options.score,
        "extra_scores": options.extra_scores,
        "extra_weights": options.extra_weights or [1.0] * len(options.extra_scores),
        "aggregate": options.aggregate,
        "dependencies": options.dependencies,
        "format_weight": 0.0,
    }
    return from_config_dict(fields)


def _field_value(name: str, text: str) -> Any:
    """Reads a field of `VerifierOptions` from text; the configuration's checks refuse the rest."""
    kinds = {field.name: field.type for field in dataclasses.fields(VerifierOptions)}
    kind = kinds.get(name)
    if kind == tuple[str, ...]:
        return tuple(text.split(",")) if text else ()
    if kind in (bool, int, float):
        with contextlib.suppress(ValueError):
            return json.loads(text.lower())  # also True, as train's flags have it
    return text


def score(options: argparse.Namespace) -> report.Report:
    """Asks the verifier about every image that has a record.

    Raises:
      InputError, RecordError, MissingFileError: images or records cannot be used.
      ConfigError: flags that do not go together.
      PoolError: the verifier cannot be started.
    """
    paths, passed_over = list_images(options.images)
    records = read_jsonl(options.records)
    matched = match_images(paths, records)
    if not matched.pairs:
        raise InputError(
            f"none of the {len(paths)} images in {options.images} belongs to one of the "
            f"{len(records)} records in {options.records}, e.g. {matched.images[:3]}; expected "
            "ID.png or NUMBER.png (from 0), or ID_0.png, NUMBER_0.png and so on"
        )
    config = verifier_config(options)
    reward_options = options_lib.scoring_options(config, tasks.TASKS["t2i"])
    rows, readable, urls, first_pages = [], [], [], []
    with verifiers_lib.make_pool(config) as pool:
        pool.wait_ready()
        for path, number in matched.pairs:
            try:
                image = images_lib.open_rgb(path)
            except UserError as error:
                rows.append(_unreadable(path, records[number], str(error)))
                continue
            pages = images_lib.count_pages(path)
            if pages is None:
                first_pages.append(f"{path.name} (damaged, the number of pages is not known)")
            elif pages > 1:
                first_pages.append(path.name)
            pixels = np.asarray(image)
            scoring.submit(pool, [path.name], [pixels], [records[number]], reward_options)
            readable.append((path.name, records[number]))
            urls.append(_report_image(image))
        names = [name for name, _ in readable]
        asked_records = [record for _, record in readable]
        rewards = scoring.gather(pool, names, asked_records, (), reward_options)
    rows += report.rows(names, urls, asked_records, rewards, reward_options)
    return report.Report(
        title=f"{options.images}, judged by {_judge(options)}",
        how=report.describe(reward_options),
        rows=tuple(rows),
        images_without_record=tuple(matched.images),
        records_without_image=tuple(
            _record_name(number, records[number]) for number in matched.records
        ),
        files_passed_over=tuple(passed_over),
        first_pages=tuple(first_pages),
    )


def summary(scored: report.Report) -> str:
    """Summarizes a report in a few lines for the terminal."""
    mean = "none" if scored.mean is None else f"{scored.mean:.3f}"
    lines = [f"{len(scored.rows)} images, mean reward {mean}, {scored.failed} without a score"]
    lines += [
        f"  {tag.kind:9}{tag.tag or 'untagged':14}{tag.count:6} questions, mean {tag.mean:.3f}"
        for tag in scored.tags
    ]
    for heading, names in scored.name_lists:
        more = ", ..." if len(names) > 5 else ""
        lines.append(f"{heading} ({len(names)}): {', '.join(names[:5])}{more}")
    # A file's name may be bytes that are no UTF-8, which cannot be printed.
    return printable("\n".join(lines))


def run(options: argparse.Namespace) -> None:
    """Scores, writes the report, and prints a summary.

    Raises:
      InputError: more images than allowed have no score; see also `score`.
    """
    out = pathlib.Path(options.out)
    _check_writable(out)
    scored = score(options)
    replace_text(out, report.FORMATS[out.suffix.lower()](scored))
    print(f"{summary(scored)}\n{out}")
    if scored.failed > options.allow_failures:
        failure = next(row.failure for row in scored.rows if row.failure is not None)
        raise InputError(
            f"{scored.failed} of {len(scored.rows)} images have no score, at most "
            f"{options.allow_failures} allowed (--allow-failures), e.g.: {failure}"
        )


def _check_writable(out: pathlib.Path) -> None:
    """Checks that the report can be written, before the first question is asked.

    Raises:
      InputError: nothing can be written there.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error}; give another place") from error
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; give the name of a file")


def _judge(options: argparse.Namespace) -> str:
    """Names the verifier as the flags do."""
    if options.verifier_of is not None:
        return f"the verifier of {options.verifier_of}"
    return DEFAULT_VERIFIER if options.verifier is None else options.verifier


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _record_name(number: int, record: Record) -> str:
    return f"{number if record.id is None else record.id}: {record.prompt}"


def _unreadable(path: pathlib.Path, record: Record, failure: str) -> report.Row:
    return report.Row(
        path.name, record.prompt, "", None, None, None, f"not asked: {failure}", (), {}
    )


def _report_image(image: Image.Image) -> str:
    """Encodes an image for the report as a data: URL, made smaller if it is large."""
    small = image.copy()
    small.thumbnail((REPORT_SIDE, REPORT_SIDE))
    return images_lib.data_url(np.asarray(small))


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(
        prog="python -m alphagrpo_jax.score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--images", required=True, help="the folder of images")
    add("--records", required=True, help="JSONL file of records with questions")
    add("--out", required=True, help="the report to write: *.html, *.csv or *.json")
    add("--verifier", help="package:NAME, a folder, openai:URL[,URL] or callable:MODULE:FUNCTION; "
        f"{DEFAULT_VERIFIER} by default")  # fmt: skip
    add("--verifier-of", metavar="RUN", help="instead: the verifier of a run, with all of its "
        "settings; the flags below change them")  # fmt: skip
    add("--model", help="of openai: the name that the servers know it by")
    add("--api-key-env", help="of openai: environment variable that holds the key")
    add("--workers", type=cli.COUNT, help="verifier processes, 2 by default")
    add("--device", help="of a local verifier, cpu by default")
    add("--dtype", help="of its weights: float32 (the default), bfloat16 or auto")
    add("--attempts", type=cli.COUNT, help="at an image, until it has no score; 4 by default")
    add("--cache-size", type=cli.AMOUNT, help="answers that are remembered, for folders in which "
        "images come more than once; 0 by default")  # fmt: skip
    add("--verifier-option", action="append", default=[], metavar="NAME=VALUE", help="any field of "
        "the configuration's verifier section, e.g. read=after_thinking, max_tokens=512, "
        "instruction=TEXT, min_mass=0.1, concurrency=8, attempt_seconds=300; goes before other "
        "flags; may be given several times")  # fmt: skip
    add("--score", default="confidence", help="confidence, binary, holistic, or a scorer such as "
        "hf_clip:PATH or callable:MODULE:FUNCTION")  # fmt: skip
    add("--extra-scores", nargs="*", default=[], metavar="SCORE", help="further scores")
    add("--extra-weights", nargs="*", type=float, metavar="NUMBER", help="their weights, 1 each by "
        "default; that of --score is 1")  # fmt: skip
    add("--aggregate", choices=get_args(Aggregate), default="geometric")
    add("--dependencies", action="store_true", help="a question counts only if those that it "
        "depends on hold")  # fmt: skip
    add(
        "--allow-failures",
        type=cli.AMOUNT,
        default=0,
        help="failed images above which the code is 1",
    )
    options = parser.parse_args(arguments)
    if pathlib.Path(options.out).suffix.lower() not in report.FORMATS:
        parser.error(f"--out {options.out}: expected a name that ends in {[*report.FORMATS]}")
    if options.verifier is not None and options.verifier_of is not None:
        parser.error("--verifier and --verifier-of both name the verifier; give one of them")
    pairs = [text.partition("=") for text in options.verifier_option]
    if not all(name and equals for name, equals, _ in pairs):
        parser.error("--verifier-option: expected NAME=VALUE, e.g. read=after_thinking")
    options.verifier_option = {name: value for name, _, value in pairs}
    if options.verifier_option.get("second"):
        parser.error("--verifier-option second: one verifier judges here; run the command twice")
    remote = options.verifier is not None and options.verifier.startswith("openai:")
    if remote and not (options.model or options.verifier_option.get("model")):
        parser.error("--verifier openai:URL needs --model NAME")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
