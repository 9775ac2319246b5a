"""One update over a stored rollout on one device and on several meshes; prints what differs.

Run by test_devices.py in a process with eight fake devices.
"""

import dataclasses
import functools
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tiny_world

from alphagrpo_jax import config_checks as config_lib
from alphagrpo_jax.runtime import sharding
from alphagrpo_jax.tasks import TASKS
from alphagrpo_jax.training import options as options_lib
from alphagrpo_jax.training import setup
from alphagrpo_jax.training.optimizer import make_optimizer
from alphagrpo_jax.training.sampling import collect_images, run_steps
from alphagrpo_jax.training.steps import compile_fns
from alphagrpo_jax.training.update_loss import FixedOutputs
from alphagrpo_jax.types import TextBlock, UpdateBatch, join_micro_batches, map_rows

ROWS = 8
# Three and six devices do not divide the rows: they are filled up, and a micro-batch repeats some.
MESHES = ((3, 1, 1), (6, 1, 1), (2, 2, 2))


def numbers(config, mesh, stored=None):
    """The stored rollout (sampled here if None), and everything that is compared, as numpy."""
    with jax.set_mesh(mesh):
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **mesh.shape))
        loaded = setup.load_policy(config, mesh)
        optimizer = make_optimizer(config.optimizer)
        state = setup.initial_state(config, loaded.base, optimizer, mesh)
        fns = compile_fns(config, loaded, state, optimizer, mesh)
        task = fns.tasks["rt2i"]
        rows = [loaded.tokenizer.wrap(text) for text in tiny_world.WORDS[:2]]
        block = TextBlock(*loaded.tokenizer.batch(rows, config.rollout.prompt_tokens))
        weights = fns.weights(loaded.base, state.trainable)
        sample = functools.partial(run_steps, task.train, weights, (block,))
        images = []
        greedy = sample(
            jax.random.key(3),
            start=config.eval.num_points,
            temperature=0.0,
            on_images=lambda *pair: images.append(pair),
        )
        if stored is None:
            stored = sample(jax.random.key(4), start=0, temperature=1.0)
            stored = jax.tree.map(np.asarray, stored)
        layout = task.train.spec.layout(ROWS)
        filled = np.minimum(np.arange(layout.rows), ROWS - 1)
        padded = map_rows(lambda axis, x: np.take(x, filled, axis), stored)
        placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), padded, greedy)
        advantage = np.zeros(layout.rows, np.float32)
        advantage[:ROWS] = [1.0, -1.0, 0.5, -0.5, 0.25, 1.5, -2.0, 0.1]
        batch = UpdateBatch(placed, advantage, advantage, np.arange(layout.rows) < ROWS)
        totals = task.count(batch, None)
        spec = options_lib.update_spec(config, loaded, TASKS["rt2i"])
        accumulated, scores, policy = None, [], (state.trainable, loaded.base)
        for number in map(jnp.int32, range(spec.layout.micro_batches)):
            new, residuals = task.forward(*policy, placed, number)
            micro_batch = task.backward(
                *policy,
                residuals,
                new,
                None,
                FixedOutputs(),
                batch,
                number,
                totals,
                jnp.float32(1.0),
            )
            accumulated = (
                micro_batch if accumulated is None else fns.accumulate(*accumulated, micro_batch)
            )
            scores.append(new)
        gradient, metrics = accumulated
        joined = jax.tree.map(lambda x: x[:ROWS], join_micro_batches(spec.layout, scores))
        compared = {"scores": joined, "gradient": gradient, "metrics": metrics}
        compared |= {
            "greedy tokens": greedy.texts[0].tokens[:ROWS],
            "ode": greedy.images[0].latents[:ROWS],
            "pixels": collect_images(images),
        }
        compared = jax.tree.map(np.asarray, compared)
        attention = gradient["language_model"]["layers"]["self_attn"]
        spread = len(attention["q_proj"]["a"].sharding.device_set)
        after, _ = fns.apply_gradient(state, gradient, metrics)
        compared["updated"] = jax.tree.map(np.asarray, after.trainable)
        whole = whole_matrices((gradient, after.trainable, after.opt_state), mesh.shape["fsdp"])
    return stored, compared, {"devices": spread, "whole over fsdp": whole}


def whole_matrices(tree, ways):
    """Returns the paths of matrices of which a device holds more than its share over fsdp."""
    return [
        sharding.path_name(path)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if x.ndim >= 2 and math.prod(x.sharding.shard_shape(x.shape)) * ways > x.size
    ]


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
    stored, expected, _ = numbers(config, sharding.make_mesh(1, 1, 1, jax.devices()[:1]))
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(expected["gradient"]))
    for sizes in MESHES:
        mesh = sharding.make_mesh(*sizes, jax.devices()[: math.prod(sizes)])
        _, got, places = numbers(config, mesh, stored)
        differences = {name: largest_difference(expected[name], got[name]) for name in expected}
        sys.stdout.write(json.dumps({"scale": scale} | places | differences) + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
