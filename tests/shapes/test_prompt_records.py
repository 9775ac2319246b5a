"""Prompt records: the form, the splits, the truth of the questions, the shipped files."""

import collections
import importlib.resources
import json

import numpy as np
import pytest

from alphagrpo_jax.runtime.records import parse_record, read_jsonl
from alphagrpo_jax.shapes import prompts, questions, requests, riddles, scenes, specs
from alphagrpo_jax.shapes.specs import Spec

DATA = importlib.resources.files("alphagrpo_jax") / "shapes" / "assets" / "data"


def test_questions_say_yes_exactly_if_the_scene_fulfils_the_spec():
    rng = np.random.default_rng(0)
    outcomes = collections.Counter()
    for _ in range(400):
        spec = requests.sample_plain(rng, split=None).spec
        queries = [query for query, _ in prompts.semantic_queries(spec, rng)]
        near = specs.sample_scene(requests.sample_plain(rng, split=None).spec, rng)
        for scene in (specs.sample_scene(spec, rng), near, scenes.random_scene(rng, spec.total)):
            yes = all(questions.truth(query, scene) for query in queries)
            assert yes == specs.satisfied(spec, scene)
            outcomes[yes] += 1
    assert outcomes[True] >= 400
    assert outcomes[False] >= 400


def test_records():
    records = prompts.records("validation", 40, seed=3)
    assert records == prompts.records("validation", 40, seed=3)
    assert records != prompts.records("validation", 40, seed=4)
    assert [record["kind"] for record in records[:4]] == ["plain", "implied", "plain", "implied"]
    for index, fields in enumerate(records):
        record = parse_record(json.loads(json.dumps(fields)))
        assert record.id == f"validation-{index:04d}"
        assert record.original_index == index
        assert 3 <= len(record.question_texts) <= 8
        assert [question.tag for question in record.quality] == [
            "Geometry",
            "Coherence",
            "Texture",
        ]
        assert all(question.is_valid for question in (*record.semantic, *record.quality))
        spec = Spec.from_json(fields["facts"])
        assert spec.split == "validation"
        assert spec.combination == fields["combination"]
        assert (fields["kind"] == "implied") == bool(fields["riddles"])


def test_types_and_kinds_on_request():
    plain = prompts.records("heldout", 25, kinds=("plain",))
    counts = collections.Counter(record["type"] for record in plain)
    assert counts == dict.fromkeys(requests.PLAIN_TYPES, 5)
    with pytest.raises(ValueError, match="got split 'test'"):
        prompts.records("test", 1)


def test_dependencies():
    rng = np.random.default_rng(1)
    spec = requests.sample_plain(rng, "relation").spec
    for query, needs in prompts.semantic_queries(spec, rng):
        assert len(needs) == {"relation": 2, "has_color": 1}.get(query.form, 0)


def test_repeats_only_on_request():
    request = requests.sample_plain(np.random.default_rng(0))
    once, often = prompts._UniqueRequests(repeats=False), prompts._UniqueRequests(repeats=True)
    assert once.sample(lambda: request, 1) == [request]
    once.use(request)
    with pytest.raises(ValueError, match="found 1 different prompts and no more"):
        once.sample(lambda: request, 1)
    often.use(request)
    assert often.sample(lambda: request, 3) == [request] * 3
    many = prompts.records("heldout", 400, kinds=("plain",), repeats=True)
    assert len({record["prompt"] for record in many}) < 400


FILES = ("train.jsonl", "validation.jsonl", "heldout.jsonl", "heldout_riddles.jsonl")
PLAIN_FILES = ("plain_train.jsonl", "plain_heldout.jsonl")


def test_shipped_files():
    files = {name: read_jsonl(DATA / name) for name in FILES}
    assert {name: len(records) for name, records in files.items()} == {
        "train.jsonl": 1600,
        "validation.jsonl": 200,
        "heldout.jsonl": 400,
        "heldout_riddles.jsonl": 60,
    }
    meanings = {
        name: {record.extra["combination"] for record in records} for name, records in files.items()
    }
    for name in ("validation.jsonl", "heldout.jsonl", "heldout_riddles.jsonl"):
        assert not meanings["train.jsonl"] & meanings[name]
    assert not meanings["validation.jsonl"] & meanings["heldout.jsonl"]
    kept_out = {riddle.clue for riddle in riddles.HELDOUT}
    for name, records in files.items():
        used = {clue for record in records for clue in record.extra["riddles"]}
        if name == "heldout_riddles.jsonl":
            assert used == kept_out
        else:
            assert used == {riddle.clue for riddle in riddles.TRAINED}
    counts = collections.Counter(
        (record.extra["kind"], record.extra["type"]) for record in files["heldout.jsonl"]
    )
    assert all(counts["plain", type_] == 40 for type_ in requests.PLAIN_TYPES)
    assert sum(count for (kind, _), count in counts.items() if kind == "implied") == 200


def test_shipped_plain_files():
    train, heldout = (read_jsonl(DATA / name) for name in PLAIN_FILES)
    assert (len(train), len(heldout)) == (1600, 400)
    assert all(record.extra["kind"] == "plain" for record in (*train, *heldout))
    types = collections.Counter(record.extra["type"] for record in heldout)
    assert types == dict.fromkeys(requests.PLAIN_TYPES, 80)
    meanings = [{record.extra["combination"] for record in records} for records in (train, heldout)]
    assert not meanings[0] & meanings[1]


def test_shipped_files_are_what_the_command_writes(tmp_path, capsys):
    prompts.main(["--out", str(tmp_path)])
    assert "train.jsonl: 1600 records" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, *PLAIN_FILES}
    for name in (*FILES, *PLAIN_FILES):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()
