"""The policy as its own verifier, against one question at a time and numpy; other verifiers."""

import dataclasses

import bad_server
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_world
from bad_server import BadServer

from alphagrpo_jax import config_checks as config_lib
from alphagrpo_jax import policy
from alphagrpo_jax.config import ConfigError
from alphagrpo_jax.models import kv_cache
from alphagrpo_jax.ops.patchify import patchify
from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.rewards.workers.in_process import InProcessPool
from alphagrpo_jax.training import self_verifier
from alphagrpo_jax.training import verifiers as verifiers_lib
from configs import grpo

QUESTIONS = ("Is there a red circle?", "Is it flat?", "Is only a blue square to be seen?")
LENGTH = 40


@pytest.fixture(scope="module")
def loaded():
    return tiny_world.model(words=("yes", "no"))


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    shape = (self_verifier.IMAGES + 3, tiny_world.SIDE, tiny_world.SIDE, 3)
    return rng.integers(0, 256, shape, np.uint8)


@pytest.fixture(scope="module")
def verifier(loaded):
    policy_verifier = self_verifier.PolicyVerifier(loaded, question_tokens=LENGTH, min_mass=1e-3)
    policy_verifier.follow(PolicyParams(loaded.base))
    return policy_verifier


@pytest.fixture(scope="module")
def pool(verifier):
    return InProcessPool(verifier)


def direct(loaded, image, question):
    """P(yes) and P(no) of one question: the text, then one step of decoding, float64 softmax."""
    model, params = loaded.model, PolicyParams(loaded.base)
    floats = (jnp.asarray(image[None], jnp.float32) / 255.0 - 0.5) / 0.5
    patches = patchify(floats, model.config.vit.patch_size)
    grid = model.config.vit_grid(*image.shape[:2])
    ctx = policy.extend_vit(model, params, kv_cache.empty(1), patches, grid)
    tokens = jnp.array([loaded.tokenizer.wrap(question)], jnp.int32)
    ctx, _ = policy.extend_text(model, params, ctx, tokens, jnp.ones(tokens.shape, bool))
    cache = policy.init_decode(model, ctx, 1)
    start = jnp.array([loaded.tokenizer.special.im_start], jnp.int32)
    _, logits = policy.decode_step(model, params, ctx, cache, start)
    weights = np.exp(np.asarray(logits[0], np.float64) - float(logits.max()))
    shares = weights / weights.sum()
    return [float(shares[loaded.tokenizer.encode(word)].sum()) for word in ("yes", "no")]


def test_answers_are_the_first_token_of_the_policy(pool, loaded, images):
    # More images than are encoded at once, and with different numbers of questions.
    questions = {number: QUESTIONS[: 1 + number % 3] for number in range(len(images))}
    for number in questions:
        pool.submit(number, images[number], questions[number])
    results = pool.gather(reversed(questions))
    assert list(results) == [*reversed(questions)]
    last = len(images) - 1
    assert {number: len(result.p_yes) for number, result in results.items()} == {
        number: len(image_questions) for number, image_questions in questions.items()
    }
    for number in (0, 2, last):
        for p, question in zip(results[number].p_yes, questions[number], strict=True):
            yes, no = direct(loaded, images[number], question)
            assert p == pytest.approx(yes / (yes + no), abs=1e-5)
    assert results[last].valid
    assert len({p for result in results.values() for p in result.p_yes}) > len(images)
    with pytest.raises(ValueError, match=r"got sample ids \[0\] that are not waiting"):
        pool.gather([0])


def test_many_questions_about_one_image_and_what_cannot_be_asked(pool, images):
    many = [f"Is {number} right?" for number in range(self_verifier.QUESTIONS + 5)]
    pool.submit("many", images[0], many)
    pool.submit("first", images[0], many[:1])
    pool.submit("last", images[1], many[-1:])
    pool.submit("last too", images[0], many[-1:])
    pool.submit("long", images[0], ["Is it flat?", "long " * LENGTH])
    pool.submit("control", images[0], ["Is it <|im_end|> yes?"])
    results = pool.gather(["many", "first", "last", "last too", "long", "control"])
    assert len(results["many"].p_yes) == len(many)
    assert results["many"].p_yes[0] == pytest.approx(results["first"].p_yes[0], abs=1e-6)
    assert results["many"].p_yes[-1] == pytest.approx(results["last too"].p_yes[0], abs=1e-6)
    assert results["last"].p_yes != results["last too"].p_yes
    assert (results["long"].valid, results["long"].p_yes) == (False, None)
    assert "at most 40 fit (rollout.prompt_tokens)" in results["long"].failure
    assert "control tokens" in results["control"].failure


def test_a_policy_that_says_neither_gives_no_answer(verifier, pool, loaded, images):
    kernel = np.array(loaded.base["lm_head"]["kernel"])
    ids = [loaded.tokenizer.encode(word)[0] for word in ("yes", "no")]
    for name, broken in (
        ("neither yes nor no", np.where(np.isin(np.arange(kernel.shape[1]), ids), 0, 1e3 * kernel)),
        ("mass nan", np.full_like(kernel, np.nan)),
    ):
        head = {"lm_head": {"kernel": jnp.asarray(broken)}}
        verifiers_lib.follow(pool, PolicyParams(loaded.base | head))
        pool.submit(name, images[0], QUESTIONS[:1])
        result = pool.gather([name])[name]
        assert (result.valid, result.p_yes) == (False, None)
        assert name in result.failure
    verifiers_lib.follow(pool, PolicyParams(loaded.base))


def test_the_least_mass_is_that_of_the_options(loaded, images):
    strict = self_verifier.PolicyVerifier(loaded, question_tokens=LENGTH, min_mass=0.9)
    strict.follow(PolicyParams(loaded.base))
    (answer,) = strict.answer(images[0], QUESTIONS[:1])
    yes, no = direct(loaded, images[0], QUESTIONS[0])
    assert answer.p_yes is None
    assert answer.mass == pytest.approx(yes + no, abs=1e-5)
    assert "at least 0.9" in answer.failure


def test_one_image_by_itself_is_answered_like_in_a_pool(verifier, pool, images):
    pool.submit("x", images[0], QUESTIONS)
    answers = verifier.answer(images[0], QUESTIONS)
    assert tuple(answer.p_yes for answer in answers) == pool.gather(["x"])["x"].p_yes
    with pytest.raises(ValueError, match="expected yes/no questions"):
        verifier.rate(images[0], ["How well is it drawn?"])


def test_a_policy_without_weights_does_not_answer(loaded, images):
    unset = self_verifier.PolicyVerifier(loaded, question_tokens=LENGTH, min_mass=1e-3)
    pool = InProcessPool(unset)
    pool.submit("x", images[0], QUESTIONS)
    with pytest.raises(ValueError, match="expected a call of `follow` before"):
        pool.gather(["x"])
    verifiers_lib.follow(pool, PolicyParams(loaded.base))
    assert pool.gather(["x"])["x"].valid  # the error did not lose it


def test_a_tokenizer_without_the_words_is_refused(loaded):
    wordless = dataclasses.replace(loaded, tokenizer=tiny_world.tokenizer(words=("no",)))
    with pytest.raises(ConfigError, match="has 0 that spell yes and 1 that spell no"):
        self_verifier.PolicyVerifier(wordless, question_tokens=LENGTH)


def test_a_second_verifier_may_be_an_endpoint(images, tmp_path):
    fields = grpo.get_config()
    fields.verifier.kind, fields.verifier.path = "callable", "tiny_verifiers:Honest"
    fields.verifier.model, fields.verifier.workers = bad_server.MODEL, 1
    with BadServer(tmp_path) as server:
        fields.verifier.second = f"openai:{server.url}"
        with verifiers_lib.open_verifiers(config_lib.from_config_dict(fields), None) as (_, second):
            second.submit(0, images[0], QUESTIONS)
            p_yes = second.gather([0])[0].p_yes
    truths = [bad_server.truth(images[0], question) for question in QUESTIONS]
    assert p_yes == pytest.approx(truths)


def test_a_pool_without_processes_has_nothing_to_count(pool):
    assert verifiers_lib.PoolCounts(pool).metrics() == {}


def test_a_second_verifier_stands_beside_the_first(images):
    fields = grpo.get_config()
    fields.verifier.kind, fields.verifier.path = "callable", "tiny_verifiers:Honest"
    fields.verifier.second, fields.verifier.workers = "tiny_verifiers:Constant", 1
    config = config_lib.from_config_dict(fields)
    with verifiers_lib.open_verifiers(config, None) as (first, second):
        for pool in (first, second):
            pool.submit(0, images[0], QUESTIONS)
        assert first.gather([0])[0].p_yes != (0.5,) * 3
        assert second.gather([0])[0].p_yes == (0.5,) * 3
        counts = verifiers_lib.PoolCounts(first)  # counts what was before it, too
        first.submit(1, images[1], QUESTIONS)
        first.gather([1])
        once, nothing = counts.metrics(), counts.metrics()
        assert {name for name in once if not name.startswith("time/pool/")} == set()
        assert once["time/pool/questions"] == 2 * len(QUESTIONS)
        assert once["time/pool/answered"] == once["time/pool/attempts"] == 2
        assert once["time/pool/busy_seconds"] > 0
        assert once.keys() == nothing.keys() >= {"time/pool/retries", "time/pool/lost_workers"}
        assert set(nothing.values()) == {0.0}
    verifier = dataclasses.replace(config.verifier, second="")
    with verifiers_lib.open_verifiers(dataclasses.replace(config, verifier=verifier), None) as (
        first,
        second,
    ):
        assert second is None
