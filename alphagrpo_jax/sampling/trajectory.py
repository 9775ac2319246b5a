"""Samples trajectories: a task's events over its contexts, texts and images in order.

Texts are written for all rows at once, images by micro-batches. What compiles longest, the two
loops, takes contexts and row numbers alone: so tasks, training and evaluation share it.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from alphagrpo_jax import policy
from alphagrpo_jax.config import ImageOptions, RolloutOptions, part_of
from alphagrpo_jax.models import kv_cache, lora
from alphagrpo_jax.models.bagel import Bagel
from alphagrpo_jax.models.kv_cache import Context, GuidanceContexts
from alphagrpo_jax.runtime import sharding
from alphagrpo_jax.runtime.rows import RowLayout
from alphagrpo_jax.sampling import image, text
from alphagrpo_jax.sampling.contexts import (
    Inputs,
    context,
    event_block,
    extend,
    fill_pieces,
    first_rows,
    guidance_contexts,
    image_block,
    pixels,
    take_rows,
    with_pieces,
)  # fmt: skip
from alphagrpo_jax.tasks import (
    IMAGE,
    Plan,
    PlannedStep,
)  # fmt: skip
from alphagrpo_jax.types import (
    ImageSample,
    Piece,
    Rollout,
    TextSample,
    join_micro_batches,
    row_count,
    take_micro_batch,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RolloutSpec:
    """Everything that a rollout is compiled for; hashable, a static argument of jit."""

    plan: Plan
    system_tokens: tuple[int, ...]  # ids of the system prompt with its delimiters; may be empty
    grid: tuple[int, int]  # latent token rows and columns of an image
    rows_per_prompt: int
    stochastic: bool  # whether image steps have a stochastic window, which training needs
    options: RolloutOptions
    shards: int = 1  # of the mesh, over which rows lie
    micro_batch: int = 1 << 20  # most images at once over all shards

    def layout(self, rows: int) -> RowLayout:
        """Returns how so many rows lie on the mesh."""
        return RowLayout.make(rows, shards=self.shards, micro_batch=self.micro_batch)

    def sharing(self, rows: int) -> int:
        """Returns how many neighboring rows surely have the same prompt; see `RowLayout`."""
        return self.layout(rows).sharing(self.rows_per_prompt)


class Images(NamedTuple):
    """Images of one step, of a micro-batch or of all rows."""

    sample: ImageSample
    pixels: jax.Array  # uint8[B, Hpx, Wpx, 3]
    pieces: dict[int, Piece]  # by node: what their contexts needed, and their own


def sample_trajectories(
    model: Bagel,
    params: policy.PolicyParams,
    inputs: Inputs,
    key: jax.Array,
    first: jax.Array,
    start: jax.Array,
    temperature: jax.Array,
    *,
    spec: RolloutSpec,
) -> tuple[Rollout, jax.Array | None]:
    """Samples `rows_per_prompt` trajectories for each of P prompts: `prefill`, then `generate`.

    A trajectory depends on its own inputs, its number in the update and the key; not on how the
    update is cut into calls.

    Args:
      model: static.
      params: the policy.
      inputs: one block of P rows per input of the task, in order.
      key: typed key[] of the update.
      first: int32[], number of the first trajectory of this call in the update.
      start: int32[], first stochastic image step; beyond the schedule's end there is none.
      temperature: float32[], of texts; 0 is greedy.
      spec: static.
    Returns:
      The trajectories, and uint8[B, Hpx, Wpx, 3], the images of the last image step, if any.
    """
    params = merged_params(params, merge_lora=spec.options.merge_lora)
    prefix = prefill(model, params, inputs, spec=spec)
    return generate(model, params, prefix, key, first, start, temperature, spec=spec)


def merged_params(params: policy.PolicyParams, *, merge_lora: bool) -> policy.PolicyParams:
    """Returns weights with the adapters folded into a copy of the base, or unchanged."""
    if not merge_lora or params.lora is None:
        return params
    return policy.PolicyParams(base=lora.merge(params.base, params.lora, params.lora_scale))


def prefill(
    model: Bagel,
    params: policy.PolicyParams,
    inputs: Inputs,
    *,
    spec: RolloutSpec,
) -> Rollout:
    """Computes the contexts of the inputs of P prompts; the rollout has no samples yet.

    What all prompts share is computed and kept once, what belongs to a prompt once per prompt;
    pieces of generated events are None.
    """
    plan, group, prompts = spec.plan, spec.rows_per_prompt, row_count(inputs)
    layout = spec.layout(prompts * group)
    blocks = inputs
    if group > 1 and spec.shards > 1:
        # Few prompts, many devices: each computes some, then all get all.
        spread = jnp.minimum(jnp.arange(-(-prompts // spec.shards) * spec.shards), prompts - 1)
        blocks = sharding.constrain_rows(take_rows(inputs, spread))
    pieces: list[Piece | None] = [None] * len(plan.nodes)
    for index, node in enumerate(plan.nodes):
        if node.level != "trajectory":
            block = event_block(plan, node, blocks, (), spec.system_tokens)
            pieces[index] = extend(model, params, pieces, node, block)
    owner = jnp.minimum(jnp.arange(layout.rows, dtype=jnp.int32) // group, prompts - 1)
    for index, piece in enumerate(pieces):
        if piece is None or plan.nodes[index].level == "shared":
            continue
        if group == 1:
            pieces[index] = piece if layout.rows == prompts else take_rows(piece, owner)
        else:
            pieces[index] = dataclasses.replace(first_rows(piece, prompts), level="prompt")
    return Rollout(
        inputs=take_rows(inputs, owner), owner=owner, pieces=tuple(pieces), texts=(), images=()
    )


def generate(
    model: Bagel,
    params: policy.PolicyParams,
    prefix: Rollout,
    key: jax.Array,
    first: jax.Array,
    start: jax.Array,
    temperature: jax.Array,
    *,
    spec: RolloutSpec,
) -> tuple[Rollout, jax.Array | None]:
    """Runs the task's steps over the contexts of `prefill`, all rows at once.

    See `sample_trajectories`. A run samples step by step, by `training.sampling.run_steps`, to the
    same numbers.
    """
    rollout, images = prefix, None
    count = prefix.owner.shape[0]
    spec = dataclasses.replace(spec, shards=1, micro_batch=count)
    rows = first + jnp.arange(count, dtype=jnp.int32)
    for step in spec.plan.steps:
        event = jnp.int32(step.event)
        if step.kind != IMAGE:
            ctx, pieces = text_context(model, params, rollout, step=step, spec=spec)
            limits = {"max_tokens": spec.options.text_tokens, "top_p": spec.options.top_p}
            written = write_text(model, params, ctx, key, event, rows, temperature, **limits)
            rollout = add_text(rollout, *written, pieces, step=step)
            continue
        contexts, pieces = image_contexts(
            model, params, rollout, jnp.int32(0), step=step, spec=spec
        )
        numbers = (rows, noise_owners(rows, spec), start)
        sample, images = draw_image(
            model, params, contexts, key, event, *numbers,
            options=image_options(spec.options, step), grid=spec.grid, stochastic=spec.stochastic,
        )  # fmt: skip
        if step.node is not None:
            pieces[step.node] = absorb_image(
                model, params, rollout, images, pieces, jnp.int32(0),
                step=step, spec=spec,
            )  # fmt: skip
        rollout = add_images(rollout, [Images(sample, images, pieces)], spec=spec)
    return rollout, images


def text_context(
    model: Bagel,
    params: policy.PolicyParams,
    rollout: Rollout,
    *,
    step: PlannedStep,
    spec: RolloutSpec,
) -> tuple[Context, dict[int, Piece]]:
    """Joins the context of a text step, merged, and computes what it lacks.

    Args:
      rollout: all rows.
      step, spec: static.
    Returns:
      The context of all rows, and new pieces by node.
    """
    rows = rollout.owner.shape[0]
    sharing = dataclasses.replace(spec, micro_batch=rows).sharing(rows)  # texts are of all rows
    pieces, new = fill_pieces(
        model,
        params,
        rollout,
        step.gen,
        plan=spec.plan,
        system_tokens=spec.system_tokens,
        sharing=sharing,
    )
    return kv_cache.merge(context(pieces, step.gen, rollout.owner, sharing=sharing)), new


def write_text(
    model: Bagel,
    params: policy.PolicyParams,
    ctx: Context,
    key: jax.Array,
    event: jax.Array,
    rows: jax.Array,
    temperature: jax.Array,
    *,
    max_tokens: int,
    top_p: float,
) -> tuple[TextSample, Piece]:
    """Writes one text per row.

    Args:
      ctx: context of B rows, merged.
      key: typed key[] of the update.
      event: int32[], number of the step's event in its task.
      rows: int32[B], numbers of the rows in the update; a row's text depends on its own alone.
      temperature: float32[].
      max_tokens, top_p: static; see `text.sample_text`.
    Returns:
      The texts, and the piece that they add to their contexts.
    """
    sample, after = text.sample_text(
        model,
        params,
        ctx,
        _row_keys(jax.random.fold_in(key, event), rows),
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
    )
    return sample, Piece(after.segments[-1:], after.rope - ctx.rope)


def add_text(
    rollout: Rollout,
    sample: TextSample,
    piece: Piece,
    pieces: Mapping[int, Piece],
    *,
    step: PlannedStep,
) -> Rollout:
    """Appends the texts of a step, and their piece if a later step reads it."""
    text_piece = {} if step.node is None else {step.node: piece}
    return dataclasses.replace(
        rollout,
        pieces=with_pieces(rollout.pieces, {**pieces, **text_piece}),
        texts=(*rollout.texts, sample),
    )


def cut_text(rollout: Rollout, length: int, *, step: PlannedStep) -> Rollout:
    """Cuts the texts of the newest text step, and their piece, to `length` slots."""
    sample = rollout.texts[-1]
    longest = sample.tokens.shape[1]
    drop = longest - length
    texts = TextSample(
        tokens=sample.tokens[:, :length],
        mask=sample.mask[:, :length],
        scored=sample.scored[:, : longest - 1 - drop],
        log_prob=sample.log_prob[:, : longest - 1 - drop],
        truncated=sample.truncated,
    )
    pieces = list(rollout.pieces)
    piece = None if step.node is None else pieces[step.node]
    if step.node is not None and piece is not None:
        segment = piece.segments[0]
        short = kv_cache.Segment(
            segment.k[..., :length, :], segment.v[..., :length, :], segment.valid[:, :length]
        )
        pieces[step.node] = dataclasses.replace(piece, segments=(short,))
    return dataclasses.replace(rollout, pieces=tuple(pieces), texts=(*rollout.texts[:-1], texts))


def image_contexts(
    model: Bagel,
    params: policy.PolicyParams,
    rollout: Rollout,
    number: jax.Array,
    *,
    step: PlannedStep,
    spec: RolloutSpec,
) -> tuple[GuidanceContexts, dict[int, Piece]]:
    """Joins the contexts of a micro-batch of an image step, and computes what they lack.

    Args:
      rollout: all rows.
      number: int32[], of the micro-batch.
      step, spec: static.
    Returns:
      The contexts, merged, and new pieces by node, both of the micro-batch.
    """
    rows = take_micro_batch(spec.layout(rollout.owner.shape[0]), rollout, number)
    nodes, sharing = (*step.gen, *step.cfg_text, *step.cfg_img), spec.sharing(len(rollout.owner))
    pieces, new = fill_pieces(
        model,
        params,
        rows,
        nodes,
        plan=spec.plan,
        system_tokens=spec.system_tokens,
        sharing=sharing,
    )
    return guidance_contexts(pieces, step, rows.owner, sharing=sharing), new


def draw_image(
    model: Bagel,
    params: policy.PolicyParams,
    contexts: GuidanceContexts,
    key: jax.Array,
    event: jax.Array,
    rows: jax.Array,
    owners: jax.Array,
    start: jax.Array,
    *,
    options: ImageOptions,
    grid: tuple[int, int],
    stochastic: bool,
) -> tuple[ImageSample, jax.Array]:
    """Samples one image per row, each from its trajectory's own keys.

    Args:
      contexts: of B rows, merged.
      key: typed key[] of the update.
      event: int32[], number of the step's event in its task.
      rows: int32[B], numbers of the rows in the update.
      owners: int32[B]; rows of one number start from the same noise.
      start: int32[], first stochastic step.
      options, grid, stochastic: static.
    Returns:
      The samples and their pixels, uint8[B, Hpx, Wpx, 3].
    """
    chex.assert_rank([rows, owners, start], [1, 1, 0])
    (high, wide), width = grid, model.config.latent_width
    initial_keys, noise_keys = jax.random.split(jax.random.fold_in(key, event))
    sample_noise = functools.partial(
        jax.random.normal, shape=(high * wide, width), dtype=jnp.float32
    )
    initial = jax.vmap(sample_noise)(_row_keys(initial_keys, owners))
    sample = image.sample_image(
        model,
        params,
        contexts,
        initial,
        _row_keys(noise_keys, rows),
        start,
        options=options,
        grid=grid,
        stochastic=stochastic,
    )
    return sample, pixels(model, params, sample.latents, grid)


def noise_owners(rows: Any, spec: RolloutSpec) -> Any:
    """Returns the numbers by which rows start from the same noise: their own or their group's."""
    return rows // spec.rows_per_prompt if spec.options.shared_noise else rows


def absorb_image(
    model: Bagel,
    params: policy.PolicyParams,
    rollout: Rollout,
    images: jax.Array,
    pieces: Mapping[int, Piece],
    number: jax.Array,
    *,
    step: PlannedStep,
    spec: RolloutSpec,
) -> Piece:
    """Computes what a micro-batch of generated images adds to their contexts.

    Args:
      rollout: all rows.
      images: uint8[B, Hpx, Wpx, 3], of the micro-batch.
      pieces: of the micro-batch, from `image_contexts`.
      number: int32[], of the micro-batch.
      step, spec: static.
    """
    rows = take_micro_batch(spec.layout(rollout.owner.shape[0]), rollout, number)
    assert step.node is not None  # a later step reads the images
    node, complete = spec.plan.nodes[step.node], with_pieces(rows.pieces, pieces)
    block, sharing = image_block(model, images), spec.sharing(len(rollout.owner))
    return extend(model, params, complete, node, block, rows.owner, sharing=sharing)


def add_images(rollout: Rollout, micro_batches: Sequence[Images], *, spec: RolloutSpec) -> Rollout:
    """Appends the images of a step, and their pieces, from all its micro-batches."""
    layout = spec.layout(rollout.owner.shape[0])
    joined: Images = join_micro_batches(layout, micro_batches)
    return dataclasses.replace(
        rollout,
        pieces=with_pieces(rollout.pieces, joined.pieces),
        images=(*rollout.images, joined.sample),
    )


def image_options(options: RolloutOptions, step: PlannedStep) -> ImageOptions:
    """Returns the options of one image step: behind another image, guidance is that of edits."""
    chosen = part_of(options, ImageOptions)
    return dataclasses.replace(chosen, guidance=options.edit_guidance) if step.edits else chosen


def _row_keys(key: jax.Array, rows: jax.Array) -> jax.Array:
    """Derives one key per row number, typed key[B]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
