"""Tells which prompts a Hugging Face verifier can be asked, before a model computes anything."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoProcessor

from alphagrpo_jax.rewards.verifiers.base import VerifierLoadError
from alphagrpo_jax.rewards.verifiers.instructions import AUDIT_INSTRUCTION
from alphagrpo_jax.rewards.verifiers.prompting import (
    TEMPLATE_ERRORS,
    Prompter,
    context_tokens,
)
from alphagrpo_jax.runtime.errors import InputError

LARGEST_SIDE = 1024  # pixels, of what BAGEL draws
CACHED_SIZES = 64  # of images


class PromptLimits:
    """Builds and measures the prompts of one processor; needs no weights.

    Attributes:
      context_tokens: most tokens of a prompt, or None if neither the model's configuration nor its
        tokenizer says.
    """

    def __init__(self, processor: Any, config: Any) -> None:
        """Takes both as transformers loads them; `config` is the model's."""
        self._tokenizer = processor.tokenizer
        self._prompter = Prompter(processor, torch.device("cpu"), torch.float32)
        self.context_tokens = context_tokens(config, self._tokenizer)
        self._added_by_image = functools.lru_cache(CACHED_SIZES)(self._measure_image)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "PromptLimits":
        """Reads processor and configuration from a local model folder.

        Raises:
          VerifierLoadError: it is no folder of a chat model for images and text.
        """
        try:
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            return cls(processor, config)
        except (ImportError, OSError, ValueError, KeyError, AttributeError) as error:
            raise VerifierLoadError(
                f"cannot read the verifier's processor in {str(folder)!r}: {error}; expected a "
                "Hugging Face folder of a chat model for images and text"
            ) from error

    def prompt(self, content: Sequence[Mapping[str, str]], instruction: str) -> str:
        """Returns the complete prompt, with the image's token where the template puts it.

        Args:
          content: of the user's turn: one {"type": "image"} and any number of {"type": "text",
            "text": ...}, in their order.
          instruction: of the system's turn; "" for none.
        Raises:
          InputError: a text holds a control token, or the template takes no such turns.
        """
        try:
            return self._prompter.prompt_of(content, instruction)
        except TEMPLATE_ERRORS as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"the model's chat template refuses the request: {error}") from error

    def count(self, prompt: str, height: int, width: int) -> int:
        """Counts the tokens of a prompt with an image of a size in pixels."""
        return self._count_text(prompt) + self._added_by_image(height, width)

    def check(self, prompt: str, height: int, width: int) -> int:
        """Returns the number of tokens of a prompt with an image of a size in pixels.

        Raises:
          InputError: it is longer than the model's context.
        """
        count, limit = self.count(prompt, height, width), self.context_tokens
        if limit is not None and count >= limit:  # the reply needs a token too
            raise InputError(
                f"the prompt has {count} tokens with the image, and the model's context {limit}; "
                "expected a shorter question"
            )
        return count

    def refusal(self, question: str) -> str | None:
        """Returns why the verifier cannot be asked a question about a large image, else None."""
        try:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            self.check(self.prompt(content, AUDIT_INSTRUCTION), LARGEST_SIDE, LARGEST_SIDE)
        except InputError as error:
            return f"question {question[:80]!r} cannot be asked: {error}"
        return None

    def _count_text(self, prompt: str) -> int:
        return len(self._prompter.text_tokens(prompt))

    def _measure_image(self, height: int, width: int) -> int:
        """Counts the tokens by which an image of a size makes a prompt longer than its text."""
        prompt = self.prompt([{"type": "image"}, {"type": "text", "text": "?"}], "")
        image = np.zeros((height, width, 3), np.uint8)
        return self._prompter.inputs(image, [prompt])["input_ids"].shape[1] - self._count_text(
            prompt
        )
