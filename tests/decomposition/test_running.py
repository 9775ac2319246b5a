"""A run over a journal with makers of our own: early ends, and reports of nothing done."""

import threading

import pytest
from fake_llm import FIELDS

from alphagrpo_jax.decomposition import running
from alphagrpo_jax.decomposition.journal import Journal, JournalError, read_prompts
from alphagrpo_jax.decomposition.limits import StopRequestedError
from alphagrpo_jax.decomposition.pipeline import DecompositionError

PATIENCE_SECONDS = 30.0  # for threads on a busy machine; no result depends on it


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a\nb\nc\nd\n")
    return read_prompts(path)


def go(journal, make, **options):
    defaults = {"threads": 2, "stopped": lambda: False, "halt": threading.Event()}
    return running.decompose_all(journal, make, **defaults | options)


def test_a_record_that_cannot_be_written_halts_the_others(prompts, tmp_path, monkeypatch):
    halt, waited = threading.Event(), []

    def make(prompt):
        if prompt == "b":  # under way while that of "a" cannot be written
            waited.append(halt.wait(PATIENCE_SECONDS))
            raise StopRequestedError
        return running.NewRecord(FIELDS, {})

    def append(*_):
        raise JournalError("cannot write the output")

    with Journal(tmp_path / "o.jsonl", prompts) as journal:
        monkeypatch.setattr(journal, "append", append)
        with pytest.raises(JournalError, match="cannot write"):
            go(journal, make, halt=halt)
    assert waited == [True]


def test_a_stop_books_nothing_as_failed(prompts, tmp_path):
    stop = threading.Event()

    def make(prompt):
        if prompt == "b":
            stop.set()
            raise StopRequestedError
        return running.NewRecord(FIELDS, {"by": "test"})

    with Journal(tmp_path / "o.jsonl", prompts) as journal:
        tally = go(journal, make, threads=1, stopped=stop.is_set)
        report = running.report(prompts, journal, tally)
    assert (report["written"], report["failed"], report["not_tried"]) == (1, 0, 3)
    assert not tally.model_away


def test_silence_counts_only_in_a_row(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("".join(f"prompt {n}\n" for n in range(20)))
    prompts = read_prompts(path)

    def make(prompt):
        if prompt.endswith(("4", "9")):
            return running.NewRecord(FIELDS, {})
        raise DecompositionError("tuples", "away", kind="silent")

    with Journal(tmp_path / "o.jsonl", prompts) as journal:
        tally = go(journal, make, threads=1)
        assert (len(tally.failed), tally.model_away) == (16, False)
    second_journal = Journal(tmp_path / "other.jsonl", prompts)
    with second_journal as journal:
        tally = go(journal, lambda prompt: make("0"), threads=1)
        assert (len(tally.failed), tally.model_away) == (running.MAX_SILENT, True)
        report = running.report(prompts, journal, tally)
    assert report["not_tried"] == 20 - running.MAX_SILENT
    assert report["failed_by_stage"] == {"tuples": running.MAX_SILENT}


@pytest.mark.parametrize("kind", ["refused", "cut", "failed", "useless"])
def test_what_a_model_says_of_single_prompts_is_no_silence(tmp_path, kind):
    path = tmp_path / "p.txt"
    path.write_text("".join(f"prompt {n}\n" for n in range(3 * running.MAX_SILENT)))
    prompts = read_prompts(path)

    def make(prompt):
        raise DecompositionError("tuples", "no", kind=kind)

    with Journal(tmp_path / "o.jsonl", prompts) as journal:
        tally = go(journal, make, threads=1)
        report = running.report(prompts, journal, tally)
    assert (len(tally.failed), tally.model_away) == (3 * running.MAX_SILENT, False)
    assert report["failed_by_kind"] == {kind: 3 * running.MAX_SILENT}
    assert f"failed, by kind: {kind} 15" in running.summary(report)


def test_a_long_list_of_failures_is_cut_in_the_text_only(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("".join(f"prompt {n}\n" for n in range(15)))
    prompts = read_prompts(path)

    def make(prompt):
        raise DecompositionError("tags", "nonsense", kind="useless")

    with Journal(tmp_path / "o.jsonl", prompts) as journal:
        report = running.report(prompts, journal, go(journal, make, threads=3))
    assert [failure["line"] for failure in report["failed_prompts"]] == list(range(1, 16))
    text = running.summary(report)
    assert text.count("tags: nonsense") == running.MAX_LISTED
    assert text.endswith("... and 5 more, see the report")
