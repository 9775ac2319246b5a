"""The policy as its own verifier (self-reward).

It encodes an image as ViT tokens, then the question, and reads P(yes) / (P(yes) + P(no)) off the
first token of its answer; for a likelihood it reads the log-probs of the prompt as its answer. It
uses the weights of the policy in training, in this process and without overlap with rollouts.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from alphagrpo_jax import policy
from alphagrpo_jax.config import ConfigError
from alphagrpo_jax.models import kv_cache
from alphagrpo_jax.models.bagel import Bagel
from alphagrpo_jax.models.bagel_weights import LoadedModel
from alphagrpo_jax.models.kv_cache import Context
from alphagrpo_jax.ops.patchify import patchify
from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.rewards.verifiers.base import Answer, Rating, Score
from alphagrpo_jax.rewards.verifiers.instructions import CAPTION_REQUEST
from alphagrpo_jax.rewards.verifiers.spelling import MIN_MASS, normalize_word
from alphagrpo_jax.runtime.stopping import NEVER, StopRequest
from alphagrpo_jax.runtime.tokenizer import Tokenizer
from alphagrpo_jax.sampling.contexts import image_block

IMAGES = 8  # encoded at once
QUESTIONS = 48  # about these images, answered at once


class PolicyVerifier:
    """The policy as a `BatchVerifier`; `workers.in_process.InProcessPool` makes a pool of it."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        question_tokens: int,
        min_mass: float = MIN_MASS,
        stop: StopRequest = NEVER,
    ) -> None:
        """Finds the tokens that spell yes and no.

        Args:
          loaded: the pretrained model; `follow` sets the weights that answer.
          question_tokens: most tokens of a question with its delimiters.
          min_mass: P(yes) + P(no) below which a question has no answer.
          stop: ends `answer_batch` and `score` once it is overdue.
        Raises:
          ConfigError: no token spells one of the two, or there are several processes, each of
            which would answer about images of its own while the model lies on all of them.
        """
        if jax.process_count() > 1:
            raise ConfigError(
                "verifier.kind=self runs in a single process; use hf or openai with several"
            )
        # One more token: the beginning of the answer, from which its first token is predicted.
        self._stop, self._min_mass = stop, min_mass
        self._tokenizer, self._length = loaded.tokenizer, question_tokens + 1
        self._most_reply_tokens = question_tokens
        words = [_spellings(loaded.tokenizer, word) for word in ("yes", "no")]
        if not all(words):
            raise ConfigError(
                f"verifier.kind=self: the tokenizer of {loaded.config.llm.vocab_size} tokens has "
                f"{len(words[0])} that spell yes and {len(words[1])} that spell no, expected at "
                "least one each; use another verifier"
            )
        self._yes, self._no = (jnp.array(ids, jnp.int32) for ids in words)
        self._encode_images = jax.jit(functools.partial(encode_images, loaded.model))
        self._yes_no_probs = jax.jit(functools.partial(yes_no_probs, loaded.model))
        self._mean_log_probs = jax.jit(
            functools.partial(mean_log_probs, loaded.model), static_argnames="first"
        )
        self._params: PolicyParams | None = None

    def follow(self, params: PolicyParams) -> None:
        """Answers with these weights from now on."""
        self._params = params

    def answer(self, image: np.ndarray, questions: Sequence[str]) -> list[Answer]:
        """Answers about one image uint8[H, W, 3]; see `answer_batch`.

        Raises:
          ValueError: no weights yet.
        """
        return self.answer_batch([image], [questions])[0]

    def rate(self, image: np.ndarray, questions: Sequence[str]) -> list[Rating]:
        """Refuses: the policy is not asked for ratings.

        Raises:
          ValueError: always.
        """
        raise ValueError("got questions to be rated, expected yes/no questions of the policy")

    def answer_batch(
        self, images: Sequence[np.ndarray], questions: Sequence[Sequence[str]]
    ) -> list[list[Answer]]:
        """Answers each image's questions, `IMAGES` images at once.

        Args:
          images: N of uint8[H, W, 3], all of one size.
          questions: N lists.
        Returns:
          N lists, one `Answer` per question.
        Raises:
          ValueError: no weights yet.
          StoppedError: a stop is overdue.
        """
        if self._params is None:
            raise ValueError("got no weights to answer with, expected a call of `follow` before")
        answers: list[list[Answer]] = []
        for first in range(0, len(images), IMAGES):
            self._stop.check()
            batch = slice(first, first + IMAGES)
            answers += self._answer_batch(self._params, images[batch], questions[batch])
        return answers

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Score]:
        """Computes the mean log-prob of each prompt as the policy's description of its image.

        The prompt stands where the answer to `CAPTION_REQUEST` would; its tokens alone count.

        Args:
          images: N of uint8[H, W, 3], all of one size.
          prompts: N.
        Returns:
          N scores, nats, at most 0.
        Raises:
          ValueError: no weights yet.
          StoppedError: a stop is overdue.
        """
        if self._params is None:
            raise ValueError("got no weights to score with, expected a call of `follow` before")
        scores: list[Score] = []
        for first in range(0, len(images), IMAGES):
            self._stop.check()
            batch = slice(first, first + IMAGES)
            scores += self._score_batch(self._params, images[batch], prompts[batch])
        return scores

    def _score_batch(
        self, params: PolicyParams, images: Sequence[np.ndarray], prompts: Sequence[str]
    ) -> list[Score]:
        """Scores at most `IMAGES` images."""
        rows = np.resize(np.arange(len(images)), IMAGES)
        contexts = self._encode_images(params, jnp.asarray(np.stack(images)[rows]))
        replies = [self._reply_ids(prompt) for prompt in prompts]
        # What cannot be scored is one token whose number nobody reads.
        filler = [self._tokenizer.special.im_start]
        ids = [filler if isinstance(reply, Score) else reply for reply in replies]
        request = [*self._tokenizer.wrap(CAPTION_REQUEST), self._tokenizer.special.im_start]
        tokens, mask = self._tokenizer.batch(
            [[*request, *ids[row]] for row in rows], len(request) + self._most_reply_tokens
        )
        means = jax.device_get(
            self._mean_log_probs(params, contexts, tokens, mask, first=len(request))
        )
        return [
            reply if isinstance(reply, Score) else Score(float(mean))
            for reply, mean in zip(replies, means, strict=False)
        ]

    def _reply_ids(self, prompt: str) -> list[int] | Score:
        """Returns the ids of a prompt that stands where an answer would, or a failed score."""
        ids = self._tokenizer.encode(prompt)
        if self._holds_control_tokens(ids):
            reason = f"got control tokens in the prompt {prompt!r}; a prompt is plain text"
            return Score(None, reason, permanent=True)
        if not 1 <= len(ids) <= self._most_reply_tokens:
            reason = (
                f"the prompt {prompt!r} has {len(ids)} tokens, expected 1 to "
                f"{self._most_reply_tokens} (rollout.prompt_tokens)"
            )
            return Score(None, reason, permanent=True)
        return ids

    def _holds_control_tokens(self, ids: Sequence[int]) -> bool:
        """Tells whether a text could end its own turn and begin another."""
        return bool(set(ids) & set(dataclasses.asdict(self._tokenizer.special).values()))

    def _answer_batch(
        self,
        params: PolicyParams,
        images: Sequence[np.ndarray],
        questions: Sequence[Sequence[str]],
    ) -> list[list[Answer]]:
        """Answers about at most `IMAGES` images."""
        # Padded by repetition to a fixed number of images, so that it is compiled once.
        rows = np.resize(np.arange(len(images)), IMAGES)
        contexts = self._encode_images(params, jnp.asarray(np.stack(images)[rows]))
        pairs = [
            (row, question)
            for row, image_questions in enumerate(questions)
            for question in image_questions
        ]
        answers: list[list[Answer]] = [[] for _ in images]
        for first in range(0, len(pairs), QUESTIONS):
            batch = pairs[first : first + QUESTIONS]
            for (row, _), answer in zip(
                batch, self._answer_pairs(params, contexts, batch), strict=True
            ):
                answers[row].append(answer)
        return answers

    def _answer_pairs(
        self, params: PolicyParams, contexts: Context, pairs: Sequence[tuple[int, str]]
    ) -> list[Answer]:
        """Answers at most `QUESTIONS` pairs of an image's row and a question."""
        rows = np.zeros(QUESTIONS, np.int32)
        rows[: len(pairs)] = [row for row, _ in pairs]
        prompts = [self._prompt_ids(question) for _, question in pairs]
        # What cannot be asked, and the padding, is one token whose answer nobody reads.
        filler = [self._tokenizer.special.im_start]
        ids = [filler if isinstance(prompt, Answer) else prompt for prompt in prompts]
        ids += [filler] * (QUESTIONS - len(pairs))
        tokens, mask = self._tokenizer.batch(ids, self._length)
        yes, no = jax.device_get(
            self._yes_no_probs(
                params, contexts, jnp.asarray(rows), tokens, mask, self._yes, self._no
            )
        )
        return [
            prompt
            if isinstance(prompt, Answer)
            else _answer(float(yes_prob), float(no_prob), self._min_mass)
            for prompt, yes_prob, no_prob in zip(prompts, yes, no, strict=False)
        ]

    def _prompt_ids(self, question: str) -> list[int] | Answer:
        """Returns the ids of a question and of its answer's beginning, or a failed answer."""
        special = self._tokenizer.special
        question_ids = self._tokenizer.encode(question)
        if self._holds_control_tokens(question_ids):
            return Answer(
                None,
                f"got control tokens in the question {question!r}; a question is plain text",
                permanent=True,
            )
        ids = [special.im_start, *question_ids, special.im_end, special.im_start]
        if len(ids) > self._length:
            return Answer(
                None,
                f"the question {question!r} has {len(ids) - 1} tokens with its delimiters, at most "
                f"{self._length - 1} fit (rollout.prompt_tokens)",
                permanent=True,
            )
        return ids


def encode_images(model: Bagel, params: PolicyParams, images: jax.Array) -> Context:
    """Encodes images uint8[I, Hpx, Wpx, 3] by the ViT alone; returns their contexts, I rows."""
    pixels = image_block(model, images).vit_pixels
    floats = pixels.astype(jnp.float32) / 127.5 - 1.0
    patches = patchify(floats, model.config.vit.patch_size)
    grid = model.config.vit_grid(*pixels.shape[1:3])
    return policy.extend_vit(model, params, kv_cache.empty(len(images)), patches, grid)


def yes_no_probs(
    model: Bagel,
    params: PolicyParams,
    contexts: Context,
    rows: jax.Array,
    tokens: jax.Array,
    mask: jax.Array,
    yes: jax.Array,
    no: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Computes the probabilities that an answer begins with yes and with no, over all spellings.

    Args:
      model: static.
      params: the policy.
      contexts: of the images, I rows.
      rows: int32[Q], the image of each question.
      tokens: int32[Q, T], each question and the `<|im_start|>` of its answer, padded on the right.
      mask: bool[Q, T].
      yes, no: int32[], the ids that spell each.
    Returns:
      float32[Q] and float32[Q].
    """
    context = kv_cache.take(contexts, rows)
    _, hidden = policy.extend_text(model, params, context, tokens, mask)
    last = jnp.sum(mask, axis=1) - 1
    at_end = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    probabilities = jax.nn.softmax(policy.text_logits(model, params, at_end)[:, 0], axis=-1)
    yes_probs, no_probs = (jnp.sum(probabilities[:, ids], axis=-1) for ids in (yes, no))
    return yes_probs, no_probs


def mean_log_probs(
    model: Bagel,
    params: PolicyParams,
    contexts: Context,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    first: int,
) -> jax.Array:
    """Computes the mean log-prob of each row's tokens from position `first` on, float32[B].

    Args:
      model: static.
      params: the policy.
      contexts: before the tokens, B rows.
      tokens: int32[B, T], padded on the right.
      mask: bool[B, T].
      first: static, position of the first token that counts, at least 1; each row has such a token.
    """
    _, hidden = policy.extend_text(model, params, contexts, tokens, mask)
    logits = policy.text_logits(model, params, hidden[:, first - 1 : -1])
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    picked = jnp.take_along_axis(log_probs, tokens[:, first:, None], axis=-1)[..., 0]
    counted = mask[:, first:]
    return jnp.sum(jnp.where(counted, picked, 0.0), axis=1) / jnp.sum(counted, axis=1)


def _spellings(tokenizer: Tokenizer, word: str) -> list[int]:
    """Returns the ids of all tokens that spell a word."""
    return [
        index
        for index in range(len(tokenizer))
        if normalize_word(tokenizer.decode([index])) == word
    ]


def _answer(yes: float, no: float, min_mass: float) -> Answer:
    """Returns P(yes) among yes and no, or a failure if both are improbable."""
    mass = yes + no
    if not mass >= min_mass or mass == 0.0:  # also true for NaN
        reason = f"neither yes nor no begins the answer (mass {mass:.2g}, at least {min_mass:g})"
        return Answer(None, reason, mass)
    return Answer(yes / mass, mass=mass)
