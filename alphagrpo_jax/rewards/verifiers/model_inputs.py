"""Handles a processor's output as a dict of the model's inputs: parts, comparison, longer rows."""

from typing import Any

import torch
from torch import Tensor


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
