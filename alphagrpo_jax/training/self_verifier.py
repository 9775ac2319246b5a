"""Who rates a run's images: a pool of verifiers, a second one beside it, or the policy itself.

The policy as its own verifier (self-reward) sees an image as ViT tokens, then the question, and
P(yes) / (P(yes) + P(no)) is read off the first token of its answer. It follows the policy as it is
trained, in this process and without overlap with rollouts.
"""

import dataclasses
import functools
from collections.abc import Hashable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from alphagrpo_jax import policy
from alphagrpo_jax.config import ConfigError
from alphagrpo_jax.models import kv_cache
from alphagrpo_jax.models.bagel import Bagel
from alphagrpo_jax.models.bagel_weights import Loaded
from alphagrpo_jax.models.kv_cache import Context
from alphagrpo_jax.ops.patchify import patchify
from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.rewards.verifiers.spelling import MIN_MASS, normalize_word
from alphagrpo_jax.rewards.workers.ledger import VerifierResult
from alphagrpo_jax.runtime.tokenizer import Tokenizer
from alphagrpo_jax.sampling.trajectory import image_block

IMAGES = 8  # that are looked at at a time
QUESTIONS = 48  # about these, asked at a time


class PolicyVerifier:
    """The policy as verifier, a `scoring.VerifierPool`: samples are answered when gathered."""

    def __init__(self, loaded: Loaded, *, question_tokens: int) -> None:
        """Finds the tokens that spell yes and no.

        Args:
          loaded: the pretrained model; whose weights judge is said by `follow`.
          question_tokens: most tokens of a question with its delimiters.
        Raises:
          ConfigError: no token spells one of the two, or there are several processes, each of
            which would judge images of its own while the model lies on all of them.
        """
        if jax.process_count() > 1:
            raise ConfigError(
                "verifier.kind=self runs in a single process; use hf or openai with several"
            )
        self._tokenizer, self._length = loaded.tokenizer, question_tokens + 1
        words = [_spellings(loaded.tokenizer, word) for word in ("yes", "no")]
        if not all(words):
            raise ConfigError(
                f"verifier.kind=self: the tokenizer of {loaded.config.llm.vocab_size} tokens has "
                f"{len(words[0])} that spell yes and {len(words[1])} that spell no, expected at "
                "least one each; use another verifier"
            )
        self._words = tuple(jnp.array(ids, jnp.int32) for ids in words)
        self._see = jax.jit(functools.partial(encode_images, loaded.model))
        self._ask = jax.jit(functools.partial(yes_no_probs, loaded.model))
        self._weights: PolicyParams | None = None
        self._waiting: dict[Hashable, tuple[np.ndarray, tuple[str, ...]]] = {}

    def follow(self, weights: PolicyParams) -> None:
        """Judges by these weights from now on."""
        self._weights = weights

    def submit(
        self,
        sample_id: Hashable,
        image: np.ndarray,
        questions: Sequence[str],
        rated: Sequence[str] = (),
    ) -> None:
        """Takes a sample, see `pool.Pool.submit`.

        Raises:
          ValueError: wrong image or questions, the id is in use, or a rating is asked for.
        """
        if rated or not questions or isinstance(questions, str):
            raise ValueError(
                f"sample {sample_id!r}: got questions {questions!r} and {rated!r} to be rated, "
                "expected a list of yes/no questions only: the policy gives no ratings"
            )
        image = np.array(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"sample {sample_id!r}: got an image {image.dtype}{list(image.shape)}, expected "
                "uint8[H, W, 3]"
            )
        if sample_id in self._waiting:
            raise ValueError(f"sample {sample_id!r} was submitted before and not yet gathered")
        self._waiting[sample_id] = (image, tuple(questions))

    def gather(self, sample_ids: Iterable[Hashable]) -> dict[Hashable, VerifierResult]:
        """Answers these samples, each once, in the order given; the images must be of one size.

        Raises:
          ValueError: an id that was not submitted, or was gathered before; no weights yet.
        """
        sample_ids = list(dict.fromkeys(sample_ids))
        unknown = [each for each in sample_ids if each not in self._waiting]
        if unknown or self._weights is None:
            raise ValueError(
                f"got sample ids {unknown[:5]} that are not waiting, expected ids submitted and "
                "not yet gathered, and weights from `follow`"
            )
        found: dict[Hashable, VerifierResult] = {}
        for first in range(0, len(sample_ids), IMAGES):
            part = sample_ids[first : first + IMAGES]
            found |= self._judge({each: self._waiting.pop(each) for each in part})
        return found

    def _judge(
        self, samples: dict[Hashable, tuple[np.ndarray, tuple[str, ...]]]
    ) -> dict[Hashable, VerifierResult]:
        """The outcomes of at most `IMAGES` samples."""
        images = np.stack([image for image, _ in samples.values()])
        rows = np.resize(np.arange(len(images)), IMAGES)  # always as many: compiled once
        context = self._see(self._weights, jnp.asarray(images[rows]))
        asked = [
            (number, self._tokens(question))
            for number, (_, questions) in enumerate(samples.values())
            for question in questions
        ]
        answers: list[list[float | str]] = [[] for _ in samples]
        for first in range(0, len(asked), QUESTIONS):
            part = asked[first : first + QUESTIONS]
            for (number, _), answer in zip(part, self._answers(context, part), strict=True):
                answers[number].append(answer)
        return {sample_id: _outcome(own) for sample_id, own in zip(samples, answers, strict=True)}

    def _answers(
        self, context: Context, asked: Sequence[tuple[int, list[int] | str]]
    ) -> list[float | str]:
        """P(yes), or why there is none, of at most `QUESTIONS` (image, question) pairs."""
        rows = np.zeros(QUESTIONS, np.int32)
        rows[: len(asked)] = [number for number, _ in asked]
        ids = [[] if isinstance(tokens, str) else tokens for _, tokens in asked]
        start = [self._tokenizer.special.im_start]
        filled = [each or start for each in ids] + [start] * (QUESTIONS - len(asked))
        tokens, mask = self._tokenizer.batch(filled, self._length)
        found = jax.device_get(
            self._ask(self._weights, context, jnp.asarray(rows), tokens, mask, *self._words)
        )
        return [
            own if isinstance(own, str) else _share(float(yes), float(no))
            for (_, own), yes, no in zip(asked, *found, strict=False)
        ]

    def _tokens(self, question: str) -> list[int] | str:
        """The ids of a question and of the beginning of its answer, or why it cannot be asked."""
        special = self._tokenizer.special
        own = self._tokenizer.encode(question)
        if set(own) & set(dataclasses.asdict(special).values()):
            return f"got control tokens in the question {question!r}; a question is plain text"
        ids = [special.im_start, *own, special.im_end, special.im_start]
        if len(ids) > self._length:
            return (
                f"the question {question!r} has {len(ids) - 1} tokens with its delimiters, at most "
                f"{self._length - 1} fit (rollout.prompt_tokens)"
            )
        return ids


def encode_images(model: Bagel, params: PolicyParams, images: jax.Array) -> Context:
    """The contexts of images uint8[I, Hpx, Wpx, 3] that are to be understood, one row each."""
    seen = image_block(model, images).seen
    floats = seen.astype(jnp.float32) / 127.5 - 1.0
    patches = patchify(floats, model.config.vit.patch_size)
    grid = model.config.vit_grid(*seen.shape[1:3])
    return policy.extend_vit(model, params, kv_cache.empty(len(images)), patches, grid)


def yes_no_probs(
    model: Bagel,
    params: PolicyParams,
    seen: Context,
    rows: jax.Array,
    tokens: jax.Array,
    mask: jax.Array,
    yes: jax.Array,
    no: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The probabilities that an answer begins with yes and with no, over all spellings.

    Args:
      model: static.
      params: the policy.
      seen: contexts of the images.
      rows: int32[Q], the image of each question.
      tokens: int32[Q, T], each question and the `<|im_start|>` of its answer, padded on the right.
      mask: bool[Q, T].
      yes, no: int32[], the ids that spell each.
    Returns:
      float32[Q] and float32[Q].
    """
    context = kv_cache.take(seen, rows)
    _, hidden = policy.extend_text(model, params, context, tokens, mask)
    last = jnp.sum(mask, axis=1) - 1
    at_end = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    probabilities = jax.nn.softmax(policy.text_logits(model, params, at_end)[:, 0], axis=-1)
    return tuple(jnp.sum(probabilities[:, ids], axis=-1) for ids in (yes, no))


def _spellings(tokenizer: Tokenizer, word: str) -> list[int]:
    return [
        index
        for index in range(len(tokenizer))
        if normalize_word(tokenizer.decode([index])) == word
    ]


def _share(yes: float, no: float) -> float | str:
    """P(yes) among the two, or why there is none."""
    if not yes + no >= MIN_MASS:  # also true for NaN
        return f"neither yes nor no begins the answer (mass {yes + no:.2g})"
    return yes / (yes + no)


def _outcome(answers: Sequence[float | str]) -> VerifierResult:
    """All answers of a sample, or its first failure."""
    failures = [each for each in answers if isinstance(each, str)]
    p_yes = None if failures else tuple(answers)
    return VerifierResult(p_yes, not failures, failures[0] if failures else None, 1, None, 0.0)
