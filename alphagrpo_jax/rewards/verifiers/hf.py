"""Verifier over any Hugging Face image-text-to-text model in a local folder.

`passes` describes how forward passes share work between questions and images. Nothing depends on
other images or on the load, so equal questions about equal images always get equal answers.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

from alphagrpo_jax.rewards.verifiers.base import (
    Answer,
    Rating,
    Score,
    VerifierLoadError,
    checked_image,
)
from alphagrpo_jax.rewards.verifiers.instructions import AUDIT_INSTRUCTION, RATE_INSTRUCTION
from alphagrpo_jax.rewards.verifiers.likelihood import mean_log_probs
from alphagrpo_jax.rewards.verifiers.passes import Passes
from alphagrpo_jax.rewards.verifiers.spelling import (
    FALLBACK_TOKENS,
    MIN_MASS,
    RATINGS,
    normalize_word,
)


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

    Their classes depend on the folder; transformers gives them no common type with `generate` or
    an image processor.

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
            folder, local_files_only=True, dtype=dtype, output_loading_info=True
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
        model = model.to(device)
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
    for package in ("torchvision", "num2words"):
        if package in str(error).lower():
            message += f"\nFix: this model's processor needs {package}; pip install {package}"
    return message


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
    ):
        """Loads the model and chooses by a test image how questions share forward passes.

        Args:
          path: a local model folder.
          device: where the model runs.
          dtype: of the weights, or "auto" for the folder's own.
          num_threads: fixed number of CPU threads of this process; None: unchanged.
          top_k: number of likeliest tokens that count as candidates (AlphaGRPO: 5); None: all.
          text_fallback: if neither yes nor no is a candidate, generate a short text; exactly yes
            or no then counts as 1 or 0.
          shared_prefix: False runs the complete prompt for every question; see `passes`.
          max_batch: most questions in one forward pass.
        Raises:
          VerifierLoadError: see `load`; or no token spells yes or no.
        """
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.model, self.processor = load(path, device, dtype)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "right"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.device, self.top_k, self.text_fallback = device, top_k, text_fallback
        self.max_batch = max_batch
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
        self.passes = Passes(self.model, self.processor, shared_prefix=shared_prefix)

    def answer(self, image: np.ndarray, questions: Sequence[str]) -> list[Answer]:
        """Answers in the questions' order; `image` is uint8[H, W, 3].

        Raises:
          ValueError: the image is not uint8[H, W, 3].
        """
        answers = []
        for start in range(0, len(questions), self.max_batch):
            batch = list(questions[start : start + self.max_batch])
            logits = self.first_token_logits(image, batch, AUDIT_INSTRUCTION)
            probabilities = candidates(logits, self.top_k)
            yes, no = (probabilities[:, ids].double().sum(-1) for ids in (self.yes, self.no))
            for yes_mass, no_mass, question in zip(yes.tolist(), no.tolist(), batch, strict=True):
                answers.append(self._answer(yes_mass, no_mass, question, image))
        return answers

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
        logits = self.first_token_logits(image, questions, RATE_INSTRUCTION)
        probabilities = candidates(logits, None).double()
        mass = torch.stack([probabilities[:, ids].sum(-1) for ids in self.ratings], -1)
        if not self.ratings[10]:
            self._split_ten(mass, probabilities, image, questions)
        totals, values = mass.sum(-1).tolist(), (mass @ torch.arange(11.0).to(mass)).tolist()
        return [
            Rating(value / total)
            if total >= MIN_MASS  # false for NaN too
            else Rating(None, f"no number from 0 to 10 can be read (mass {total:.2g})")
            for total, value in zip(totals, values, strict=True)
        ]

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Score]:
        """Scores images uint8[H, W, 3] by their prompts' mean log-probabilities, see `likelihood`.

        Raises:
          ValueError: an image is not uint8[H, W, 3].
        """
        return mean_log_probs(self.model, self.passes, images, prompts)

    def _split_ten(
        self, mass: Tensor, probabilities: Tensor, image: np.ndarray, questions: Sequence[str]
    ) -> None:
        """Splits the mass of "1" between 1 and 10 where "10" is two tokens, by what follows "1".

        Args:
          mass: float64[Q, 11] of the numbers; changed in place.
          probabilities: float64[Q, V] of the first token.
          image: uint8[H, W, 3].
          questions: Q.
        """
        ones = torch.tensor(self.ratings[1], device=probabilities.device)
        first = ones[probabilities[:, ones].argmax(-1)]  # the likeliest spelling stands for all
        logits = self.passes.logits(image, questions, RATE_INSTRUCTION, first.tolist())
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
        prompts = [self.passes.prompt(question, instruction)]
        inputs = self.passes.inputs(checked_image(image), prompts)
        options = copy.deepcopy(self.model.generation_config)
        options.do_sample, options.max_new_tokens = False, max_tokens
        options.pad_token_id = self.tokenizer.pad_token_id
        with torch.inference_mode():
            output = self.model.generate(
                **inputs,
                generation_config=options,
                return_dict_in_generate=True,
                output_logits=True,
            )
        reply = output.sequences[0, inputs["input_ids"].shape[1] :]
        return reply, torch.cat(output.logits).float()

    def _answer(self, yes: float, no: float, question: str, image: np.ndarray) -> Answer:
        """Returns P(yes) among yes and no, or reads the reply's text, or fails."""
        if np.isnan(yes + no):
            return Answer(None, "the model's probabilities are NaN")
        if yes + no >= MIN_MASS:
            return Answer(yes / (yes + no))
        if self.text_fallback:
            text = normalize_word(self._reply(image, question))
            if text in ("yes", "no"):
                return Answer(float(text == "yes"))
            return Answer(None, f"neither yes nor no: the reply is {text!r}")
        return Answer(None, f"neither yes nor no among the candidates (mass {yes + no:.2g})")

    def _reply(self, image: np.ndarray, question: str) -> str:
        """Generates a short text."""
        tokens, _ = self.generate(image, question, AUDIT_INSTRUCTION, FALLBACK_TOKENS)
        return self.tokenizer.decode(tokens, skip_special_tokens=True)
