import json

import pytest

from alphagrpo_jax.runtime import records
from alphagrpo_jax.runtime.records import parse_record, read_jsonl


def question(text, kind="semantic", **fields):
    defaults = {"question_type": kind, "question": text, "is_valid": True, "tag": "Count"}
    return defaults | fields


def fields(**changes):
    record = {
        "prompt": "two red circles",
        "semantic_questions": [
            question("Are there two circles?"),
            question("Are they red?", is_valid=False, dependency=[0]),
            question("Is the image free of squares?", tag="Negative"),
        ],
        "quality_questions": [question("Are the edges clean?", "quality", tag="Texture")],
        "original_index": 7,
    }
    return {k: v for k, v in (record | changes).items() if v is not ...}


def write(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_reads_the_released_form(tmp_path):
    path = write(tmp_path / "a.jsonl", fields(), "", fields(prompt="später", id=3, kind="plain"))
    first, second = read_jsonl(path)
    assert first.prompt == "two red circles"
    assert (first.original_index, first.id, first.extra) == (7, None, {})
    assert [q.tag for q in first.semantic] == ["Count", "Count", "Negative"]
    assert first.semantic[1].dependency == (0,)
    assert (second.prompt, second.id, second.extra) == ("später", "3", {"kind": "plain"})


def test_invalid_questions_are_kept_and_never_asked():
    record = parse_record(fields())
    assert len(record.semantic) == 3
    assert record.asked_semantic == ["Are there two circles?", "Is the image free of squares?"]
    assert record.question_texts == [*record.asked_semantic, "Are the edges clean?"]
    assert record.split([0.1, 0.2, 0.3]) == ([0.1, 0.2], [0.3])
    with pytest.raises(ValueError, match=r"got 4 answers .* expected 3"):
        record.split([0.1, 0.2, 0.3, 0.4])


def test_dependencies_among_the_questions_that_are_asked():
    """Places shift where an invalid question is left out; a dependency on it is dropped."""
    semantic = [
        question("Is there a circle?", is_valid=False),
        question("Is there a square?"),
        question("Is the square red?", dependency=[1]),
        question("Is the square in the circle?", dependency=[0, 1]),
        question("Is the square old?", dependency=[2], is_valid=False),
    ]
    quality = [question("Is the square even?", "quality", dependency=[1, 2])]
    record = parse_record(fields(semantic_questions=semantic, quality_questions=quality))
    assert record.question_texts == [semantic[i]["question"] for i in (1, 2, 3)] + [
        "Is the square even?"
    ]
    assert record.asked_parents == [(), (0,), (0,), (0, 1)]


def test_round_trip():
    record = parse_record(fields(id="a", facts={"count": 2}))
    assert parse_record(json.loads(json.dumps(record.to_json()))) == record
    assert parse_record(fields()).to_json() == fields()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ...}, "field 'prompt': got None"),
        ({"prompt": "  "}, "field 'prompt'"),
        ({"semantic_questions": ...}, "field 'semantic_questions' is missing"),
        ({"semantic_questions": []}, "field 'semantic_questions': got an empty list"),
        ({"quality_questions": []}, "field 'quality_questions': got an empty list"),
        ({"quality_questions": {}}, "field 'quality_questions': got dict {}"),
        ({"quality_questions": None}, "field 'quality_questions': got null"),
        ({"quality_questions": ["Is it?"]}, r"quality_questions\[0\]: got str 'Is it\?'"),
        ({"quality_questions": [question("", "quality")]}, r"quality_questions\[0\]: .* ''"),
        ({"quality_questions": [question("Is it?")]}, "question_type 'semantic', expected 'qual"),
        ({"quality_questions": [question("Is it?", "quality", is_valid="yes")]}, "is_valid 'yes'"),
        ({"quality_questions": [question("Is it?", "quality", is_valid=False)]}, "every question"),
        ({"quality_questions": [question("Is it?", "quality", tag=3)]}, "tag 3"),
        ({"semantic_questions": [question("Is it?", dependency=[1])]}, r"dependency \[1\]"),
        ({"semantic_questions": [question("Is it?", dependency=0)]}, "dependency 0"),
        ({"original_index": "7"}, "field 'original_index': got '7'"),
        ({"id": [1]}, r"field 'id': got \[1\]"),
    ],
)
def test_says_what_is_wrong_with_a_record(changes, message):
    with pytest.raises(ValueError, match=message):
        parse_record(fields(**changes))


def test_all_bad_lines_are_reported_with_file_and_number(tmp_path):
    path = write(
        tmp_path / "bad.jsonl",
        fields(),
        '{"prompt": "a", ',
        fields(quality_questions=[]),
        "[1, 2]",
        fields(),
    )
    with pytest.raises(ValueError, match="3 bad line") as info:
        read_jsonl(path)
    lines = str(info.value).splitlines()
    assert len(lines) == 4
    assert lines[1].startswith(f"{path}:2: got ")
    assert "not JSON" in lines[1]
    assert lines[2].startswith(f"{path}:3: field 'quality_questions': got an empty list")
    assert lines[3].startswith(f"{path}:4: got list [1, 2], expected a JSON object")


def test_a_long_list_of_bad_lines_is_cut(tmp_path):
    path = write(tmp_path / "bad.jsonl", *["nonsense"] * (records.MAX_REPORTED + 5))
    with pytest.raises(ValueError, match=r"\.\.\. and 5 more") as info:
        read_jsonl(path)
    assert len(str(info.value).splitlines()) == records.MAX_REPORTED + 2


def test_bytes_that_are_not_utf8_and_empty_and_missing_files(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "sp\xe4ter"}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl:1: got bytes that are not UTF-8"):
        read_jsonl(path)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="got no records"):
        read_jsonl(tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError, match="no file of question records"):
        read_jsonl(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"prompt": "a \ud83d"}, "field 'prompt'"),
        (
            {"semantic_questions": [question("Is it \udcff?")]},
            "field 'semantic_questions[0].question'",
        ),
        (
            {"quality_questions": [question("Is it?", "quality", tag="\ud800")]},
            "field 'quality_questions[0].tag'",
        ),
        ({"id": "\ude00"}, "field 'id'"),
        ({"notes": {"a": ["fine", "\ud83d"]}}, "field 'notes.a[1]'"),
        ({"notes": {"\ud83d": 1}}, "field 'notes'"),
    ],
)
def test_text_that_utf8_cannot_hold_is_refused_wherever_it_is(tmp_path, changes, where):
    path = write(tmp_path / "a.jsonl", fields(), fields(**changes))
    with pytest.raises(ValueError, match="1 bad line") as caught:
        read_jsonl(path)
    assert f"{path}:2: {where}" in str(caught.value)
    str(caught.value).encode()  # the message itself can be written


def test_whole_characters_beyond_the_first_plane_are_read(tmp_path):
    path = write(tmp_path / "a.jsonl", fields(prompt="a \U0001f600 face"))
    assert "\\ud83d\\ude00" in path.read_text()
    assert read_jsonl(path)[0].prompt == "a \U0001f600 face"


@pytest.mark.parametrize("depth", [60, 900, 5000, 200_000])
@pytest.mark.parametrize("pair", ["[]", '{"a":}'])
def test_deep_nesting_is_a_bad_line(tmp_path, depth, pair):
    opening, closing = pair[:-1] * depth, pair[-1] * depth
    line = json.dumps(fields())[:-1] + f', "extra": {opening}1{closing}}}'
    path = write(tmp_path / "a.jsonl", fields(), line)
    with pytest.raises(ValueError, match="1 bad line") as caught:
        read_jsonl(path)
    assert f"{path}:2: " in str(caught.value)
    assert "nested" in str(caught.value)
    flat = json.dumps(fields())[:-1] + f', "extra": {"[" * 40}1{"]" * 40}}}'
    assert len(read_jsonl(write(path, flat))) == 1


def test_byte_order_marks_are_skipped_where_lines_begin(tmp_path):
    mark, line = b"\xef\xbb\xbf", json.dumps(fields()).encode() + b"\n"
    path = tmp_path / "a.jsonl"
    path.write_bytes(mark + b"\n" + mark + line + line + mark + mark + line + mark)
    assert len(read_jsonl(path)) == 3
    assert [number for number, _ in records.numbered_lines(path)] == [2, 3, 4]
    path.write_bytes(mark + b"{no\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:1: got '\{no', which is not JSON"):
        read_jsonl(path)


@pytest.mark.parametrize(
    ("encoding", "name"),
    [
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16"),
        ("utf-16-be", "UTF-16"),
        ("utf-32", "UTF-32"),
        ("utf-32-le", "UTF-32"),
    ],
)
def test_wide_encodings_are_named_with_the_fix(tmp_path, encoding, name):
    path = tmp_path / "a.jsonl"
    path.write_bytes((json.dumps(fields()) + "\n").encode(encoding))
    with pytest.raises(ValueError, match=rf"a\.jsonl is {name}, expected UTF-8; convert it: iconv"):
        read_jsonl(path)
