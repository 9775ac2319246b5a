"""Samples texts with a key/value cache, all rows at once; computes the log-probs of texts."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from alphagrpo_jax import policy
from alphagrpo_jax.models import kv_cache
from alphagrpo_jax.models.bagel import Bagel
from alphagrpo_jax.models.kv_cache import Context
from alphagrpo_jax.ops import categorical
from alphagrpo_jax.ops.log_probs import TextLogProbs, by_blocks, target_log_probs
from alphagrpo_jax.types import TextSample


class _State(NamedTuple):
    """Carry of the loop; slot `step` of `tokens` is read next."""

    step: jax.Array  # int32[]
    cache: policy.DecodeCache
    tokens: jax.Array  # int32[B, T]
    log_prob: jax.Array  # float32[B, T], of the token in the same slot
    length: jax.Array  # int32[B], tokens so far, <|im_start|> included
    sampled: jax.Array  # int32[B], number of sampled tokens
    open: jax.Array  # bool[B], <|im_end|> not yet sampled
    active: jax.Array  # bool[B], the slot `step` holds a token that the cache lacks


def sample_text(
    model: Bagel,
    params: policy.PolicyParams,
    ctx: Context,
    keys: jax.Array,
    *,
    max_tokens: int,
    temperature: jax.Array,
    top_p: float,
) -> tuple[TextSample, Context]:
    """Samples one text per row, from `<|im_start|>` to `<|im_end|>`.

    A text that reaches its limit gets `<|im_end|>` appended, which is not scored. Row i's text
    depends on its own context and key only. Log-probs are of the full softmax at `temperature`,
    whatever `top_p` (AlphaGRPO, sampling).

    Args:
      model, params: the policy.
      ctx: context of B rows.
      keys: typed key[B].
      max_tokens: most new tokens, a sampled `<|im_end|>` included; T = max_tokens + 2.
      temperature: float32[]; 0 takes the likeliest token (log-probs then at temperature 1).
      top_p: static, in (0, 1].
    Returns:
      The sample, and the context followed by the text.
    """
    chex.assert_rank([keys, temperature], [1, 0])
    batch, length = keys.shape[0], max_tokens + 2
    ctx = kv_cache.merge(kv_cache.broadcast(ctx, batch))
    end = model.config.tokens.im_end
    tokens = jnp.zeros((batch, length), jnp.int32).at[:, 0].set(model.config.tokens.im_start)
    all_rows = jnp.ones((batch,), bool)
    state = _State(
        step=jnp.zeros((), jnp.int32),
        cache=policy.init_decode(model, ctx, length),
        tokens=tokens,
        log_prob=jnp.zeros((batch, length), jnp.float32),
        length=jnp.ones((batch,), jnp.int32),
        sampled=jnp.zeros((batch,), jnp.int32),
        open=all_rows,
        active=all_rows,
    )

    def step(state: _State) -> _State:
        token = jax.lax.dynamic_index_in_dim(state.tokens, state.step, axis=1, keepdims=False)
        cache, logits = policy.decode_step(model, params, ctx, state.cache, token, state.active)
        scaled = logits / jnp.where(temperature > 0, temperature, 1.0)
        log_p = jax.nn.log_softmax(scaled, axis=-1)
        token_ids = sample_tokens(log_p, keys, state.step, temperature=temperature, top_p=top_p)
        token_log_p = jnp.take_along_axis(log_p, token_ids[:, None], axis=1)[:, 0]
        room = state.step < max_tokens
        new = jnp.where(state.open, jnp.where(room, token_ids, end), 0)
        scored = state.open & room
        at = state.step + 1
        return _State(
            step=at,
            cache=cache,
            tokens=_set_column(state.tokens, new, at),
            log_prob=_set_column(state.log_prob, jnp.where(scored, token_log_p, 0.0), at),
            length=state.length + state.open.astype(jnp.int32),
            sampled=state.sampled + scored.astype(jnp.int32),
            open=state.open & (new != end),
            active=state.open,
        )

    final = jax.lax.while_loop(lambda state: jnp.any(state.active), step, state)
    slots = jnp.arange(length, dtype=jnp.int32)[None]
    mask = slots < final.length[:, None]
    sample = TextSample(
        tokens=final.tokens,
        mask=mask,
        scored=slots[:, 1:] <= final.sampled[:, None],
        log_prob=final.log_prob[:, 1:],
        truncated=final.length - 1 > final.sampled,
    )
    return sample, policy.end_decode(ctx, final.cache)


def sample_tokens(
    log_p: jax.Array, keys: jax.Array, step: jax.Array, *, temperature: jax.Array, top_p: float
) -> jax.Array:
    """Samples one token per row, int32[B], from log-probs float32[B, V], by key i and the step.

    Only tokens of the nucleus are sampled; temperature 0 takes the likeliest.
    """
    if top_p < 1.0:
        likely = categorical.nucleus(log_p, top_p=top_p)
        nucleus_log_p = jnp.where(likely, log_p, -jnp.inf)
    else:
        nucleus_log_p = log_p
    step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
    token_ids = categorical.sample(nucleus_log_p, jax.vmap(jax.random.uniform)(step_keys))
    return jnp.where(temperature > 0, token_ids, jnp.argmax(log_p, axis=-1)).astype(jnp.int32)


def _set_column(array: jax.Array, column: jax.Array, at: jax.Array) -> jax.Array:
    """Sets `array[:, at] = column`; does nothing where `at` lies beyond the end."""
    return array.at[:, at].set(column, mode="drop")


def text_log_probs(
    model: Bagel,
    params: policy.PolicyParams,
    ctx: Context,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    temperature: float,
    chunk: int = 0,
) -> TextLogProbs:
    """Computes log-probability and entropy of every token after the first.

    `log softmax(logits_t / temperature)[token_{t+1}]` of the full softmax, in float32
    (AlphaGRPO, sampling: top-p is not part of the scored distribution).

    Args:
      ctx: context before the text.
      tokens: int32[B, T], as for `extend_text`.
      mask: bool[B, T].
      temperature: divides the logits.
      chunk: static; so many slots at once. A chunk behind the end of all rows is not computed,
        which the device decides: one compiled function for texts of any length. 0: all at once.
    """
    chex.assert_rank([tokens, mask], 2)
    length = tokens.shape[1]

    def of_block(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = policy.text_logits(model, params, hidden)
        return target_log_probs(logits, targets, temperature=temperature)

    def of_chunk(ctx: Context, begin: int, end: int) -> tuple[Context, tuple]:
        after, hidden = policy.extend_text(
            model, params, ctx, tokens[:, begin:end], mask[:, begin:end]
        )
        targets = tokens[:, begin + 1 : end + 1]  # one less in the last chunk
        scores = by_blocks(of_block, hidden[:, : targets.shape[1]], targets)
        # Without the context so far, which `cond` would copy.
        return Context(after.segments[-1:], after.rope), scores

    chunks = []
    for begin in range(0, length - 1, chunk or length):
        end = min(begin + (chunk or length), length)
        compute = functools.partial(of_chunk, begin=begin, end=end)
        if begin:
            needed = jnp.any(mask[:, begin:])
            new, scores = jax.lax.cond(needed, compute, functools.partial(_zeros, compute), ctx)
        else:
            new, scores = compute(ctx)
        ctx = Context((*ctx.segments, *new.segments), new.rope)
        chunks.append(scores)
    log_prob, entropy = (jnp.concatenate(arrays, axis=1) for arrays in zip(*chunks, strict=True))
    valid = mask[:, 1:]
    return TextLogProbs(jnp.where(valid, log_prob, 0.0), jnp.where(valid, entropy, 0.0), valid)


def _zeros(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns zeros in place of what a function would return."""
    shapes = jax.eval_shape(function, *arguments)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
