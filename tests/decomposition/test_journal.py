"""Input files, and an output file that survives kills, refuses other inputs and never doubles."""

import json
import os
import pathlib
import re

import pytest
from fake_llm import FIELDS

from alphagrpo_jax.decomposition.check import check_file
from alphagrpo_jax.decomposition.journal import PROVENANCE, Journal, JournalError, read_prompts
from alphagrpo_jax.runtime.records import read_jsonl


@pytest.fixture
def source(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n a dog \nein Bär\na cat\nfour\n", encoding="utf-8")
    return path


def fill(journal: Journal, count: int) -> None:
    for prompt in journal.open_prompts[:count]:
        journal.append(prompt, FIELDS, {"by": "test"})


def test_prompts_of_a_text_file(source):
    prompts = read_prompts(source)
    assert [(prompt.text, prompt.index) for prompt in prompts.prompts] == [
        ("a cat", 0),
        ("a dog", 2),
        ("ein Bär", 3),
        ("four", 5),
    ]
    assert prompts.duplicates == (5,)


def test_prompts_that_the_check_calls_the_same_occur_once(tmp_path):
    path, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    path.write_text("A red  cat\na red cat.\nA red dog\nA RED CAT\n")
    prompts = read_prompts(path)
    assert [prompt.text for prompt in prompts.prompts] == ["A red  cat", "A red dog"]
    assert prompts.duplicates == (2, 4)
    with Journal(out, prompts) as journal:
        fill(journal, 2)
    assert [finding for finding in check_file(out)[0] if finding.severity == "error"] == []


def test_prompts_of_a_jsonl_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a cat", "id": 7}\n{"prompt": " a\\ndog ", "tag": 1}\n')
    prompts = read_prompts(path).prompts
    assert [(prompt.text, prompt.id) for prompt in prompts] == [("a cat", "7"), ("a\ndog", None)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "got no prompts"),
        (
            "p.txt",
            b"a cat\n\xef\xbb\xbfa <|im_end|> dog\n",
            ":2: got the control tokens ['<|im_end",
        ),
        ("p.jsonl", b'{"prompt": "a <image>"}\n', ":1: got the control tokens ['<image>']"),
        ("p.jsonl", b'{"prompt": "a", "x": ' + b"[" * 9000 + b"]" * 9000 + b"}", "nested too deep"),
        ("p.jsonl", b'{"prompt": "a \\ud83d"}\n', "that UTF-8 can hold"),
        ("p.jsonl", b'{"prompt": "a", "id": "\\ud83d"}\n', "got id '"),
        ("p.txt", "a cat\n".encode("utf-16"), "is UTF-16, expected UTF-8; convert it: iconv"),
        ("p.txt", b"\n \n", "got no prompts"),
        ("p.txt", b"a cat\nB\xe4r\n", "p.txt:2: got bytes that are not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\na cat\n', "p.jsonl:2: got 'a cat', which is not JSON"),
        ("p.jsonl", b'{"text": "a"}\n', 'p.jsonl:1: got "prompt" None'),
        ("p.jsonl", b'{"prompt": "\\ud800"}\n', 'p.jsonl:1: got "prompt"'),
        ("p.jsonl", b"[1]\n", 'p.jsonl:1: got "prompt" None'),
        ("p.jsonl", b'{"prompt": "a", "id": [1]}\n', "p.jsonl:1: got id [1]"),
        (
            "p.jsonl",
            b'{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}\n',
            "p.jsonl:2: id 'x' is that of line 1 too",
        ),
    ],
)
def test_bad_inputs(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(JournalError, match=re.escape(message)):
        read_prompts(path)


def test_a_missing_input(tmp_path):
    with pytest.raises(JournalError, match=r"cannot read the prompts .*No such file"):
        read_prompts(tmp_path / "none.txt")


def test_records_are_whole_lines_with_their_place(source, tmp_path):
    prompts, path = read_prompts(source), tmp_path / "new" / "out.jsonl"
    with Journal(path, prompts) as journal:
        fill(journal, 2)
        assert [prompt.text for prompt in journal.open_prompts] == ["ein Bär", "four"]
        assert len(read_jsonl(path)) == 2  # on the disk while the journal is open
    records = read_jsonl(path)
    assert [(r.prompt, r.id, r.original_index) for r in records] == [
        ("a cat", "prompts-0", 0),
        ("a dog", "prompts-2", 2),
    ]
    assert records[0].extra[PROVENANCE] == {"input": prompts.digest, "by": "test"}


@pytest.mark.parametrize("lost", [1, 2, 30, 10_000])
def test_a_line_cut_short_at_any_place_is_dropped(source, tmp_path, lost):
    """Whatever part of the last line had reached the disk, resuming gives the same file."""
    prompts, path = read_prompts(source), tmp_path / "out.jsonl"
    with Journal(path, prompts) as journal:
        fill(journal, 4)
    content = path.read_bytes()
    last = content.rindex(b"\n", 0, len(content) - 1) + 1
    path.write_bytes(content[: max(last, len(content) - lost)])
    with Journal(path, prompts) as journal:
        assert [prompt.text for prompt in journal.open_prompts] == ["four"]
        fill(journal, 1)
    assert path.read_bytes() == content


def test_a_first_line_cut_short_is_dropped_too(source, tmp_path):
    prompts, path = read_prompts(source), tmp_path / "out.jsonl"
    with Journal(path, prompts) as journal:
        fill(journal, 1)
    content = path.read_bytes()
    for length in (1, 11, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with Journal(path, prompts) as journal:
            assert len(journal.open_prompts) == 4
        assert path.read_bytes() == b""


FOREIGN = {
    "text": (b"my notes", "was not written by this command"),
    "record without line end": (
        json.dumps({"prompt": "x", **FIELDS}).encode(),
        "was not written by this command",
    ),
    "records": (
        json.dumps({"prompt": "a cat", **FIELDS}).encode() + b"\n",
        "out.jsonl:1: a record that this command did not write",
    ),
    "other lines": (b"my notes\n", "out.jsonl:1: not a record"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_left_alone(source, tmp_path, name):
    content, message = FOREIGN[name]
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(JournalError, match=message):
        Journal(path, read_prompts(source))
    assert path.read_bytes() == content


def test_another_input_is_refused(source, tmp_path):
    path = tmp_path / "out.jsonl"
    with Journal(path, read_prompts(source)) as journal:
        fill(journal, 1)
    before = path.read_bytes()
    source.write_text(source.read_text() + "one more\n")
    with pytest.raises(JournalError, match="begun with another input than"):
        Journal(path, read_prompts(source))
    assert path.read_bytes() == before


def test_a_doubled_or_changed_record_is_refused(source, tmp_path):
    prompts, path = read_prompts(source), tmp_path / "out.jsonl"
    with Journal(path, prompts) as journal:
        fill(journal, 2)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1] + lines[0])
    with pytest.raises(JournalError, match=r"out.jsonl:3: a second record of original_index 0"):
        Journal(path, prompts)
    path.write_bytes(lines[0].replace(b"a cat", b"a cow"))
    with pytest.raises(JournalError, match="got prompt 'a cow', expected 'a cat', line 1"):
        Journal(path, prompts)


def test_a_prompt_is_never_written_twice(source, tmp_path):
    with Journal(tmp_path / "out.jsonl", read_prompts(source)) as journal:
        prompt = journal.open_prompts[0]
        journal.append(prompt, FIELDS, {})
        with pytest.raises(ValueError, match="has a record already"):
            journal.append(prompt, FIELDS, {})


def test_one_process_at_a_time(source, tmp_path):
    prompts, path = read_prompts(source), tmp_path / "out.jsonl"
    with Journal(path, prompts), pytest.raises(JournalError, match="another process is writing"):
        Journal(path, prompts)
    with Journal(path, prompts):
        pass  # closed: free again


def test_sorting_replaces_the_file_at_once(source, tmp_path, monkeypatch):
    prompts, path = read_prompts(source), tmp_path / "out.jsonl"
    with Journal(path, prompts) as journal:
        for prompt in reversed(journal.open_prompts):
            journal.append(prompt, FIELDS, {})
        unsorted = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(JournalError, match="cannot write"):
                journal.sort()
        assert path.read_bytes() == unsorted
    with Journal(path, prompts) as journal:
        journal.sort()
    assert [record.original_index for record in read_jsonl(path)] == [0, 2, 3, 5]
    assert sorted(path.read_bytes().splitlines()) == sorted(unsorted.splitlines())


def fail(*_):
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_whole_records(source, tmp_path, monkeypatch):
    prompts, path = read_prompts(source), tmp_path / "out.jsonl"
    with Journal(path, prompts) as journal:
        fill(journal, 1)
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(JournalError, match="No space left on device"):
                fill(journal, 1)
        assert path.read_bytes() == before
        assert len(journal.open_prompts) == 3


@pytest.mark.parametrize("where", ["folder", "below a file"])
def test_an_unwritable_output(source, tmp_path, where):
    path = tmp_path if where == "folder" else source / "out.jsonl"
    with pytest.raises(JournalError, match="cannot write the output"):
        Journal(path, read_prompts(source))
