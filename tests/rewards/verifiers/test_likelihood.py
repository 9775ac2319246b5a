"""Likelihoods of prompts under a judge, against plain transformers token by token."""

import math

import numpy as np
import pytest
import torch
from judge_families import FAMILIES, picture

from alphagrpo_jax.rewards.verifiers import hf
from alphagrpo_jax.rewards.verifiers.hf import HFVerifier
from alphagrpo_jax.rewards.verifiers.instructions import CAPTION_REQUEST

SEE_AHEAD = ("paligemma",)
PROMPTS = ("a red circle", "a blue square in the image is flat", "circle")


@pytest.fixture(scope="module")
def verifier(llava_folder) -> HFVerifier:
    return HFVerifier(llava_folder)


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [
        rng.integers(0, 256, shape, np.uint8) for shape in ((48, 48, 3), (30, 60, 3), (48, 48, 3))
    ]


def by_hand(verifier, image, prompt):
    """Mean log-prob of the prompt's tokens, each from a pass over what stands before it."""
    processor = verifier.processor
    content = [{"type": "image"}, {"type": "text", "text": CAPTION_REQUEST}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    before = processor(text=[text], images=[[image]], return_tensors="pt")
    ids = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    log_probs = []
    for index, token in enumerate(ids):
        reply = torch.tensor([ids[:index]], dtype=torch.long)
        tokens = torch.cat([before["input_ids"], reply], 1)
        inputs = dict(before) | {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        with torch.no_grad():
            logits = verifier.model(**inputs).logits[0, -1].double()
        log_probs.append(float(logits.log_softmax(-1)[token]))
    return math.fsum(log_probs) / len(log_probs)


def test_scores_are_mean_log_probs(verifier, images):
    scores = verifier.score(images, PROMPTS)
    for image, prompt, score in zip(images, PROMPTS, scores, strict=True):
        assert score.value == pytest.approx(by_hand(verifier, image, prompt), abs=1e-5)
    assert verifier.score(images[:1], PROMPTS[:1]) == scores[:1]
    other_image = verifier.score([images[2]], PROMPTS[:1])[0]
    assert other_image.value != scores[0].value


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_predicts_each_token_from_those_before_it(monkeypatch, name):
    judge = FAMILIES[name]()
    monkeypatch.setattr(hf, "load", lambda *_: judge)
    verifier, image, prompt = HFVerifier(name, min_mass=0.0), picture(), "two blue squares"
    (score,) = verifier.score([image], [prompt])
    if name in SEE_AHEAD:
        assert (score.value, score.permanent) == (None, True)
        assert "prefix attention" in score.failure
        return
    prompter = verifier.passes.prompter
    request = prompter.prompt(CAPTION_REQUEST, "")
    inputs = prompter.inputs(image, [request + prompt])
    ids, first = inputs["input_ids"], prompter.inputs(image, [request])["input_ids"].shape[1]
    assert prompt in judge.processor.tokenizer.decode(ids[0, first:]).strip()
    log_probs = []
    for length in range(first, ids.shape[1]):
        per_token = {key for key, value in inputs.items() if value.shape[:2] == ids.shape}
        cut = {key: inputs[key][:, :length] if key in per_token else inputs[key] for key in inputs}
        with torch.no_grad():
            logits = judge.model(**cut, use_cache=False).logits[0, -1].double()
        log_probs.append(float(logits.log_softmax(-1)[ids[0, length]]))
    assert score.value == pytest.approx(np.mean(log_probs), abs=1e-5)
    assert verifier.score([picture(seed=2)], [prompt])[0].value != score.value


def test_a_prompt_longer_than_the_context_has_no_likelihood(llava_folder, images):
    judge = HFVerifier(llava_folder)
    judge.passes.context_tokens = 60
    (score,) = judge.score(images[:1], ["a red circle " * 30])
    assert (score.value, score.permanent) == (None, True)
    assert "context holds 60" in score.failure


def test_prompts_that_are_no_text_have_no_likelihood(verifier, images):
    token = verifier.processor.image_token
    for prompt, reason in ((f"a {token}", "control tokens"), ("", "no tokens of its own")):
        (score,) = verifier.score(images[:1], [prompt])
        assert (score.value, score.permanent) == (None, True)
        assert reason in score.failure


def test_nan_weights_give_no_finite_number(llava_folder, images):
    broken = HFVerifier(llava_folder)
    with torch.no_grad():
        broken.model.lm_head.weight.fill_(math.nan)
    (score,) = broken.score(images[:1], PROMPTS[:1])
    assert math.isnan(score.value)  # which the pool refuses
