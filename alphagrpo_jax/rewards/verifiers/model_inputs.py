"""Handles a model's inputs, as its processor makes them, and its caches: parts and copies."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache


def per_token(inputs: dict[str, Any]) -> list[str]:
    """Returns the names of a processor's outputs that have an entry for every token."""
    shape = inputs["input_ids"].shape
    return [
        name
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.shape[:2] == shape
    ]


def without_text(inputs: dict[str, Any]) -> dict[str, Any]:
    """Returns a processor's output without the inputs that describe the text."""
    text = per_token(inputs)
    return {name: value for name, value in inputs.items() if name not in text}


def equal_inputs(inputs: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Returns True if both have the same names and bit-equal tensors."""
    return inputs.keys() == expected.keys() and all(
        isinstance(value, Tensor) and torch.equal(value, expected[name])
        for name, value in inputs.items()
    )


def with_replies(inputs: dict[str, Any], replies: tuple[tuple[int, ...], ...]) -> dict[str, Any]:
    """Appends the tokens of replies to the right-padded rows."""
    mask = inputs["attention_mask"]
    width = max(len(reply) for reply in replies)
    longer = dict(inputs)
    for name in per_token(inputs):
        value = inputs[name]
        shape = (len(value), width, *value.shape[2:])
        # What a processor says of a text's last token, e.g. which images it sees, holds for these.
        last = value[torch.arange(len(value)), mask.sum(1) - 1][:, None].expand(shape)
        longer[name] = torch.cat([value, last], 1)
    longer["attention_mask"][:, mask.shape[1] :] = 0
    for row, (start, reply) in enumerate(zip(mask.sum(1).tolist(), replies, strict=True)):
        end = start + len(reply)
        for name in per_token(inputs):
            if name != "input_ids":
                longer[name][row, start:end] = inputs[name][row, start - 1]
        longer["input_ids"][row, start:end] = torch.tensor(reply, device=mask.device)
        longer["attention_mask"][row, end:] = 0
    return longer


def embedding_device(model: Any) -> torch.device:
    """Returns the device that takes a model's inputs, wherever its other layers are."""
    embeddings = model.get_input_embeddings()
    if embeddings.weight.device.type != "meta":
        return embeddings.weight.device
    return torch.device(embeddings._hf_hook.execution_device)  # accelerate fetches them from disk


def shallow_copy(cache: DynamicCache | None) -> DynamicCache | None:
    """Copies a cache so that the copy may grow while the original stays as it is.

    No tensor is copied: a layer that grows binds new tensors.
    """
    if cache is None:
        return None
    duplicate = copy.copy(cache)
    duplicate.layers = [copy.copy(layer) for layer in cache.layers]
    return duplicate


def inputs_behind(inputs: dict[str, Any], rows: int, width: int) -> dict[str, Any]:
    """Returns what a model with cross attention needs for tokens behind a prompt.

    Args:
      inputs: of the prompt, one row.
      rows, width: of the tokens int64[rows, width].
    Returns:
      The images that the prompt's last token sees, for each of the tokens; else nothing.
    """
    name = "cross_attention_mask"
    if name not in inputs:
        return {}
    return {name: inputs[name][:, -1:].expand(rows, width, *inputs[name].shape[2:])}
