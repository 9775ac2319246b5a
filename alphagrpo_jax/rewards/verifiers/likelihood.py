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
from alphagrpo_jax.rewards.verifiers.trials import tolerance
from alphagrpo_jax.runtime.errors import InputError

NOT_CAUSAL = (
    "the judge's texts see what stands behind them, so that it knows each token of a prompt before "
    "it predicts it (prefix attention, as of PaliGemma); use another judge for likelihoods"
)


class LikelihoodReader:
    """Computes likelihoods of prompts under one judge."""

    def __init__(self, model: Any, passes: Passes) -> None:
        """Does nothing yet; the first image shows whether the judge is fit.

        Args:
          model: an image-text-to-text model of transformers.
          passes: renders its prompts and runs its processor.
        """
        self._model, self._passes = model, passes
        self._is_causal: bool | None = None  # None: not yet known

    def mean_log_probs(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Score]:
        """Computes the mean log-prob of each prompt's tokens behind its image and a request.

        One forward pass per image, without padding, so that nothing depends on other images.

        Args:
          images: N of uint8[H, W, 3].
          prompts: N.
        Returns:
          N scores, nats, at most 0.
        Raises:
          ValueError: an image is not uint8[H, W, 3].
        """
        return [
            self._mean_log_prob(checked_image(image), prompt)
            for image, prompt in zip(images, prompts, strict=True)
        ]

    def _mean_log_prob(self, image: np.ndarray, prompt: str) -> Score:
        prompter = self._passes.prompter
        try:
            prompter.prompt(prompt, "")  # refuses control tokens, which would end the reply
            request = prompter.prompt(CAPTION_REQUEST, "")
            before = prompter.inputs(image, [request])
            inputs = prompter.inputs(image, [request + prompt])
            ids = inputs["input_ids"][0]
            self._passes.check_lengths(torch.tensor([len(ids)]))
        except InputError as error:
            return Score(None, str(error), permanent=True)
        # The reply's first token may have taken in the request's last character: what both have in
        # common counts as the request.
        common = _common_length(before["input_ids"][0], ids)
        count = len(ids) - common
        if count < 1:
            return Score(None, f"the prompt {prompt!r} has no tokens of its own", permanent=True)
        logits = _last_logits(self._model, inputs, count + 1)
        if self._is_causal is None:
            behind = before["input_ids"].shape[1] - common
            alone = _last_logits(self._model, before, behind + 1)[0].softmax(-1)
            difference = float((alone - logits[0].softmax(-1)).abs().max())
            self._is_causal = not difference > tolerance(self._model.dtype)
        if not self._is_causal:
            return Score(None, NOT_CAUSAL, permanent=True)
        log_probs = logits[:-1].log_softmax(-1).gather(-1, ids[-count:, None].to(logits.device))
        return Score(float(log_probs.double().mean()))


@torch.inference_mode()
def _last_logits(model: Any, inputs: dict[str, Any], count: int) -> Tensor:
    """Computes the logits float32[count, V] at the last tokens of one row."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(**inputs, use_cache=False, logits_to_keep=count).logits[0].float()
    return model(**inputs, use_cache=False).logits[0, -count:].float()


def _common_length(first: Tensor, second: Tensor) -> int:
    """Counts the tokens with which both int64[T] begin."""
    length = min(len(first), len(second))
    differs = (first[:length] != second[:length]).nonzero()
    return int(differs[0]) if len(differs) else length
