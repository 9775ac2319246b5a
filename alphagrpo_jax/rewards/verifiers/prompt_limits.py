"""Tells which prompts a Hugging Face verifier can be asked, before a model computes anything."""

import copy
import functools
import itertools
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoProcessor

from alphagrpo_jax.rewards.verifiers.base import VerifierLoadError
from alphagrpo_jax.rewards.verifiers.prompting import (
    TEMPLATE_ERRORS,
    Prompter,
    context_tokens,
    is_too_long,
)
from alphagrpo_jax.runtime.errors import InputError

CACHED_SIZES = 64  # of images
LONG_PROMPT = 10_000  # letters
CACHED_FRAMES = 64  # instructions with orders of text and image
# Texts that a template which only places texts leaves as they are.
PROBES = ("Is it?", "<b>'a' & \"c\"</b>\n\n{{ x }} {% y %} \\n \u00e9")


class PromptLimits:
    """Builds and measures the prompts of one processor; needs no weights.

    Attributes:
      context_tokens: most tokens of a prompt, or None if neither the model's configuration nor its
        tokenizer says.
      tokenizer: the processor's, to be read only.
    """

    def __init__(self, processor: Any, config: Any) -> None:
        """Copies what it needs of both, as transformers loads them; `config` is the model's."""
        # Copies, since calls of a processor change its tokenizer, which another thread must not
        # read meanwhile: that of the processor is locked, the other one never changes.
        self._lock, self.tokenizer = threading.Lock(), copy.deepcopy(processor.tokenizer)
        self._prompter = Prompter(copy.deepcopy(processor), torch.device("cpu"), torch.float32)
        self.context_tokens = context_tokens(config, self.tokenizer)
        self._frame = functools.lru_cache(CACHED_FRAMES)(self._find_frame)
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
        texts = [item["text"] for item in content if item["type"] == "text"]
        self._prompter.check_texts(texts, instruction)
        frame = self._frame(tuple(item["type"] for item in content), instruction)
        if frame is None or any(text != text.strip() for text in texts):
            return self._render(content, instruction)
        pairs = zip(frame, [*texts, ""], strict=True)
        return "".join(text for pair in pairs for text in pair)

    def _find_frame(self, layout: tuple[str, ...], instruction: str) -> tuple[str, ...] | None:
        """Returns what the template writes around the texts of a user's turn of this layout.

        Rendering takes longer than the tokenizer. None: the template does more than to place texts.
        """

        def filled(texts: Iterator[str]) -> str:
            content = [
                {"type": "text", "text": next(texts)} if kind == "text" else {"type": "image"}
                for kind in layout
            ]
            return self._render(content, instruction)

        marks = [f"TEXT-{number}-OF-THE-TURN" for number in range(layout.count("text"))]
        frame = re.split("|".join(marks), filled(iter(marks)))
        if len(frame) != len(marks) + 1:
            return None
        for probe in PROBES:
            if probe.join(frame) != filled(itertools.repeat(probe)):
                return None
        return tuple(frame)

    def _render(self, content: Sequence[Mapping[str, str]], instruction: str) -> str:
        """Returns the complete prompt as the template writes it.

        Raises:
          InputError: the template takes no such turns.
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
        if is_too_long(count, limit):
            raise InputError(
                f"the prompt has {count} tokens with the image, and the model's context {limit}; "
                "expected a shorter question"
            )
        return count

    def refusal(self, question: str, *, instruction: str, side: int) -> str | None:
        """Returns why the verifier cannot be asked a question, else None.

        Args:
          question: about the image.
          instruction: of the system's turn; "" for none.
          side: of the image, a square, in pixels.
        """
        try:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            self.check(self.prompt(content, instruction), side, side)
        except InputError as error:
            return f"question {question[:80]!r} cannot be asked: {error}"
        return None

    def _count_text(self, prompt: str) -> int:
        special = self._prompter.adds_special(prompt)
        if self.tokenizer.is_fast:  # without the detours of the general way
            backend = self.tokenizer.backend_tokenizer
            if len(prompt) < LONG_PROMPT:
                return len(backend.encode(prompt, add_special_tokens=special))
            # Slower for short ones; meanwhile other threads can run.
            return len(backend.encode_batch([prompt], add_special_tokens=special)[0])
        ids = self.tokenizer(prompt, add_special_tokens=special, verbose=False)["input_ids"]
        return len(ids)

    def _measure_image(self, height: int, width: int) -> int:
        """Counts the tokens by which an image of a size makes a prompt longer than its text."""
        prompt = self.prompt([{"type": "image"}, {"type": "text", "text": "?"}], "")
        image = np.zeros((height, width, 3), np.uint8)
        with self._lock:
            ids = self._prompter.inputs(image, [prompt])["input_ids"]
        return ids.shape[1] - self._count_text(prompt)
