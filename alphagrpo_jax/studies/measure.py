"""Measures the small UMM: reconstructions, generated images by type of prompt, or skills.

    python -m alphagrpo_jax.studies.measure --model package:umm --out runs/measure.json
    python -m alphagrpo_jax.studies.measure --drawings runs/drawings.npz
    python -m alphagrpo_jax.studies.measure --skills

The exact checker judges everything: reconstructions of random scenes (every object in its cell, and
the background), and images generated for held-out prompts with think texts sampled at temperature
1, by kind and type of prompt. `--drawings` also writes these images with their records, for
`verifier_eval` and, with several images per prompt (`--repeats`), for `reward_figures`. `--skills`
measures captions, answers, edits and repairs instead, see `measure_skills`.
"""

import argparse
import collections
import functools
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from alphagrpo_jax import config_checks, inference, policy, tasks
from alphagrpo_jax.inference import Policy
from alphagrpo_jax.runtime import cli, distributed
from alphagrpo_jax.runtime.files import replace_text
from alphagrpo_jax.sampling.contexts import pixels
from alphagrpo_jax.sampling.trajectory import sample_trajectories
from alphagrpo_jax.shapes import checker, examples, prompts, requests, scenes
from alphagrpo_jax.studies import drawings, measure_skills
from alphagrpo_jax.training import options as options_lib
from alphagrpo_jax.types import TextBlock

SEED = 31
CHUNK = 50  # reconstructions per batch
BATCH = 100  # generated images per batch


def reconstruction(policy_: Policy, count: int) -> float:
    """Measures the share of `count` random scenes that survive encoding and decoding."""
    model, params = policy_.loaded.model, policy_.params
    grid = model.config.latent_grid(scenes.RESOLUTION, scenes.RESOLUTION)

    @jax.jit
    def reconstruct(images: jax.Array) -> jax.Array:
        latents = policy.encode_image(model, params, images.astype(jnp.float32) / 127.5 - 1.0)
        return pixels(model, params, latents, grid)

    rng = np.random.default_rng(SEED)
    random_scenes = [scenes.random_scene(rng) for _ in range(count)]
    survived = []
    for first in range(0, count, CHUNK):
        batch = random_scenes[first : first + CHUNK]
        images = np.asarray(reconstruct(examples.render_batch(batch)))
        survived += [
            checker.shows_scene(image, scene) for image, scene in zip(images, batch, strict=True)
        ]
    return float(np.mean(survived))


def sample_images(
    policy_: Policy, records: Sequence[Mapping], *, temperature: float, seed: int
) -> Iterator[np.ndarray]:
    """Generates one image per record, uint8[48, 48, 3], with the policy's `eval` settings.

    Args:
      policy_: the policy.
      records: prompts.
      temperature: of the think text; 0 is greedy.
      seed: of the keys; equal seeds give equal noise for all policies.
    """
    config, loaded = policy_.config, policy_.loaded
    spec = inference.one_shard(options_lib.eval_spec(config, loaded, tasks.TASKS["rt2i"]))
    sample = jax.jit(functools.partial(_sample, model=loaded.model, spec=spec))
    key, size = jax.random.key(seed), min(BATCH, len(records))
    for first in tqdm.trange(0, len(records), size, desc="drawing", unit_scale=size):
        rows = [
            loaded.tokenizer.wrap(records[i % len(records)]["prompt"])
            for i in range(first, first + size)
        ]
        block = TextBlock.from_host(*loaded.tokenizer.batch(rows, config.rollout.prompt_tokens))
        images = sample(policy_.params, block, key, jnp.int32(first), jnp.float32(temperature))
        yield from distributed.to_host(images)[: len(records) - first]


def _sample(params, block, key, first, temperature, *, model, spec) -> jax.Array:
    _, images = sample_trajectories(
        model, params, (block,), key, first, jnp.int32(0), temperature, spec=spec
    )
    assert images is not None  # the task generates images
    return images


def judge_policy(
    policy_: Policy, records: Sequence[Mapping], *, temperature: float, seed: int
) -> np.ndarray:
    """Judges by the exact checker if all facts hold in each record's image: bool[N].

    See `sample_images` for the arguments.
    """
    images = sample_images(policy_, records, temperature=temperature, seed=seed)
    pairs = zip(images, records, strict=True)
    return np.array([checker.exact_all(image, record["facts"]) for image, record in pairs], bool)


def heldout_records(per_type: int, implied: int) -> list[dict]:
    """Generates held-out prompts: `per_type` of every plain type, and implied ones."""
    make = functools.partial(prompts.records, "heldout", seed=SEED, repeats=True)
    plain = make(per_type * len(requests.PLAIN_TYPES), kinds=("plain",))
    return plain + make(implied, kinds=("implied",))


def exact_shares(images: Iterable[np.ndarray], records: Sequence[Mapping]) -> dict[str, float]:
    """Computes the share of images in which all facts hold, by kind and type of prompt."""
    verdicts = collections.defaultdict(list)
    for image, record in zip(images, records, strict=True):
        exact = checker.exact_all(image, record["facts"])
        for name in (record["kind"], f"{record['kind']}/{record['type']}"):
            verdicts[name].append(exact)
    return {name: float(np.mean(exact)) for name, exact in sorted(verdicts.items())}


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Measures what the flags ask for."""
    changes = {"model.path": args.model}
    if args.text_guidance is not None:
        changes["eval.text_guidance"] = args.text_guidance
    config = config_checks.change_options(config_checks.read_config(args.config), changes)
    policy_ = inference.from_config(config)
    if args.skills:
        return measure_skills.measure(policy_, args.examples)
    different = heldout_records(args.per_type, args.implied)
    records = [record for record in different for _ in range(args.repeats)]
    images = np.stack(list(sample_images(policy_, records, temperature=1.0, seed=SEED)))
    if args.drawings is not None:
        drawings.write(args.drawings, images, records)
    reconstructed = reconstruction(policy_, args.scenes)
    return {"reconstruction": reconstructed, **exact_shares(images, records)}


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", default="package:umm")
    add("--config", type=pathlib.Path, default=config_checks.DEFAULT_CONFIG)
    add("--text-guidance", type=float, help="default: the configuration's")
    add("--out", type=pathlib.Path)
    add("--scenes", type=cli.COUNT, default=500, help="that are reconstructed")
    add("--per-type", type=cli.COUNT, default=200, help="prompts of every plain type")
    add("--implied", type=cli.COUNT, default=600, help="implied prompts")
    add("--repeats", type=cli.COUNT, default=1, help="drawings of every prompt")
    add("--drawings", type=pathlib.Path, help=".npz file for the images and their records")
    add("--skills", action="store_true", help="measure captioning, answering, editing, repairing")
    add("--examples", type=cli.COUNT, default=200, help="of each skill")
    args = parser.parse_args(arguments)
    if args.skills and args.drawings is not None:
        parser.error("--drawings goes without --skills: nothing is drawn for prompts then")
    return args


def run(options: argparse.Namespace) -> None:
    """Measures as the flags say, and writes the figures as JSON."""
    figures = {name: round(value, 4) for name, value in measure(options).items()}
    text = json.dumps(figures, indent=2) + "\n"
    if options.out is not None:
        replace_text(options.out, text)
    sys.stdout.write(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
