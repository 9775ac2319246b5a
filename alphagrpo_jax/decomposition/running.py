"""Decomposes all prompts that have no record yet, several at a time, and reports the outcome."""

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


class NewRecord(NamedTuple):
    """The record of a prompt, before the journal adds the prompt's identity."""

    fields: Mapping[str, Any]  # of the record
    origin: Mapping[str, Any]  # by whom it was made, in how many tries


# Takes a prompt's text. Raises DecompositionError or StopRequestedError.
Decomposer = Callable[[str], NewRecord]


@dataclasses.dataclass
class RunSummary:
    """Failures of one run over the prompts; the records are in the journal."""

    failed: list[tuple[Prompt, DecompositionError]] = dataclasses.field(default_factory=list)
    model_away: bool = False  # the run ended because the language model cannot be reached


def model_decomposer(model: LanguageModel, *, name: str, tries: int) -> Decomposer:
    """Returns a decomposer that asks a language model, see `pipeline.decompose`.

    Args:
      model: asked from many threads at once.
      name: of the model, for the records.
      tries: see `pipeline.decompose`.
    """

    def decompose(prompt: str) -> NewRecord:
        decomposition = pipeline.decompose(prompt, model, tries=tries)
        record = Record(
            prompt=prompt,
            semantic=tuple(checked.question for checked in decomposition.semantic),
            quality=tuple(checked.question for checked in decomposition.quality),
        )
        return NewRecord(record.to_json(), {"by": name} | _provenance(decomposition))

    return decompose


def _provenance(decomposition: Decomposition) -> dict[str, Any]:
    faults = [
        {"question": checked.question.text, "fault": checked.fault}
        for checked in (*decomposition.semantic, *decomposition.quality)
        if checked.fault is not None
    ]
    origin = {
        "calls": decomposition.calls,
        "tries": decomposition.tries,
        "repairs": decomposition.repairs,
    }
    return origin | ({"faults": faults} if faults else {})


def decompose_all(
    journal: Journal,
    decompose: Decomposer,
    *,
    threads: int,
    stopped: Callable[[], bool],
    halt: threading.Event,
    progress: bool | None = None,
) -> RunSummary:
    """Writes the records that are missing; decomposes `threads` prompts at a time.

    Args:
      journal: written by this thread alone.
      decompose: called by many threads; raises StopRequestedError soon after `stopped` or `halt`.
      threads: prompts in flight at once.
      stopped: returns True if no further prompt is to begin.
      halt: set here if the run ends early for another reason.
      progress: shows a bar; None: on a terminal only.
    Raises:
      JournalError: a record cannot be written.
    """
    run, waiting = RunSummary(), iter(journal.open_prompts)
    total = len(journal.done) + len(journal.open_prompts)
    disable = None if progress is None else not progress
    with (
        concurrent.futures.ThreadPoolExecutor(threads, "decompose") as executor,
        tqdm.tqdm(total=total, initial=len(journal.done), unit="prompt", disable=disable) as bar,
    ):
        in_flight: dict[concurrent.futures.Future[NewRecord], Prompt] = {}
        silent = 0  # prompts in a row that the model could not be reached for
        try:
            while True:
                while len(in_flight) < threads and not (stopped() or run.model_away):
                    prompt = next(waiting, None)
                    if prompt is None:
                        break
                    in_flight[executor.submit(decompose, prompt.text)] = prompt
                if not in_flight:
                    return run
                finished, _ = concurrent.futures.wait(
                    in_flight, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in finished:
                    error = _store_outcome(journal, run, in_flight.pop(future), future)
                    bar.update(error is None)
                    silent = silent + 1 if error is not None and error.kind == "silent" else 0
                bar.set_postfix(failed=len(run.failed))
                if silent >= MAX_SILENT:
                    run.model_away = True
                    halt.set()
        except BaseException:
            halt.set()  # else leaving the pool would wait for whole prompts
            raise


def _store_outcome(
    journal: Journal,
    run: RunSummary,
    prompt: Prompt,
    future: concurrent.futures.Future[NewRecord],
) -> DecompositionError | None:
    """Writes the record of a prompt, or notes its failure and returns it."""
    try:
        record = future.result()
    except StopRequestedError:
        return None
    except DecompositionError as error:
        run.failed.append((prompt, error))
        return error
    journal.append(prompt, record.fields, record.origin)
    return None


def report(prompts: Prompts, journal: Journal, run: RunSummary) -> dict[str, Any]:
    """Returns counts, failures and faults of all runs on this output as one JSON object."""
    origins = [record.extra[PROVENANCE] for record in journal.done.values()]
    repairs: collections.Counter[str] = collections.Counter()
    for origin in origins:
        repairs.update(origin.get("repairs", {}))
    failed = sorted(run.failed, key=lambda failure: failure[0].index)
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
            {"line": index + 1, "prompt": record.prompt, "faults": origin["faults"]}
            for (index, record), origin in zip(journal.done.items(), origins, strict=True)
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
    """Returns a report in a few lines of text."""
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
            counts = ", ".join(f"{value} {count}" for value, count in content[name].items())
            lines.append(f"{title}: {counts}")
    for failure in content["failed_prompts"][:MAX_LISTED]:
        lines.append(f"line {failure['line']}: {failure['stage']}: {failure['reason']}")
    more = len(content["failed_prompts"]) - MAX_LISTED
    return "\n".join([*lines, f"... and {more} more, see the report"] if more > 0 else lines)
