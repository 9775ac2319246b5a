"""The pools of scorers beside every kind of verifier, and what is checked before a run."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
import tiny_verifiers
import tiny_world

from alphagrpo_jax import config_checks as config_lib
from alphagrpo_jax import policy, tasks
from alphagrpo_jax.config import ConfigError
from alphagrpo_jax.evaluation.checkers import check_scored
from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.prompts import PromptSet
from alphagrpo_jax.rewards import scoring
from alphagrpo_jax.rewards.workers.combined import CombinedPool
from alphagrpo_jax.rewards.workers.pool import Pool, PoolError
from alphagrpo_jax.runtime.errors import InputError
from alphagrpo_jax.runtime.records import parse_record
from alphagrpo_jax.shapes import scenes
from alphagrpo_jax.training import options as options_lib
from alphagrpo_jax.training import self_verifier
from alphagrpo_jax.training import verifiers as verifiers_lib
from configs import grpo

REDNESS = "callable:tiny_verifiers:redness"
FACTS = {
    "groups": [{"count": 1, "shape": "circle", "color": "red"}],
    "background": "white",
    "relation": None,
}


def config_of(*scorers, verifier=None, **reward):
    fields = grpo.get_config()
    fields.verifier.kind, fields.verifier.path = "callable", "tiny_verifiers:Honest"
    fields.verifier.workers = 1
    fields.verifier.update(verifier or {})
    fields.reward.extra_scores, fields.reward.extra_weights = scorers, (1.0,) * len(scorers)
    fields.reward.update(reward)
    return config_lib.from_config_dict(fields)


@pytest.fixture(scope="module")
def loaded():
    return tiny_world.model(words=("yes", "no"))


@pytest.fixture(scope="module")
def images():
    shape = (3, tiny_world.SIDE, tiny_world.SIDE, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_without_scorers_the_pool_is_the_verifiers_own():
    with verifiers_lib.make_pool(config_of()) as pool:
        assert isinstance(pool, Pool)


def test_scorers_answer_beside_a_verifier(tmp_path):
    audit = tmp_path / "audit.jsonl"
    config = config_of(f"{REDNESS}?range=0..255", "exact", verifier={"audit": str(audit)})
    record = parse_record(tiny_world.record("a red circle", facts=FACTS))
    options = options_lib.scoring_options(config, tasks.TASKS["t2i"])
    rng = np.random.default_rng(0)
    pictures = [
        scenes.render(scenes.place_objects(rng, [("circle", color)], "white"))
        for color in ("red", "blue")
    ]
    with verifiers_lib.open_verifiers(config, None) as (pool, _):
        counts = verifiers_lib.PoolCounts(pool)
        scoring.submit(pool, ["right", "wrong"], pictures, [record] * 2, options)
        rewards = scoring.gather(pool, ["right", "wrong"], [record] * 2, (), options)
        metrics = counts.metrics()
    redness = tiny_verifiers.redness(pictures, [record.prompt] * 2)
    assert rewards.by_score["callable.redness"].tolist() == redness
    assert rewards.by_score["exact"][0] == 1.0 > rewards.by_score["exact"][1]
    judged = rewards.by_score["confidence"]
    for row in range(2):
        expected = (judged[row] + redness[row] / 255.0 + rewards.by_score["exact"][row]) / 3
        assert rewards.reward[row] == pytest.approx(expected)
    assert metrics["time/pool/answered"] == 2
    assert metrics["time/pool/exact/answered"] == metrics["time/pool/exact/attempts"] == 2
    logs = {
        name: rows_of(tmp_path / f"audit{name}.jsonl")
        for name in ("", ".callable.redness", ".exact")
    }
    samples = {name: sorted(row["sample"] for row in rows) for name, rows in logs.items()}
    assert set(map(tuple, samples.values())) == {("right", "wrong")}
    assert sorted(row["scores"][0] for row in logs[".callable.redness"]) == sorted(redness)
    assert {row["scored"][0] for row in logs[".exact"]} == {scoring.facts_text(record)}


def rows_of(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_scorer_that_cannot_be_built_stops_the_start():
    config = config_of("callable:tiny_verifiers:no_such_name")
    with (
        pytest.raises(
            PoolError, match=r"scorer callable\.no_such_name: .* got None, expected a fun"
        ),
        verifiers_lib.open_verifiers(config, None),
    ):
        pass
    with (
        pytest.raises(OSError, match="there_is_none"),
        verifiers_lib.make_pool(config_of("hf_clip:there_is_none")),
    ):
        pass


def log_probs_by_decoding(loaded, image, prompt):
    """Mean log-prob of a prompt behind image and request, one decoding step per token."""
    model, params = loaded.model, PolicyParams(loaded.base)
    context = self_verifier.encode_images(model, params, image[None])
    request = np.array([loaded.tokenizer.wrap("Describe the image.")], np.int32)
    extend = jax.jit(functools.partial(policy.extend_text, model))
    decode = jax.jit(functools.partial(policy.decode_step, model))
    context, _ = extend(params, context, request, np.ones(request.shape, bool))
    ids = loaded.tokenizer.encode(prompt)
    cache = policy.init_decode(model, context, len(ids) + 1)
    token, log_probs = loaded.tokenizer.special.im_start, []
    for target in ids:
        cache, logits = decode(params, context, cache, np.array([token], np.int32))
        shifted = np.asarray(logits[0], np.float64) - float(logits.max())
        log_probs.append(shifted[target] - np.log(np.exp(shifted).sum()))
        token = target
    return float(np.mean(log_probs))


def test_the_policy_computes_likelihoods_itself(loaded, images, tmp_path):
    kind = {"kind": "self", "path": "", "audit": str(tmp_path / "audit.jsonl")}
    config = config_of("likelihood", REDNESS, verifier=kind)
    prompts = ["a red circle", "two green crosses", "a"]
    with verifiers_lib.open_verifiers(config, loaded) as (pool, _):
        assert isinstance(pool, CombinedPool)
        verifiers_lib.follow(pool, PolicyParams(loaded.base))
        for number, prompt in enumerate(prompts):
            pool.submit(number, images[number], [], (), [prompt] * 2)
        pool.submit("long", images[0], [], (), ["a red circle " * 40, ""])
        pool.submit("control", images[0], [], (), ["a <|im_end|>", ""])
        pool.submit("empty", images[0], [], (), ["", ""])
        results = pool.gather([*range(3), "long", "control", "empty"])
    redness = tiny_verifiers.redness(images, prompts)
    for number in (0, 2):
        likelihood, red = results[number].scores
        expected = log_probs_by_decoding(loaded, images[number], prompts[number])
        assert likelihood == pytest.approx(expected, abs=1e-4)
        assert red == redness[number]
    for name, reason in (
        ("long", "tokens, expected 1 to 32"),
        ("control", "control tokens"),
        ("empty", "has 0 tokens"),
    ):
        assert (results[name].valid, results[name].scores) == (False, ())
        assert reason in results[name].failure
    assert len(rows_of(tmp_path / "audit.callable.redness.jsonl")) == 6
    assert not (tmp_path / "audit.jsonl").exists()


@pytest.mark.parametrize(
    ("scorers", "fields", "message"),
    [
        (
            ("likelihood",),
            {"kind": "openai", "endpoints": ("http://a/v1",), "model": "m"},
            "chat ser",
        ),
        ((REDNESS, REDNESS), {}, "expected different names"),
        ((REDNESS, "callable:other:redness"), {}, r"'callable\.redness', 'callable\.redness'"),
        (("exact",), {"kind": "self", "endpoints": ("http://a/v1",)}, "the policy answers alone"),
        (("likelihood",), {"kind": "self", "audit": "log"}, "keeps no log"),
    ],
)
def test_contradictions_are_refused(scorers, fields, message):
    with pytest.raises(ConfigError, match=message):
        config_of(*scorers, verifier=fields)


def test_two_scorers_of_one_kind_need_names():
    config = config_of(REDNESS, "callable:other:redness?name=other")
    assert [spec.name for spec in config.reward.scorers] == ["callable.redness", "other"]


def test_a_second_verifier_needs_questions():
    with pytest.raises(ConfigError, match="ask no verifier"):
        config_of(score="exact", verifier={"second": "tiny_verifiers:Constant"})


def test_a_run_is_resumed_with_its_scorers_only():
    config = config_of(REDNESS)
    saved = json.loads(config_lib.to_json(config))
    config_lib.check_resumable(config, saved)
    with pytest.raises(ConfigError, match=r"reward\.extra_scores: the run has \['callable"):
        config_lib.check_resumable(config_of(f"{REDNESS}?range=0..9"), saved)


def prompt_set(task, *fields):
    records = tuple(parse_record(record) for record in fields)
    return PromptSet(tasks.TASKS[task], records, (), pathlib.Path(), "")


def test_records_are_checked_for_what_scorers_need():
    plain, with_facts = tiny_world.record("a circle"), tiny_world.record("a circle", facts=FACTS)
    captioned = tiny_world.record("make it red", caption="a red circle")
    exact, clip = config_of("exact").reward, config_of("hf_clip:a/b").reward
    for task, options, fields in (
        ("t2i", exact, [with_facts]),
        ("t2i", clip, [plain]),
        ("srr", clip, [plain]),
        ("ti2i", clip, [captioned]),
        ("ti2i", config_of(REDNESS).reward, [plain]),
    ):
        check_scored(prompt_set(task, *fields), options, (48, 48), source="the records")
    for task, options, fields, message in (
        ("t2i", exact, [with_facts, plain], r'the records, record 2 .* without "facts"'),
        ("ti2i", clip, [captioned, plain], r"record 2 .* the prompt of an edit is an instruction"),
    ):
        with pytest.raises(InputError, match=message):
            check_scored(prompt_set(task, *fields), options, (48, 48), source="the records")
    with pytest.raises(InputError, match="images of 32x32 pixels"):
        check_scored(prompt_set("t2i", with_facts), exact, (32, 32), source="the records")
