"""Cases c1, c3, c4, c12: tokenizer and position ids, text logits, greedy decoding, resizing."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from alphagrpo_jax import policy
from alphagrpo_jax.models import kv_cache
from alphagrpo_jax.models.kv_cache import Context
from alphagrpo_jax.models.mot import Tokens
from alphagrpo_jax.ops.log_probs import token_log_probs
from alphagrpo_jax.ops.masked import causal_mask
from alphagrpo_jax.ops.posembed import grid_ids
from alphagrpo_jax.parity.model import Port, cache_arrays, context_sizes
from alphagrpo_jax.runtime.images import ImageSizes, fitted_size, resize, to_float

Outputs = dict[str, np.ndarray | jax.Array]


def tokenizer(port: Port) -> Outputs:
    """Recomputes c1: ids of texts, and table rows of image tokens."""
    out = {}
    for name, match in port.fixture.matching(r"(c1\.str\d+)_ids"):
        out[name] = np.asarray(port.tokenizer.encode(port.fixture.texts[match.group(1)]), np.int32)
    for name, match in port.fixture.matching(r"c1\.posids\.extrapolate\.h(\d+)w(\d+)p(\d+)m(\d+)"):
        height, width, patch, side = map(int, match.groups())
        out[name] = grid_ids((height // patch, width // patch), side)
    return out


def prompt_ids(port: Port, case: str) -> Outputs:
    """Tokenizes the case's texts, for every recorded `NAME_ids` with a text NAME."""
    recorded = port.fixture.matching(rf"({case}\.\w+?)(_prompt)?_ids")
    out = {}
    for name, _ in recorded:
        text = name.removesuffix("_ids")
        for candidate in (text, text + "_prompt"):
            if candidate in port.fixture.texts:
                out[name] = port.ids_of(candidate)
    return out


def text_log_probs(
    port: Port, logits: jax.Array, ids: np.ndarray, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Computes log-probs and entropies float32[T - 1] from logits float32[T, V]."""
    tokens = jnp.asarray(ids)[None]
    mask = jnp.ones(tokens.shape, bool)
    row = token_log_probs(logits[None, :-1], tokens, mask, temperature=temperature)
    return row.log_prob[0], row.entropy[0]


def log_prob_outputs(port: Port, prefix: str, logits: jax.Array, ids: np.ndarray) -> Outputs:
    """Recomputes every recorded `PREFIX_logprobs_T...` and `PREFIX_entropy_T...`."""
    out = {}
    pattern = re.escape(prefix) + r"_(logprobs|entropy)_T([\d.]+)"
    for name, match in port.fixture.matching(pattern):
        log_prob, entropy = text_log_probs(port, logits, ids, float(match.group(2)))
        out[name] = log_prob if match.group(1) == "logprobs" else entropy
    return out


def prefill(port: Port) -> Outputs:
    """Recomputes c3: logits, layers and cache of a prompt; log-probs of a text after it."""
    out = prompt_ids(port, "c3")
    ids = port.ids_of("c3.prompt")
    ctx, hidden = port.append_ids(kv_cache.empty(1), ids)
    out["c3.prompt_hidden"] = hidden
    out["c3.prompt_logits"] = port.logits(port.params, hidden[None])[0]
    for index, layer in enumerate(_text_layers(port, ids)):
        out[f"c3.prompt_layer{index}"] = layer.und[0]
    out |= context_sizes(ctx, "c3.ctx")
    out["c3.ctx.key_cache"], out["c3.ctx.value_cache"] = cache_arrays(ctx)
    second = port.ids_of("c3.second")
    _, hidden = port.append_ids(ctx, second)
    logits = port.logits(port.params, hidden[None])[0]
    out["c3.second_logits"] = logits
    return out | log_prob_outputs(port, "c3.second", logits, second)


def _text_layers(port: Port, ids: np.ndarray) -> list[Tokens]:
    """Returns the outputs of all decoder layers for a text in an empty context."""
    und = port.call(port.params, method="embed_text", tokens=jnp.asarray(ids)[None])
    positions = jnp.arange(len(ids), dtype=jnp.int32)[None]
    self_mask = causal_mask(jnp.ones(positions.shape, bool))
    return port.layers(Tokens(und, None), positions, kv_cache.empty(1), self_mask)


def greedy(
    port: Port, ctx: Context, max_length: int, stop: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes by the official greedy loop.

    The result starts with `<|im_start|>`, never holds the stop token, and loses the last
    prediction: reproduced here only, the policy's own sampler keeps it.

    Args:
      port: the fixture.
      ctx: context of one row.
      max_length: tokens of the result, the first included.
      stop: id that ends the text, or None.
    Returns:
      int32[n] tokens, and float32[n, V], the logits after each of them.
    """
    ctx = kv_cache.merge(ctx)
    cache = policy.init_decode(port.model, ctx, max_length)
    token, tokens, rows = port.tokenizer.special.im_start, [], []
    while len(tokens) < max_length:
        tokens.append(token)
        cache, logits = port.decode_step(port.params, ctx, cache, jnp.array([token], jnp.int32))
        rows.append(np.asarray(logits[0]))
        token = int(rows[-1].argmax())
        if token == stop:
            break
    return np.asarray(tokens, np.int32), np.stack(rows)


def decoding(port: Port) -> Outputs:
    """Recomputes c4: greedy texts after several prompts."""
    out = prompt_ids(port, "c4")
    ctx = port.text(kv_cache.empty(1), "c3.prompt")
    length = int(port.fixture.number("c4.tokens", r"max_length=(\d+)"))
    tokens, logits = greedy(port, ctx, length, None)
    out |= {"c4.tokens": tokens, "c4.step_logits": logits, "c4.top2_margin": _margin(logits)}
    out["c4.tokens_stopped"], _ = greedy(port, ctx, length, int(port.array("c4.stop_id")))
    for name, match in port.fixture.matching(r"(c4\.extra\d+)_tokens"):
        prefix = match.group(1)
        extra_ctx = port.text(kv_cache.empty(1), f"{prefix}_prompt")
        out[name], logits = greedy(port, extra_ctx, length, None)
        out[f"{prefix}_top2_margin"] = _margin(logits)
    return out


def _margin(logits: np.ndarray) -> np.ndarray:
    """Returns best minus second best of every row."""
    top = np.sort(logits, axis=-1)
    return top[:, -1] - top[:, -2]


def resizing(port: Port) -> Outputs:
    """Recomputes c12: sizes after the two transforms, and one small image through a transform."""
    out = {}
    for name in ("c12.resize_vae_wh", "c12.resize_vit_wh"):
        rule = _transform(port, name)
        sizes = [fitted_size(int(w), int(h), rule) for w, h in port.array("c12.resize_in_wh")]
        out[name] = np.asarray(sizes, np.int32)
    image = Image.fromarray(port.array("c12.image_uint8"))
    resized = resize(image, _transform(port, "c12.image_resized_uint8"))
    out["c12.image_resized_uint8"] = np.asarray(resized)
    out["c12.image_tensor"] = to_float(resized).transpose(2, 0, 1)
    return out


def _transform(port: Port, name: str) -> ImageSizes:
    """Parses the rule written `ImageTransform(max, min, stride)` in an array's description."""
    match = re.search(r"ImageTransform\((\d+), *(\d+), *(\d+)\)", port.fixture.descriptions[name])
    assert match is not None, f"the description of {name} names no ImageTransform"
    return ImageSizes(*map(int, match.groups()))
