"""Shipped edits and questions: true, of their split, and readable as the tasks read them."""

import json

import numpy as np
import pytest

from alphagrpo_jax.runtime.images import from_data_url
from alphagrpo_jax.runtime.paths import resolve
from alphagrpo_jax.runtime.records import parse_record, read_jsonl
from alphagrpo_jax.shapes import checker, image_records, questions, scenes
from alphagrpo_jax.studies import verifier_eval


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("name", ["edit", "answer"])
def test_shipped_files_are_those_of_the_generator(name, split):
    path = resolve(f"package:data/{name}_{split}.jsonl")
    lines = path.read_text().splitlines()
    assert len(lines) == image_records.SIZES[split]
    assert [json.loads(line) for line in lines[:20]] == image_records.records(name, split, 20)
    assert len(read_jsonl(path, form="answer" if name == "answer" else "questions")) == len(lines)


def test_edits_are_not_yet_done_and_ask_about_the_result():
    records = image_records.records("edit", "heldout", 60)
    assert {record["type"] for record in records} == set(image_records.OPERATIONS)
    for record in records:
        image = np.asarray(from_data_url(record["image"]))
        assert not all(checker.facts(image, record["facts"]).values())
        assert parse_record(record).question_texts


def test_answers_are_true():
    for record in image_records.records("answer", "heldout", 40):
        parsed = checker.parse(np.asarray(from_data_url(record["image"])))
        scene = scenes.Scene(tuple(parsed.objects), parsed.background)
        if record["type"] == "open":
            continue
        query = verifier_eval.queries_by_text()[record["prompt"]]
        truth = questions.truth(query, scene)
        assert record["answer"] == ("yes" if truth else "no")
