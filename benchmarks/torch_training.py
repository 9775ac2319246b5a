"""A training step of the embedded default in plain PyTorch; see `benchmarks.torch_peer`.

Rollout, log-probs before the update, and the update, for task `rt2i` with adapters, "sde" steps,
no guidance and no KL term, which is what `configs/grpo.py` sets.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from alphagrpo_jax.config import Config, ConfigError, ImageOptions
from alphagrpo_jax.runtime.tokenizer import Tokenizer
from alphagrpo_jax.tasks import THINK_SYSTEM_PROMPT
from alphagrpo_jax.types import TextBlock
from benchmarks import torch_policy
from benchmarks.torch_bagel import TorchBagel, TorchContext
from benchmarks.torch_policy import TextLengths, TorchImages, TorchTexts

Gradients = dict[tuple[str, int, str], torch.Tensor]  # by path, layer and "a" or "b"


PIXEL_ROWS = 16  # images that are decoded at once: of more, the arrays leave the CPU's caches


class TorchTrajectories(NamedTuple):
    """B trajectories, the members of a group in a row."""

    prompt: TorchContext  # before the text
    context: TorchContext  # before the image
    texts: TorchTexts
    images: TorchImages
    start: int  # first stochastic image step
    think: list[str]
    pixels: np.ndarray  # uint8[B, Hpx, Wpx, 3]


class TorchLogProbs(NamedTuple):
    """Log-probs of B trajectories."""

    text: torch.Tensor  # float32[B, T - 1], 0 where not scored
    entropy: torch.Tensor  # float32[B, T - 1]
    image: torch.Tensor  # float32[B, J]


class TorchTrainer:
    """The model, its optimizer, and the three stages of a training step."""

    def __init__(
        self, model: TorchBagel, tokenizer: Tokenizer, config: Config, *, compiled: bool
    ) -> None:
        """Makes the optimizer; `compiled` functions compile at their first calls.

        Raises:
          ConfigError: an option that only our own implementation has.
        """
        check_options(config)
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.compute = model.compiled() if compiled else model
        self.grid = model.config.latent_grid(config.model.height, config.model.width)
        names = [field.name for field in dataclasses.fields(ImageOptions)]
        self.image_options = ImageOptions(**{name: getattr(config.rollout, name) for name in names})
        self.graphs: list[TorchLogProbs] = []  # by micro-batch, of the newest old log-probs
        self.system = torch.tensor([tokenizer.wrap(THINK_SYSTEM_PROMPT)], device=model.device)
        by_rate: dict[bool, list[torch.nn.Parameter]] = {False: [], True: []}
        for path, _, module in model.adapted():
            by_rate["_moe_gen" in path] += module.parameters()
        self.parameters = [parameter for group in by_rate.values() for parameter in group]
        options = config.optimizer
        rates = {False: options.learning_rate, True: options.learning_rate * options.gen_scale}
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "lr": rates[is_gen]} for is_gen, group in by_rate.items()],
            betas=(options.b1, options.b2),
            eps=options.eps,
            weight_decay=options.weight_decay,
            fused=True,
        )

    @torch.no_grad()
    def rollout(self, prompts: TextBlock, lengths: TextLengths, start: int) -> TorchTrajectories:
        """Samples `train.group_size` trajectories per prompt with the adapters merged.

        Args:
          prompts: numpy arrays of P rows.
          lengths: that the texts are to have.
          start: first stochastic image step.
        """
        with self.merged():
            return self._rollout(prompts, lengths, start)

    def _rollout(self, prompts: TextBlock, lengths: TextLengths, start: int) -> TorchTrajectories:
        model = self.compute
        prompt = self.prefill(prompts)
        longest, image_tokens = int(lengths.tokens.max()), self.grid[0] * self.grid[1] + 2
        ctx = prompt.repeated(self.config.train.group_size, room=longest + image_tokens)
        texts = torch_policy.write_text(
            model, ctx, prompt.length, lengths, temperature=self.config.rollout.temperature
        )
        images, pixels = self._draw(prompt, texts, ctx, start)
        return TorchTrajectories(
            prompt=_cut(ctx, prompt.length),
            context=torch_policy.end_text(ctx, prompt.length, texts),
            texts=texts,
            images=images,
            start=start,
            think=[
                self.tokenizer.decode(row[1 : count - 1])
                for row, count in zip(
                    texts.tokens.cpu().numpy(), lengths.tokens.tolist(), strict=True
                )
            ],
            pixels=pixels,
        )

    @contextlib.contextmanager
    def merged(self) -> Iterator[None]:
        """Merges the adapters into copies of the weights they adapt, which are used meanwhile."""
        for _, _, module in self.model.adapted():
            module.merge()
        try:
            yield
        finally:
            for _, _, module in self.model.adapted():
                module.unmerge()

    @torch.no_grad()
    def prefill(self, prompts: TextBlock) -> TorchContext:
        """Reads the system prompt once, and every prompt once; prompts are cut to the longest."""
        tokens, mask = (
            torch.from_numpy(np.asarray(x)).to(self.model.device)
            for x in (prompts.tokens, prompts.mask)
        )
        longest = int(mask.sum(1).max())
        everything = torch.ones_like(self.system, dtype=torch.bool)
        system = torch_policy.extend_text(self.model, self.model.empty(1), self.system, everything)
        return torch_policy.extend_text(
            self.model,
            system.repeated(len(tokens)),
            tokens[:, :longest].long(),
            mask[:, :longest],
        )

    def old_log_probs(self, trajectories: TorchTrajectories) -> TorchLogProbs:
        """Computes all log-probs before the update.

        With `train.keep_residuals` the next gradient takes what autograd has kept of them, as ours
        does, and computes no log-probs of its own.
        """
        with torch.set_grad_enabled(self.config.train.keep_residuals):
            by_batch = [
                self.log_probs(_rows(trajectories, rows)) for rows in self._slices(trajectories)
            ]
        self.graphs = by_batch if self.config.train.keep_residuals else []
        joined = (torch.cat(arrays).detach() for arrays in zip(*by_batch, strict=True))
        return TorchLogProbs(*joined)

    @torch.no_grad()
    def old_velocities(self, trajectories: TorchTrajectories) -> torch.Tensor:
        """Computes the velocities float32[B, J, M, C] of all stochastic steps."""
        by_batch = []
        for rows in self._slices(trajectories):
            batch = _rows(trajectories, rows)
            by_batch.append(
                torch_policy.image_velocities(
                    self.compute,
                    batch.context,
                    batch.images.before,
                    batch.start,
                    options=self.image_options,
                    grid=self.grid,
                )
            )
        return torch.cat(by_batch)

    @torch.no_grad()
    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes latents float32[B, M, C] as float32[B, Hpx, Wpx, 3] in [-1, 1]."""
        return torch.cat(
            [
                self.compute.decode_pixels(latents[rows], self.grid)
                for rows in _slices(len(latents), PIXEL_ROWS)
            ]
        )

    def log_probs(self, trajectories: TorchTrajectories) -> TorchLogProbs:
        """Computes log-probs in the contexts of the rollout, which are constants."""
        text, entropy = torch_policy.text_log_probs(
            self.compute,
            trajectories.prompt,
            trajectories.texts,
            temperature=self.config.rollout.temperature,
        )
        image = torch_policy.image_log_probs(
            self.compute,
            trajectories.context,
            trajectories.images,
            trajectories.start,
            options=self.image_options,
            grid=self.grid,
        )
        return TorchLogProbs(text, entropy, image)

    def update(
        self, trajectories: TorchTrajectories, old: TorchLogProbs, advantages: torch.Tensor
    ) -> dict[str, float]:
        """Takes one optimizer step.

        Args:
          trajectories, old: from `rollout` and `old_log_probs`.
          advantages: float32[B].
        Returns:
          Metrics.
        """
        metrics = self.gradient(trajectories, old, advantages)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.clip_norm)
        if not torch.isfinite(norm):
            raise ValueError("the gradient is not finite")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {name: float(value) for name, value in metrics.items()} | {"norm": float(norm)}

    def gradient(
        self, trajectories: TorchTrajectories, old: TorchLogProbs, advantages: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Adds the gradient of the update's loss to that of the adapters, by micro-batches."""
        metrics: dict[str, torch.Tensor] = {}
        for rows in self._slices(trajectories):
            is_kept = bool(self.graphs)
            new = self.graphs.pop(0) if is_kept else self.log_probs(_rows(trajectories, rows))
            share = self._loss(
                new,
                TorchLogProbs(*(x[rows] for x in old)),
                advantages[rows],
                trajectories.texts.scored[rows],
                len(advantages),
            )
            share["loss"].backward()
            for name, value in share.items():
                metrics[name] = metrics.get(name, 0.0) + value.detach()
        return metrics

    def gradients(self) -> Gradients:
        """Returns the adapters' gradients."""
        return {
            (path, layer, name): parameter.grad
            for path, layer, module in self.model.adapted()
            for name, parameter in module.named_parameters()
            if parameter.grad is not None
        }

    def _loss(
        self,
        new: TorchLogProbs,
        old: TorchLogProbs,
        advantages: torch.Tensor,
        scored: torch.Tensor,
        total: int,
    ) -> dict[str, torch.Tensor]:
        """Computes a micro-batch's share of the loss of `total` trajectories, and of metrics."""
        options, window = self.config.loss, self.config.rollout.window
        tokens = scored.sum(1).clamp(min=1)
        ratio = ((new.text - old.text).sum(1) / tokens).exp()
        bounded = ratio.clamp(1.0 - options.clip_low, 1.0 + options.clip_high)
        text = torch.maximum(-ratio * advantages, -bounded * advantages).sum() / total
        image_advantages = advantages.clamp(-options.advantage_clip, options.advantage_clip)
        image_ratio = (new.image - old.image).exp()
        bounded = image_ratio.clamp(1.0 - options.image_clip, 1.0 + options.image_clip)
        image_terms = -torch.minimum(
            image_ratio * image_advantages[:, None], bounded * image_advantages[:, None]
        )
        image = image_terms.sum() / (total * window)
        loss = (window * options.text_loss_weight * text + window * image) / (1 + window)
        return {
            "loss": loss,
            "text": text,
            "image": image,
            "entropy": (new.entropy.sum(1) / tokens).sum() / total,
        }

    def _draw(
        self, prompt: TorchContext, texts: TorchTexts, ctx: TorchContext, start: int
    ) -> tuple[TorchImages, np.ndarray]:
        """Samples the images of all rows at once, and decodes them."""
        behind = torch_policy.end_text(ctx, prompt.length, texts)
        group, latents = self.config.train.group_size, self.grid[0] * self.grid[1]
        shape = (len(prompt.rope), latents, self.model.config.latent_width)
        noise = torch.randn(shape, device=self.model.device)
        initial = noise.repeat_interleave(group, 0)  # a group starts from the same noise
        images = torch_policy.sample_images(
            self.compute,
            behind,
            prompt.length + texts.mask.shape[1],
            initial,
            start,
            options=self.image_options,
            grid=self.grid,
        )
        pixels = ((self.pixels(images.latents) * 0.5 + 0.5) * 255.0).to(torch.uint8)
        return images, pixels.cpu().numpy()

    def _slices(self, trajectories: TorchTrajectories) -> Iterator[slice]:
        return _slices(len(trajectories.prompt.rope), self.config.train.micro_batch)


def check_options(config: Config) -> None:
    """Refuses options that the PyTorch implementation lacks.

    Raises:
      ConfigError: an option has another value than the embedded default's.
    """
    loss, rollout = config.loss, config.rollout
    expected = {
        "task": (config.task, "rt2i"),
        "train.trainable": (config.train.trainable, "lora"),
        "train.old_logprob": (config.train.old_logprob, "recompute"),
        "train.context_gradient": (config.train.context_gradient, False),
        "train.updates_per_batch": (config.train.updates_per_batch, 1),
        "rollout.sampler": (rollout.sampler, "sde"),
        "rollout.merge_lora": (rollout.merge_lora, True),
        "rollout.shared_noise": (rollout.shared_noise, True),
        "rollout.top_p": (rollout.top_p, 1.0),
        "rollout.guidance.text_scale": (rollout.guidance.text_scale, 1.0),
        "loss.text": (loss.text, "grpo"),
        "loss.image": (loss.image, "grpo"),
        "loss.level": (loss.level, "sequence"),
        "loss.entropy_fraction": (loss.entropy_fraction, 1.0),
        "loss.text_beta": (loss.text_beta, 0.0),
        "loss.image_beta": (loss.image_beta, 0.0),
        "loss.report_kl": (loss.report_kl, False),
        "optimizer.average_limit": (config.optimizer.average_limit, 0.0),
    }
    for name, (value, only) in expected.items():
        if value != only:
            raise ConfigError(f"{name}: got {value!r}, but in PyTorch there is {only!r} only")


def _rows(trajectories: TorchTrajectories, rows: slice) -> TorchTrajectories:
    """Takes a micro-batch."""
    texts, images = (
        type(sample)(*(x[rows] for x in sample))
        for sample in (trajectories.texts, trajectories.images)
    )
    return trajectories._replace(
        prompt=trajectories.prompt.rows(rows),
        context=trajectories.context.rows(rows),
        texts=texts,
        images=images,
    )


def _cut(ctx: TorchContext, length: int) -> TorchContext:
    """Returns a view of the first `length` slots."""
    return TorchContext(
        ctx.keys[:, :, :, :length], ctx.values[:, :, :, :length], ctx.valid[:, :length], ctx.rope
    )


def _slices(rows: int, micro_batch: int) -> Iterator[slice]:
    """Cuts rows into micro-batches."""
    for start in range(0, rows, micro_batch):
        yield slice(start, min(start + micro_batch, rows))
