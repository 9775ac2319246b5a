"""Draws images for a prompt, with the shipped model or that of a run's newest checkpoint.

    python -m alphagrpo_jax.generate --prompt "a red circle" --out x.png --think --n 4

Prints the think texts and writes one PNG, a grid if there are several images.
"""

import argparse
import dataclasses
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from alphagrpo_jax import build, trained
from alphagrpo_jax.config import Config, ConfigError
from alphagrpo_jax.rollout import RolloutOptions, rollout
from alphagrpo_jax.runtime import images as images_lib
from alphagrpo_jax.runtime.checkpoint import CheckpointError
from alphagrpo_jax.types import TextBlock

_rollout = jax.jit(rollout, static_argnames=("model", "options"))

SHOWN_SIDE = 96  # pixels; smaller images are enlarged for the eye


class Drawn(NamedTuple):
    """N images of one prompt."""

    images: np.ndarray  # uint8[N, H, W, 3]
    texts: list[str]  # think texts; empty without thinking


def options_of(policy: trained.Trained, *, think: bool, count: int) -> RolloutOptions:
    """What to compile: `count` images of one prompt, drawn as evaluation does."""
    config = dataclasses.replace(policy.config, task="rt2i" if think else "t2i")
    options = build.eval_options(config, policy.loaded)
    return dataclasses.replace(options, group_size=count)


def draw(policy: trained.Trained, prompt: str, *, think: bool, count: int, seed: int) -> Drawn:
    """Draws `count` images of a prompt.

    Args:
      policy: who draws; sampling is that of its configuration's `eval` section.
      prompt: of any length that the model takes.
      think: whether a think text comes before each image.
      count: N.
      seed: the same seed draws the same images, and the first of many as the only one.
    """
    loaded, options = policy.loaded, options_of(policy, think=think, count=count)
    row = loaded.tokenizer.wrap(prompt)
    tokens, mask = loaded.tokenizer.batch([row], len(row))
    trajectories, images = _rollout(
        loaded.model,
        policy.params,
        (TextBlock(jnp.asarray(tokens), jnp.asarray(mask)),),
        jax.random.key(seed),
        jnp.int32(0),
        jnp.int32(options.image.num_points),  # no stochastic step
        jnp.float32(policy.config.eval.temperature),
        options=options,
    )
    texts = []
    for sample in jax.device_get(trajectories.texts):
        pairs = zip(sample.tokens, sample.mask, strict=True)
        texts = [loaded.tokenizer.decode(ids[held][1:-1]) for ids, held in pairs]
    return Drawn(np.asarray(images), texts)


def picture(images: np.ndarray) -> Image.Image:
    """A grid of uint8[N, H, W, 3], small images enlarged by a whole factor; one image alone."""
    scale = math.ceil(SHOWN_SIDE / images.shape[1])
    large = images.repeat(scale, axis=1).repeat(scale, axis=2)
    if len(large) == 1:
        return Image.fromarray(large[0])
    return Image.fromarray(images_lib.grid(large, math.ceil(math.sqrt(len(large)))))


def changed(config: Config, options: argparse.Namespace) -> Config:
    """The configuration with the evaluation's sampling as the flags say."""
    names = ("temperature", "top_p", "num_points", "text_guidance")
    values = {name: vars(options)[name] for name in names if vars(options)[name] is not None}
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, **values))


def open_policy(options: argparse.Namespace) -> trained.Trained:
    """The policy that the flags name."""
    if options.checkpoint:
        policy = trained.from_run(options.checkpoint, model_path=options.model)
        return policy._replace(config=changed(policy.config, options))
    config = changed(trained.read_config(options.config), options)
    if options.model:
        model = dataclasses.replace(config.model, path=options.model)
        config = dataclasses.replace(config, model=model)
    return trained.from_config(config)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command's flags; wrong usage ends the process with code 2."""
    parser = argparse.ArgumentParser(prog="python -m alphagrpo_jax.generate", description=__doc__)
    add = parser.add_argument
    add("--prompt", required=True)
    add("--out", required=True, help="the PNG to write")
    add("--think", action="store_true", help="write a think text before each image")
    add("--n", type=int, default=1, help="how many images")
    add("--seed", type=int, default=0)
    add("--checkpoint", help="a run's folder: its newest checkpoint draws")
    add("--config", default=trained.DEFAULT_CONFIG, help="without --checkpoint; a Python file")
    add("--model", help="a folder or package:NAME, instead of the configuration's")
    add("--temperature", type=float, help="of think texts; 0 is greedy")
    add("--top_p", type=float, help="of think texts")
    add("--num_points", type=int, help="of the schedule: one more than steps")
    add("--text_guidance", type=float, help="scale; at most 1 is off")
    options = parser.parse_args(arguments)
    top_p = 1.0 if options.top_p is None else options.top_p
    if options.n < 1 or (options.num_points or 2) < 2 or not 0 < top_p <= 1:
        parser.error("--n must be at least 1, --num_points at least 2, --top_p in (0, 1]")
    if (options.temperature or 0) < 0:
        parser.error("--temperature must not be negative")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    options = parse(arguments)
    out = pathlib.Path(options.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        drawn = draw(
            open_policy(options),
            options.prompt,
            think=options.think,
            count=options.n,
            seed=options.seed,
        )
        picture(drawn.images).save(out)
    except ConfigError as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError, CheckpointError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 1
    for number, text in enumerate(drawn.texts, start=1):
        print(f"{number}: {text}")
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
