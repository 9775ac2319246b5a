"""Text-only chat with a local Hugging Face model: the decomposer's language model."""

import copy
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pydantic
import torch
import transformers
from safetensors import SafetensorError
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from alphagrpo_jax.rewards.verifiers.chat.base import LanguageModelError, Message


class HFChat:
    """A causal LM, or the language side of an image-text-to-text model; greedy.

    Thread-safe; replies are generated one at a time.
    """

    def __init__(self, path: str | Path, *, device: str, dtype: str, max_tokens: int) -> None:
        """Loads the model.

        Args:
          path: a local model folder with a chat template.
          device: where it runs.
          dtype: of the weights, or "auto" for the folder's own.
          max_tokens: most new tokens of a reply.
        Raises:
          LanguageModelError: no such folder, damaged weights, or no chat template.
        """
        folder = Path(path)
        if not (folder / "config.json").is_file():
            raise LanguageModelError(
                f"{str(folder)!r} has no config.json; expected a local Hugging Face model folder",
                kind="failed",
                retryable=False,
            )
        transformers.utils.logging.disable_progress_bar()  # the command shows its progress itself
        if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise LanguageModelError(
                f"got dtype {dtype!r}, expected float32, bfloat16, float16 or auto",
                kind="failed",
                retryable=False,
            )
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
            kind = (
                transformers.AutoModelForCausalLM
                if causal
                else transformers.AutoModelForImageTextToText
            )
            loaded: Any = kind.from_pretrained(  # a pair because of output_loading_info
                folder, local_files_only=True, dtype=dtype, output_loading_info=True
            )
            self._model, loading = loaded
            source = transformers.AutoTokenizer if causal else transformers.AutoProcessor
            templates = source.from_pretrained(folder, local_files_only=True)
        except (ImportError, OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise LanguageModelError(
                f"cannot load the language model in {str(folder)!r}: {error}",
                kind="failed",
                retryable=False,
            ) from error
        if loading["missing_keys"]:  # transformers only warns, and leaves random numbers in them
            missing = sorted(loading["missing_keys"])
            raise LanguageModelError(
                f"{str(folder)!r} lacks {len(missing)} tensors of its model, e.g. {missing[:3]}; "
                "fetch its weights again",
                kind="failed",
                retryable=False,
            )
        if not templates.chat_template:
            raise LanguageModelError(
                f"{str(folder)!r} has no chat template; expected a chat model with all its files",
                kind="failed",
                retryable=False,
            )
        self._templates, self._causal = templates, causal
        self._tokenizer = templates if causal else templates.tokenizer
        try:
            self._model.to(device).eval()
        except (RuntimeError, AssertionError) as error:  # PyTorch's, for a device it lacks
            raise LanguageModelError(
                f"the language model in {str(folder)!r} cannot run on device {device!r}: {error}",
                kind="failed",
                retryable=False,
            ) from error
        self._device, self._lock = device, threading.Lock()
        self._generation = copy.deepcopy(self._model.generation_config)
        self._generation.update(
            do_sample=False, temperature=None, top_p=None, top_k=None, max_new_tokens=max_tokens
        )
        if self._generation.pad_token_id is None:
            self._generation.pad_token_id = self._tokenizer.pad_token_id

    def complete(
        self, messages: Sequence[Message], form: type[pydantic.BaseModel] | None = None
    ) -> str:
        """Returns the greedy reply; ignores the form. See `base.LanguageModel`."""
        chat = list(messages)
        if not self._causal:  # processors expect a turn's content as a list of parts
            chat = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
        try:
            prompt = self._templates.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=False
            )
        except jinja2.TemplateError as error:
            raise LanguageModelError(
                f"the model's chat template refuses the conversation: {error}",
                kind="refused",
                retryable=False,
            ) from error
        # The template has written all special tokens; the tokenizer would add some once more.
        inputs = self._tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        inputs = inputs.to(self._device)
        length = inputs["input_ids"].shape[1]
        try:
            with self._lock, torch.inference_mode():
                tokens = self._model.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    generation_config=self._generation,
                )[0, length:]
        except (RuntimeError, IndexError, ValueError) as error:
            raise LanguageModelError(
                f"the model failed at a conversation of {length} tokens: {error}",
                kind="failed",
                retryable=False,
            ) from error
        if len(tokens) == self._generation.max_new_tokens and not self._is_end(int(tokens[-1])):
            raise LanguageModelError(
                f"the reply was cut at {len(tokens)} tokens; raise --max-tokens",
                kind="cut",
                retryable=False,
            )
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _is_end(self, token: int) -> bool:
        """Returns True for a token that ends replies."""
        ends = self._generation.eos_token_id
        return token in (ends if isinstance(ends, list) else [ends])
