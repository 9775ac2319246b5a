"""Every kind of finding of --check, with its line; shipped data has none."""

import copy
import json
import pathlib

import judge_families
import pytest

from alphagrpo_jax import decompose
from alphagrpo_jax.decomposition import check, phrasing
from alphagrpo_jax.rewards.verifiers import prompt_limits
from alphagrpo_jax.rewards.verifiers.instructions import AUDIT_INSTRUCTION
from alphagrpo_jax.shapes import prompts

DATA = pathlib.Path(prompts.__file__).parent / "assets" / "data"


def question(kind: str, text: str, tag: str, **fields) -> dict:
    defaults = {"question_type": kind, "question": text, "is_valid": True, "tag": tag}
    return defaults | fields


GOOD = {
    "prompt": "A cat on a mat.",
    "id": "one",
    "original_index": 0,
    "semantic_questions": [
        question("semantic", "Is there a cat?", "Existence"),
        question("semantic", "Is there a mat?", "Existence"),
        question("semantic", "Is the cat on the mat?", "Spatial", dependency=[0, 1]),
    ],
    "quality_questions": [question("quality", "Is the cat well formed?", "Anatomy")],
}


def findings(tmp_path: pathlib.Path, *records) -> list[check.Finding]:
    path = tmp_path / "r.jsonl"
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines))
    return check.check_file(path)[0]


@pytest.mark.parametrize("path", sorted(DATA.glob("*.jsonl")), ids=lambda path: path.name)
def test_shipped_data_has_no_findings(path):
    problems, count = check.check_file(path)
    assert problems == []
    assert count == len(path.read_text().splitlines())


def test_a_good_record(tmp_path):
    assert findings(tmp_path, GOOD) == []


def spoiled(**changes) -> dict:
    record = copy.deepcopy(GOOD)
    for name, value in changes.items():
        kind, _, suffix = name.partition("_")
        index, _, field = suffix.partition("_")
        record[f"{kind}_questions"][int(index)][field] = value
    return record


ERRORS = {
    "not JSON": ('{"prompt": ', "not JSON"),
    "no object": ("[]", "expected a JSON object"),
    "no quality": ({k: v for k, v in GOOD.items() if k != "quality_questions"}, "is missing"),
    "empty list": (GOOD | {"semantic_questions": []}, "got an empty list"),
    "empty prompt": (GOOD | {"prompt": " "}, "field 'prompt'"),
    "empty question": (spoiled(semantic_0_question=""), "not empty"),
    "wrong kind": (spoiled(semantic_0_question_type="quality"), "question_type 'quality'"),
    "all invalid": (spoiled(quality_0_is_valid=False), "every question has is_valid false"),
    "is_valid no boolean": (spoiled(quality_0_is_valid="yes"), "expected true or false"),
    "unknown tag": (spoiled(semantic_1_tag="Colour"), "got tag 'Colour'"),
    "quality tag on semantic": (spoiled(semantic_1_tag="Anatomy"), "got tag 'Anatomy'"),
    "no such dependency": (spoiled(semantic_1_dependency=[3]), "expected indexes"),
    "circle": (spoiled(semantic_0_dependency=[2]), "a circle through the semantic questions"),
    "own dependency": (spoiled(semantic_1_dependency=[1]), "a circle"),
    "question twice": (spoiled(semantic_1_question="is there a  CAT?"), "asked by semantic_"),
    "quality repeats": (spoiled(quality_0_question="Is there a cat?"), "asked by semantic_"),
    "negated": (spoiled(semantic_1_question="Isn't there a mat?"), "is negated"),
    "asks for none": (spoiled(semantic_1_question="Is there no mat?"), "is negated"),
    "asks for faults": (
        spoiled(quality_0_question="Are there any visible artifacts?"),
        "asks for 'artifacts'",
    ),
    "control token": (spoiled(semantic_1_question="Is there a <|im_end|> mat?"), "<|im_end|>"),
    "instruction token": (spoiled(quality_0_question="[INST] Is it fine?"), "['[INST]']"),
    "control token in the prompt": (GOOD | {"prompt": "A <|im_end|> cat."}, "['<|im_end|>']"),
    "image in the prompt": (GOOD | {"prompt": "A cat <image>."}, "holds the control tokens"),
    "half a character": (GOOD | {"prompt": "A cat \ud83d."}, "field 'prompt': got 'A cat \\ud83d"),
    "half in a question": (spoiled(quality_0_question="Is it \ude00 fine?"), "[0].question': got"),
    "half in a tag": (spoiled(semantic_0_tag="\ud800"), "[0].tag': got"),
    "deep": (json.dumps(GOOD)[:-1] + f', "x": {"[" * 5000}{"]" * 5000}}}', "nested too deep"),
    "rather deep": (json.dumps(GOOD)[:-1] + f', "x": {"[" * 99}{"]" * 99}}}', "nested more than"),
    "field twice": (json.dumps(GOOD)[:-1] + ', "prompt": "x"}', "['prompt'] occur twice"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(tmp_path, name):
    record, message = ERRORS[name]
    first_record = GOOD | {"prompt": "Another.", "id": "two", "original_index": 1}
    problems = findings(tmp_path, first_record, record)
    assert [(problem.line, problem.severity) for problem in problems] == [(2, "error")]
    assert message in problems[0].message
    assert str(problems[0]).startswith(f"{tmp_path / 'r.jsonl'}:2: error: ")


def test_not_utf8(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "B\xe4r"}\n')
    (problem,), count = check.check_file(path)
    assert (problem.line, problem.severity, count) == (2, "error", 1)
    assert "not UTF-8" in problem.message


def test_marks_and_wide_encodings(tmp_path):
    path = tmp_path / "r.jsonl"
    line = (json.dumps(GOOD) + "\n").encode()
    path.write_bytes(b"\xef\xbb\xbf\n\xef\xbb\xbf" + line)
    problems, count = check.check_file(path)
    assert [(problem.line, problem.message) for problem in problems] == [(1, "blank line")]
    assert count == 1
    path.write_bytes(line.decode().encode("utf-16"))
    (problem,), count = check.check_file(path)
    assert (problem.line, problem.severity, count) == (1, "error", 0)
    assert "is UTF-16, expected UTF-8; convert it: iconv -f UTF-16" in problem.message


@pytest.mark.torch
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Is it <|assistant|>yes?", "control tokens ['<|assistant|>']"),  # a mark without a name
        ("Is there a " + "red " * 1200 + "cat?", "tokens with the image, and the model's context"),
        ("Is there a cat?", None),
    ],
)
def test_questions_that_a_verifier_cannot_be_asked(tmp_path, capsys, text, message):
    path = tmp_path / "r.jsonl"
    path.write_text(
        json.dumps(spoiled(quality_0_question=text, semantic_0_question="Is it?")) + "\n"
    )
    code = decompose.main(["--check", str(path), "--verifier", "package:verifier"])
    printed = capsys.readouterr().out
    assert code == (0 if message is None else 1)
    if message is not None:
        assert f"{path}:1: error: quality_questions[0]: question 'Is" in printed
        assert message in printed


@pytest.mark.torch
def test_a_verifier_is_checked_with_the_runs_instruction_and_image(tmp_path, capsys, monkeypatch):
    judge = judge_families.FAMILIES["qwen2_vl"]()
    limits = prompt_limits.PromptLimits(judge.processor, judge.model.config)
    monkeypatch.setattr(prompt_limits.PromptLimits, "from_folder", lambda folder: limits)
    (tmp_path / "r.jsonl").write_text(json.dumps(GOOD) + "\n")

    def code(*flags):
        files = ("--check", str(tmp_path / "r.jsonl"), "--verifier", str(tmp_path))
        return decompose.main([*files, *flags])

    longest = {"type": "text", "text": GOOD["quality_questions"][0]["question"]}
    prompt = limits.prompt([{"type": "image"}, longest], AUDIT_INSTRUCTION)
    small, large = limits.count(prompt, 32, 32), limits.count(prompt, 1024, 1024)
    assert small + 10 < large
    limits.context_tokens = large
    assert code() == 0  # it may be full
    limits.context_tokens = large - 1
    assert code() == code("--image-side", "1024") == 1
    assert f"has {large} tokens with the image, and the model's context {large - 1}" in (
        capsys.readouterr().out
    )
    assert code("--image-side", "32") == code("--image-side", "1024", "--instruction", "") == 0
    long_text = "Be strict. " * limits.context_tokens
    assert code("--image-side", "32", "--instruction", long_text) == 1
    for flags, message in (
        (("--instruction", "  "), "got blanks"),
        (("--image-side", "0"), "between 1 and 4096"),
    ):
        with pytest.raises(SystemExit):
            code(*flags)
        assert message in capsys.readouterr().err
    for flags in (("--instruction", "x"), ("--image-side", "9")):
        with pytest.raises(SystemExit):
            decompose.main(["--check", str(tmp_path / "r.jsonl"), *flags])
        assert f"{flags[0]} needs --check FILE --verifier PATH" in capsys.readouterr().err


def test_a_verifier_that_is_none_is_explained(tmp_path, capsys):
    (tmp_path / "r.jsonl").write_text(json.dumps(GOOD) + "\n")
    for path, message in (("nowhere", "'nowhere' names"), (str(tmp_path), "expected a Hugging")):
        assert decompose.main(["--check", str(tmp_path / "r.jsonl"), "--verifier", path]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        decompose.main(["--input", "a", "--output", "b", "--verifier", "package:verifier"])
    assert "--verifier needs --check" in capsys.readouterr().err


WARNINGS = {
    "some invalid": (spoiled(semantic_1_is_valid=False, semantic_2_dependency=[0]), "never asked"),
    "depends on invalid": (spoiled(semantic_1_is_valid=False), "are never asked: [1]"),
    "dependency twice": (spoiled(semantic_2_dependency=[0, 0]), "each index once"),
    "no question mark": (spoiled(semantic_1_question="There is a mat"), "question mark"),
    "adjective of fault": (spoiled(quality_0_question="Is the cat deformed?"), "seems to ask"),
    "negation inside": (spoiled(semantic_1_question="Is the mat not red?"), "negation inside"),
    "blank line": ("", "blank line"),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_warnings(tmp_path, name):
    record, message = WARNINGS[name]
    problems = findings(tmp_path, record)
    assert problems
    assert {problem.severity for problem in problems} == {"warning"}
    assert any(message in problem.message for problem in problems)


def test_fields_left_out_are_warned_of(tmp_path):
    record = copy.deepcopy(GOOD)
    del record["semantic_questions"][0]["is_valid"]
    (problem,) = findings(tmp_path, record)
    assert problem.severity == "warning"
    assert problem.message == "semantic_questions[0]: no field is_valid"


def test_duplicates_over_lines(tmp_path):
    second = GOOD | {"prompt": "a  cat on a mat", "id": "one"}
    problems = findings(tmp_path, GOOD, second)
    assert [(problem.line, problem.severity) for problem in problems] == [
        (2, "error"),
        (2, "error"),
        (2, "warning"),
    ]
    assert [problem.message.split()[0] for problem in problems] == [
        "prompt",
        "id",
        "original_index",
    ]
    assert all(problem.message.endswith("is that of line 1 too") for problem in problems)


def test_one_wish_for_many_images_is_no_duplicate(tmp_path):
    images = ["a.png", "b.png", "a.png"]
    records = [GOOD | {"id": str(n), "original_index": n, "image": i} for n, i in enumerate(images)]
    (problem,) = findings(tmp_path, *records)
    assert (problem.line, problem.severity) == (3, "error")
    assert problem.message == "prompt 'A cat on a mat.' is that of line 1 too"


def test_records_of_the_answering_task_have_no_questions(tmp_path):
    good = {"prompt": "How many?", "image": "a.png", "answer": ["two", "2"]}
    assert findings(tmp_path, good) == []
    (problem,) = findings(tmp_path, good | {"answer": []})
    assert "field 'answer'" in problem.message


def test_an_empty_or_missing_file(tmp_path):
    path = tmp_path / "r.jsonl"
    (missing,), _ = check.check_file(path)
    assert missing.severity == "error"
    path.write_text("")
    (empty,), _ = check.check_file(path)
    assert "no records" in empty.message
    path.write_text(json.dumps(GOOD))
    (cut,), count = check.check_file(path)
    assert (cut.severity, count) == ("warning", 1)


@pytest.mark.parametrize(
    "text",
    [
        "Isn't the cat black?",
        "Isn\u2019t the cat black?",
        "Doesn't it have a tail?",
        "Can't the cat be seen?",
        "Is there no cat?",
        "Are there not two cats?",
        "Is it not a cat?",
        "Are there any mistakes?",
        "Are there any visible distortions in the face?",
        "Does the image have any artifacts?",
        "Is there a glitch?",
    ],
)
def test_negative_phrasing(text):
    assert phrasing.negation_fault(text, "a black cat")


@pytest.mark.parametrize(
    "text",
    [
        "Is the image free of cars?",
        "Is the image free of artifacts?",
        "Is the cat without a collar?",
        "Is there a knot in the rope?",
        "Is there a note on the table?",
        "Is the canteen open?",
        "Does the sign read \"No entry\"?",
        "Are the instruments distinct?",
        "Is the error message on the screen legible?",
    ],
)  # fmt: skip
def test_positive_phrasing(text):
    assert phrasing.negation_fault(text, "a black cat") is None


def test_faults_that_the_prompt_asks_for_may_be_asked_about():
    assert (
        phrasing.negation_fault("Are there any mistakes on the page?", "a page full of mistakes")
        is None
    )
    assert phrasing.negation_fault("Is there a glitch?", "glitch art of a cat") is None
    assert phrasing.wording_doubt("Is the cat blurry?", "a blurry photo of a cat") is None
    assert phrasing.wording_doubt("Is the cat blurry?", "a photo of a cat")
