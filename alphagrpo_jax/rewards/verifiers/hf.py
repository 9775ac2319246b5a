"""Any Hugging Face image-text-to-text model from a local folder, asked yes/no questions.

One image's questions are one fixed padded batch behind one shared prefix: the instruction and the
image are encoded once, and their key-value cache is repeated for each question. Where a model's
cache or positions do not allow that (found out once, at start, on a test image), every question is
a plain forward pass with the whole prompt. Nothing depends on other images or on the load, so that
equal questions about equal images always get equal answers.
"""

import copy
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from alphagrpo_jax.rewards.verifiers.base import Answer, Rating, VerifierLoadError
from alphagrpo_jax.rewards.verifiers.instructions import AUDIT_INSTRUCTION, RATE_INSTRUCTION
from alphagrpo_jax.rewards.verifiers.spelling import FALLBACK_TOKENS, MIN_MASS, RATINGS, bare

PROBE_TOLERANCE = 1e-3  # of a probability, between the shared prefix and separate prompts
CACHED_QUESTION_LISTS = 1024


def token_sets(tokenizer: object, words: Sequence[str]) -> list[list[int]]:
    """For each word the ids of all tokens that spell it (see `bare`), e.g. "Yes", " yes"."""
    texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
    bares = [bare(text) for text in texts]
    return [[index for index, text in enumerate(bares) if text == word] for word in words]


def candidates(logits: Tensor, top_k: int | None) -> Tensor:
    """First-token probabilities float32[Q, V]; zero outside the `top_k` likeliest, if given."""
    probabilities = logits.float().softmax(-1)
    if top_k is None:
        return probabilities
    kept = probabilities.topk(min(top_k, probabilities.shape[-1]), -1)
    return torch.zeros_like(probabilities).scatter(-1, kept.indices, kept.values)


def load(path: str | Path, device: str, dtype: str) -> tuple[torch.nn.Module, object]:
    """Loads (model, processor) from a local folder.

    Raises:
      VerifierLoadError: no such folder, no image processor or chat template in it, damaged or
        incomplete weights, or a package that the model's processor needs is missing.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise VerifierLoadError(
            f"verifier folder {str(folder)!r} has no config.json; expected a local Hugging Face "
            "model folder; set verifier.path to one (or to package:verifier)"
        )
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        model, found = AutoModelForImageTextToText.from_pretrained(
            folder, local_files_only=True, dtype=dtype, output_loading_info=True
        )
    except (ImportError, OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise VerifierLoadError(_explain(folder, error)) from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise VerifierLoadError(
            f"verifier folder {str(folder)!r} lacks {len(missing)} tensors of its model, e.g. "
            f"{missing[:3]}; they would be random and so would rewards: fetch its weights again"
        )
    for part in ("image_processor", "tokenizer", "chat_template"):
        if part not in dir(processor) or vars(processor)[part] is None:
            raise VerifierLoadError(
                f"verifier folder {str(folder)!r}: its processor {type(processor).__name__} has "
                f"no {part}; expected a chat model for images and text with all its files"
            )
    return model.to(device).eval(), processor


def _explain(folder: Path, error: Exception) -> str:
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    message = f"cannot load the verifier in {str(folder)!r} (model type {kind!r}): {error}"
    if isinstance(error, SafetensorError):
        message += "\nFix: a weight file is damaged or cut short; fetch it again"
    for package in ("torchvision", "num2words"):
        if package in str(error).lower():
            message += f"\nFix: this model's processor needs {package}; pip install {package}"
    return message


class HFVerifier:
    """A verifier (see `base.Verifier`) over a Hugging Face image-text-to-text model.

    Attributes:
      shared_prefix: whether an image is encoded once for all its questions.
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
        """Loads the model and tries the shared prefix on a test image.

        Args:
          path: a local model folder.
          device: where the model runs.
          dtype: of the weights, or "auto" for the folder's own.
          num_threads: fixed number of CPU threads of this process; None leaves it.
          top_k: count only the likeliest tokens as candidates (AlphaGRPO: 5); None: all.
          text_fallback: if neither yes nor no is a candidate, generate a short text; exactly yes
            or no then counts as 1 or 0.
          shared_prefix: False asks every question with the whole prompt.
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
        self.yes, self.no = token_sets(self.tokenizer, ("yes", "no"))
        if not (self.yes and self.no) and not text_fallback:
            raise VerifierLoadError(
                f"the tokenizer in {str(path)!r} has {len(self.yes)} tokens that spell yes and "
                f"{len(self.no)} that spell no; expected at least one each; text_fallback=True "
                "reads generated text instead"
            )
        self.ratings = token_sets(self.tokenizer, RATINGS)
        # A group's images are asked the same questions: their text is encoded once.
        self._encoded = functools.lru_cache(maxsize=CACHED_QUESTION_LISTS)(self._encode)
        self.shared_prefix = shared_prefix and self._prefix_works()

    def answer(self, image: np.ndarray, questions: Sequence[str]) -> list[Answer]:
        """Answers in the questions' order; `image` is uint8[H, W, 3].

        Raises:
          ValueError: the image is not uint8[H, W, 3].
        """
        answers = []
        for start in range(0, len(questions), self.max_batch):
            part = list(questions[start : start + self.max_batch])
            logits = self.first_token_logits(image, part, AUDIT_INSTRUCTION)
            answers += [
                self._answer(row, image, question)
                for row, question in zip(candidates(logits, self.top_k), part, strict=True)
            ]
        return answers

    def rate(self, image: np.ndarray, questions: Sequence[str]) -> list[Rating]:
        """Expected value over the number tokens 0 to 10, one per question.

        Raises:
          ValueError: the image is not uint8[H, W, 3], or a number is no single token.
        """
        if not all(self.ratings):
            missing = [word for word, ids in zip(RATINGS, self.ratings, strict=True) if not ids]
            raise ValueError(
                f"the tokenizer has no single token for {missing}; expected one for each number "
                "from 0 to 10, over which the rating is averaged"
            )
        logits = self.first_token_logits(image, questions, RATE_INSTRUCTION)
        probabilities = candidates(logits, None)
        mass = torch.stack([probabilities[:, ids].sum(-1) for ids in self.ratings], -1)
        result = []
        for row in mass.double():
            total = float(row.sum())
            if not total >= MIN_MASS:  # also true for NaN
                result.append(Rating(None, f"no number among the first tokens (mass {total:.2g})"))
            else:
                result.append(Rating(float(row @ torch.arange(11.0).double()) / total))
        return result

    @torch.inference_mode()
    def first_token_logits(
        self, image: np.ndarray, questions: Sequence[str], instruction: str
    ) -> Tensor:
        """Logits of the reply's first token, float32[Q, V], one fixed padded batch.

        Raises:
          ValueError: the image is not uint8[H, W, 3], or a text holds a control token.
        """
        image = _checked(image)
        forward = self._behind_prefix if self.shared_prefix else self._separately
        return forward(image, tuple(questions), instruction).float()

    def generate(
        self, image: np.ndarray, question: str, instruction: str, max_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """The greedy reply, at most `max_tokens` long: ids int[T], and logits float32[T, V].

        Raises:
          ValueError: see `first_token_logits`.
        """
        inputs = self.processor(
            text=[self._prompt(question, instruction)],
            images=[[_checked(image)]],
            return_tensors="pt",
        ).to(self.device)
        options = copy.deepcopy(self.model.generation_config)
        options.do_sample, options.max_new_tokens = False, max_tokens
        options.pad_token_id = self.tokenizer.pad_token_id
        with torch.inference_mode():
            found = self.model.generate(
                **inputs,
                generation_config=options,
                return_dict_in_generate=True,
                output_logits=True,
            )
        reply = found.sequences[0, inputs["input_ids"].shape[1] :]
        return reply, torch.cat(found.logits).float()

    def _prompt(self, question: str, instruction: str) -> str:
        """The whole prompt; without an instruction it has no system turn.

        Raises:
          ValueError: the texts hold a control token, which would be read as one.
        """
        control = {*self.tokenizer.all_special_tokens, self.processor.image_token}
        if found := sorted(token for token in control if token in question + instruction):
            raise ValueError(
                f"got the control tokens {found} in the text {question!r}; a question is plain text"
            )
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        system = {"role": "system", "content": [{"type": "text", "text": instruction}]}
        messages = [system, user] if instruction else [user]
        return self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )

    def _separately(
        self, image: np.ndarray, questions: tuple[str, ...], instruction: str
    ) -> Tensor:
        prompts = [self._prompt(question, instruction) for question in questions]
        inputs = self.processor(
            text=prompts, images=[[image]] * len(prompts), padding=True, return_tensors="pt"
        ).to(self.device)
        return _last(self.model(**inputs, use_cache=False).logits, inputs["attention_mask"])

    def _behind_prefix(
        self, image: np.ndarray, questions: tuple[str, ...], instruction: str
    ) -> Tensor:
        start, tokens, mask = self._encoded(questions, instruction)
        prefix = self.processor(text=[start], images=[[image]], return_tensors="pt").to(self.device)
        cache = self.model(**prefix, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(questions))
        before = prefix["attention_mask"].expand(len(questions), -1)
        logits = self.model(
            input_ids=tokens, attention_mask=torch.cat([before, mask], 1), past_key_values=cache
        ).logits
        return _last(logits, mask)

    def _encode(self, questions: tuple[str, ...], instruction: str) -> tuple[str, Tensor, Tensor]:
        """The prompts' common text up to the image, and tokens and mask [Q, T] of the rest."""
        prompts = [self._prompt(question, instruction) for question in questions]
        cut = prompts[0].rindex(self.processor.image_token) + len(self.processor.image_token)
        rest = self.tokenizer(
            [prompt[cut:] for prompt in prompts],
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",
        ).to(self.device)
        return prompts[0][:cut], rest["input_ids"], rest["attention_mask"]

    def _prefix_works(self) -> bool:
        """Compares the shared prefix with separate prompts on a test image."""
        ramp = np.arange(48 * 48 * 3, dtype=np.int64).reshape(48, 48, 3)
        image = (ramp % 251).astype(np.uint8)
        asked = (image, ("Is there anything in the image?", "Is it flat?"), AUDIT_INSTRUCTION)
        with torch.inference_mode():
            expected = self._separately(*asked).float().softmax(-1)
            try:
                got = self._behind_prefix(*asked).float().softmax(-1)
            except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
                return False  # a cache of another kind, or an image token of another name
        return bool((got - expected).abs().max() <= PROBE_TOLERANCE)

    def _answer(self, probabilities: Tensor, image: np.ndarray, question: str) -> Answer:
        yes = float(probabilities[self.yes].double().sum())
        no = float(probabilities[self.no].double().sum())
        if np.isnan(yes + no):
            return Answer(None, "the model's probabilities are NaN")
        if yes + no >= MIN_MASS:
            return Answer(yes / (yes + no))
        if self.text_fallback:
            text = bare(self._reply(image, question))
            if text in ("yes", "no"):
                return Answer(float(text == "yes"))
            return Answer(None, f"neither yes nor no: the reply is {text!r}")
        return Answer(None, f"neither yes nor no among the candidates (mass {yes + no:.2g})")

    def _reply(self, image: np.ndarray, question: str) -> str:
        tokens, _ = self.generate(image, question, AUDIT_INSTRUCTION, FALLBACK_TOKENS)
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def _checked(image: np.ndarray) -> np.ndarray:
    """The image, if it is uint8[H, W, 3].

    Raises:
      ValueError: it is not.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"image is {image.dtype}{list(image.shape)}; expected uint8[H, W, 3]")
    return image


def _last(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits float[Q, V] at the last token of each right-padded row of float[Q, T, V]."""
    return logits[torch.arange(len(mask)), mask.sum(1) - 1]
