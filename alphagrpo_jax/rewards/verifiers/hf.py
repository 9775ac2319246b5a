"""Verifier over any Hugging Face image-text-to-text model in a local folder.

`passes` describes how forward passes share work between questions and images. Nothing depends on
other images or on the load, so equal questions about equal images always get equal answers.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

from alphagrpo_jax.rewards.verifiers.answer_finder import opened_by
from alphagrpo_jax.rewards.verifiers.base import (
    Answer,
    Rating,
    Score,
    VerifierLoadError,
    checked_image,
)
from alphagrpo_jax.rewards.verifiers.instructions import AUDIT_INSTRUCTION, RATE_INSTRUCTION
from alphagrpo_jax.rewards.verifiers.likelihood import LikelihoodReader
from alphagrpo_jax.rewards.verifiers.passes import Passes
from alphagrpo_jax.rewards.verifiers.prompting import PromptTooLongError, explain_length
from alphagrpo_jax.rewards.verifiers.spelling import (
    FALLBACK_TOKENS,
    MIN_MASS,
    RATINGS,
    normalize_word,
)
from alphagrpo_jax.rewards.verifiers.thinking import GREEDY, Reading, ThinkingReader
from alphagrpo_jax.runtime.errors import InputError


def normalized_tokens(tokenizer: Any) -> list[str]:
    """Returns what each token spells, normalized: "Yes" and " yes" are both "yes"."""
    texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
    return [normalize_word(text) for text in texts]


def token_sets(tokens: Sequence[str], words: Sequence[str]) -> list[list[int]]:
    """Returns for each word the ids of all tokens that spell it (see `normalized_tokens`)."""
    return [[index for index, text in enumerate(tokens) if text == word] for word in words]


def candidates(logits: Tensor, top_k: int | None) -> Tensor:
    """Computes first-token probabilities float32[Q, V], zero outside the `top_k` likeliest.

    Args:
      logits: float[Q, V].
      top_k: number of candidates; None: all tokens.
    """
    probabilities = logits.float().softmax(-1)
    if top_k is None:
        return probabilities
    best = probabilities.topk(min(top_k, probabilities.shape[-1]), -1)
    return torch.zeros_like(probabilities).scatter(-1, best.indices, best.values)


def load(path: str | Path, device: str, dtype: str) -> tuple[Any, Any]:
    """Loads (model, processor) from a local folder.

    `device` "auto" spreads the model over all devices of this machine. Their classes depend on the
    folder; transformers gives them no common type with `generate` or an image processor.

    Raises:
      VerifierLoadError: no such folder, no image processor or chat template in it, damaged or
        incomplete weights, or a package that the model's processor needs is missing.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise VerifierLoadError(
            f"verifier folder {str(folder)!r} has no config.json; expected a local Hugging Face "
            "model folder; set verifier.path to one, to ORG/NAME of the hub or to package:verifier"
        )
    transformers_logging.disable_progress_bar()  # one of every worker would run through one line
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise VerifierLoadError(
            f"got dtype {dtype!r}, expected float32, bfloat16, float16 or auto (the folder's own)"
        )
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder,
            local_files_only=True,
            dtype=dtype,
            output_loading_info=True,
            **({"device_map": "auto"} if device == "auto" else {}),
        )
        model, loading = loaded  # a pair because of output_loading_info
    except (ImportError, OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise VerifierLoadError(_explain(folder, error)) from error
    if loading["missing_keys"]:  # transformers only warns, and leaves random numbers in them
        missing = sorted(loading["missing_keys"])
        raise VerifierLoadError(
            f"verifier folder {str(folder)!r} lacks {len(missing)} tensors of its model, e.g. "
            f"{missing[:3]}; they would be random and so would rewards: fetch its weights again"
        )
    for attribute in ("image_processor", "tokenizer", "chat_template"):
        if attribute not in dir(processor) or vars(processor)[attribute] is None:
            raise VerifierLoadError(
                f"verifier folder {str(folder)!r}: its processor {type(processor).__name__} has "
                f"no {attribute}; expected a chat model for images and text with all its files"
            )
    try:
        model = model if device == "auto" else model.to(device)
    except (RuntimeError, AssertionError) as error:  # what PyTorch raises for a device it lacks
        raise VerifierLoadError(
            f"the verifier in {str(folder)!r} cannot run on device {device!r}: {error}"
        ) from error
    return model.eval(), processor


def _explain(folder: Path, error: Exception) -> str:
    """Returns the message of a failed load, with the fix where it is known."""
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    message = f"cannot load the verifier in {str(folder)!r} (model type {kind!r}): {error}"
    if isinstance(error, SafetensorError):
        message += "\nFix: a weight file is damaged or cut short; fetch it again"
    if "torchvision" in str(error).lower():
        message += (
            "\nFix: this model's processor needs the torchvision that was built for this PyTorch: "
            f"{torchvision_command(torch.__version__)}\n(a plain `pip install torchvision` may "
            "replace PyTorch itself)"
        )
    for package in ("num2words", "accelerate"):
        if package in str(error).lower():
            message += f"\nFix: {package} is needed; pip install 'alphagrpo_jax[judges]'"
    return message


def torchvision_command(torch_version: str) -> str:
    """Returns the command that installs torchvision beside a PyTorch, and nothing else.

    Args:
      torch_version: as PyTorch says it, e.g. "2.13.0+cpu"; the part behind the plus is its build.
    """
    release, _, build = torch_version.partition("+")
    numbers = release.split(".")
    if len(numbers) != 3 or numbers[0] != "2" or not all(number.isdigit() for number in numbers):
        return f"see https://pytorch.org/get-started/previous-versions for PyTorch {torch_version}"
    fitting = f"0.{int(numbers[1]) + 15}.{numbers[2]}"  # 2.0.0 came with 0.15.0, 2.13.0 with 0.28.0
    index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
    return f"pip install --no-deps{index} torchvision=={fitting}"


class HFVerifier:
    """A `base.Verifier` over a Hugging Face image-text-to-text model.

    Attributes:
      passes: runs the forward passes; `passes.way` says how an image's questions share them.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        num_threads: int | None = None,
        top_k: int | None = None,
        text_fallback: bool = False,
        shared_prefix: bool = True,
        max_batch: int = 64,
        instruction: str = AUDIT_INSTRUCTION,
        min_mass: float = MIN_MASS,
        read: Literal["first", "after_thinking"] = "first",
        max_tokens: int = 2048,
    ):
        """Loads the model and chooses by a test image how questions share forward passes.

        Args:
          path: a local model folder.
          device: where the model runs; "auto" spreads it over all devices of this machine, which
            needs the package accelerate.
          dtype: of the weights, or "auto" for the folder's own.
          num_threads: fixed number of CPU threads of this process; None: unchanged.
          top_k: number of likeliest tokens that count as candidates (AlphaGRPO: 5); None: all.
          text_fallback: if neither yes nor no is a candidate, generate a short text; exactly yes
            or no then counts as 1 or 0; with read="first" alone.
          shared_prefix: False runs the complete prompt for every question; see `passes`.
          max_batch: most questions in one forward pass.
          instruction: system turn of every yes/no question; "" for none.
          min_mass: P(yes) + P(no) of the token that is read, below which there is no answer.
          read: the token that is read: the first of the reply, or the first behind the end of its
            thinking (see `thinking`).
          max_tokens: most tokens of a reply whose thinking comes first.
        Raises:
          VerifierLoadError: see `load`; or no token spells yes or no.
        """
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.model, self.processor = load(path, device, dtype)
        self.tokenizer = self.processor.tokenizer
        self.device, self.top_k, self.text_fallback = device, top_k, text_fallback
        self.max_batch, self.instruction, self.min_mass = max_batch, instruction, min_mass
        tokens = normalized_tokens(self.tokenizer)
        self.yes, self.no = token_sets(tokens, ("yes", "no"))
        if not (self.yes and self.no) and not text_fallback:
            raise VerifierLoadError(
                f"the tokenizer in {str(path)!r} has {len(self.yes)} tokens that spell yes and "
                f"{len(self.no)} that spell no; expected at least one each; text_fallback=True "
                "reads generated text instead"
            )
        self.ratings = token_sets(tokens, RATINGS)
        self._digits = [index for index, text in enumerate(tokens) if text[:1].isdigit()]
        words = self.yes, self.no
        self.passes = Passes(self.model, self.processor, shared_prefix=shared_prefix, words=words)
        self._likelihood = LikelihoodReader(self.model, self.passes)
        self._thinking = None
        if read == "after_thinking":
            self._thinking = ThinkingReader(self.model, self.passes, max_tokens)

    @property
    def context_tokens(self) -> int | None:
        """The model's longest sequence, image included; None if its configuration names none."""
        return self.passes.context_tokens

    def answer(self, image: np.ndarray, questions: Sequence[str]) -> list[Answer]:
        """Answers in the questions' order; `image` is uint8[H, W, 3].

        Raises:
          ValueError: the image is not uint8[H, W, 3].
        """
        readings = self._readings(image, questions, self.instruction)
        masses = iter(self._yes_no_masses([r.logits for r in readings if r.logits is not None]))
        answers = []
        for reading, question in zip(readings, questions, strict=True):
            if reading.logits is None:
                answers.append(Answer(None, reading.failure, permanent=reading.permanent))
            else:
                yes, no = next(masses)
                answers.append(self._answer(yes, no, reading.logits, question, image))
        return answers

    def _readings(
        self, image: np.ndarray, questions: Sequence[str], instruction: str
    ) -> list[Reading]:
        """Reads the logits of each question, or says why they cannot be read."""
        image = checked_image(image)
        read = self._read_first if self._thinking is None else self._thinking.read
        readings: dict[int, Reading] = {}
        indices = list(range(len(questions)))
        while indices:
            batch = indices[: self.max_batch]
            try:
                rows = read(image, [questions[index] for index in batch], instruction)
            except PromptTooLongError as error:
                for index, length in zip(batch, error.lengths, strict=True):
                    if length > error.limit:
                        reason = explain_length(length, error.limit)
                        readings[index] = Reading(None, failure=reason, permanent=True)
            except InputError:
                for index in batch:
                    if reason := self._reason_against(questions[index], instruction):
                        readings[index] = Reading(None, failure=reason, permanent=True)
                if not any(index in readings for index in batch):
                    raise
            else:
                readings.update(zip(batch, rows, strict=True))
            indices = [index for index in indices if index not in readings]
        return [readings[index] for index in range(len(questions))]

    def _reason_against(self, question: str, instruction: str) -> str | None:
        """Returns why the texts make no prompt; None if they do."""
        try:
            self.passes.prompter.prompt(question, instruction)
        except InputError as error:
            return str(error)
        return None

    def _read_first(
        self, image: np.ndarray, questions: Sequence[str], instruction: str
    ) -> list[Reading]:
        """Reads the first token of each reply."""
        return [Reading(row) for row in self.first_token_logits(image, questions, instruction)]

    def _yes_no_masses(self, rows: Sequence[Tensor]) -> list[tuple[float, float]]:
        """Returns P(yes) and P(no) of logits float32[V] each."""
        if not rows:
            return []
        probabilities = candidates(torch.stack(list(rows)), self.top_k)
        yes, no = (probabilities[:, ids].double().sum(-1) for ids in (self.yes, self.no))
        return list(zip(yes.tolist(), no.tolist(), strict=True))

    def rate(self, image: np.ndarray, questions: Sequence[str]) -> list[Rating]:
        """Rates by the expected value over the numbers 0 to 10, one per question.

        Raises:
          ValueError: the image is not uint8[H, W, 3], or one of 0 to 9 is no single token.
        """
        if not all(self.ratings[:10]):
            sets = zip(RATINGS[:10], self.ratings, strict=False)
            raise ValueError(
                f"the tokenizer has no single token for {[word for word, ids in sets if not ids]}; "
                "expected one for each number from 0 to 9, of which ratings are read"
            )
        readings = self._readings(image, questions, RATE_INSTRUCTION)
        numbers = iter(self._number_masses(image, questions, readings))
        ratings = []
        for reading in readings:
            mass = None if reading.logits is None else next(numbers)
            if mass is None:
                ratings.append(Rating(None, reading.failure))
            elif (total := float(mass.sum())) >= MIN_MASS:  # false for NaN too
                ratings.append(Rating(float(mass @ torch.arange(11.0).to(mass)) / total))
            else:
                reason = f"no number from 0 to 10 can be read (mass {total:.2g})"
                ratings.append(Rating(None, reason))
        return ratings

    def _number_masses(
        self, image: np.ndarray, questions: Sequence[str], readings: Sequence[Reading]
    ) -> Tensor:
        """Computes the probabilities float64[N, 11] of 0 to 10 where there are logits."""
        read = [
            (question, reading.tokens, reading.logits)
            for question, reading in zip(questions, readings, strict=True)
            if reading.logits is not None
        ]
        if not read:
            return torch.zeros(0, 11)
        texts, tokens, logits = zip(*read, strict=True)
        probabilities = candidates(torch.stack(logits), None).double()
        mass = torch.stack([probabilities[:, ids].sum(-1) for ids in self.ratings], -1)
        if not self.ratings[10]:
            self._split_ten(mass, probabilities, image, texts, tokens)
        return mass

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Score]:
        """Scores images uint8[H, W, 3] by their prompts' mean log-probabilities, see `likelihood`.

        Raises:
          ValueError: an image is not uint8[H, W, 3].
        """
        return self._likelihood.mean_log_probs(images, prompts)

    def _split_ten(
        self,
        mass: Tensor,
        probabilities: Tensor,
        image: np.ndarray,
        questions: Sequence[str],
        tokens: Sequence[tuple[int, ...]],
    ) -> None:
        """Splits the mass of "1" between 1 and 10 where "10" is two tokens, by what follows "1".

        Args:
          mass: float64[Q, 11] of the numbers; changed in place.
          probabilities: float64[Q, V] of the first token.
          image: uint8[H, W, 3].
          questions: Q.
          tokens: of each reply before its number.
        """
        ones = torch.tensor(self.ratings[1], device=probabilities.device)
        first = ones[probabilities[:, ones].argmax(-1)]  # the likeliest spelling stands for all
        replies = [(*row, one) for row, one in zip(tokens, first.tolist(), strict=True)]
        logits = self.passes.logits(image, questions, RATE_INSTRUCTION, replies)
        second = candidates(logits, None).double()
        mass[:, 10] = mass[:, 1] * second[:, self.ratings[0]].sum(-1)
        # A "1" with another digit behind it is neither 1 nor 10: that share counts for nothing.
        mass[:, 1] *= 1 - second[:, self._digits].sum(-1)

    def first_token_logits(
        self, image: np.ndarray, questions: Sequence[str], instruction: str
    ) -> Tensor:
        """Computes the logits of the reply's first token, float32[Q, V], in one forward pass.

        Raises:
          ValueError: the image is not uint8[H, W, 3], or a text holds a control token.
        """
        return self.passes.logits(checked_image(image), questions, instruction).float()

    def generate(
        self, image: np.ndarray, question: str, instruction: str, max_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Generates the greedy reply of at most `max_tokens` tokens.

        Returns:
          ids int[T] and logits float32[T, V].

        Raises:
          ValueError: see `first_token_logits`.
        """
        return self.reply(image, self.passes.prompter.prompt(question, instruction), max_tokens)

    def reply(self, image: np.ndarray, prompt: str, max_tokens: int) -> tuple[Tensor, Tensor]:
        """Generates the greedy reply to a complete prompt that holds the image's token once.

        Returns:
          ids int[T] and logits float32[T, V], T at most `max_tokens`.

        Raises:
          ValueError: the image is not uint8[H, W, 3].
        """
        inputs = self.passes.prompter.inputs(checked_image(image), [prompt])
        options = copy.deepcopy(self.model.generation_config)
        pad = self.tokenizer.pad_token_id
        options.update(**GREEDY, max_new_tokens=max_tokens, pad_token_id=pad)
        with torch.inference_mode():
            output = self.model.generate(
                **inputs,
                generation_config=options,
                return_dict_in_generate=True,
                output_logits=True,
            )
        reply = output.sequences[0, inputs["input_ids"].shape[1] :]
        return reply, torch.cat(output.logits).float()

    def _answer(
        self, yes: float, no: float, logits: Tensor, question: str, image: np.ndarray
    ) -> Answer:
        """Returns P(yes) among yes and no, or reads the reply's text, or fails."""
        mass = yes + no
        if np.isnan(mass):
            return Answer(None, "the model's probabilities are NaN")
        if mass >= self.min_mass and mass > 0:
            return Answer(yes / mass, mass=mass)
        if self.text_fallback and self._thinking is None:
            text = normalize_word(self._reply(image, question))
            if text in ("yes", "no"):
                return Answer(float(text == "yes"), mass=mass)
            return Answer(None, f"neither yes nor no: the reply is {text!r}", mass)
        likeliest = self.tokenizer.decode([int(logits.argmax())])
        reason = (
            f"neither yes nor no among the candidates (mass {mass:.2g}, expected at least "
            f"{self.min_mass:g}); the likeliest token is {likeliest!r}"
        )
        if self._thinking is None and self._opens_thinking(likeliest, question):
            reason += "; this judge thinks first: set verifier.read='after_thinking'"
        return Answer(None, reason, mass)

    def _opens_thinking(self, token: str, question: str) -> bool:
        """Tells whether a token, or the prompt itself, begins the reply's thinking."""
        prompt = self.passes.prompter.prompt(question, self.instruction)
        return bool(opened_by(token) or opened_by(prompt))

    def _reply(self, image: np.ndarray, question: str) -> str:
        """Generates a short text."""
        tokens, _ = self.generate(image, question, self.instruction, FALLBACK_TOKENS)
        return self.tokenizer.decode(tokens, skip_special_tokens=True)
