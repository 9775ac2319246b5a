"""Training forward of the small verifier: many questions behind one shared image prefix.

Equals `LlavaForConditionalGeneration` on every single (prefix, question) pair (a test compares
them), but runs every image and every prefix once. Letters: N images, Q questions per image, T
question tokens, S prefix tokens, H heads, D width.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from alphagrpo_jax.shapes.pretraining.verifier_data import CELLS, SUBJECTS

GROUNDED_LAYERS = 3  # text layers after which a noun's state must predict the cells it names
GATHERED_LAYERS = 4  # ... and a question's last state the cells of its first two nouns


@dataclasses.dataclass(frozen=True)
class QuestionStates:
    """Hidden states of the questions' tokens, float32[N Q T, D] each, zero at padding."""

    grounded: Tensor  # after `GROUNDED_LAYERS` layers
    gathered: Tensor  # after `GATHERED_LAYERS` layers
    final: Tensor  # normalized, for the language head


class Probes(nn.Module):
    """Linear probes for the dense training losses; they are not part of the shipped model."""

    def __init__(self, width: int, patch_outputs: int):
        super().__init__()
        self.patch = nn.Linear(width, patch_outputs)  # of projected patch features
        self.cells = nn.Linear(width, CELLS)  # of the states of nouns in questions
        self.nothing = nn.Parameter(torch.randn(2, width) * 0.1)  # "no shape", "no color"
        self.subjects = nn.Linear(width, SUBJECTS * CELLS)  # of questions' last states


def patch_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Encodes float32[N, 3, h, w] in [-1, 1] as projected features float32[N, patches, D]."""
    output: Any = model.model.get_image_features(pixels, vision_feature_layer=-1)
    return torch.stack(list(output.pooler_output))


def embed_prefix(model: LlavaForConditionalGeneration, tokens: Tensor, patches: Tensor) -> Tensor:
    """Embeds the common prefix int64[S], image placeholders replaced: float32[N, S, D]."""
    embedded = model.get_input_embeddings()(tokens).expand(len(patches), -1, -1)
    is_image = (tokens == model.config.image_token_id)[None, :, None].expand_as(embedded)
    return embedded.masked_scatter(is_image, patches)


def _project(layer: Any, states: Tensor) -> Tensor:
    """Projects to queries, keys and values side by side, before rotation: float32[..., 3 D]."""
    attention, normed = layer.self_attn, layer.input_layernorm(states)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return torch.cat([projection(normed) for projection in projections], -1)


def _heads(layer: Any, projected: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple:
    """Splits float32[N, L, 3 D] into rotated query and key, and value: float32[N, H, L, D/H]."""
    size = layer.self_attn.head_dim
    query, key, value = projected.unflatten(2, (3, -1, size)).permute(2, 0, 3, 1, 4)
    return *apply_rotary_pos_emb(query, key, *rotary), value


def _finish(layer: Any, states: Tensor, attended: Tensor) -> Tensor:
    """Applies output projection and feed-forward of one layer, both float32[..., D]."""
    states = states + layer.self_attn.o_proj(attended)
    return states + layer.mlp(layer.post_attention_layernorm(states))


def _question_attention(
    query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor]
) -> Tensor:
    """Computes causal attention of each question to the prefix and to itself.

    Args:
      query, key, value: float32[N, H, Q, T, D/H].
      prefix: keys and values float32[N, H, S, D/H].
    """
    count, length, size = query.shape[2:]
    flat = query.flatten(2, 3) * size**-0.5
    to_prefix = (flat @ prefix[0].transpose(-1, -2)).unflatten(2, (count, length))
    future = torch.full((length, length), -torch.inf).triu(1)
    to_self = flat.unflatten(2, (count, length)) @ key.transpose(-1, -2) + future
    weights = torch.cat([to_prefix, to_self], -1).softmax(-1)
    from_prefix, from_self = weights.split([prefix[0].shape[2], length], -1)
    attended = (from_prefix.flatten(2, 3) @ prefix[1]).unflatten(2, (count, length))
    return attended + from_self @ value


def question_states(
    model: LlavaForConditionalGeneration, prefix: Tensor, questions: Tensor, ends: Tensor
) -> QuestionStates:
    """Runs the text model over questions that share their image's prefix.

    Args:
      model: the verifier.
      prefix: float32[N, S, D] from `embed_prefix`.
      questions: int64[N, Q, T], right-padded.
      ends: int64[N, Q] index of each question's last token.
    """
    text = model.model.language_model
    images, count, length = questions.shape
    start = prefix.shape[1]
    # All but attention runs on the M real tokens alone, without padding.
    real = (torch.arange(length) <= ends[..., None]).flatten().nonzero().squeeze(1)  # [M]

    def spread(packed: Tensor) -> Tensor:
        return packed.new_zeros(questions.numel(), packed.shape[1]).index_copy(0, real, packed)

    positions = (start + torch.arange(length)).repeat(count)[None]
    rotary_prefix = text.rotary_emb(prefix, torch.arange(start)[None])
    rotary = text.rotary_emb(prefix, positions)
    states = model.get_input_embeddings()(questions.flatten()[real])  # [M, D]
    after = []
    for index, layer in enumerate(text.layers):
        query, key, value = _heads(layer, _project(layer, prefix), rotary_prefix)
        shared = (key, value)
        if index + 1 < len(text.layers):  # the prefix is not read after the last layer
            attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            prefix = _finish(layer, prefix, attended.transpose(1, 2).flatten(2))
        projected = spread(_project(layer, states)).view(images, count * length, -1)
        query, key, value = (
            head.unflatten(2, (count, length)) for head in _heads(layer, projected, rotary)
        )
        attended = _question_attention(query, key, value, shared)
        attended = attended.permute(0, 2, 3, 1, 4).reshape(questions.numel(), -1)
        states = _finish(layer, states, attended[real])
        after.append(states)
    return QuestionStates(
        grounded=spread(after[GROUNDED_LAYERS - 1]),
        gathered=spread(after[GATHERED_LAYERS - 1]),
        final=spread(text.norm(states)),
    )


def last_states(states: Tensor, ends: Tensor) -> Tensor:
    """Selects states float32[N Q T, D] at each question's last token, `ends` int64[N, Q].

    Returns:
      float32[N, Q, D].
    """
    length = len(states) // ends.numel()
    first = torch.arange(ends.numel()).view(ends.shape) * length
    return states[first + ends]
