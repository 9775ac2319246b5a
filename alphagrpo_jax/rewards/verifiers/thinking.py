"""Reads the answer of a judge that thinks first: the token behind the end of its thinking."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from alphagrpo_jax.rewards.verifiers.answer_finder import AnswerFinder, opened_by
from alphagrpo_jax.rewards.verifiers.instructions import AUDIT_INSTRUCTION
from alphagrpo_jax.rewards.verifiers.passes import Passes
from alphagrpo_jax.rewards.verifiers.trials import (
    PROBE_QUESTIONS,
    TRIAL_ERRORS,
    disagreement,
    probe_image,
)

# Options of greedy replies; any left out would be filled with the folder's own.
GREEDY: Mapping[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}
_LOG = logging.getLogger(__name__)


class Reading(NamedTuple):
    """The logits where an answer is read, or the reason for their absence.

    Exactly one of `logits` and `failure` is None.
    """

    logits: Tensor | None  # float32[V] of the answer's first token
    tokens: tuple[int, ...] = ()  # of the reply before the answer
    failure: str | None = None
    permanent: bool = False  # no verifier could answer


class Reply:
    """Follows one reply, token by token, and keeps the logits of its answer's first token."""

    def __init__(self, prompt: str, decode: Callable[[Sequence[int]], str]) -> None:
        """Begins the reply to a prompt, whose template may have opened the thinking.

        Args:
          prompt: the complete one.
          decode: returns the text of tokens, control tokens included.
        """
        self._finder = AnswerFinder(decode, opened_by(prompt))
        self._tokens: list[int] = []
        self._logits: Tensor | None = None  # of the answer's first token, or of the next one

    def expect(self, logits: Tensor) -> None:
        """Keeps logits float32[V] if the next token may be the answer's first."""
        if self._finder.awaits_answer:
            self._logits = logits.clone()

    def append(self, token: int) -> None:
        """Takes the next token."""
        self._tokens.append(token)
        self._finder.append(token)

    def reading(self, max_tokens: int, room: int | None = None) -> Reading:
        """Returns what was read, after all tokens.

        Args:
          max_tokens: most tokens of a reply.
          room: tokens that the prompt leaves of the judge's context; None: any number.
        """
        count, index, end = len(self._tokens), self._finder.position, self._finder.open_end
        if end:
            bound = f"verifier.max_tokens allows {max_tokens}"
            if room is not None and room < max_tokens:
                bound = f"the prompt leaves {room} of the judge's context"
                max_tokens = room
            reason = "cut off" if count >= max_tokens else "ended by the judge"
            return Reading(
                None,
                failure=f"the thinking did not end: no {end!r} in {count} tokens ({reason}; "
                f"{bound})",
            )
        if index is None or self._logits is None:
            return Reading(None, failure=f"no answer behind the thinking in {count} tokens")
        return Reading(self._logits, tuple(self._tokens[:index]))


class _Expect(LogitsProcessor):
    """Shows each reply the logits of its next token, which stay as they are."""

    def __init__(self, replies: Sequence[Reply]) -> None:
        self._replies = replies

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        del input_ids
        for reply, row in zip(self._replies, scores, strict=True):
            reply.expect(row.float())
        return scores


class _Append(StoppingCriteria):
    """Gives each reply its next token, up to the end of its turn: thinking may begin again."""

    def __init__(self, replies: Sequence[Reply], ends: Sequence[int]) -> None:
        self._replies, self._ends = replies, set(ends)
        self._is_over = [False] * len(replies)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        del scores
        for index, (reply, token) in enumerate(
            zip(self._replies, input_ids[:, -1].tolist(), strict=True)
        ):
            if not self._is_over[index]:  # behind the end of a reply there is padding
                reply.append(token)
                self._is_over[index] = token in self._ends
        return torch.tensor(self._is_over, device=input_ids.device)


class ThinkingReader:
    """Lets a judge think and reads its answers."""

    def __init__(self, model: Any, passes: Passes, max_tokens: int) -> None:
        """Finds out whether the model's replies may be generated together.

        Args:
          model: an image-text-to-text model of transformers.
          passes: of the model.
          max_tokens: most tokens of a reply, its thinking included.
        """
        self._model, self._passes, self._max_tokens = model, passes, max_tokens
        ends = model.generation_config.eos_token_id
        self._ends = [ends] if isinstance(ends, int) else list(ends or [])
        if not self._ends and passes.prompter.tokenizer.eos_token_id is not None:
            self._ends = [passes.prompter.tokenizer.eos_token_id]
        self._together = True
        self._together = self._agrees()

    def read(self, image: np.ndarray, questions: Sequence[str], instruction: str) -> list[Reading]:
        """Generates a greedy reply to each question and reads its answer.

        Args:
          image: uint8[H, W, 3].
          questions: Q >= 1.
          instruction: see `Prompter.prompt`.
        Returns:
          Q readings.
        Raises:
          PromptTooLongError: the model's context does not hold every prompt.
          ValueError: see `Prompter.prompt`.
        """
        prompter, context = self._passes.prompter, self._passes.context_tokens
        prompts = [prompter.prompt(question, instruction) for question in questions]
        lengths = self._lengths(image, prompts)
        self._passes.check_lengths(torch.tensor(lengths))
        rooms = [None if context is None else max(1, context - length) for length in lengths]
        # A reply that the context bounds is generated alone: it may be as long as it would be
        # beside other questions.
        is_alone = [
            not self._together or (room is not None and room < self._max_tokens) for room in rooms
        ]
        together = [index for index, alone in enumerate(is_alone) if not alone]
        groups = [[index] for index, alone in enumerate(is_alone) if alone]
        readings: dict[int, Reading] = {}
        for group in [*groups, *([together] if together else [])]:
            room = rooms[group[0]] if is_alone[group[0]] else None
            rows = self._read(image, [prompts[index] for index in group], room)
            readings.update(zip(group, rows, strict=True))
        return [readings[index] for index in range(len(prompts))]

    def _lengths(self, image: np.ndarray, prompts: Sequence[str]) -> list[int]:
        """Counts the tokens of each prompt, the image's included."""
        inputs = self._passes.prompter.inputs
        groups = [prompts] if self._together else [[prompt] for prompt in prompts]
        masks = [inputs(image, group, side="left")["attention_mask"] for group in groups]
        return [int(length) for mask in masks for length in mask.sum(1)]

    def _read(self, image: np.ndarray, prompts: Sequence[str], room: int | None) -> list[Reading]:
        """Generates the replies to prompts together; for `room` see `Reply.reading`."""
        inputs = self._passes.prompter.inputs(image, prompts, side="left")
        limit = self._max_tokens if room is None else min(self._max_tokens, room)
        replies = [Reply(prompt, self._decode) for prompt in prompts]
        config = self._greedy(limit)
        with torch.inference_mode():
            self._model.generate(
                **inputs,
                generation_config=config,
                logits_processor=LogitsProcessorList([_Expect(replies)]),
                stopping_criteria=StoppingCriteriaList([_Append(replies, self._ends)]),
            )
        return [reply.reading(self._max_tokens, room) for reply in replies]

    def _greedy(self, limit: int, **options: Any) -> GenerationConfig:
        """Returns the options of at most `limit` greedy tokens."""
        return GenerationConfig(
            **GREEDY,
            max_new_tokens=limit,
            eos_token_id=self._ends or None,
            pad_token_id=self._passes.prompter.tokenizer.pad_token_id,
            **options,
        )

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._passes.prompter.tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _agrees(self) -> bool:
        """Tells whether prompts padded on the left get the logits that they get alone."""
        prompter = self._passes.prompter
        prompts = [prompter.prompt(question, AUDIT_INSTRUCTION) for question in PROBE_QUESTIONS]
        alone = torch.cat([self._first_logits([prompt]) for prompt in prompts])
        try:
            together = self._first_logits(prompts)
            reason = disagreement(together, alone, self._model.dtype, self._passes.words)
        except TRIAL_ERRORS as error:
            reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            _LOG.warning("replies are generated one by one: %s", reason)
        return reason is None

    def _first_logits(self, prompts: Sequence[str]) -> Tensor:
        """Computes logits float[Q, V] of the replies' first tokens."""
        inputs = self._passes.prompter.inputs(probe_image(), prompts, side="left")
        config = self._greedy(1, return_dict_in_generate=True, output_logits=True)
        with torch.inference_mode():
            output = self._model.generate(**inputs, generation_config=config)
        return output.logits[0]
