"""Forward passes over one image and its questions, in the cheapest way that a model allows.

- "packed": one pass over the image and all questions. The key-value cache of the text before the
  image, which is the same for all images, is reused; after it come the image and the questions, one
  behind another. The attention mask lets each question see that text, the image and itself only;
  its positions continue those of the image. Nothing is padded, no cache is copied per question.
- "shared": a pass over the prompt up to the image, whose cache is repeated for each question, and
  a pass over the questions as a padded batch. It needs only a cache that can be repeated.
- "separate": one pass over the complete prompts as a padded batch; every model allows that.

The way is chosen once, by comparing each with "separate" on a test image. Nothing depends on other
images or on the load: equal questions about equal images always get equal logits.
"""

import copy
import functools
import inspect
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from alphagrpo_jax.rewards.verifiers.instructions import AUDIT_INSTRUCTION
from alphagrpo_jax.rewards.verifiers.prompt_limits import special_tokens
from alphagrpo_jax.runtime.errors import InputError

WAYS = ("packed", "shared", "separate")
# Largest difference of a probability from "separate" that rounding explains. The shipped verifier
# has at most 5e-7, 7e-4 and 6e-3; deeper models round more often.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.005, torch.bfloat16: 0.03}
CACHED_QUESTION_LISTS = 1024
CACHED_PREFIXES = 16  # one per instruction and image size
TEXT_INPUTS = ("input_ids", "attention_mask")
PROBE_SIZE = (208, 304)  # not square, and many patches: wrong positions would show
PROBE_QUESTIONS = ("Is there anything in the image?", "Is it flat?", "Are there exactly two?")
_LOG = logging.getLogger(__name__)


class _Request(NamedTuple):
    """The arguments of `Passes.logits`."""

    image: np.ndarray
    questions: tuple[str, ...]
    instruction: str
    replies: tuple[int, ...] | None

    @property
    def suffix_key(self) -> tuple[tuple[str, ...], str, tuple[int, ...] | None]:
        """The arguments of `Passes._suffixes`: everything but the image."""
        return self.questions, self.instruction, self.replies


class _Suffixes(NamedTuple):
    """Prompts of Q questions after their common prefix; N tokens in all, at most T each."""

    prefix: str  # the text up to and including the image's token
    tokens: Tensor  # int64[Q, T], padded on the right
    mask: Tensor  # int64[Q, T], 1 at tokens
    packed: Tensor  # int64[N], the tokens without padding
    owner: Tensor  # int64[N], from 1: the question that a token belongs to
    offsets: Tensor  # int64[N], position of a token in its question
    ends: Tensor  # int64[Q], positions of the last tokens in `packed`


class _Prefix(NamedTuple):
    """The prompt up to and including an image of one size."""

    ids: Tensor  # int64[P]
    first: int  # position of the image's first token
    cache: DynamicCache | None  # key-values of the tokens before it; None if there are none


class Passes:
    """Computes the logits of each reply's first token; see the module's docstring.

    Attributes:
      way: one of `WAYS`.
    """

    def __init__(self, model: Any, processor: Any, *, shared_prefix: bool) -> None:
        """Chooses the cheapest way that the model allows; warns if it is not "packed".

        Args:
          model: an image-text-to-text model of transformers.
          processor: its processor, whose tokenizer pads on the right.
          shared_prefix: False always takes "separate".
        """
        self._model, self._processor, self._tokenizer = model, processor, processor.tokenizer
        self._control = special_tokens(processor)
        self._can_select = "logits_to_keep" in inspect.signature(model.forward).parameters
        # A group's images get the same questions, and all prompts have the same prefix.
        self._suffixes = functools.lru_cache(maxsize=CACHED_QUESTION_LISTS)(self._encode_suffixes)
        self._prefix = functools.lru_cache(maxsize=CACHED_PREFIXES)(self._encode_prefix)
        self._image_only = False
        self.way = self._choose() if shared_prefix else "separate"

    @torch.inference_mode()
    def logits(
        self,
        image: np.ndarray,
        questions: Sequence[str],
        instruction: str,
        replies: Sequence[int] | None = None,
    ) -> Tensor:
        """Computes the logits float[Q, V] of the token that follows each prompt.

        Args:
          image: uint8[H, W, 3].
          questions: Q >= 1.
          instruction: see `prompt`.
          replies: Q first tokens of the replies, appended to the prompts; None: none.
        Raises:
          ValueError: see `prompt`.
        """
        forward = {"packed": self._packed, "shared": self._shared, "separate": self._separate}
        replies = None if replies is None else tuple(replies)
        return forward[self.way](_Request(image, tuple(questions), instruction, replies))

    def prompt(self, question: str, instruction: str) -> str:
        """Returns the complete prompt; without an instruction it has no system turn.

        Raises:
          ValueError: the texts hold a control token, which the tokenizer would read as one.
        """
        if tokens := sorted(token for token in self._control if token in question + instruction):
            raise InputError(
                f"got the control tokens {tokens} in the text {question!r}; "
                "a question is plain text"
            )
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        system = {"role": "system", "content": [{"type": "text", "text": instruction}]}
        messages = [system, user] if instruction else [user]
        return self._processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )

    def inputs(self, image: np.ndarray, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Runs the processor on the prompts, each with the image; returns a padded batch."""
        batch = self._processor(
            text=list(prompts), images=[[image]] * len(prompts), padding=True, return_tensors="pt"
        )
        return dict(batch.to(self._model.device))

    @torch.inference_mode()
    def _choose(self) -> str:
        """Returns the first way that agrees with "separate" on a test image."""
        image = np.random.default_rng(0).integers(0, 256, (*PROBE_SIZE, 3)).astype(np.uint8)
        probe = image, PROBE_QUESTIONS, AUDIT_INSTRUCTION
        tolerance = TOLERANCE.get(self._model.dtype, TOLERANCE[torch.float32])
        self.way = "separate"
        expected = self.logits(*probe).float().softmax(-1)
        reasons = []
        for way in WAYS[:-1]:
            self.way = way
            try:
                if way == "packed":
                    self._check_packable(*probe)
                got = self.logits(*probe).float().softmax(-1)
                difference = float((got - expected).abs().max())
            # Models of other families fail here in many ways: a cache of another kind, an image
            # token of another name, arguments that they do not take.
            except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, IndexError) as e:
                reasons.append(f"{way!r}: {type(e).__name__}: {e}")
                continue
            if difference <= tolerance:
                break
            reasons.append(
                f"{way!r}: probabilities differ by {difference:.2g}, above {tolerance:.2g}"
            )
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

    def _check_packable(
        self, image: np.ndarray, questions: tuple[str, ...], instruction: str
    ) -> None:
        """Refuses models for which packing may be wrong although the test image agrees.

        Raises:
          ValueError: positions that follow the image's rows, attention that is not causal or has a
            window, a recurrent state, or image tokens that depend on the image's content.
        """
        if any(hasattr(module, "get_rope_index") for module in self._model.modules()):
            raise ValueError("the model's positions follow the image's rows and columns")
        suffixes = self._suffixes(questions, instruction, None)
        full = self.inputs(image, [suffixes.prefix])
        # E.g. token types, by which some models let image tokens see each other both ways.
        per_token = [
            name
            for name, value in full.items()
            if name != "attention_mask" and value.shape[:2] == full["input_ids"].shape
        ]
        if per_token != ["input_ids"]:
            raise ValueError(f"the processor marks tokens by {per_token}; expected input_ids alone")
        prefix = self._prefix(suffixes.prefix, image.shape)
        kinds = {type(layer).__name__ for layer in prefix.cache.layers} if prefix.cache else set()
        if kinds - {DynamicLayer.__name__}:
            raise ValueError(f"the cache's layers are {sorted(kinds)}; expected full attention")
        if not torch.equal(prefix.ids[None], full["input_ids"]):
            raise ValueError("the image's tokens follow its content, not its size alone")
        self._image_only = _equal_inputs(self._pixels(image), _without_text(full))

    def _packed(self, request: _Request) -> Tensor:
        """Computes `logits` in one pass without padding."""
        suffixes = self._suffixes(*request.suffix_key)
        prefix = self._prefix(suffixes.prefix, request.image.shape)
        first, size = prefix.first, len(prefix.ids)
        if self._image_only:
            pixels = self._pixels(request.image)
        else:
            pixels = _without_text(self.inputs(request.image, [suffixes.prefix]))
        # Owner 0 is the prefix with the image, which every question sees.
        owner = torch.cat([suffixes.owner.new_zeros(size), suffixes.owner])
        position = torch.arange(len(owner), device=owner.device)
        causal = position <= position[first:, None]
        visible = causal & ((owner == 0) | (owner == owner[first:, None]))
        mask = torch.zeros(visible.shape, dtype=self._model.dtype, device=owner.device)
        mask.masked_fill_(~visible, torch.finfo(mask.dtype).min)
        return self._logits_at(
            suffixes.ends + (size - first),
            input_ids=torch.cat([prefix.ids[first:], suffixes.packed])[None],
            attention_mask=mask[None, None],
            position_ids=torch.cat([position[first:size], size + suffixes.offsets])[None],
            past_key_values=_shallow_copy(prefix.cache),
            **pixels,
        )[0]

    def _shared(self, request: _Request) -> Tensor:
        """Computes `logits` in a pass over the prefix and one over the padded questions."""
        suffixes = self._suffixes(*request.suffix_key)
        prefix = self.inputs(request.image, [suffixes.prefix])
        cache = self._model(**prefix, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(suffixes.tokens))
        prefix_mask = prefix["attention_mask"].expand(len(suffixes.tokens), -1)
        return self._last_logits(
            suffixes.mask,
            input_ids=suffixes.tokens,
            attention_mask=torch.cat([prefix_mask, suffixes.mask], 1),
            past_key_values=cache,
        )

    def _separate(self, request: _Request) -> Tensor:
        """Computes `logits` in one pass over the padded, complete prompts."""
        prompts = [self.prompt(question, request.instruction) for question in request.questions]
        inputs = self.inputs(request.image, prompts)
        if request.replies is not None:
            inputs = _with_replies(inputs, request.replies)
        return self._last_logits(inputs["attention_mask"], **inputs, use_cache=False)

    def _last_logits(self, mask: Tensor, **inputs: object) -> Tensor:
        """Computes logits float[Q, V] at the last token of each row of `mask` int64[Q, T].

        Rows are padded on the right.
        """
        positions, index = torch.unique(mask.sum(1) - 1, return_inverse=True)
        rows = torch.arange(len(mask), device=mask.device)
        return self._logits_at(positions, **inputs)[rows, index]

    def _logits_at(self, positions: Tensor, **inputs: object) -> Tensor:
        """Computes logits float[B, K, V] at the tokens `positions` int64[K] of each row."""
        if self._can_select:  # with a large vocabulary all others would take much memory
            return self._model(**inputs, logits_to_keep=positions).logits
        return self._model(**inputs).logits[:, positions]

    def _pixels(self, image: np.ndarray) -> dict[str, Tensor]:
        """Returns the model's inputs for the image, without tokenizing the text again."""
        batch = self._processor.image_processor(images=[[image]], return_tensors="pt")
        return dict(batch.to(self._model.device))

    def _encode_suffixes(
        self, questions: tuple[str, ...], instruction: str, replies: tuple[int, ...] | None
    ) -> _Suffixes:
        """Tokenizes the prompts behind the image; cached by `_suffixes`."""
        prompts = [self.prompt(question, instruction) for question in questions]
        token = self._processor.image_token
        # The texts differ only behind the image, whose token no question may hold (`prompt`).
        cut = prompts[0].rindex(token) + len(token)
        suffixes = [prompt[cut:] for prompt in prompts]
        rows = self._tokenizer(suffixes, add_special_tokens=False)["input_ids"]
        if replies is not None:
            rows = [[*row, reply] for row, reply in zip(rows, replies, strict=True)]
        padded = self._tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        padded = padded.to(self._model.device)
        tokens, mask = padded["input_ids"], padded["attention_mask"]
        owner, offsets = mask.nonzero(as_tuple=True)
        ends = mask.sum(1).cumsum(0) - 1
        return _Suffixes(
            prompts[0][:cut], tokens, mask, tokens[owner, offsets], owner + 1, offsets, ends
        )

    def _encode_prefix(self, text: str, shape: tuple[int, ...]) -> _Prefix:
        """Tokenizes the prompt up to an image of this size; cached by `_prefix`."""
        # Any image will do: `_check_packable` made sure that the tokens follow its size alone.
        ids = self.inputs(np.zeros(shape, np.uint8), [text])["input_ids"]
        first = int((ids[0] == self._processor.image_token_id).nonzero()[0])
        cache = None
        if first:
            cache = self._model(input_ids=ids[:, :first], use_cache=True).past_key_values
        return _Prefix(ids[0], first, cache)


def _without_text(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a processor's output without the inputs that describe the text."""
    return {name: value for name, value in inputs.items() if name not in TEXT_INPUTS}


def _shallow_copy(cache: DynamicCache | None) -> DynamicCache | None:
    """Copies a cache so that the copy may grow while the original stays as it is.

    No tensor is copied: a layer that grows binds new tensors.
    """
    if cache is None:
        return None
    duplicate = copy.copy(cache)
    duplicate.layers = [copy.copy(layer) for layer in cache.layers]
    return duplicate


def _equal_inputs(inputs: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Returns True if both have the same names and bit-equal tensors."""
    return inputs.keys() == expected.keys() and all(
        isinstance(value, Tensor) and torch.equal(value, expected[name])
        for name, value in inputs.items()
    )


def _with_replies(inputs: dict[str, Tensor], replies: tuple[int, ...]) -> dict[str, Tensor]:
    """Appends one token to each of the right-padded rows."""
    mask = inputs["attention_mask"]
    rows, ends = torch.arange(len(mask), device=mask.device), mask.sum(1)
    longer = dict(inputs)
    for name, value in inputs.items():
        if value.shape[:2] == mask.shape:
            longer[name] = torch.cat([value, torch.zeros_like(value[:, :1])], 1)
    longer["input_ids"][rows, ends] = torch.tensor(replies, device=mask.device)
    longer["attention_mask"][rows, ends] = 1
    return longer
