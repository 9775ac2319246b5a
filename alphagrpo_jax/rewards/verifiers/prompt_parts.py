"""Tokenizes a judge's prompts up to the image and behind it, once for many images.

A group's images get the same questions, and all prompts have the same prefix.
"""

import functools
import inspect
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from alphagrpo_jax.rewards.verifiers.prompting import Prompter

CACHED_QUESTION_LISTS = 1024
CACHED_PACKED = 2  # the masks of a large judge are large, and a group's images come in a row
CACHED_PREFIXES = 16  # one per instruction and image size


class Suffixes(NamedTuple):
    """Prompts of Q questions after their common prefix; N tokens in all, at most T each."""

    prefix: str  # the text up to and including the image's token
    tokens: Tensor  # int64[Q, T], padded on the right
    mask: Tensor  # int64[Q, T], 1 at tokens
    packed: Tensor  # int64[N], the tokens without padding
    owner: Tensor  # int64[N], from 1: the question that a token belongs to
    offsets: Tensor  # int64[N], position of a token in its question
    ends: Tensor  # int64[Q], positions of the last tokens in `packed`


class Prefix(NamedTuple):
    """The prompt up to and including an image of one size."""

    ids: Tensor  # int64[P]
    first: int  # index of the image's first token
    cache: DynamicCache | None  # key-values of the tokens before it; None if there are none
    positions: Tensor  # int64[R, P], one row for each axis of the model's positions
    end: int  # the position behind the image


class PromptParts:
    """Encodes parts of prompts for a model; results are cached, and nobody may change them.

    Attributes:
      rope: the module that gives positions three axes, which follow the image's rows and columns
        (Qwen-VL, GLM-V); None where positions are numbers.
      suffixes: `Suffixes` of questions, an instruction and beginnings of replies or None.
      prefix: `Prefix` of a text that ends with the image's token, and an image's shape.
      packed: inputs of a packed pass beside the image's; arguments as of `suffixes`, and the shape.
    """

    def __init__(self, model: Any, prompter: Prompter) -> None:
        """Encodes nothing yet.

        Args:
          model: of transformers.
          prompter: of the same judge.
        """
        self._model, self._prompter = model, prompter
        self.rope = next((m for m in model.modules() if hasattr(m, "get_rope_index")), None)
        self.suffixes = functools.lru_cache(maxsize=CACHED_QUESTION_LISTS)(self._encode_suffixes)
        self.prefix = functools.lru_cache(maxsize=CACHED_PREFIXES)(self._encode_prefix)
        self.packed = functools.lru_cache(maxsize=CACHED_PACKED)(self.pack)

    def positions(self, inputs: dict) -> tuple[Tensor, int]:
        """Returns positions int64[R, T] of a prompt's tokens, and the position behind the last."""
        ids = inputs["input_ids"]
        if self.rope is None:
            return torch.arange(ids.shape[1], device=ids.device)[None], ids.shape[1]
        names = inspect.signature(self.rope.get_rope_index).parameters
        positions, delta = self.rope.get_rope_index(
            **{name: value for name, value in inputs.items() if name in names}
        )
        return positions[:, 0], ids.shape[1] + int(delta.flatten()[0])

    def _axes(self, positions: Tensor) -> Tensor:
        """Returns positions int64[R, B, T] as the model takes them: without R where it is 1."""
        return positions[0] if self.rope is None else positions

    def _encode_suffixes(
        self,
        questions: tuple[str, ...],
        instruction: str,
        replies: tuple[tuple[int, ...], ...] | None,
    ) -> Suffixes:
        """Tokenizes the prompts behind the image; cached by `suffixes`."""
        prompts = [self._prompter.prompt(question, instruction) for question in questions]
        rows = self._prompter.tokens_behind(prompts)
        # The texts differ only behind the image, whose token no question may hold (`prompt`).
        cut = prompts[0].index(self._prompter.placeholder) + len(self._prompter.placeholder)
        if replies is not None:
            rows = [[*row, *reply] for row, reply in zip(rows, replies, strict=True)]
        tokens, mask = self._prompter.padded(rows)
        owner, offsets = mask.nonzero(as_tuple=True)
        ends = mask.sum(1).cumsum(0) - 1
        return Suffixes(
            prompts[0][:cut], tokens, mask, tokens[owner, offsets], owner + 1, offsets, ends
        )

    def _encode_prefix(self, text: str, shape: tuple[int, ...]) -> Prefix:
        """Tokenizes the prompt up to an image of this size; cached by `prefix`."""
        # Any image will do: `Passes._check_packable` lets the tokens follow its size alone.
        inputs = self._prompter.inputs(np.zeros(shape, np.uint8), [text])
        ids = inputs["input_ids"]
        before = self._prompter.text_tokens(text.removesuffix(self._prompter.placeholder))
        # A last token of the text may be another one where the image follows.
        pairs = enumerate(zip(before, ids[0].tolist(), strict=False))
        first = next((index for index, (a, b) in pairs if a != b), min(len(before), ids.shape[1]))
        positions, end = self.positions(inputs)
        cache = None
        if first:
            cache = self._model(
                input_ids=ids[:, :first],
                position_ids=self._axes(positions[:, None, :first]),
                use_cache=True,
            ).past_key_values
        return Prefix(ids[0], first, cache, positions, end)

    def pack(
        self,
        questions: tuple[str, ...],
        instruction: str,
        replies: tuple[tuple[int, ...], ...] | None,
        shape: tuple[int, ...],
    ) -> dict:
        """Returns a packed pass's inputs beside the image's; cached by `packed`.

        `logits_to_keep` holds the positions int64[Q] of the logits, `past_key_values` the cache of
        the text before the image, which a pass must not change; None if there is no such text.
        """
        suffixes = self.suffixes(questions, instruction, replies)
        prefix = self.prefix(suffixes.prefix, shape)
        first, size = prefix.first, len(prefix.ids)
        # Owner 0 is the prefix with the image, which every question sees.
        owner = torch.cat([suffixes.owner.new_zeros(size), suffixes.owner])
        index = torch.arange(len(owner), device=owner.device)
        causal = index <= index[first:, None]
        visible = causal & ((owner == 0) | (owner == owner[first:, None]))
        mask = torch.zeros(visible.shape, dtype=self._model.dtype, device=owner.device)
        mask.masked_fill_(~visible, torch.finfo(mask.dtype).min)
        offsets = (prefix.end + suffixes.offsets).expand(len(prefix.positions), -1)
        return {
            "logits_to_keep": suffixes.ends + (size - first),
            "input_ids": torch.cat([prefix.ids[first:], suffixes.packed])[None],
            "attention_mask": mask[None, None],
            "position_ids": self._axes(
                torch.cat([prefix.positions[:, first:], offsets], 1)[:, None]
            ),
            "past_key_values": prefix.cache,
        }
