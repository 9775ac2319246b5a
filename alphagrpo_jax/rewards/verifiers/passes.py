"""Forward passes over one image and its questions, in the cheapest way that a model allows.

- "packed": one pass over the image and all questions. The key-value cache of the text before the
  image, which is the same for all images, is kept; behind it come the image and then the questions
  one after another, each of which sees that text, the image and itself only (attention mask) and
  counts its positions from the image on. Nothing is padded, no cache is copied per question.
- "shared": a pass over the prompt up to the image, whose cache is repeated for each question, and
  a pass over the questions as a padded batch. It needs a cache that can be repeated, no more.
- "separate": one pass over the whole prompts as a padded batch; every model allows that.

Which way it is is found out once, on a test image, by comparing it with "separate". Nothing depends
on other images or on the load: equal questions about equal images always get equal logits.
"""

import copy
import functools
import inspect
import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from alphagrpo_jax.rewards.verifiers.instructions import AUDIT_INSTRUCTION
from alphagrpo_jax.runtime.errors import InputError

WAYS = ("packed", "shared", "separate")
# Largest difference of a probability from "separate" that rounding explains. The shipped verifier
# has at most 5e-7, 7e-4 and 6e-3; deeper models round more often.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.005, torch.bfloat16: 0.03}
CACHED_QUESTION_LISTS = 1024
CACHED_BEGINNINGS = 16  # instruction and image size
TEXT_INPUTS = ("input_ids", "attention_mask")
PROBE_SIZE = (208, 304)  # not square, and many patches: wrong positions would show
PROBE_QUESTIONS = ("Is there anything in the image?", "Is it flat?", "Are there exactly two?")
_LOG = logging.getLogger(__name__)


class _Asked(NamedTuple):
    """The arguments of `Passes.logits`."""

    image: np.ndarray
    questions: tuple[str, ...]
    instruction: str
    replies: tuple[int, ...] | None


class _Rest(NamedTuple):
    """The prompts of Q questions, behind their common beginning; N tokens in all, T at most."""

    start: str  # all text up to the image, with the image's own token
    tokens: Tensor  # int64[Q, T], padded on the right
    mask: Tensor  # int64[Q, T], 1 at tokens
    packed: Tensor  # int64[N], the tokens without padding
    owner: Tensor  # int64[N], from 1: the question that a token belongs to
    offsets: Tensor  # int64[N], a token's place in its question
    ends: Tensor  # int64[Q], the places of the last tokens in `packed`


class _Beginning(NamedTuple):
    """The prompt up to and with an image of one size."""

    ids: Tensor  # int64[P]
    first: int  # place of the image's first token
    cache: DynamicCache | None  # of the tokens before it; None if there are none


class Passes:
    """The questions' first reply tokens from a model; see the module's text.

    Attributes:
      way: one of `WAYS`.
    """

    def __init__(self, model: torch.nn.Module, processor: object, *, shared_prefix: bool) -> None:
        """Finds out which way the model allows; logs a warning if it is a slower one.

        Args:
          model: an image-text-to-text model.
          processor: its processor; its tokenizer pads on the right.
          shared_prefix: False takes "separate" in any case.
        """
        self._model, self._processor, self._tokenizer = model, processor, processor.tokenizer
        self._control = {*self._tokenizer.all_special_tokens, processor.image_token}
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        # A group's images are asked the same questions, and all have the same beginning.
        self._rest = functools.lru_cache(maxsize=CACHED_QUESTION_LISTS)(self._encode)
        self._begin = functools.lru_cache(maxsize=CACHED_BEGINNINGS)(self._encode_beginning)
        self._image_alone = False
        self.way = self._choose() if shared_prefix else "separate"

    @torch.inference_mode()
    def logits(
        self,
        image: np.ndarray,
        questions: Sequence[str],
        instruction: str,
        replies: Sequence[int] | None = None,
    ) -> Tensor:
        """Logits float[Q, V] of the token that follows each prompt.

        Args:
          image: uint8[H, W, 3].
          questions: Q >= 1.
          instruction: see `prompt`.
          replies: for each question a token with which its reply has begun.
        Raises:
          ValueError: see `prompt`.
        """
        forward = {"packed": self._packed, "shared": self._shared, "separate": self._separate}
        replies = None if replies is None else tuple(replies)
        return forward[self.way](_Asked(image, tuple(questions), instruction, replies))

    def prompt(self, question: str, instruction: str) -> str:
        """The whole prompt; without an instruction it has no system turn.

        Raises:
          ValueError: the texts hold a control token, which would be read as one.
        """
        if found := sorted(token for token in self._control if token in question + instruction):
            raise InputError(
                f"got the control tokens {found} in the text {question!r}; a question is plain text"
            )
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        system = {"role": "system", "content": [{"type": "text", "text": instruction}]}
        messages = [system, user] if instruction else [user]
        return self._processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )

    def inputs(self, image: np.ndarray, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What the processor makes of the prompts, a padded batch, each with the image."""
        made = self._processor(
            text=list(prompts), images=[[image]] * len(prompts), padding=True, return_tensors="pt"
        )
        return dict(made.to(self._model.device))

    @torch.inference_mode()
    def _choose(self) -> str:
        """The first way that agrees with "separate" on a test image."""
        image = np.random.default_rng(0).integers(0, 256, (*PROBE_SIZE, 3)).astype(np.uint8)
        asked = image, PROBE_QUESTIONS, AUDIT_INSTRUCTION
        tolerance = TOLERANCE.get(self._model.dtype, TOLERANCE[torch.float32])
        self.way = "separate"
        expected = self.logits(*asked).float().softmax(-1)
        reasons = []
        for way in WAYS[:-1]:
            self.way = way
            try:
                if way == "packed":
                    self._demand_packable(*asked)
                got = self.logits(*asked).float().softmax(-1)
                apart = float((got - expected).abs().max())
            except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, IndexError) as e:
                reasons.append(f"{way!r}: {type(e).__name__}: {e}")
                continue  # a cache of another kind, or an image token of another name
            if apart <= tolerance:
                break
            reasons.append(f"{way!r}: probabilities differ by {apart:.2g}, above {tolerance:.2g}")
        else:
            self.way = "separate"
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

    def _demand_packable(
        self, image: np.ndarray, questions: tuple[str, ...], instruction: str
    ) -> None:
        """Refuses models of which the test image need not show that packing is wrong.

        Raises:
          ValueError: positions that follow the image's rows, attention that is not causal or has a
            window, or a recurrent state.
        """
        if any(hasattr(module, "get_rope_index") for module in self._model.modules()):
            raise ValueError("the model's positions follow the image's rows and columns")
        rest = self._rest(questions, instruction, None)
        full = self.inputs(image, [rest.start])
        beside = [
            name
            for name, value in full.items()
            if name != "attention_mask" and value.shape[:2] == full["input_ids"].shape
        ]
        if beside != ["input_ids"]:
            raise ValueError(f"the processor marks tokens by {beside}; expected input_ids alone")
        begin = self._begin(rest.start, image.shape)
        kinds = {type(layer).__name__ for layer in begin.cache.layers} if begin.cache else set()
        if kinds - {DynamicLayer.__name__}:
            raise ValueError(f"the cache's layers are {sorted(kinds)}; expected full attention")
        if not torch.equal(begin.ids[None], full["input_ids"]):
            raise ValueError("the image's tokens follow its content, not its size alone")
        self._image_alone = _same(self._pixels(image), _without_text(full))

    def _packed(self, asked: _Asked) -> Tensor:
        rest = self._rest(*asked[1:])
        begin = self._begin(rest.start, asked.image.shape)
        first, size = begin.first, len(begin.ids)
        if self._image_alone:
            pixels = self._pixels(asked.image)
        else:
            pixels = _without_text(self.inputs(asked.image, [rest.start]))
        owner = torch.cat([rest.owner.new_zeros(size), rest.owner])
        place = torch.arange(len(owner), device=owner.device)
        sees = (place <= place[first:, None]) & ((owner == 0) | (owner == owner[first:, None]))
        mask = torch.zeros(sees.shape, dtype=self._model.dtype, device=owner.device)
        mask.masked_fill_(~sees, torch.finfo(mask.dtype).min)
        return self._kept(
            rest.ends + (size - first),
            input_ids=torch.cat([begin.ids[first:], rest.packed])[None],
            attention_mask=mask[None, None],
            position_ids=torch.cat([place[first:size], size + rest.offsets])[None],
            past_key_values=_again(begin.cache),
            **pixels,
        )[0]

    def _shared(self, asked: _Asked) -> Tensor:
        rest = self._rest(*asked[1:])
        prefix = self.inputs(asked.image, [rest.start])
        cache = self._model(**prefix, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(rest.tokens))
        before = prefix["attention_mask"].expand(len(rest.tokens), -1)
        return self._last(
            rest.mask,
            input_ids=rest.tokens,
            attention_mask=torch.cat([before, rest.mask], 1),
            past_key_values=cache,
        )

    def _separate(self, asked: _Asked) -> Tensor:
        _, questions, instruction, replies = asked
        prompts = [self.prompt(question, instruction) for question in questions]
        inputs = self.inputs(asked.image, prompts)
        if replies is not None:
            inputs = _extended(inputs, replies)
        return self._last(inputs["attention_mask"], **inputs, use_cache=False)

    def _last(self, mask: Tensor, **inputs: object) -> Tensor:
        """Logits float[Q, V] at the last token of each row of `mask` int64[Q, T], padded right."""
        places, which = torch.unique(mask.sum(1) - 1, return_inverse=True)
        return self._kept(places, **inputs)[torch.arange(len(mask), device=mask.device), which]

    def _kept(self, places: Tensor, **inputs: object) -> Tensor:
        """Logits float[B, K, V] at the tokens `places` int64[K] of each row."""
        if self._keeps:  # with a large vocabulary all others would take much memory
            return self._model(**inputs, logits_to_keep=places).logits
        return self._model(**inputs).logits[:, places]

    def _pixels(self, image: np.ndarray) -> dict[str, Tensor]:
        """The image's own inputs, without tokenizing the text again."""
        made = self._processor.image_processor(images=[[image]], return_tensors="pt")
        return dict(made.to(self._model.device))

    def _encode(
        self, questions: tuple[str, ...], instruction: str, replies: tuple[int, ...] | None
    ) -> _Rest:
        prompts = [self.prompt(question, instruction) for question in questions]
        token = self._processor.image_token
        cut = prompts[0].rindex(token) + len(token)
        rows = self._tokenizer([text[cut:] for text in prompts], add_special_tokens=False)
        rows = rows["input_ids"]
        if replies is not None:
            rows = [[*row, reply] for row, reply in zip(rows, replies, strict=True)]
        padded = self._tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        padded = padded.to(self._model.device)
        tokens, mask = padded["input_ids"], padded["attention_mask"]
        owner, offsets = mask.nonzero(as_tuple=True)
        ends = mask.sum(1).cumsum(0) - 1
        return _Rest(
            prompts[0][:cut], tokens, mask, tokens[owner, offsets], owner + 1, offsets, ends
        )

    def _encode_beginning(self, start: str, shape: tuple[int, ...]) -> _Beginning:
        ids = self.inputs(np.zeros(shape, np.uint8), [start])["input_ids"]
        first = int((ids[0] == self._processor.image_token_id).nonzero()[0])
        cache = None
        if first:
            cache = self._model(input_ids=ids[:, :first], use_cache=True).past_key_values
        return _Beginning(ids[0], first, cache)


def _without_text(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A processor's output about the image alone."""
    return {name: value for name, value in inputs.items() if name not in TEXT_INPUTS}


def _again(cache: DynamicCache | None) -> DynamicCache | None:
    """A cache that may grow while the other stays: its layers bind new tensors when they do."""
    if cache is None:
        return None
    grown = copy.copy(cache)
    grown.layers = [copy.copy(layer) for layer in cache.layers]
    return grown


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        isinstance(value, Tensor) and torch.equal(value, other[name]) for name, value in one.items()
    )


def _extended(inputs: dict[str, Tensor], replies: tuple[int, ...]) -> dict[str, Tensor]:
    """The inputs of right-padded rows, each with one more token at its end."""
    mask = inputs["attention_mask"]
    rows, ends = torch.arange(len(mask), device=mask.device), mask.sum(1)
    longer = dict(inputs)
    for name, value in inputs.items():
        if value.shape[:2] == mask.shape:
            longer[name] = torch.cat([value, torch.zeros_like(value[:, :1])], 1)
    longer["input_ids"][rows, ends] = torch.tensor(replies, device=mask.device)
    longer["attention_mask"][rows, ends] = 1
    return longer
