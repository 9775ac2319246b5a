"""Trains by our functions, and compares their numbers with PyTorch's; see `torch_peer`.

What `train` calls is called here: `rollout.sample`, `update.old_log_probs`, `update.step`.
"""

import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import traverse_util

from alphagrpo_jax import policy, prompts, rollout, update
from alphagrpo_jax.bench import start_run
from alphagrpo_jax.config import Config
from alphagrpo_jax.runtime.compilations import CompileCounter
from alphagrpo_jax.sampling.contexts import guidance_contexts
from alphagrpo_jax.sampling.image import noise_levels
from alphagrpo_jax.tasks import TASKS
from alphagrpo_jax.training import gradient as gradient_lib
from alphagrpo_jax.training import options as options_lib
from alphagrpo_jax.types import (
    Advantages,
    BatchAdvantages,
    DataPosition,
    ImageSample,
    LogProbs,
    PromptBatch,
    RolloutBatch,
    TextBlock,
    TextSample,
    TrainState,
)
from alphagrpo_jax.update import OldLogProbs
from benchmarks import torch_policy
from benchmarks.torch_policy import TextLengths, TorchImages, TorchTexts
from benchmarks.torch_training import Gradients, TorchTrainer, TorchTrajectories

ADAPTER_STDDEV = 0.01  # of the adapters' second matrices, which a run starts at zero
SEED = 7


class JaxTrainer:
    """A run without verifier and run folder, and the state that its stages read."""

    def __init__(self, config: Config, folder: pathlib.Path) -> None:
        """Loads model and prompts of a configuration; nothing is compiled yet.

        Args:
          config: of the run.
          folder: for the prompt cache.
        """
        self.compiles = CompileCounter()
        self.run, state = start_run(config, folder, None)
        trainable = _random_adapters(state.trainable)
        self.state = dataclasses.replace(state, trainable=trainable)

    @property
    def params(self) -> policy.PolicyParams:
        """Returns the weights of the policy, adapters not merged."""
        scale = options_lib.lora_scale(self.run.config)
        return gradient_lib.policy_params(
            self.run.loaded.base, self.state.trainable, lora_scale=scale
        )

    def batch(self, step: int) -> PromptBatch:
        """Returns the prompts of an update."""
        config = self.run.config
        position = (step - 1) * config.train.prompts_per_step
        data = {name: context.data for name, context in self.run.tasks.items()}
        (batch,) = prompts.next_batches(
            config, data, step, DataPosition({config.task: position}, None)
        )
        return batch

    def prompts(self, batch: PromptBatch) -> TextBlock:
        """Returns the tokens of a batch's prompts, numpy arrays of P rows."""
        (block,) = self.run.tasks[batch.task.name].data.train.inputs(batch.rows)
        assert isinstance(block, TextBlock)  # the input of the task
        return block

    def rollout(self, step: int) -> RolloutBatch:
        """Samples the trajectories of an update, and fetches their images."""
        params = self.run.sampling_params(self.state)
        batch = self.batch(step)
        sampled = rollout.sample(
            self.run, params, self.state.key, step, batch, on_images=lambda *_: None
        )
        jax.block_until_ready(sampled.trajectories)
        return sampled

    def old_log_probs(self, sampled: RolloutBatch) -> OldLogProbs:
        """Computes the log-probs before the update, which an update can take once."""
        old = update.old_log_probs(self.run, self.state, sampled)
        assert old is not None  # the option asks for them
        jax.block_until_ready(old.log_probs)
        return old

    def copied_state(self) -> TrainState:
        """Returns a copy of the state, which an update may take."""
        return jax.block_until_ready(self.run.fns.copy(self.state))

    def update(
        self,
        state: TrainState,
        sampled: RolloutBatch,
        old: OldLogProbs,
        advantages: np.ndarray,
    ) -> None:
        """Takes an optimizer step from a copied state; the trainer's own stays.

        Args:
          state: from `copied_state`.
          sampled, old: from the stages before.
          advantages: float32[P, G].
        """
        after, _ = update.step(
            self.run, state, [sampled], [old], [_batch_advantages(advantages)], 1
        )
        jax.block_until_ready(after.trainable)

    def gradient(
        self, sampled: RolloutBatch, old: OldLogProbs, advantages: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Computes an update's gradient, by "path/a" and "path/b", layers stacked."""
        gradients = []

        def keep(state: TrainState, gradient: Any, metrics: dict) -> tuple[TrainState, dict]:
            gradients.append(jax.tree.map(np.asarray, gradient))
            return state, metrics | {"update/finite": 1.0, "update/grad_norm": 0.0}

        run = self.run._replace(fns=self.run.fns._replace(apply_gradient=keep))
        update.step(run, self.state, [sampled], [old], [_batch_advantages(advantages)], 1)
        return traverse_util.flatten_dict(gradients[0], sep="/")

    def joined(self, old: OldLogProbs) -> LogProbs:
        """Joins the log-probs of micro-batches."""
        spec = options_lib.update_spec(self.run.config, self.run.loaded, TASKS["rt2i"])
        return jax.tree.map(lambda *arrays: spec.layout.join(list(arrays)), *old.log_probs)


class JaxNumbers(NamedTuple):
    """Numbers of our own that PyTorch's are compared with."""

    prompts: TextBlock
    sampled: RolloutBatch
    advantages: np.ndarray  # float32[P, G]
    log_probs: LogProbs
    velocities: np.ndarray  # float32[B, J, M, C]
    gradient: dict[str, np.ndarray]
    pixels: np.ndarray  # float32[B, Hpx, Wpx, 3], in [-1, 1]


def numbers(ours: JaxTrainer, step: int = 1) -> JaxNumbers:
    """Computes our numbers for one update."""
    sampled = ours.rollout(step)
    old = ours.old_log_probs(sampled)
    advantages = random_advantages(ours.run.config, step)
    return JaxNumbers(
        ours.prompts(sampled.batch),
        sampled,
        advantages,
        ours.joined(old),
        _velocities(ours, sampled),
        ours.gradient(sampled, old, advantages),
        _pixels(ours, sampled),
    )


def differences(reference: JaxNumbers, peer: TorchTrainer) -> dict[str, float]:
    """Computes the largest absolute differences of PyTorch's numbers from ours, by name.

    Both compute them for our trajectories. Gradients are relative to the largest entry of all. The
    last one compares PyTorch with itself, see `sampler_gap`.
    """
    trajectories = replay(reference, peer)
    old = peer.old_log_probs(trajectories)
    velocities = peer.old_velocities(trajectories)
    peer.gradient(trajectories, old, torch.from_numpy(reference.advantages.ravel()))
    gradient_gap = gradient_difference(reference.gradient, peer.gradients())
    peer.optimizer.zero_grad()
    pixels = peer.pixels(trajectories.images.latents)
    scored = trajectories.texts.scored
    text = torch.where(scored, tensor(reference.log_probs.text_log_prob[0]), 0.0)
    entropy = torch.where(scored, tensor(reference.log_probs.text_entropy[0]), 0.0)
    return {
        "text log-probs": largest(text, old.text),
        "entropies": largest(entropy, old.entropy),
        "velocities": largest(tensor(reference.velocities), velocities),
        "image log-probs": largest(tensor(reference.log_probs.image_log_prob[0]), old.image),
        "adapter gradients": gradient_gap,
        "pixels": largest(tensor(reference.pixels), pixels),
        "rollout and update": sampler_gap(reference, peer),
    }


def sampler_gap(reference: JaxNumbers, peer: TorchTrainer) -> float:
    """Computes the largest difference of log-probs from PyTorch's rollout and from its update."""
    text, image = _samples(reference)
    sampled = peer.rollout(reference.prompts, text_lengths(text), int(image.start))
    old = peer.old_log_probs(sampled)
    return max(
        largest(sampled.texts.log_prob, old.text), largest(sampled.images.log_prob, old.image)
    )


@torch.no_grad()
def replay(reference: JaxNumbers, peer: TorchTrainer) -> TorchTrajectories:
    """Computes PyTorch's contexts of our trajectories, under merged adapters as in a rollout."""
    text, image = _samples(reference)
    texts = TorchTexts(
        tensor(text.tokens).long(), tensor(text.log_prob), tensor(text.mask), tensor(text.scored)
    )
    images = TorchImages(
        before=tensor(image.before),
        after=tensor(image.after),
        log_prob=tensor(image.log_prob),
        latents=tensor(image.latents),
    )
    with peer.merged():
        prompt = peer.prefill(reference.prompts).repeated(peer.config.train.group_size)
        context = torch_policy.extend_text(peer.model, prompt, texts.tokens, texts.mask)
    return TorchTrajectories(
        prompt, context, texts, images, int(image.start), [], np.empty(0, np.uint8)
    )


def text_lengths(text: TextSample) -> TextLengths:
    """Returns the lengths of our texts."""
    return TextLengths(tensor(text.mask).sum(1), tensor(text.scored).sum(1))


def random_advantages(config: Config, step: int) -> np.ndarray:
    """Returns advantages float32[P, G] in place of those of a verifier's rewards."""
    shape = (config.train.prompts_per_step, config.train.group_size)
    return np.random.default_rng([SEED, step]).normal(size=shape).astype(np.float32)


def gradient_difference(ours: dict[str, np.ndarray], peer: Gradients) -> float:
    """Computes the largest difference of all adapters' gradients, as a share of the largest entry.

    Raises:
      ValueError: one of the two has an adapter that the other lacks.
    """
    layers = {(path, layer) for path in ours for layer in range(len(ours[path]))}
    if layers != {(f"{path}/{name}", layer) for path, layer, name in peer}:
        raise ValueError("the two implementations train other adapters")
    scale = max(np.abs(gradient).max() for gradient in ours.values())
    gaps = [
        largest(torch.from_numpy(np.array(ours[f"{path}/{name}"][layer])), gradient.T)
        for (path, layer, name), gradient in peer.items()
    ]
    return max(gaps) / float(scale)


def largest(first: torch.Tensor, second: torch.Tensor) -> float:
    """Returns the largest absolute difference of two arrays."""
    return float((first.float() - second.detach().float().cpu()).abs().max())


def tensor(array: Any) -> torch.Tensor:
    """Copies an array of ours to the host as a tensor."""
    return torch.from_numpy(np.array(array))


def _samples(reference: JaxNumbers) -> tuple[TextSample, ImageSample]:
    trajectories = reference.sampled.trajectories
    return trajectories.texts[0], trajectories.images[0]


def _random_adapters(trainable: Any) -> Any:
    """Replaces the zeros of the adapters' second matrices, which hide half of the gradient."""
    flat = traverse_util.flatten_dict(trainable)
    rng = np.random.default_rng(SEED)
    noisy = {
        path: jax.device_put(
            leaf + ADAPTER_STDDEV * rng.standard_normal(leaf.shape, np.float32), leaf.sharding
        )
        if path[-1] == "b"
        else leaf
        for path, leaf in flat.items()
    }
    return traverse_util.unflatten_dict(noisy)


def _batch_advantages(advantages: np.ndarray) -> BatchAdvantages:
    used = np.ones(advantages.shape, bool)
    return BatchAdvantages(Advantages(advantages, used, {}), advantages)


def _velocities(ours: JaxTrainer, sampled: RolloutBatch) -> np.ndarray:
    """Computes our velocities of all stochastic steps, float32[B, J, M, C]."""
    run, trajectories = ours.run, sampled.trajectories
    spec = options_lib.rollout_spec(run.config, run.loaded, TASKS["rt2i"])
    (step,) = spec.plan.image_steps
    ctx = guidance_contexts(trajectories.pieces, step, trajectories.owner).gen
    flow = jax.jit(functools.partial(policy.velocity, run.loaded.model, grid=spec.grid))
    image, levels = trajectories.images[0], noise_levels(spec.options)  # pyright: ignore[reportArgumentType]
    columns = []
    for number in range(run.config.rollout.window):
        sigma = jnp.full(image.before.shape[:1], levels[int(image.start) + number])
        columns.append(np.asarray(flow(ours.params, ctx, image.before[:, number], sigma)))
    return np.stack(columns, 1)


def _pixels(ours: JaxTrainer, sampled: RolloutBatch) -> np.ndarray:
    """Decodes our images, float32[B, Hpx, Wpx, 3]."""
    run = ours.run
    grid = run.loaded.config.latent_grid(*run.image_size)
    decode = jax.jit(functools.partial(policy.decode_latents, run.loaded.model, grid=grid))
    return np.asarray(decode(ours.params, sampled.trajectories.images[0].latents))
