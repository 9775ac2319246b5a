"""Reads the answer of a judge that thinks first: the token behind the end of its thinking."""

import logging
from collections.abc import Callable, Sequence
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

from alphagrpo_jax.rewards.verifiers.instructions import AUDIT_INSTRUCTION
from alphagrpo_jax.rewards.verifiers.passes import Passes
from alphagrpo_jax.rewards.verifiers.spelling import THINKING_TAGS
from alphagrpo_jax.rewards.verifiers.trials import (
    PROBE_QUESTIONS,
    TRIAL_ERRORS,
    probe_image,
    tolerance,
)

_TAIL = 16  # tokens that surely hold the end of thinking, however it is tokenized
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
    """Follows one reply, token by token.

    A reply that opens no thinking is an answer from its first token on. Blank tokens before an
    answer are passed over.

    Attributes:
      is_read: True once the answer's first token is there.
    """

    def __init__(self, prompt: str, decode: Callable[[Sequence[int]], str]) -> None:
        """Begins the reply to a prompt, whose template may have opened the thinking.

        Args:
          prompt: the complete one.
          decode: returns the text of tokens, control tokens included.
        """
        self._decode = decode
        # An example of thinking in a system turn is closed again.
        opened = [end for begin, end in THINKING_TAGS if prompt.rfind(begin) > prompt.rfind(end)]
        self._end = opened[0] if opened else ""  # what ends the thinking; "" outside of any
        self._has_thought, self.is_read = bool(opened), False
        self._tokens: list[int] = []
        self._begin = 0  # index of the first token behind the thinking
        self._answer: tuple[Tensor, int] | None = None  # logits, and index of the answer's token

    def expect(self, logits: Tensor) -> None:
        """Keeps logits float32[V] if the next token may be the answer's first."""
        if not self.is_read and not self._end and not self._text():
            self._answer = logits.clone(), len(self._tokens)

    def append(self, token: int) -> None:
        """Takes the next token."""
        self._tokens.append(token)
        if self._end:
            _, end, behind = self._decode(self._tokens[-_TAIL:]).rpartition(self._end)
            if end:
                self._end, self._begin, self._answer = "", len(self._tokens), None
                self.is_read = bool(behind.strip())  # the answer has no token of its own
            return
        text = self._text()
        if not text:
            return
        if not self._has_thought:
            for begin, end in THINKING_TAGS:
                if text.startswith(begin):
                    self._end, self._has_thought, self._answer = end, True, None
                    return
            if any(begin.startswith(text) for begin, _ in THINKING_TAGS):
                return  # the next tokens will tell
        self.is_read = True

    def reading(self, max_tokens: int) -> Reading:
        """Returns what was read, after at most `max_tokens` tokens."""
        count = len(self._tokens)
        if self._end:
            reason = "cut off" if count >= max_tokens else "ended by the judge"
            return Reading(
                None,
                failure=f"the thinking did not end: no {self._end!r} in {count} tokens ({reason}; "
                f"verifier.max_tokens allows {max_tokens})",
            )
        if self._answer is None:
            return Reading(None, failure=f"no answer behind the thinking in {count} tokens")
        logits, index = self._answer
        return Reading(logits, tuple(self._tokens[:index]))

    def _text(self) -> str:
        """Returns the text behind the thinking, without blanks around it."""
        return self._decode(self._tokens[self._begin :]).strip()


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
    """Gives each reply its next token; ends those that are read."""

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
                self._is_over[index] = reply.is_read or token in self._ends
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
        rows = [questions] if self._together else [[question] for question in questions]
        return [reading for row in rows for reading in self._read(image, row, instruction)]

    def _read(self, image: np.ndarray, questions: Sequence[str], instruction: str) -> list[Reading]:
        """Generates the replies together."""
        prompter = self._passes.prompter
        prompts = [prompter.prompt(question, instruction) for question in questions]
        inputs = prompter.inputs(image, prompts, side="left")
        lengths = inputs["attention_mask"].sum(1)
        self._passes.check_lengths(lengths)
        limit = self._max_tokens
        if self._passes.context_tokens is not None:
            limit = min(limit, max(1, self._passes.context_tokens - int(lengths.max())))
        replies = [Reply(prompt, self._decode) for prompt in prompts]
        config = self._greedy(limit)
        with torch.inference_mode():
            self._model.generate(
                **inputs,
                generation_config=config,
                logits_processor=LogitsProcessorList([_Expect(replies)]),
                stopping_criteria=StoppingCriteriaList([_Append(replies, self._ends)]),
            )
        return [reply.reading(limit) for reply in replies]

    def _greedy(self, limit: int, **options: Any) -> GenerationConfig:
        """Returns the options of at most `limit` greedy tokens."""
        return GenerationConfig(
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,  # None would be filled with the folder's own
            no_repeat_ngram_size=0,
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
        alone = torch.cat([self._first_shares([prompt]) for prompt in prompts])
        try:
            difference = float((self._first_shares(prompts) - alone).abs().max())
        except TRIAL_ERRORS as error:
            _LOG.warning("replies are generated one by one: %s: %s", type(error).__name__, error)
            return False
        if difference > tolerance(self._model.dtype):
            _LOG.warning(
                "replies are generated one by one: together, probabilities differ by %.2g",
                difference,
            )
            return False
        return True

    def _first_shares(self, prompts: Sequence[str]) -> Tensor:
        """Computes probabilities float32[Q, V] of the replies' first tokens."""
        inputs = self._passes.prompter.inputs(probe_image(), prompts, side="left")
        config = self._greedy(1, return_dict_in_generate=True, output_logits=True)
        with torch.inference_mode():
            output = self._model.generate(**inputs, generation_config=config)
        return output.logits[0].float().softmax(-1)
