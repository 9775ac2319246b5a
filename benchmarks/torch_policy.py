"""Samples and scores texts and images by a `TorchBagel`; see `benchmarks.torch_peer`."""

import dataclasses
from typing import NamedTuple

import torch
from torch.nn import functional as F

from alphagrpo_jax.config import ImageOptions
from alphagrpo_jax.sampling.image import noise_levels
from benchmarks.torch_bagel import TorchBagel, TorchContext
from benchmarks.torch_layers import Past


class TextLengths(NamedTuple):
    """Lengths that texts are to have, and what is counted of them."""

    tokens: torch.Tensor  # int64[B], with both delimiters
    sampled: torch.Tensor  # int64[B], without <|im_start|> and an appended <|im_end|>


class TorchTexts(NamedTuple):
    """Written texts, right padded to the longest."""

    tokens: torch.Tensor  # int64[B, T]
    log_prob: torch.Tensor  # float32[B, T - 1], the sampler's own
    mask: torch.Tensor  # bool[B, T]
    scored: torch.Tensor  # bool[B, T - 1]


class TorchImages(NamedTuple):
    """Sampled images and their stochastic steps."""

    before: torch.Tensor  # float32[B, J, M, C]
    after: torch.Tensor  # float32[B, J, M, C]
    log_prob: torch.Tensor  # float32[B, J], the sampler's own
    latents: torch.Tensor  # float32[B, M, C]


class TokenPlaces(NamedTuple):
    """The scored tokens of some texts: n of them."""

    index: torch.Tensor  # int64[n], `row * T + t` of the position before the token
    targets: torch.Tensor  # int64[n]


def extend_text(
    model: TorchBagel, ctx: TorchContext, tokens: torch.Tensor, mask: torch.Tensor
) -> TorchContext:
    """Appends one text per row, int64[B, T] under bool[B, T]."""
    visible = _causal(ctx, mask)
    past = Past(ctx.keys, ctx.values, None)
    _, cache = model.text_hidden(
        tokens, ctx.rope, past, model.additive_mask(visible), keep_cache=True
    )
    keys, values = (torch.stack(arrays) for arrays in zip(*cache, strict=True))
    return TorchContext(
        torch.cat([ctx.keys, keys], 3),
        torch.cat([ctx.values, values], 3),
        torch.cat([ctx.valid, mask], 1),
        ctx.rope + mask.sum(1),
    )


def write_text(
    model: TorchBagel,
    ctx: TorchContext,
    length: int,
    lengths: TextLengths,
    *,
    temperature: float,
) -> TorchTexts:
    """Samples one text per row, of the lengths that it is told.

    Args:
      model: the policy.
      ctx: context of B rows with room for the texts; their keys and values are written into it.
      length: S of the context without the room.
      lengths: of the texts.
      temperature: of the softmax.
    """
    batch, device = ctx.rope.shape[0], ctx.rope.device
    ids, longest = model.config.tokens, int(lengths.tokens.max())
    tokens = torch.zeros((batch, longest), dtype=torch.int64, device=device)
    tokens[:, 0] = ids.im_start
    log_probs = torch.zeros((batch, longest), device=device)
    # Behind its end a row writes slots that no reader of its context will see.
    visible = ctx.valid.clone()
    visible[:, length:] = True
    mask = model.additive_mask(visible[:, None])
    for step in range(longest):
        slot = length + step
        past = Past(ctx.keys, ctx.values, slot)
        logits = model.next_logits(tokens[:, step], ctx.rope + step, past, mask[..., : slot + 1])
        if step + 1 == longest:  # <|im_end|> of the longest: only its keys and values are needed
            break
        log_p = F.log_softmax(logits / temperature, -1)
        # By the inverse of the distribution: on the CPU `torch.multinomial` takes 30 times as long.
        cumulative = log_p.exp().cumsum(-1)
        uniform = torch.rand((batch, 1), device=device) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, uniform)[:, 0].clamp(max=log_p.shape[1] - 1)
        token = torch.where(lengths.tokens == step + 2, ids.im_end, token)
        log_probs[:, step + 1] = log_p.gather(1, token[:, None])[:, 0]
        tokens[:, step + 1] = token
    slots = torch.arange(longest, device=device)
    mask = slots < lengths.tokens[:, None]
    scored = slots[1:] <= lengths.sampled[:, None]
    return TorchTexts(tokens, torch.where(scored, log_probs[:, 1:], 0.0), mask, scored)


def end_text(ctx: TorchContext, length: int, texts: TorchTexts) -> TorchContext:
    """Returns the context behind the texts; the room behind them is still there, not valid."""
    valid = ctx.valid.clone()
    valid[:, length : length + texts.mask.shape[1]] = texts.mask
    return dataclasses.replace(ctx, valid=valid, rope=ctx.rope + texts.mask.sum(1))


def sample_images(
    model: TorchBagel,
    ctx: TorchContext,
    length: int,
    initial: torch.Tensor,
    start: int,
    *,
    options: ImageOptions,
    grid: tuple[int, int],
) -> TorchImages:
    """Samples one image per row by ODE steps, `options.window` of them stochastic.

    Args:
      model: the policy.
      ctx: context of B rows with room for an image's tokens behind `length` slots.
      length: S of the context without the room.
      initial: float32[B, M, C] noise.
      start: first stochastic step.
      options: schedule, window and sampler ("sde"), without guidance.
      grid: token rows and columns.
    """
    sigmas = torch.from_numpy(noise_levels(options))
    past = Past(ctx.keys, ctx.values, length)
    count = initial.shape[1] + 2
    visible = ctx.valid.clone()
    visible[:, length : length + count] = True
    mask = model.additive_mask(visible[:, None, : length + count])
    x, steps = initial, []
    for step in range(len(sigmas) - 1):
        level = sigmas[step : step + 1].to(x.device)
        v = model.velocity(x[:, None], level, ctx.rope, past, mask, grid)[:, 0]
        sigma, sigma_next = float(sigmas[step]), float(sigmas[step + 1])
        if not start <= step < start + options.window:
            x = x + (sigma_next - sigma) * v
            continue
        mean, std = transition(x, v, step, options)
        after = mean + std * (sigma - sigma_next) ** 0.5 * torch.randn_like(mean)
        steps.append((x, after, transition_log_prob(after, mean, std, sigma - sigma_next)))
        x = after
    before, after, log_prob = (torch.stack(arrays, 1) for arrays in zip(*steps, strict=True))
    return TorchImages(before, after, log_prob, x)


def transition(
    x: torch.Tensor, v: torch.Tensor, step: int, options: ImageOptions
) -> tuple[torch.Tensor, float]:
    """Computes mean and diffusion coefficient of a Flow-SDE step (Flow-GRPO, eq. 9)."""
    levels = noise_levels(options)
    sigma, sigma_next = float(levels[step]), float(levels[step + 1])
    below_one = float(levels[1]) if sigma >= 1.0 else sigma
    std = options.noise_level * (sigma / (1.0 - below_one)) ** 0.5
    dt = sigma_next - sigma
    drift = (1.0 + std**2 * (1.0 - sigma) / (2.0 * sigma)) * dt
    return x * (1.0 + std**2 / (2.0 * sigma) * dt) + v * drift, std


def transition_log_prob(
    after: torch.Tensor, mean: torch.Tensor, std: float, dt: float
) -> torch.Tensor:
    """Computes a step's log-prob, a mean over the latent: float32[B]."""
    return -(after - mean).square().mean((-2, -1)) / (2.0 * std**2 * dt)


def places(texts: TorchTexts) -> TokenPlaces:
    """Returns where the scored tokens stand."""
    rows, steps = texts.scored.nonzero(as_tuple=True)
    return TokenPlaces(rows * texts.tokens.shape[1] + steps, texts.tokens[rows, steps + 1])


def text_log_probs(
    model: TorchBagel, ctx: TorchContext, texts: TorchTexts, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes log-probs and entropies of scored tokens, float32[B, T - 1], 0 elsewhere.

    Texts and contexts are cut to the longest of the batch.
    """
    longest, context = int(texts.mask.sum(1).max()), int(ctx.valid.nonzero()[:, 1].max()) + 1
    cut = TorchTexts(
        texts.tokens[:, :longest],
        texts.log_prob[:, : longest - 1],
        texts.mask[:, :longest],
        texts.scored[:, : longest - 1],
    )
    index, targets = places(cut)
    past = Past(ctx.keys[:, :, :, :context], ctx.values[:, :, :, :context], None)
    visible = torch.cat([ctx.valid[:, None, :context].expand(-1, longest, -1), _lower(cut.mask)], 2)
    mask = model.additive_mask(visible)
    log_p, entropy = model.token_scores(
        cut.tokens, ctx.rope, past, mask, index, targets, temperature
    )
    empty = torch.zeros_like(texts.log_prob).flatten()
    rows, steps = cut.scored.nonzero(as_tuple=True)
    at = rows * texts.log_prob.shape[1] + steps
    shape = texts.log_prob.shape
    return empty.index_put((at,), log_p).view(shape), empty.index_put((at,), entropy).view(shape)


def image_log_probs(
    model: TorchBagel,
    ctx: TorchContext,
    images: TorchImages,
    start: int,
    *,
    options: ImageOptions,
    grid: tuple[int, int],
) -> torch.Tensor:
    """Computes log-probs float32[B, J] of stochastic steps; all J are versions in one sequence."""
    v = image_velocities(model, ctx, images.before, start, options=options, grid=grid)
    levels, columns = noise_levels(options), []
    for number in range(images.before.shape[1]):
        step = start + number
        mean, std = transition(images.before[:, number], v[:, number], step, options)
        dt = float(levels[step]) - float(levels[step + 1])
        columns.append(transition_log_prob(images.after[:, number], mean, std, dt))
    return torch.stack(columns, 1)


def image_velocities(
    model: TorchBagel,
    ctx: TorchContext,
    before: torch.Tensor,
    start: int,
    *,
    options: ImageOptions,
    grid: tuple[int, int],
) -> torch.Tensor:
    """Computes the velocities float32[B, J, M, C] of latents before their stochastic steps."""
    count, latents = before.shape[1:3]
    sigma = torch.from_numpy(noise_levels(options)[start : start + count]).to(before.device)
    numbers = torch.arange(count, device=before.device)
    version = torch.cat([numbers.repeat_interleave(2), numbers.repeat_interleave(latents)])
    context = int(ctx.valid.nonzero()[:, 1].max()) + 1
    among = (version[:, None] == version).expand(len(ctx.rope), -1, -1)
    before_image = ctx.valid[:, None, :context].expand(-1, len(version), -1)
    mask = model.additive_mask(torch.cat([before_image, among], 2))
    past = Past(ctx.keys[:, :, :, :context], ctx.values[:, :, :, :context], None)
    return model.velocity(before, sigma, ctx.rope, past, mask, grid)


def _causal(ctx: TorchContext, mask: torch.Tensor) -> torch.Tensor:
    """Lets tokens of a text see its context and themselves, bool[B, T, S + T]."""
    context = ctx.valid[:, None].expand(-1, mask.shape[1], -1)
    return torch.cat([context, _lower(mask)], 2)


def _lower(mask: torch.Tensor) -> torch.Tensor:
    """Lets query t see valid key s if `s <= t`, bool[B, T, T]."""
    length = mask.shape[1]
    lower = torch.ones((length, length), dtype=torch.bool, device=mask.device).tril()
    return lower & mask[:, None]
