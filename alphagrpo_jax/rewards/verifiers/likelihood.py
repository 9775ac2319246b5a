"""Likelihood of a prompt under a judge that sees the image: a reward without any question.

The judge is asked to describe the image, and the prompt is put in the place of its reply. The score
is the mean log-probability of the prompt's tokens (VisualGPTScore, Lin et al., arXiv 2306.01879,
normalized by the prompt's length).
"""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alphagrpo_jax.rewards.verifiers.base import Score, checked_image
from alphagrpo_jax.rewards.verifiers.instructions import CAPTION_REQUEST
from alphagrpo_jax.rewards.verifiers.passes import Passes
from alphagrpo_jax.runtime.errors import InputError


def mean_log_probs(
    model: Any, passes: Passes, images: Sequence[np.ndarray], prompts: Sequence[str]
) -> list[Score]:
    """Computes the mean log-probability of each prompt's tokens behind its image and a request.

    One forward pass per image, without padding, so that nothing depends on other images.

    Args:
      model: an image-text-to-text model of transformers.
      passes: renders its prompts and runs its processor.
      images: N of uint8[H, W, 3].
      prompts: N.
    Returns:
      N scores, natural logarithms: at most 0.
    """
    return [
        _mean_log_prob(model, passes, checked_image(image), prompt)
        for image, prompt in zip(images, prompts, strict=True)
    ]


def _mean_log_prob(model: Any, passes: Passes, image: np.ndarray, prompt: str) -> Score:
    try:
        passes.prompter.prompt(prompt, "")  # refuses control tokens, which would end the reply
        request = passes.prompter.prompt(CAPTION_REQUEST, "")
        before = passes.prompter.inputs(image, [request])["input_ids"][0]
        inputs = passes.prompter.inputs(image, [request + prompt])
    except InputError as error:
        return Score(None, str(error), permanent=True)
    ids = inputs["input_ids"][0]
    # The reply's first token may have taken in the request's last character: what both have in
    # common counts as the request.
    count = len(ids) - _common_length(before, ids)
    if count < 1:
        return Score(None, f"the prompt {prompt!r} has no tokens of its own", permanent=True)
    with torch.inference_mode():
        logits = _last_logits(model, inputs, count + 1)[0, :-1]
        log_probs = logits.float().log_softmax(-1).gather(-1, ids[-count:, None].to(logits.device))
    return Score(float(log_probs.double().mean()))


def _last_logits(model: Any, inputs: dict[str, Any], count: int) -> Tensor:
    """Computes the logits float[1, count, V] at the last tokens."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(**inputs, use_cache=False, logits_to_keep=count).logits
    return model(**inputs, use_cache=False).logits[:, -count:]


def _common_length(first: Tensor, second: Tensor) -> int:
    """Counts the tokens with which both int64[T] begin."""
    length = min(len(first), len(second))
    differs = (first[:length] != second[:length]).nonzero()
    return int(differs[0]) if len(differs) else length
