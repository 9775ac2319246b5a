"""Scores by two-tower models of Hugging Face: CLIP, SigLIP, PickScore and others of their kind.

One tower embeds the image, the other one the prompt; both embeddings lie in one space. A model
qualifies if its forward pass gives `image_embeds`, `text_embeds` and `logits_per_image`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging as transformers_logging

from alphagrpo_jax.rewards.verifiers.base import Score, VerifierLoadError, checked_image
from alphagrpo_jax.rewards.verifiers.prompting import NO_LENGTH

OUTPUTS = ("image_embeds", "text_embeds", "logits_per_image")
# SigLIP was trained on texts padded to the full length, and reads shorter ones differently.
PADDED_TO_FULL_LENGTH = ("siglip", "siglip2")
PROCESSOR_CONFIGS = ("processor_config.json", "preprocessor_config.json")
PROBE_SIDE = 32  # pixels of the image by which a model is tried


class TwoTowerScorer:
    """A `base.Scorer` over a two-tower model.

    Attributes:
      model: the model of transformers.
      processor: its processor.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        processor: str | Path | None = None,
        value: Literal["cosine", "logit", "probability"] = "cosine",
        truncate: bool = False,
        device: str = "cpu",
        dtype: str = "float32",
        num_threads: int | None = None,
    ) -> None:
        """Loads the model and tries it once.

        Args:
          path: a local model folder.
          processor: a local folder of the processor; None: the model's.
          value: the score: "cosine" of the two embeddings, in [-1, 1]; "logit", the model's
            `logits_per_image`, e.g. the number that PickScore states; or "probability",
            sigmoid(logit), which only models trained by a sigmoid loss mean (SigLIP).
          truncate: cut prompts that are longer than the model reads; else they have no score.
          device: where the model runs.
          dtype: of the weights, or "auto" for the folder's own.
          num_threads: fixed number of CPU threads of this process; None: unchanged.
        Raises:
          VerifierLoadError: no such folder, dtype or device, damaged or missing weights, or no
            two-tower model.
        """
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self._value, self._truncate = value, truncate
        self.model, self.processor = load(Path(path), processor, device, dtype)
        tokenizer = self.processor.tokenizer
        text_config = self.model.config.get_text_config()
        limits = [tokenizer.model_max_length, getattr(text_config, "max_position_embeddings", None)]
        stated = [limit for limit in limits if limit and limit < NO_LENGTH]
        self._most_tokens = min(stated) if stated else None
        self._control = sorted({*tokenizer.all_special_tokens} - {""})
        try:
            self.score([np.zeros((PROBE_SIDE, PROBE_SIDE, 3), np.uint8)], ["a"])
        # Models of other kinds fail here in many ways: arguments they lack, outputs they do not
        # give.
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise VerifierLoadError(
                f"the model in {str(path)!r} ({type(self.model).__name__}) scores no image by a "
                f"text ({type(error).__name__}: {error}); expected a two-tower model such as CLIP "
                f"or SigLIP, whose output has {', '.join(OUTPUTS)}"
            ) from error

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Score]:
        """Scores each image uint8[H, W, 3] by its prompt, one by one.

        Nothing depends on other images.

        Raises:
          ValueError: an image is not uint8[H, W, 3].
        """
        return [
            self._score(checked_image(image), prompt)
            for image, prompt in zip(images, prompts, strict=True)
        ]

    def _score(self, image: np.ndarray, prompt: str) -> Score:
        if tokens := [token for token in self._control if token in prompt]:
            return Score(
                None, f"got the control tokens {tokens} in the prompt {prompt!r}", permanent=True
            )
        tokenizer = self.processor.tokenizer
        length = len(tokenizer(prompt)["input_ids"])
        limit = self._most_tokens
        if limit is not None and length > limit and not self._truncate:
            return Score(
                None,
                f"the prompt has {length} tokens, the model reads {limit}: shorten it, "
                f"or cut such prompts by ?truncate=yes: {prompt!r}",
                permanent=True,
            )
        text_options: dict[str, Any] = {"padding": True}
        if limit is not None:
            text_options |= {"truncation": True, "max_length": limit}
        if limit is not None and self.model.config.model_type in PADDED_TO_FULL_LENGTH:
            text_options["padding"] = "max_length"
        # As a picture: of an array, a processor would guess which axis holds the channels.
        inputs = self.processor(
            images=[Image.fromarray(image)], text=[prompt], return_tensors="pt", **text_options
        ).to(self.model.device)
        with torch.inference_mode():
            outputs = self.model(**inputs)
        if self._value == "cosine":
            embeddings = outputs.image_embeds[0].double(), outputs.text_embeds[0].double()
            return Score(float(torch.cosine_similarity(*embeddings, dim=-1)))
        logit = outputs.logits_per_image[0, 0].double()
        return Score(float(logit if self._value == "logit" else logit.sigmoid()))


def load(
    folder: Path, processor_folder: str | Path | None, device: str, dtype: str
) -> tuple[Any, Any]:
    """Loads (model, processor) from local folders.

    Raises:
      VerifierLoadError: see `TwoTowerScorer`.
    """
    if not (folder / "config.json").is_file():
        raise VerifierLoadError(
            f"scorer folder {str(folder)!r} has no config.json; expected a local Hugging Face "
            "model folder; name one, or ORG/NAME of the hub, behind hf_clip:"
        )
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise VerifierLoadError(
            f"got dtype {dtype!r}, expected float32, bfloat16, float16 or auto (the folder's own)"
        )
    transformers_logging.disable_progress_bar()
    try:
        processor = AutoProcessor.from_pretrained(processor_folder or folder, local_files_only=True)
        loaded: Any = AutoModel.from_pretrained(
            folder, local_files_only=True, dtype=dtype, output_loading_info=True
        )
    except (ImportError, OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise VerifierLoadError(_explain(folder, error)) from error
    model, loading = loaded  # a pair because of output_loading_info
    if loading["missing_keys"]:  # transformers only warns, and leaves random numbers in them
        missing = sorted(loading["missing_keys"])
        raise VerifierLoadError(
            f"scorer folder {str(folder)!r} lacks {len(missing)} tensors of its model, e.g. "
            f"{missing[:3]}; they would be random and so would rewards: fetch its weights again"
        )
    for name in ("tokenizer", "image_processor"):
        if getattr(processor, name, None) is None:
            raise VerifierLoadError(
                f"scorer folder {str(folder)!r}: its processor {type(processor).__name__} has no "
                f"{name}; expected a two-tower model such as CLIP or SigLIP with all its files, or "
                "the processor of another one, ?processor=ORG/NAME"
            )
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:  # what PyTorch raises for a device it lacks
        raise VerifierLoadError(
            f"the scorer in {str(folder)!r} cannot run on device {device!r}: {error}"
        ) from error
    return model.eval(), processor


def _explain(folder: Path, error: Exception) -> str:
    """Returns the message of a failed load, with the fix where it is known."""
    message = f"cannot load the scorer in {str(folder)!r}: {error}"
    if not any((folder / name).is_file() for name in PROCESSOR_CONFIGS):
        message += (
            "\nFix: the folder has no processor of its own; name the one that the model's card "
            "uses, ?processor=ORG/NAME"
        )
    if "sentencepiece" in str(error).lower():
        message += "\nFix: this model's tokenizer needs sentencepiece; pip install sentencepiece"
    return message
