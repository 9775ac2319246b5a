"""One update over a stored rollout on one device and on a 2x2x2 mesh; prints what differs.

Run by test_devices.py in a process with eight fake devices.
"""

import dataclasses
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tiny_world

from alphagrpo_jax import config_checks as config_lib
from alphagrpo_jax.config import MeshOptions
from alphagrpo_jax.runtime import sharding
from alphagrpo_jax.training import setup
from alphagrpo_jax.training.optimizer import make_optimizer
from alphagrpo_jax.training.steps import compile_fns
from alphagrpo_jax.types import TextBlock, UpdateBatch


def numbers(config, mesh, root, stored=None):
    """The stored rollout (sampled here if None), and everything that is compared, as numpy."""
    with jax.set_mesh(mesh):
        loaded = setup.load_policy(config, mesh)
        optimizer = make_optimizer(config.optimizer)
        state = setup.initial_state(config, loaded.base, optimizer, mesh)
        fns = compile_fns(config, loaded, state, optimizer, mesh)
        steps = fns.tasks["rt2i"]
        rows = [loaded.tokenizer.wrap(text) for text in tiny_world.WORDS[:2]]
        block = TextBlock(*loaded.tokenizer.batch(rows, config.rollout.prompt_tokens))
        weights = fns.weights(loaded.base, state.trainable)
        prefix = steps.train.prefill(weights, (block,))
        ints = (jnp.int32(0), jnp.int32(config.eval.num_points))
        greedy, _ = steps.train.generate(
            weights, prefix, jax.random.key(3), *ints, jnp.float32(0.0)
        )
        if stored is None:
            window = (jnp.int32(0), jnp.int32(1))
            stored, _ = steps.train.generate(
                weights, prefix, jax.random.key(4), *window, jnp.float32(1.0)
            )
            stored = jax.tree.map(np.asarray, stored)
        placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), stored, greedy)
        advantage = jnp.array([1.0, -1.0, 0.5, -0.5, 0.25, 1.5, -2.0, 0.1])
        batch = UpdateBatch(placed, advantage, advantage, jnp.ones(8, bool))
        totals = steps.count(batch, None)
        micro_batch = jnp.int32(0)
        new, pullback = steps.forward(state.trainable, loaded.base, placed, micro_batch)
        gradient, metrics = steps.backward(
            pullback, new, None, None, batch, micro_batch, totals, jnp.float32(1.0)
        )
        compared = {"scores": new, "gradient": gradient, "metrics": metrics}
        compared |= {"greedy tokens": greedy.texts[0].tokens, "ode": greedy.images[0].latents}
        compared = jax.tree.map(np.asarray, compared)
        attention = gradient["language_model"]["layers"]["self_attn"]
        spread = len(attention["q_proj"]["a"].sharding.device_set)
        after, _ = fns.apply_gradient(state, gradient, metrics)
        compared["updated"] = jax.tree.map(np.asarray, after.trainable)
    return stored, compared, spread


def largest_difference(first, second):
    """Over all entries of two trees."""
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return max(float(np.max(np.abs(np.subtract(a, b, dtype=np.float64)))) for a, b in pairs)


def main(root: pathlib.Path) -> None:
    """Compares and prints one JSON object."""
    config = tiny_world.config(root)
    config.train.prompts_per_step, config.train.group_size = 2, 4
    config.train.micro_batch = config.rollout.micro_batch = 8
    config.optimizer.eps = 1.0  # else Adam's first step is the sign of the gradient, even of noise
    config = config_lib.from_config_dict(config)
    one_device = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    eight_devices = sharding.make_mesh(2, 2, 2)
    stored, first, _ = numbers(config, one_device, root)
    on_eight = dataclasses.replace(config, mesh=MeshOptions(data=2, fsdp=2, tensor=2))
    _, second, devices = numbers(on_eight, eight_devices, root, stored)
    differences = {name: largest_difference(first[name], second[name]) for name in first}
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(first["gradient"]))
    sys.stdout.write(json.dumps({"devices": devices, "scale": scale} | differences) + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
