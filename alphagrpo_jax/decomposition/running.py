"""Decomposes all prompts that have no record yet, several at a time, and reports on the whole."""

import collections
import concurrent.futures
import dataclasses
import json
import pathlib
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import tqdm

from alphagrpo_jax.decomposition import journal as journal_lib
from alphagrpo_jax.decomposition import pipeline
from alphagrpo_jax.decomposition.journal import PROVENANCE, Journal, Prompt, Prompts
from alphagrpo_jax.decomposition.limits import StopRequestedError
from alphagrpo_jax.decomposition.pipeline import Decomposition, DecompositionError
from alphagrpo_jax.rewards.verifiers.chat.base import LanguageModel
from alphagrpo_jax.runtime.records import Record

MAX_SILENT = 5  # prompts in a row without a model to ask after which the run ends
MAX_LISTED = 10  # failed prompts in the short text; the report has all


class Made(NamedTuple):
    """The record of a prompt, without what the journal adds, and how it was made."""

    fields: Mapping[str, Any]
    origin: Mapping[str, Any]


# Takes a prompt's text. Raises DecompositionError or StopRequestedError.
Maker = Callable[[str], Made]


@dataclasses.dataclass
class Tally:
    """What a run did besides writing records."""

    failed: list[tuple[Prompt, DecompositionError]] = dataclasses.field(default_factory=list)
    silent: bool = False  # ended since the language model is away


def by_model(model: LanguageModel, *, name: str, tries: int) -> Maker:
    """A maker that asks a language model, see `pipeline.decompose`; `name` goes into records."""

    def make(prompt: str) -> Made:
        found = pipeline.decompose(prompt, model, tries=tries)
        record = Record(
            prompt=prompt,
            semantic=tuple(each.question for each in found.semantic),
            quality=tuple(each.question for each in found.quality),
        )
        fields = record.to_json()
        return Made(fields, {"by": name} | _origin(found))

    return make


def _origin(found: Decomposition) -> dict[str, Any]:
    faults = [
        {"question": each.question.text, "fault": each.fault}
        for each in (*found.semantic, *found.quality)
        if each.fault is not None
    ]
    result = {"calls": found.calls, "tries": found.tries, "repairs": found.repairs}
    return result | ({"faults": faults} if faults else {})


def run(
    journal: Journal,
    make: Maker,
    *,
    threads: int,
    stopped: Callable[[], bool],
    halt: threading.Event,
    progress: bool | None = None,
) -> Tally:
    """Makes the records that are missing, `threads` at a time.

    Args:
      journal: written by this thread alone.
      make: called by many threads; raises StopRequestedError soon after `stopped` or `halt`.
      threads: prompts under way at once.
      stopped: whether to begin no further prompt.
      halt: set here if the run ends early for another reason.
      progress: whether to show a bar; None: on a terminal.
    Raises:
      JournalError: a record cannot be written.
    """
    tally, waiting = Tally(), iter(journal.open_prompts)
    total = len(journal.done) + len(journal.open_prompts)
    disable = None if progress is None else not progress
    with (
        concurrent.futures.ThreadPoolExecutor(threads, "decompose") as executor,
        tqdm.tqdm(total=total, initial=len(journal.done), unit="prompt", disable=disable) as bar,
    ):
        under_way: dict[concurrent.futures.Future[Made], Prompt] = {}
        silent = 0
        try:
            while True:
                while len(under_way) < threads and not (stopped() or tally.silent):
                    prompt = next(waiting, None)
                    if prompt is None:
                        break
                    under_way[executor.submit(make, prompt.text)] = prompt
                if not under_way:
                    return tally
                finished, _ = concurrent.futures.wait(
                    under_way, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in finished:
                    error = _book(journal, tally, under_way.pop(future), future)
                    bar.update(error is None)
                    silent = silent + 1 if error is not None and error.kind == "silent" else 0
                bar.set_postfix(failed=len(tally.failed))
                if silent >= MAX_SILENT:
                    tally.silent = True
                    halt.set()
        except BaseException:
            halt.set()  # else leaving the pool would wait for whole prompts
            raise


def _book(
    journal: Journal, tally: Tally, prompt: Prompt, future: concurrent.futures.Future[Made]
) -> DecompositionError | None:
    """Writes what became of a prompt; returns its failure, if it is one."""
    try:
        made = future.result()
    except StopRequestedError:
        return None
    except DecompositionError as error:
        tally.failed.append((prompt, error))
        return error
    journal.append(prompt, made.fields, made.origin)
    return None


def report(prompts: Prompts, journal: Journal, tally: Tally) -> dict[str, Any]:
    """What was done and what was not, over all runs on this output, as one JSON object."""
    origins = [record.extra[PROVENANCE] for record in journal.done.values()]
    repairs: collections.Counter[str] = collections.Counter()
    for origin in origins:
        repairs.update(origin.get("repairs", {}))
    failed = sorted(tally.failed, key=lambda each: each[0].index)
    return {
        "input": str(prompts.path),
        "output": str(journal.path),
        "prompts": len(prompts.prompts),
        "duplicate_lines": list(prompts.duplicates),
        "written": len(journal.done),
        "written_by": dict(collections.Counter(origin.get("by", "") for origin in origins)),
        "decomposed_again": sum(
            max(origin.get("tries", {}).values(), default=1) > 1 for origin in origins
        ),
        "repaired": sum(any(origin.get("repairs", {}).values()) for origin in origins),
        "repairs_by_stage": dict(sorted(repairs.items())),
        "partly_invalid": [
            {"line": record.original_index + 1, "prompt": record.prompt, "faults": origin["faults"]}
            for record, origin in zip(journal.done.values(), origins, strict=True)
            if "faults" in origin
        ],
        "failed": len(failed),
        "failed_by_stage": dict(collections.Counter(error.stage for _, error in failed)),
        "failed_by_kind": dict(collections.Counter(error.kind for _, error in failed)),
        "failed_prompts": [
            {
                "line": prompt.index + 1,
                "prompt": prompt.text,
                "stage": error.stage,
                "kind": error.kind,
                "reason": error.reason,
            }
            for prompt, error in failed
        ],
        "not_tried": len(journal.open_prompts) - len(failed),
    }


def write_report(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes a report beside its output.

    Raises:
      JournalError: it cannot be written.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    journal_lib.write_whole(path, text.encode())


def summary(content: Mapping[str, Any]) -> str:
    """A report in a few lines."""
    lines = [
        f"{content['output']}: records of {content['written']} of {content['prompts']} prompts "
        f"({content['repaired']} with repaired replies, {content['decomposed_again']} decomposed "
        f"more than once, {len(content['partly_invalid'])} with questions marked invalid), "
        f"{content['failed']} failed, {content['not_tried']} not tried"
    ]
    if content["duplicate_lines"]:
        lines.append(
            f"prompts that occur before, left out: {len(content['duplicate_lines'])} lines"
        )
    for name, title in (
        ("repairs_by_stage", "repaired, by stage"),
        ("failed_by_stage", "failed, by stage"),
        ("failed_by_kind", "failed, by kind"),
    ):
        if content[name]:
            counts = ", ".join(f"{each} {count}" for each, count in content[name].items())
            lines.append(f"{title}: {counts}")
    for each in content["failed_prompts"][:MAX_LISTED]:
        lines.append(f"line {each['line']}: {each['stage']}: {each['reason']}")
    more = len(content["failed_prompts"]) - MAX_LISTED
    return "\n".join([*lines, f"... and {more} more, see the report"] if more > 0 else lines)
