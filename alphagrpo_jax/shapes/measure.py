"""Measures the small UMM: what its autoencoder keeps, and how often it draws what is asked.

    python -m alphagrpo_jax.shapes.measure --model package:umm --out runs/measure.json

Everything is judged by the exact checker: reconstructions of random scenes, and images drawn for
held-out prompts with think texts sampled at temperature 1, by kind and type of prompt.
"""

import argparse
import collections
import dataclasses
import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from alphagrpo_jax import policy, trained
from alphagrpo_jax.rollout import pixels
from alphagrpo_jax.shapes import checker, prompts, requests, scenes, specs, study

SCENES, CHUNK, SEED = 500, 50, 31
PER_TYPE, IMPLIED = 200, 600


def reconstruction(policy_: trained.Trained) -> float:
    """Share of random scenes that are exact after encoding and decoding."""
    model, base = policy_.loaded.model, policy_.params
    grid = model.config.latent_grid(scenes.RESOLUTION, scenes.RESOLUTION)

    @jax.jit
    def through(images: jax.Array) -> jax.Array:
        latents = policy.encode_image(model, base, images.astype(jnp.float32) / 127.5 - 1.0)
        return pixels(model, base, latents, grid)

    rng = np.random.default_rng(SEED)
    drawn = [scenes.random_scene(rng) for _ in range(SCENES)]
    exact = []
    for first in range(0, SCENES, CHUNK):
        part = drawn[first : first + CHUNK]
        images = through(np.stack([scenes.render(scene) for scene in part]))
        exact += [
            checker.exact_all(image, specs.describe(scene))
            for image, scene in zip(np.asarray(images), part, strict=True)
        ]
    return float(np.mean(exact))


def drawings(policy_: trained.Trained) -> dict[str, float]:
    """Exact share of held-out prompts by kind and type; plain types weigh alike."""
    make = functools.partial(prompts.records, "heldout", seed=SEED, repeats=True)
    records = make(PER_TYPE * len(requests.PLAIN_TYPES), kinds=("plain",))
    records += make(IMPLIED, kinds=("implied",))
    exact = study.judge(policy_, records, temperature=1.0, seed=SEED)
    found = collections.defaultdict(list)
    for record, held in zip(records, exact, strict=True):
        for name in (record["kind"], f"{record['kind']}/{record['type']}"):
            found[name].append(held)
    return {name: float(np.mean(held)) for name, held in sorted(found.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="package:umm")
    parser.add_argument("--config", type=pathlib.Path, default=trained.DEFAULT_CONFIG)
    parser.add_argument("--text_guidance", type=float, help="default: the configuration's")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    config = trained.read_config(args.config)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=args.model))
    if args.text_guidance is not None:
        changed = dataclasses.replace(config.eval, text_guidance=args.text_guidance)
        config = dataclasses.replace(config, eval=changed)
    policy_ = trained.from_config(config)
    found = {"reconstruction": reconstruction(policy_), **drawings(policy_)}
    text = json.dumps({name: round(value, 4) for name, value in found.items()}, indent=2)
    if args.out is not None:
        args.out.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
