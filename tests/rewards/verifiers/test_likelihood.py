"""Likelihoods of prompts under a judge, against plain transformers token by token."""

import math

import numpy as np
import pytest
import torch

from alphagrpo_jax.rewards.verifiers.hf import HFVerifier
from alphagrpo_jax.rewards.verifiers.instructions import CAPTION_REQUEST

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
