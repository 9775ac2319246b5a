"""Renders a question as a judge's prompt and turns prompt and image into its model's inputs.

Families differ in all of it: some templates take no system turn, some begin with BOS although the
tokenizer adds one too, some processors pad on the left, some return numbers of another type.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
import torch
from torch import Tensor

from alphagrpo_jax.rewards.verifiers.base import VerifierLoadError
from alphagrpo_jax.rewards.verifiers.spelling import THINKING_TAGS
from alphagrpo_jax.runtime.errors import InputError

# What templates and processors raise for messages that they were not written for.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    AttributeError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
)
NOT_FOR_MODELS = ("labels",)  # some processors return training targets unasked
_PROBE = "Look at the image and say yes or no.", "Is it flat?"

NO_LENGTH = 10**9  # more than any model's; tokenizers without a limit say 10^30

Messages = list[dict[str, Any]]
Content = Sequence[Mapping[str, str]]


class PromptTooLongError(InputError):
    """Prompts that the model's context cannot hold.

    Attributes:
      lengths: number of tokens of each prompt, the image's included.
      limit: the longest sequence of the model.
    """

    def __init__(self, lengths: Sequence[int], limit: int) -> None:
        """Names the longest prompt."""
        super().__init__(explain_length(max(lengths), limit))
        self.lengths, self.limit = tuple(lengths), limit


def is_too_long(length: int, limit: int | None) -> bool:
    """Tells whether a context of `limit` tokens, None for no limit, cannot hold a prompt.

    A prompt that fills it can still be read at its last token.
    """
    return limit is not None and length > limit


def explain_length(length: int, limit: int) -> str:
    """Returns the message about a prompt of `length` tokens."""
    return (
        f"got a prompt of {length} tokens, the image's included; the judge's context holds "
        f"{limit}: shorten the question or take a judge with a longer context"
    )


def special_tokens(processor: Any) -> frozenset[str]:
    """Returns the texts that a processor's tokenizer reads as control tokens.

    `all_special_tokens` alone lacks those without a name, such as the marks of roles.
    """
    tokenizer = processor.tokenizer
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    tags = {tag for pair in THINKING_TAGS for tag in pair if _is_token(tokenizer, tag)}
    return frozenset(
        {*tokens, *tags, *tokenizer.all_special_tokens, image_placeholder(processor)} - {""}
    )


def image_placeholder(processor: Any) -> str:
    """Returns the text that stands for an image in a prompt; "" if the processor names none."""
    token = getattr(processor, "image_token", None)
    return "" if token is None else str(token)


def context_tokens(config: Any, tokenizer: Any) -> int | None:
    """Returns the longest sequence by a model's configuration, else by its tokenizer, else None."""
    text_config = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        limit = getattr(text_config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    limit = tokenizer.model_max_length
    return int(limit) if limit < NO_LENGTH else None


def _is_token(tokenizer: Any, text: str) -> bool:
    """Tells whether the text is one token of the vocabulary."""
    return tokenizer.convert_tokens_to_ids(text) not in (None, tokenizer.unk_token_id)


@contextlib.contextmanager
def _explained(image: np.ndarray) -> Iterator[None]:
    """Tells a processor's ValueError as the input's fault, with the size uint8[H, W, 3] of it.

    Raises:
      InputError: the processor refuses the image.
    """
    try:
        yield
    except ValueError as error:
        height, width = image.shape[:2]
        raise InputError(
            f"the judge's processor refuses the image of {width}x{height} pixels ({error}); give "
            "another size or shape"
        ) from error


def _as_list(content: Content, instruction: str) -> Messages:
    """Writes a system turn, if any, and a user's turn as lists of contents."""
    system = {"role": "system", "content": [{"type": "text", "text": instruction}]}
    user = {"role": "user", "content": [dict(item) for item in content]}
    return [system, user] if instruction else [user]


def _as_string(content: Content, instruction: str) -> Messages:
    """Writes the system turn as a string, as some templates want it."""
    messages = _as_list(content, instruction)
    if instruction:
        messages[0]["content"] = instruction
    return messages


def _as_one_turn(content: Content, instruction: str) -> Messages:
    """Writes all into the user's turn, for templates that take or show no system turn."""
    items = [dict(item) for item in content]
    if instruction:
        first = next((item for item in items if item["type"] == "text"), None)
        if first is None:
            items.append({"type": "text", "text": instruction})
        else:
            first["text"] = f"{instruction}\n\n{first['text']}"
    return _as_list(items, "")


FORMS: tuple[Callable[[Content, str], Messages], ...] = (_as_list, _as_string, _as_one_turn)


class Prompter:
    """Renders prompts and runs the processor of one judge.

    Attributes:
      tokenizer: the processor's.
      placeholder: the text that stands for the image in a prompt; "" if the processor names none.
    """

    def __init__(self, processor: Any, device: torch.device, dtype: torch.dtype) -> None:
        """Finds by a trial how the template takes an instruction.

        Args:
          processor: of an image-text-to-text model of transformers.
          device: of the model's embeddings.
          dtype: of the model; numbers of images are cast to it.
        Raises:
          VerifierLoadError: the template shows the instruction or the question in no form.
        """
        self._processor, self._device, self._dtype = processor, device, dtype
        self.tokenizer = processor.tokenizer
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.placeholder = image_placeholder(processor)
        self._control = special_tokens(processor)
        self._form = self._choose_form()

    def prompt(self, question: str, instruction: str) -> str:
        """Returns the complete prompt of a question about an image; "" is no instruction.

        Raises:
          InputError: the texts hold a control token, which the tokenizer would read as one.
        """
        return self.prompt_of([{"type": "image"}, {"type": "text", "text": question}], instruction)

    def prompt_of(self, content: Content, instruction: str) -> str:
        """Returns the complete prompt, with the image's token where the template puts it.

        Args:
          content: of the user's turn: one {"type": "image"} and any number of {"type": "text",
            "text": ...}, in their order.
          instruction: of the system's turn; "" for none.
        Raises:
          InputError: a text holds a control token, which the tokenizer would read as one.
        """
        self.check_texts([item.get("text", "") for item in content], instruction)
        return self._render(self._form(content, instruction))

    def check_texts(self, texts: Sequence[str], instruction: str) -> None:
        """Refuses texts that hold a control token.

        Raises:
          InputError: the tokenizer would read one of them as more than text.
        """
        all_texts = [instruction, *texts]
        if tokens := sorted({t for t in self._control for text in all_texts if t in text}):
            raise InputError(
                f"got the control tokens {tokens} in the text {''.join(texts)[:200]!r}; a "
                "question is plain text"
            )

    def inputs(self, image: np.ndarray, prompts: Sequence[str], side: str = "right") -> dict:
        """Runs the processor on prompts about one image; returns a batch padded on one side.

        Args:
          image: uint8[H, W, 3].
          prompts: complete ones, or the beginnings of some.
          side: "right" or "left".
        Returns:
          The model's inputs; all but the image's have shape int64[prompts, T, ...].
        Raises:
          InputError: the processor refuses the image, such as a very thin one.
        """
        special = {} if self.adds_special(prompts[0]) else {"add_special_tokens": False}
        with _explained(image):
            batch = self._processor(
                text=list(prompts),
                images=[[image]] * len(prompts),
                padding=len(prompts) > 1,
                padding_side=side,  # several processors' own default would win over the tokenizer's
                return_tensors="pt",
                # Told, not guessed: an image of 3 rows would pass for one with channels first.
                input_data_format="channels_last",
                **special,
            )
        return self._for_model(batch)

    def pixels(self, image: np.ndarray) -> dict:
        """Returns the inputs that the image alone gives, without tokenizing any text.

        Raises:
          InputError: see `inputs`.
        """
        with _explained(image):
            batch = self._processor.image_processor(
                images=[[image]], return_tensors="pt", input_data_format="channels_last"
            )
        return self._for_model(batch)

    def text_tokens(self, text: str) -> list[int]:
        """Returns the ids of a prompt, or of its beginning, with one token for an image."""
        special = self.adds_special(text)
        return self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    def tokens_behind(self, prompts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each prompt behind its image.

        The text is tokenized where it stands: alone, SentencePiece would put a blank before it.

        Raises:
          ValueError: the image is not one token of the unexpanded prompts.
        """
        rows = self.tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
        token = self.tokenizer.convert_tokens_to_ids(self.placeholder) if self.placeholder else None
        if token is None or any(row.count(token) != 1 for row in rows):
            raise ValueError(f"the prompts do not hold the image's token {self.placeholder!r} once")
        return [row[row.index(token) + 1 :] for row in rows]

    def padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Returns ids int64[Q, T] padded on the right, and int64[Q, T] that is 1 at tokens."""
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(int(lengths.max()))[None] < lengths[:, None]).long()
        tokens = torch.full_like(mask, self.tokenizer.pad_token_id)
        tokens[mask.bool()] = torch.tensor([token for row in rows for token in row])
        return tokens.to(self._device), mask.to(self._device)

    def adds_special(self, prompt: str) -> bool:
        """Tells whether the tokenizer is to add what begins a text.

        As in `apply_chat_template`: a template that writes BOS itself gets no second one.
        """
        bos = self.tokenizer.bos_token
        return not (bos and prompt.startswith(bos))

    def _for_model(self, batch: Any) -> dict:
        """Moves a processor's output to the model's device, numbers of images in its dtype."""
        return {
            name: self._moved(value) for name, value in batch.items() if name not in NOT_FOR_MODELS
        }

    def _moved(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            dtype = self._dtype if value.is_floating_point() else value.dtype
            return value.to(self._device, dtype)
        if isinstance(value, list | tuple):
            return type(value)(self._moved(entry) for entry in value)
        return value

    def _render(self, messages: Messages) -> str:
        return self._processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )

    def _choose_form(self) -> Callable[[Content, str], Messages]:
        """Returns the first of `FORMS` whose prompt shows the instruction and the question."""
        instruction, question = _PROBE
        content = [{"type": "image"}, {"type": "text", "text": question}]
        reasons = []
        for form in FORMS:
            try:
                prompt = self._render(form(content, instruction))
            except TEMPLATE_ERRORS as error:
                reasons.append(f"{type(error).__name__}: {error}")
                continue
            if instruction in prompt and question in prompt and "{'type'" not in prompt:
                return form
            reasons.append(f"the prompt {prompt!r} does not show the texts as they are")
        raise VerifierLoadError(
            f"the chat template of {type(self._processor).__name__} takes no question about an "
            f"image: {'; '.join(reasons)}; expected a chat model for images and text"
        )
