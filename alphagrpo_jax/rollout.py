"""Stage 2: runs a task's events over its contexts, writing texts and drawing images."""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from alphagrpo_jax import policy
from alphagrpo_jax.models import kv_cache, lora
from alphagrpo_jax.models.bagel import Bagel
from alphagrpo_jax.models.kv_cache import Context, GuidanceContexts
from alphagrpo_jax.sampling import image, text
from alphagrpo_jax.tasks import IMAGE, SYSTEM, TEXT, Node, Plan, PlannedStep
from alphagrpo_jax.types import ImageSample, Piece, Rollout, TextBlock, TextSample, map_rows


@dataclasses.dataclass(frozen=True)
class RolloutOptions:
    """What a rollout compiles for; hashable, a static argument of jit."""

    plan: Plan
    system_tokens: tuple[int, ...]  # ids of the system prompt with its delimiters; may be empty
    group_size: int
    max_text_tokens: int
    top_p: float
    image: image.ImageOptions
    shared_noise: bool  # one initial noise per group
    merge_lora: bool  # fold the adapters into a copy of the weights first


def rollout(
    model: Bagel,
    params: policy.PolicyParams,
    inputs: tuple[TextBlock, ...],
    key: jax.Array,
    first: jax.Array,
    start: jax.Array,
    temperature: jax.Array,
    *,
    options: RolloutOptions,
) -> tuple[Rollout, jax.Array]:
    """Draws `group_size` trajectories for each of P prompts: `prefill`, then `generate`.

    A trajectory depends on its own inputs, its number in the update and the key; not on how the
    update is cut into calls.

    Args:
      model: static.
      params: the policy.
      inputs: one block of P rows per text input of the task.
      key: typed key[] of the update.
      first: int32[], number of the first trajectory of this call in the update.
      start: int32[], first stochastic image step; beyond the schedule's end there is none.
      temperature: float32[], of texts; 0 is greedy.
      options: static.
    Returns:
      The trajectories, and uint8[B, Hpx, Wpx, 3], what the last image step drew.
    """
    params = drawing_params(params, merge_lora=options.merge_lora)
    given = prefill(model, params, inputs, options=options)
    return generate(model, params, given, key, first, start, temperature, options=options)


def drawing_params(params: policy.PolicyParams, *, merge_lora: bool) -> policy.PolicyParams:
    """The weights that rollouts use: adapters folded into a copy of the base, or as they are."""
    if not merge_lora or params.lora is None:
        return params
    return policy.PolicyParams(base=lora.merge(params.base, params.lora, params.lora_scale))


def prefill(
    model: Bagel,
    params: policy.PolicyParams,
    inputs: tuple[TextBlock, ...],
    *,
    options: RolloutOptions,
) -> Rollout:
    """What is given, before anything is generated: B = P * group_size rows without samples.

    What is the same for all prompts is computed once, what is a prompt's once per prompt; pieces
    of generated events are None.
    """
    plan, group = options.plan, options.group_size
    pieces: list[Piece | None] = [None] * len(plan.nodes)
    for index, node in enumerate(plan.nodes):
        if node.level != "trajectory":
            block = _input_block(plan, node, inputs, options.system_tokens)
            pieces[index] = _extend(model, params, pieces, node, block)
    repeated = (
        piece if piece is None or node.level == "shared" else repeat_rows(piece, group)
        for piece, node in zip(pieces, plan.nodes, strict=True)
    )
    per_row = tuple(repeat_rows(block, group) for block in inputs)
    return Rollout(inputs=per_row, pieces=tuple(repeated), texts=(), images=())


def generate(
    model: Bagel,
    params: policy.PolicyParams,
    given: Rollout,
    key: jax.Array,
    first: jax.Array,
    start: jax.Array,
    temperature: jax.Array,
    *,
    options: RolloutOptions,
) -> tuple[Rollout, jax.Array]:
    """The task's steps over what `prefill` has made; see `rollout`."""
    pieces = list(given.pieces)
    rows = first + jnp.arange(given.inputs[0].tokens.shape[0], dtype=jnp.int32)
    texts: list[TextSample] = []
    images: list[ImageSample] = []
    for step in options.plan.steps:
        if step.kind == IMAGE:
            images.append(_draw(model, params, step, pieces, key, rows, start, options))
            continue
        ctx = context(pieces, step.gen, rows.shape[0])
        sample, after = text.write(
            model,
            params,
            ctx,
            _row_keys(key, rows, step.event),
            max_tokens=options.max_text_tokens,
            temperature=temperature,
            top_p=options.top_p,
        )
        texts.append(sample)
        if step.node is not None:
            pieces[step.node] = Piece(after.segments[-1:], after.rope - ctx.rope)
    done = given.replace(pieces=tuple(pieces), texts=tuple(texts), images=tuple(images))
    return done, pixels(model, params, images[-1].latents, options.image.grid)


def rebuild(
    model: Bagel,
    params: policy.PolicyParams,
    trajectories: Rollout,
    *,
    plan: Plan,
    system_tokens: tuple[int, ...],
) -> tuple[Piece, ...]:
    """The context pieces of given trajectories under other parameters, from their tokens.

    Used where the context takes part in the gradient, and for the reference policy.
    """
    pieces: list[Piece] = []
    by_event = {step.event: step for step in plan.steps}
    for node in plan.nodes:
        if node.event in by_event:
            sample = trajectories.texts[by_event[node.event].index]
            block = TextBlock(sample.tokens, sample.mask)
        else:
            block = _input_block(plan, node, trajectories.inputs, system_tokens)
        pieces.append(_extend(model, params, pieces, node, block))
    return tuple(pieces)


def context(pieces: list[Piece] | tuple[Piece, ...], nodes: tuple[int, ...], rows: int) -> Context:
    """The context made of the given nodes' pieces, for `rows` rows."""
    ctx = kv_cache.empty(rows)
    for index in nodes:
        piece = pieces[index]
        own = kv_cache.broadcast(Context(piece.segments, piece.advance), rows)
        ctx = Context((*ctx.segments, *own.segments), ctx.rope + own.rope)
    return ctx


def guidance_contexts(
    pieces: list[Piece] | tuple[Piece, ...], step: PlannedStep, rows: int
) -> GuidanceContexts:
    """The three contexts of an image step, each merged into one segment."""
    return GuidanceContexts(
        *(
            kv_cache.merge(context(pieces, nodes, rows))
            for nodes in (step.gen, step.cfg_text, step.cfg_img)
        )
    )


def pixels(
    model: Bagel, params: policy.PolicyParams, latents: jax.Array, grid: tuple[int, int]
) -> jax.Array:
    """Latents float32[B, M, C] -> uint8[B, Hpx, Wpx, 3], truncated as the official decoder does."""
    images = policy.decode_latents(model, params, latents, grid)
    return ((images * 0.5 + 0.5) * 255.0).astype(jnp.uint8)


def repeat_rows(tree: TextBlock | Piece, count: int) -> TextBlock | Piece:
    """Every row `count` times in a row."""
    return map_rows(lambda axis, x: jnp.repeat(x, count, axis=axis), tree)


def _input_block(
    plan: Plan, node: Node, inputs: tuple[TextBlock, ...], system_tokens: tuple[int, ...]
) -> TextBlock:
    """The tokens of an input event."""
    if node.kind == SYSTEM:
        tokens = jnp.asarray(system_tokens, jnp.int32)[None]
        return TextBlock(tokens, jnp.ones(tokens.shape, bool))
    return inputs[plan.events[: node.event].count(TEXT)]


def _extend(
    model: Bagel,
    params: policy.PolicyParams,
    pieces: list[Piece | None],
    node: Node,
    block: TextBlock,
) -> Piece:
    before = context(pieces, node.before, block.tokens.shape[0])
    after, _ = policy.extend_text(model, params, before, block.tokens, block.mask)
    return Piece(after.segments[-1:], after.rope - before.rope)


def _draw(
    model: Bagel,
    params: policy.PolicyParams,
    step: PlannedStep,
    pieces: list[Piece],
    key: jax.Array,
    rows: jax.Array,
    start: jax.Array,
    options: RolloutOptions,
) -> ImageSample:
    chex.assert_rank([rows, start], [1, 0])
    grid, width = options.image.grid, model.config.latent_width
    owners = rows // options.group_size if options.shared_noise else rows
    initial_keys, noise_keys = jax.random.split(jax.random.fold_in(key, step.event))
    initial_keys = jax.vmap(jax.random.fold_in, (None, 0))(initial_keys, owners)
    noise_keys = jax.vmap(jax.random.fold_in, (None, 0))(noise_keys, rows)
    shape = (grid[0] * grid[1], width)
    initial = jax.vmap(lambda each: jax.random.normal(each, shape, jnp.float32))(initial_keys)
    contexts = guidance_contexts(pieces, step, rows.shape[0])
    return image.draw(model, params, contexts, initial, noise_keys, start, options=options.image)


def _row_keys(key: jax.Array, rows: jax.Array, event: int) -> jax.Array:
    """One key per trajectory for one event, typed key[B]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, event), rows)
