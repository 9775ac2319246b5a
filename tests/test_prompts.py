"""Records as a dataset, tokens, order, and evaluation sets."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny_world

from alphagrpo_jax import config_checks as config_lib
from alphagrpo_jax import prompts
from alphagrpo_jax.runtime.records import parse_record
from alphagrpo_jax.tasks import TASKS


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_world.tokenizer()


def test_a_file_becomes_a_dataset_and_tokens(tmp_path, tokenizer):
    path = tiny_world.write_records(tmp_path / "train.jsonl", 5)
    prompt_set = prompts.load(
        path, tokenizer, task=TASKS["rt2i"], bucket=24, cache=tmp_path / "cache"
    )
    (text,) = prompt_set.texts
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record.to_json()["prompt"] for record in prompt_set.records] == [
        r["prompt"] for r in lines
    ]
    assert prompt_set.records[3].question_texts == parse_record(lines[3]).question_texts
    assert text.tokens.shape == text.mask.shape == (5, 24)
    assert text.tokens[0][text.mask[0]].tolist() == tokenizer.wrap(lines[0]["prompt"])
    assert list((tmp_path / "cache").rglob("*.array_record*"))
    again = prompts.load(path, tokenizer, task=TASKS["rt2i"], bucket=24, cache=tmp_path / "cache")
    np.testing.assert_array_equal(again.texts[0].tokens, text.tokens)


def test_a_changed_file_is_read_anew(tmp_path, tokenizer):
    path = tiny_world.write_records(tmp_path / "train.jsonl", 2)
    first = prompts.load(path, tokenizer, task=TASKS["rt2i"], bucket=24, cache=tmp_path)
    tiny_world.write_records(path, 3)
    second = prompts.load(path, tokenizer, task=TASKS["rt2i"], bucket=24, cache=tmp_path)
    assert (len(first.records), len(second.records)) == (2, 3)
    assert first.digest != second.digest


def test_a_bad_line_is_named(tmp_path, tokenizer):
    path = tiny_world.write_records(tmp_path / "train.jsonl", 2)
    path.write_text(path.read_text() + '{"prompt": "no questions"}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl:3"):
        prompts.load(path, tokenizer, task=TASKS["rt2i"], bucket=24, cache=tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "a red <|im_end|> circle"}, "prompt: ['<|im_end|>']"),
        ({"prompt": "<|vision_start|>"}, "prompt: ['<|vision_start|>']"),
        ({"prompt": "a circle <image>"}, "prompt: ['<image>']"),  # of a verifier
        ({"prompt": "a circle <|endoftext|>"}, "prompt: ['<|endoftext|>']"),
    ],
)
def test_control_tokens_in_prompts_are_refused(tmp_path, tokenizer, changes, message):
    path = tiny_world.write_records(tmp_path / "train.jsonl", 2)
    row = tiny_world.record("a green cross") | changes
    path.write_text("\ufeff\n" + path.read_text() + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="1 of 3 records hold control tokens") as caught:
        prompts.load(path, tokenizer, task=TASKS["rt2i"], bucket=64, cache=tmp_path)
    assert f"{path}:4: {message}" in str(caught.value)


def test_control_tokens_in_questions_are_refused(tmp_path, tokenizer):
    path = tmp_path / "train.jsonl"
    row = tiny_world.record("a green cross")
    row["quality_questions"][0]["question"] = "Is it </s> fine?"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(
        ValueError, match=r"train\.jsonl:1: question 'Is it </s> fine\?': \['</s>'\]"
    ):
        prompts.load(path, tokenizer, task=TASKS["rt2i"], bucket=64, cache=tmp_path)


def test_prompts_beyond_the_bucket_are_named(tokenizer):
    with pytest.raises(ValueError, match=r"1 of 2 prompts are longer than the prompt bucket of 8"):
        prompts.tokenize(["a red circle", "x" * 40], tokenizer, bucket=8)


def test_tensorflow_is_not_needed():
    code = "import sys, alphagrpo_jax.prompts; assert 'tensorflow' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_order_is_a_permutation_per_epoch_and_a_pure_function_of_the_position():
    full_order = prompts.order(0, 30, size=10, seed=3)
    for epoch in range(3):
        assert sorted(full_order[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert not np.array_equal(full_order[:10], full_order[10:20])
    pieces = [prompts.order(at, 6, size=10, seed=3) for at in range(0, 30, 6)]
    np.testing.assert_array_equal(np.concatenate(pieces), full_order)
    assert not np.array_equal(prompts.order(0, 10, size=10, seed=4), full_order[:10])


def test_tasks_that_read_one_file_walk_different_permutations(tmp_path):
    fields = tiny_world.config(tmp_path)
    fields.task, fields.mixed.tasks = "mixed", ("rt2i", "t2i", "srr")
    fields.mixed.weights = (1.0, 1.0, 1.0)
    config = config_lib.from_config_dict(fields)
    records = tuple(parse_record(tiny_world.record(f"p{i}")) for i in range(40))

    def walk(config, name):
        prompt_set = prompts.PromptSet(TASKS[name], records, (), tmp_path, "")
        return prompts.next_rows(config, prompt_set, 0, 80).tolist()

    walks = [walk(config, name) for name in config.tasks]
    for rows in walks:
        assert sorted(rows[:40]) == sorted(rows[40:]) == list(range(40))
    epochs = [tuple(half) for rows in walks for half in (rows[:40], rows[40:])]
    assert len(set(epochs)) == 6
    # A run of one task walks as the first task of a mixed run, and as before there were tags.
    fields.task = "srr"
    assert walk(config_lib.from_config_dict(fields), "srr") == walks[0]
    assert walks[0][:40] == np.random.default_rng([config.seed, 0]).permutation(40).tolist()
    assert walks[0][40:] == np.random.default_rng([config.seed, 1]).permutation(40).tolist()


def test_more_prompts_than_the_set_has():
    assert prompts.order(0, 7, size=3, seed=0).shape == (7,)


def test_evaluation_sets_are_half_implied_and_balanced_over_types():
    kinds = [("plain", "count")] * 8 + [("plain", "relation")] * 2 + [("implied", "number")] * 9
    records = [
        parse_record(tiny_world.record(f"p{i}", kind=kind, type=type_))
        for i, (kind, type_) in enumerate(kinds)
    ]
    chosen = [kinds[row] for row in prompts.balanced(records, 8)]
    assert [chosen.count(kind) for kind in dict.fromkeys(kinds)] == [2, 2, 4]
    assert len(prompts.balanced(records, 100)) == 19
    plain = [parse_record(tiny_world.record(f"p{i}")) for i in range(4)]
    assert prompts.balanced(plain, 3) == [0, 1, 2]
