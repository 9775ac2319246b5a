"""A record that no verifier can answer is named at once, by file and line."""

import json

import numpy as np
import pytest
import tiny_world
from default_options import reward_options, start_pool

from alphagrpo_jax import config_checks as config_lib
from alphagrpo_jax.rewards import scoring
from alphagrpo_jax.rewards.verifiers import functions
from alphagrpo_jax.rewards.workers.combined import CombinedPool
from alphagrpo_jax.rewards.workers.in_process import InProcessPool
from alphagrpo_jax.runtime.records import parse_record
from alphagrpo_jax.training.checks import UnanswerableError, check_validity


@pytest.fixture
def config(tmp_path):
    tiny_world.write_records(tmp_path / "train.jsonl", 6)
    tiny_world.write_records(tmp_path / "heldout.jsonl", 3)
    return config_lib.from_config_dict(tiny_world.config(tmp_path))


def scored(records):
    """Rewards of one image per record, by a verifier that cannot be asked about unicorns."""
    refuses = ("callable", {"target": "tiny_verifiers:NoUnicorns"})
    images = np.zeros((len(records), 4, 4, 3), np.uint8)
    ids = list(range(len(records)))
    with start_pool(refuses, workers=1) as pool:
        scoring.submit(pool, ids, images, records, reward_options())
        rewards = scoring.gather(pool, ids, records, (), reward_options())
        return rewards, pool.counters()


def test_a_record_with_a_question_for_nobody_is_named_by_file_and_line(config, tmp_path):
    path = tmp_path / "train.jsonl"
    lines = path.read_text().splitlines()
    fields = json.loads(lines[4])
    fields["semantic_questions"][0]["question"] = "Is it a unicorn?"
    lines[4:5] = ["", json.dumps(fields)]  # blank lines count
    path.write_text("\n".join(lines))
    records = [parse_record(json.loads(line)) for line in lines if line]
    rewards, counters = scored(records)
    assert rewards.valid.tolist() == [True] * 4 + [False, True]
    assert rewards.unanswerable == {4: "Is it a unicorn?"}
    assert (counters["retries"], counters["attempts"]) == (0, 6)
    assert rewards.metrics()["reward/answer_mass"] == pytest.approx(0.75)
    with pytest.raises(UnanswerableError) as caught:
        check_validity(config, rewards, records, "step 1")
    message = str(caught.value)
    assert message.startswith(f"{path}:6: the prompt {fields['prompt']!r} can never have a reward")
    assert "no verifier can answer 'Is it a unicorn?': unicorns do not exist" in message


def test_a_failure_that_may_pass_ends_nothing(config):
    records = [parse_record(tiny_world.record("red 1"))] * 8
    rewards, _ = scored(records)
    assert not rewards.unanswerable
    check_validity(config, rewards, records, "step 1")


@pytest.mark.parametrize("prompt", ["a unicorn", ""])
def test_a_prompt_that_no_scorer_can_score_is_named_by_every_kind_of_pool(config, prompt):
    refuses = ("callable", {"target": "tiny_verifiers:NoUnicorns"})
    scorer = ("function", {"target": "tiny_verifiers:no_unicorns"})
    in_process = InProcessPool(functions.FunctionScorer("tiny_verifiers:no_unicorns"))
    image = np.zeros((4, 4, 3), np.uint8)
    with start_pool(refuses, workers=1) as judge, start_pool(scorer, workers=1) as workers:
        for scorers in (workers, in_process):
            pool = CombinedPool(judge, {"name": scorers})
            pool.submit(0, image, ["Is it red?"], (), [prompt])
            result = pool.gather([0])[0]
            assert (result.valid, result.unanswerable) == (False, prompt)
            assert "unicorns do not exist" in result.failure
        assert (workers.counters()["retries"], workers.counters()["attempts"]) == (0, 1)
