"""Tells which prompts a Hugging Face verifier can be asked, before a model computes anything."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoConfig, AutoProcessor

from alphagrpo_jax.rewards.verifiers.base import VerifierLoadError
from alphagrpo_jax.rewards.verifiers.instructions import AUDIT_INSTRUCTION
from alphagrpo_jax.runtime.errors import InputError

LARGEST_SIDE = 1024  # pixels, of what BAGEL draws
CACHED_SIZES = 64  # of images
NO_LENGTH = 10**9  # more than any model's; tokenizers without a limit say 10^30


def special_tokens(processor: Any) -> frozenset[str]:
    """Returns the texts that a processor's tokenizer reads as control tokens.

    `all_special_tokens` alone lacks those without a name, such as the marks of roles.
    """
    tokenizer = processor.tokenizer
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return frozenset({*added, *tokenizer.all_special_tokens, processor.image_token} - {""})


class PromptLimits:
    """Builds and measures the prompts of one processor; needs no weights.

    Attributes:
      context_tokens: most tokens of a prompt, or None if neither the model's configuration nor its
        tokenizer says.
    """

    def __init__(self, processor: Any, config: Any) -> None:
        """Takes both as transformers loads them; `config` is the model's."""
        self._processor, self._tokenizer = processor, processor.tokenizer
        self._control = special_tokens(processor)
        self.context_tokens = _context_tokens(config, self._tokenizer)
        self._added_by_image = functools.lru_cache(CACHED_SIZES)(self._measure_image)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "PromptLimits":
        """Reads processor and configuration from a local model folder.

        Raises:
          VerifierLoadError: it is no folder of a chat model for images and text.
        """
        try:
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            return cls(processor, config)
        except (ImportError, OSError, ValueError, KeyError, AttributeError) as error:
            raise VerifierLoadError(
                f"cannot read the verifier's processor in {str(folder)!r}: {error}; expected a "
                "Hugging Face folder of a chat model for images and text"
            ) from error

    def prompt(self, content: Sequence[Mapping[str, str]], instruction: str) -> str:
        """Returns the complete prompt, with the image's token where the template puts it.

        Args:
          content: of the user's turn: one {"type": "image"} and any number of {"type": "text",
            "text": ...}, in their order.
          instruction: of the system's turn; "" for none.
        Raises:
          InputError: a text holds a control token, or the template takes no such turns.
        """
        texts = [instruction, *(item.get("text", "") for item in content)]
        if tokens := sorted({t for t in self._control for text in texts if t in text}):
            raise InputError(
                f"got the control tokens {tokens} in the text {''.join(texts[1:])[:200]!r}; a "
                "question is plain text"
            )
        system = {"role": "system", "content": [{"type": "text", "text": instruction}]}
        user = {"role": "user", "content": [dict(item) for item in content]}
        messages = [system, user] if instruction else [user]
        try:
            return self._processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # jinja's, raised by templates that refuse
            raise InputError(f"the model's chat template refuses the request: {error}") from error

    def count(self, prompt: str, height: int, width: int) -> int:
        """Counts the tokens of a prompt with an image of a size in pixels."""
        return self._count_text(prompt) + self._added_by_image(height, width)

    def check(self, prompt: str, height: int, width: int) -> int:
        """Returns the number of tokens of a prompt with an image of a size in pixels.

        Raises:
          InputError: it is longer than the model's context.
        """
        count, limit = self.count(prompt, height, width), self.context_tokens
        if limit is not None and count >= limit:  # the reply needs a token too
            raise InputError(
                f"the prompt has {count} tokens with the image, and the model's context {limit}; "
                "expected a shorter question"
            )
        return count

    def refusal(self, question: str) -> str | None:
        """Returns why the verifier cannot be asked a question about a large image, else None."""
        try:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            self.check(self.prompt(content, AUDIT_INSTRUCTION), LARGEST_SIDE, LARGEST_SIDE)
        except InputError as error:
            return f"question {question[:80]!r} cannot be asked: {error}"
        return None

    def _count_text(self, prompt: str) -> int:
        # Templates often write the first token themselves; then the tokenizer must not add it.
        begins = self._tokenizer.bos_token
        add = begins is None or not prompt.startswith(begins)
        return len(self._tokenizer(prompt, add_special_tokens=add, verbose=False)["input_ids"])

    def _measure_image(self, height: int, width: int) -> int:
        """Counts the tokens by which an image of a size makes a prompt longer than its text."""
        prompt = self.prompt([{"type": "image"}, {"type": "text", "text": "?"}], "")
        image = Image.new("RGB", (width, height))
        full = self._processor(text=[prompt], images=[[image]], return_tensors="np")["input_ids"]
        return full.shape[1] - len(self._tokenizer(prompt)["input_ids"])


def _context_tokens(config: Any, tokenizer: Any) -> int | None:
    """Returns the longest sequence by the model's configuration, else by its tokenizer."""
    text_config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        limit = getattr(text_config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    limit = tokenizer.model_max_length
    return int(limit) if limit < NO_LENGTH else None
