"""Training forward of the small verifier: many questions behind one shared image prefix.

It computes what `LlavaForConditionalGeneration` computes for each (prefix, question) pair on its
own (a test compares them), but every image and every prefix is run once. Letters: N images, Q
questions per image, T question tokens, S prefix tokens, H heads, D width.
"""

import dataclasses

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from alphagrpo_jax.shapes.pretraining.verifier_data import CELLS, SUBJECTS

GROUNDED_LAYERS = 3  # text layers after which a noun's state must know which cells it names
GATHERED_LAYERS = 4  # ... and a question's last state the cells of its first two nouns


@dataclasses.dataclass(frozen=True)
class QuestionStates:
    """States of the real tokens of N questions sets, float32[N Q T, D] each, zero at padding."""

    grounded: Tensor  # after `GROUNDED_LAYERS` layers
    gathered: Tensor  # after `GATHERED_LAYERS` layers
    final: Tensor  # normalized, for the language head


class Probes(nn.Module):
    """Linear read-outs for the dense training losses; they are not part of the shipped model."""

    def __init__(self, width: int, patch_outputs: int):
        super().__init__()
        self.patch = nn.Linear(width, patch_outputs)  # of projected patch features
        self.cells = nn.Linear(width, CELLS)  # of the states of nouns in questions
        self.nothing = nn.Parameter(torch.randn(2, width) * 0.1)  # "no shape", "no colour"
        self.subjects = nn.Linear(width, SUBJECTS * CELLS)  # of questions' last states


def patch_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """float32[N, 3, h, w] in [-1, 1] -> projected features float32[N, patches, D]."""
    output = model.model.get_image_features(pixels, vision_feature_layer=-1)
    return torch.stack(list(output.pooler_output))


def embed_prefix(model: LlavaForConditionalGeneration, tokens: Tensor, patches: Tensor) -> Tensor:
    """Embeds the common prefix int64[S], image placeholders replaced: float32[N, S, D]."""
    embedded = model.get_input_embeddings()(tokens).expand(len(patches), -1, -1)
    is_image = (tokens == model.config.image_token_id)[None, :, None].expand_as(embedded)
    return embedded.masked_scatter(is_image, patches)


def _project(layer: nn.Module, states: Tensor) -> Tensor:
    """Queries, keys and values side by side, before rotation: float32[..., 3 D]."""
    attention, normed = layer.self_attn, layer.input_layernorm(states)
    return torch.cat(
        [part(normed) for part in (attention.q_proj, attention.k_proj, attention.v_proj)], -1
    )


def _heads(layer: nn.Module, projected: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple:
    """float32[N, L, 3 D] -> rotated query and key, value: float32[N, H, L, D/H]."""
    size = layer.self_attn.head_dim
    parts = projected.unflatten(2, (3, -1, size)).permute(2, 0, 3, 1, 4)
    return *apply_rotary_pos_emb(parts[0], parts[1], *rotary), parts[2]


def _finish(layer: nn.Module, states: Tensor, attended: Tensor) -> Tensor:
    """Output projection and feed-forward of one layer, both float32[..., D]."""
    states = states + layer.self_attn.o_proj(attended)
    return states + layer.mlp(layer.post_attention_layernorm(states))


def _ask(query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor]) -> Tensor:
    """Causal attention of each question to the prefix and to itself.

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

    Everything but attention is done for real tokens only (M of them), padding left out.
    Args:
      prefix: float32[N, S, D] from `embed_prefix`.
      questions: int64[N, Q, T], right-padded.
      ends: int64[N, Q] index of each question's last token.
    """
    text = model.model.language_model
    images, count, length = questions.shape
    start = prefix.shape[1]
    real = (torch.arange(length) <= ends[..., None]).flatten().nonzero().squeeze(1)  # [M]

    def spread(packed: Tensor) -> Tensor:
        return packed.new_zeros(questions.numel(), packed.shape[1]).index_copy(0, real, packed)

    positions = (start + torch.arange(length)).repeat(count)[None]
    rotary_prefix = text.rotary_emb(prefix, torch.arange(start)[None])
    rotary = text.rotary_emb(prefix, positions)
    asked = model.get_input_embeddings()(questions.flatten()[real])  # [M, D]
    after = []
    for index, layer in enumerate(text.layers):
        query, key, value = _heads(layer, _project(layer, prefix), rotary_prefix)
        shared = (key, value)
        if index + 1 < len(text.layers):  # nobody reads the prefix after the last layer
            attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            prefix = _finish(layer, prefix, attended.transpose(1, 2).flatten(2))
        projected = spread(_project(layer, asked)).view(images, count * length, -1)
        heads = _heads(layer, projected, rotary)
        attended = _ask(*(part.unflatten(2, (count, length)) for part in heads), shared)
        attended = attended.permute(0, 2, 3, 1, 4).reshape(questions.numel(), -1)
        asked = _finish(layer, asked, attended[real])
        after.append(asked)
    return QuestionStates(
        grounded=spread(after[GROUNDED_LAYERS - 1]),
        gathered=spread(after[GATHERED_LAYERS - 1]),
        final=spread(text.norm(asked)),
    )


def last_states(states: Tensor, ends: Tensor) -> Tensor:
    """float32[N Q T, D] at each question's last token, `ends` int64[N, Q]: float32[N, Q, D]."""
    length = len(states) // ends.numel()
    first = torch.arange(ends.numel()).view(ends.shape) * length
    return states[first + ends]
