"""Forward passes over one image and its questions, in the cheapest way that a model allows.

- "packed": one pass over the image and all questions. The key-value cache of the text before the
  image, which is the same for all images, is reused; after it come the image and the questions, one
  behind another. The attention mask lets each question see that text, the image and itself only;
  its positions continue those of the image. Nothing is padded, no cache is copied per question.
- "shared": a pass over the prompt up to the image, whose cache is repeated for each question, and
  a pass over the questions as a padded batch. It needs only a cache that can be repeated.
- "forked": a pass over the prompt up to the image, and one for each question behind a copy of what
  the model remembers of it. Any memory can be copied, also the state of linear attention.
- "separate": one pass over the complete prompts as a padded batch.
- "single": one pass for each question, without any padding; every model allows that.

The way is chosen once, by comparing each with "single" on a test image. Nothing depends on other
images or on the load: equal questions about equal images always get equal logits.
"""

import copy
import functools
import inspect
import logging
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from alphagrpo_jax.rewards.verifiers.base import VerifierLoadError
from alphagrpo_jax.rewards.verifiers.instructions import AUDIT_INSTRUCTION
from alphagrpo_jax.rewards.verifiers.model_inputs import (
    embedding_device,
    equal_inputs,
    inputs_behind,
    per_token,
    shallow_copy,
    with_replies,
    without_text,
)
from alphagrpo_jax.rewards.verifiers.prompt_parts import PromptParts, Suffixes
from alphagrpo_jax.rewards.verifiers.prompting import (
    Prompter,
    PromptTooLongError,
    context_tokens,
    is_too_long,
)
from alphagrpo_jax.rewards.verifiers.traced import TracedPass, is_recordable
from alphagrpo_jax.rewards.verifiers.trials import (
    PROBE_QUESTIONS,
    TRIAL_ERRORS,
    disagreement,
    probe_image,
)

WAYS = ("packed", "shared", "forked", "separate", "single")
_LOG = logging.getLogger(__name__)


class _Request(NamedTuple):
    """The arguments of `Passes.logits`."""

    image: np.ndarray
    questions: tuple[str, ...]
    instruction: str
    replies: tuple[tuple[int, ...], ...] | None

    @property
    def suffix_key(self) -> tuple[tuple[str, ...], str, tuple[tuple[int, ...], ...] | None]:
        """The arguments of `PromptParts.suffixes`: everything but the image."""
        return self.questions, self.instruction, self.replies


class Passes:
    """Computes the logits of each reply's first token; see the module's docstring.

    Attributes:
      way: one of `WAYS`.
      prompter: renders prompts and runs the processor.
      words: ids of the tokens that spell yes, and of those that spell no; () if not told.
      context_tokens: the model's longest sequence; None if its configuration names none.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        shared_prefix: bool,
        traced: bool = True,
        words: Sequence[Sequence[int]] = (),
    ) -> None:
        """Chooses the cheapest way that the model allows; warns if it is not "packed".

        Args:
          model: an image-text-to-text model of transformers.
          processor: its processor.
          shared_prefix: False takes "separate" or "single".
          traced: records packed passes of small models on CPUs as programs of the same bits.
          words: ids of tokens for yes and for no, by whose shares ways are compared too.
        Raises:
          VerifierLoadError: the model cannot answer a test question.
        """
        self._model, self.words = model, words
        self.prompter = Prompter(processor, embedding_device(model), model.dtype)
        self._can_select = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._parts = PromptParts(model, self.prompter)
        self.context_tokens = context_tokens(model.config, processor.tokenizer)
        self._image_only = False
        self._traced: TracedPass | None = None
        self._pixel_names: frozenset[str] = frozenset()
        self.way = self._choose(WAYS if shared_prefix else ("separate", "single"))
        if traced and self.way == "packed" and self._can_select and is_recordable(model):
            self._traced = TracedPass(model)

    @torch.inference_mode()
    def logits(
        self,
        image: np.ndarray,
        questions: Sequence[str],
        instruction: str,
        replies: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:
        """Computes the logits float[Q, V] of the token that follows each prompt.

        Args:
          image: uint8[H, W, 3].
          questions: Q >= 1.
          instruction: see `Prompter.prompt`.
          replies: Q beginnings of replies, appended to the prompts; None: none.
        Raises:
          PromptTooLongError: the model's context does not hold every prompt.
          ValueError: see `Prompter.prompt`.
        """
        forward = {
            "packed": self._packed,
            "shared": self._shared,
            "forked": self._forked,
            "separate": self._separate,
            "single": self._single,
        }
        rows = None if replies is None else tuple(tuple(reply) for reply in replies)
        return forward[self.way](_Request(image, tuple(questions), instruction, rows))

    @torch.inference_mode()
    def _choose(self, ways: Sequence[str]) -> str:
        """Returns the first of the ways that agrees with "single" on a test image."""
        probe = probe_image(), PROBE_QUESTIONS, AUDIT_INSTRUCTION
        self.way = "single"
        try:
            expected = self.logits(*probe)
        except TRIAL_ERRORS as error:
            raise VerifierLoadError(
                f"the verifier {type(self._model).__name__} cannot answer a test question about a "
                f"test image: {type(error).__name__}: {error}; expected a chat model for images "
                "and text whose processor and weights fit each other"
            ) from error
        reasons = []
        for way in ways[:-1]:
            self.way = way
            try:
                if way in ("packed", "shared", "forked"):
                    self._check_split(*probe)
                if way == "packed":
                    self._check_packable(*probe)
                logits = self.logits(*probe)
                reason = disagreement(logits, expected, self._model.dtype, self.words)
            except TRIAL_ERRORS as error:
                reasons.append(f"{way!r}: {type(error).__name__}: {error}")
                continue
            if reason is None:
                break
            reasons.append(f"{way!r}: {reason}")
        else:
            self.way = "single"
        if reasons:
            _LOG.warning(
                "the verifier %s (%s) takes the slower way %r of %s: %s",
                type(self._model).__name__,
                self._model.dtype,
                self.way,
                WAYS,
                "; ".join(reasons),
            )
        return self.way

    def _check_split(self, image: np.ndarray, questions: tuple[str, ...], instruction: str) -> None:
        """Refuses models whose prompts are not the common beginning and the questions' tokens.

        Raises:
          ValueError: a tokenizer that joins tokens across the image's end, or a processor that
            adds text behind the question.
        """
        suffixes = self._parts.suffixes(questions, instruction, None)
        prefix = self.prompter.inputs(image, [suffixes.prefix])["input_ids"][0].tolist()
        for question, tokens, mask in zip(questions, suffixes.tokens, suffixes.mask, strict=True):
            prompt = self.prompter.prompt(question, instruction)
            expected = self.prompter.inputs(image, [prompt])["input_ids"][0].tolist()
            if prefix + tokens[mask.bool()].tolist() != expected:
                raise ValueError("the prompt's tokens are not those of its two parts")

    def _check_packable(
        self, image: np.ndarray, questions: tuple[str, ...], instruction: str
    ) -> None:
        """Refuses models for which packing may be wrong although the test image agrees.

        Raises:
          ValueError: attention that is not causal or has a window, a recurrent state, or image
            tokens that depend on the image's content.
        """
        suffixes = self._parts.suffixes(questions, instruction, None)
        full = self.prompter.inputs(image, [suffixes.prefix])
        # E.g. token types, by which some models let image tokens see each other both ways. Where
        # positions follow rows and columns, they only tell where the image is.
        marks = {*per_token(full)} - {"input_ids", "attention_mask"}
        if self._parts.rope is not None:
            marks -= {"mm_token_type_ids"}
        if marks:
            raise ValueError(f"the processor marks tokens by {sorted(marks)}")
        prefix = self._parts.prefix(suffixes.prefix, image.shape)
        caches = [DynamicCache(config=self._model.config.get_text_config(decoder=True))]
        caches += [prefix.cache] if prefix.cache else []
        kinds = {type(layer).__name__ for cache in caches for layer in cache.layers}
        if kinds - {DynamicLayer.__name__}:
            raise ValueError(f"the cache's layers are {sorted(kinds)}; expected full attention")
        if not torch.equal(prefix.ids[None], full["input_ids"]):
            raise ValueError("the image's tokens follow its content, not its size alone")
        pixels = without_text(full)
        self._image_only = equal_inputs(self._pixels(image, pixels.keys()), pixels)

    def _packed(self, request: _Request) -> Tensor:
        """Computes `logits` in one pass without padding."""
        suffixes = self._parts.suffixes(*request.suffix_key)
        prefix = self._parts.prefix(suffixes.prefix, request.image.shape)
        self.check_lengths(len(prefix.ids) + suffixes.mask.sum(1))
        text = self._parts.packed(*request.suffix_key, request.image.shape)
        inputs = {**text, **self._image_inputs(request.image, suffixes.prefix)}
        if self._traced is not None:
            return self._traced.logits(inputs, functools.partial(self._trials, request, inputs))[0]
        inputs["past_key_values"] = shallow_copy(prefix.cache)
        return self._logits_at(inputs.pop("logits_to_keep"), **inputs)[0]

    def _image_inputs(self, image: np.ndarray, prefix: str) -> dict:
        """Returns a packed pass's inputs of the image."""
        if self._image_only:
            return self._pixels(image)
        return without_text(self.prompter.inputs(image, [prefix]))

    def _trials(self, request: _Request, inputs: dict) -> list[dict]:
        """Returns inputs of passes with fewer and with more questions, and with other images."""
        questions, shape = request.questions, request.image.shape
        prefix = self._parts.suffixes(*request.suffix_key).prefix
        black, noise = np.zeros(shape, np.uint8), np.resize(probe_image(), shape)
        texts = [
            self._parts.pack(asked, request.instruction, None, shape)
            for asked in (questions[:1], (*questions, *PROBE_QUESTIONS))
        ]
        return [
            *({**inputs, **text} for text in texts),
            *({**inputs, **self._image_inputs(image, prefix)} for image in (black, noise)),
        ]

    def _shared(self, request: _Request) -> Tensor:
        """Computes `logits` in a pass over the prefix and one over the padded questions."""
        suffixes = self._parts.suffixes(*request.suffix_key)
        prefix, cache, behind = self._begin(request.image, suffixes)
        cache.batch_repeat_interleave(len(suffixes.tokens))
        prefix_mask = prefix["attention_mask"].expand(len(suffixes.tokens), -1)
        return self._last_logits(
            suffixes.mask,
            input_ids=suffixes.tokens,
            attention_mask=torch.cat([prefix_mask, suffixes.mask], 1),
            past_key_values=cache,
            **behind,
        )

    def _forked(self, request: _Request) -> Tensor:
        """Computes `logits` in a pass over the prefix and one for each question."""
        suffixes = self._parts.suffixes(*request.suffix_key)
        prefix, cache, behind = self._begin(request.image, suffixes)
        rows = []
        for row, length in enumerate(suffixes.mask.sum(1).tolist()):
            ones = prefix["attention_mask"].new_ones(1, length)
            logits = self._logits_at(
                torch.tensor([length - 1]),
                input_ids=suffixes.tokens[row : row + 1, :length],
                attention_mask=torch.cat([prefix["attention_mask"], ones], 1),
                past_key_values=copy.deepcopy(cache),
                # Their axes are [3, questions, T] for positions and [questions, T, ...] for others.
                **{
                    name: value[:, row : row + 1, :length]
                    if name == "position_ids"
                    else value[row : row + 1, :length]
                    for name, value in behind.items()
                },
            )
            rows.append(logits[:, 0])
        return torch.cat(rows)

    def _begin(self, image: np.ndarray, suffixes: Suffixes) -> tuple[dict, Any, dict]:
        """Runs the model on the prefix.

        Returns:
          The prefix's inputs, what the model remembers of them, and inputs of the questions' tokens
          beside their ids.
        """
        prefix = self.prompter.inputs(image, [suffixes.prefix])
        self.check_lengths(prefix["input_ids"].shape[1] + suffixes.mask.sum(1))
        output = self._model(**prefix, use_cache=True, logits_to_keep=1)
        behind = inputs_behind(prefix, *suffixes.tokens.shape)
        if self._parts.rope is not None:
            # The model would make positions for the prefix's tokens, too.
            axes, end = self._parts.positions(prefix)
            offsets = end + torch.arange(suffixes.tokens.shape[1], device=axes.device)
            behind["position_ids"] = offsets.expand(len(axes), len(suffixes.tokens), -1)
        return prefix, output.past_key_values, behind

    def _separate(self, request: _Request) -> Tensor:
        """Computes `logits` in one pass over the padded, complete prompts."""
        prompts = [self.prompter.prompt(text, request.instruction) for text in request.questions]
        inputs = self.prompter.inputs(request.image, prompts)
        if request.replies is not None:
            inputs = with_replies(inputs, request.replies)
        self.check_lengths(inputs["attention_mask"].sum(1))
        return self._last_logits(inputs["attention_mask"], **inputs, use_cache=False)

    def _single(self, request: _Request) -> Tensor:
        """Computes `logits` in one pass for each question, without padding."""
        replies = request.replies or [()] * len(request.questions)
        batches = []
        for question, reply in zip(request.questions, replies, strict=True):
            prompt = self.prompter.prompt(question, request.instruction)
            inputs = self.prompter.inputs(request.image, [prompt])
            batches.append(with_replies(inputs, (reply,)) if reply else inputs)
        self.check_lengths(torch.tensor([inputs["input_ids"].shape[1] for inputs in batches]))
        rows = []
        for inputs in batches:
            last = torch.tensor([inputs["input_ids"].shape[1] - 1])
            rows.append(self._logits_at(last, **inputs, use_cache=False)[:, 0])
        return torch.cat(rows)

    def check_lengths(self, lengths: Tensor) -> None:
        """Refuses prompts that the model's context cannot hold.

        Args:
          lengths: int64[Q], tokens of each prompt, the image's included.
        Raises:
          PromptTooLongError: one is longer than `context_tokens`.
        """
        limit = self.context_tokens
        if limit is not None and is_too_long(int(lengths.max()), limit):
            raise PromptTooLongError(lengths.tolist(), limit)

    def _last_logits(self, mask: Tensor, **inputs: object) -> Tensor:
        """Computes logits float[Q, V] at the last token of each row of `mask` int64[Q, T].

        Rows are padded on the right.
        """
        positions, index = torch.unique(mask.sum(1) - 1, return_inverse=True)
        logits = self._logits_at(positions, **inputs)
        return logits[torch.arange(len(mask)), index.to(logits.device)]

    def _logits_at(self, positions: Tensor, **inputs: object) -> Tensor:
        """Computes logits float[B, K, V] at the tokens `positions` int64[K] of each row."""
        positions = positions.cpu()  # fits states on whatever device the last layer is
        if self._can_select:  # with a large vocabulary all others would take much memory
            return self._model(**inputs, logits_to_keep=positions).logits
        return self._model(**inputs).logits[:, positions]

    def _pixels(self, image: np.ndarray, names: Collection[str] | None = None) -> dict:
        """Returns the model's inputs for the image, without tokenizing the text again.

        Args:
          image: uint8[H, W, 3].
          names: of the model's inputs; None: those of the test image.
        """
        self._pixel_names = self._pixel_names if names is None else frozenset(names)
        pixels = self.prompter.pixels(image)
        return {name: value for name, value in pixels.items() if name in self._pixel_names}
