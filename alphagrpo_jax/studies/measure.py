"""Measures the small UMM: what its autoencoder keeps, how often it draws what is asked, its skills.

    python -m alphagrpo_jax.studies.measure --model package:umm --out runs/measure.json
    python -m alphagrpo_jax.studies.measure --drawings runs/drawings.npz
    python -m alphagrpo_jax.studies.measure --skills

Everything is judged by the exact checker: reconstructions of random scenes (every shape in its
cell, and the background), and images drawn for held-out prompts with think texts sampled at
temperature 1, by kind and type of prompt. `--drawings` keeps these images with their records, for
`verifier_eval` and, with several drawings of every prompt (`--repeats`), for `reward_figures`.
`--skills` measures captions, answers, edits and repairs, see `measure_skills`.
"""

import argparse
import collections
import functools
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from alphagrpo_jax import config_checks, inference, policy, tasks
from alphagrpo_jax.inference import Policy
from alphagrpo_jax.runtime import cli, distributed
from alphagrpo_jax.runtime.files import replace_text, replacing
from alphagrpo_jax.sampling.trajectory import pixels, sample_trajectories
from alphagrpo_jax.shapes import checker, examples, prompts, requests, scenes
from alphagrpo_jax.studies import measure_skills
from alphagrpo_jax.training import options as options_lib
from alphagrpo_jax.types import TextBlock

SEED = 31
CHUNK = 50  # reconstructions at a time
BATCH = 100  # drawings at a time


def reconstruction(policy_: Policy, count: int) -> float:
    """Share of `count` random scenes that are the same after encoding and decoding."""
    model, params = policy_.loaded.model, policy_.params
    grid = model.config.latent_grid(scenes.RESOLUTION, scenes.RESOLUTION)

    @jax.jit
    def through(images: jax.Array) -> jax.Array:
        latents = policy.encode_image(model, params, images.astype(jnp.float32) / 127.5 - 1.0)
        return pixels(model, params, latents, grid)

    rng = np.random.default_rng(SEED)
    drawn = [scenes.random_scene(rng) for _ in range(count)]
    same = []
    for first in range(0, count, CHUNK):
        part = drawn[first : first + CHUNK]
        images = np.asarray(through(examples.render_batch(part)))
        same += [
            checker.shows_scene(image, scene) for image, scene in zip(images, part, strict=True)
        ]
    return float(np.mean(same))


def sample_images(
    policy_: Policy, records: Sequence[Mapping], *, temperature: float, seed: int
) -> Iterator[np.ndarray]:
    """Draws one image per record, uint8[48, 48, 3] each, as the policy's `eval` section says.

    Args:
      policy_: who draws.
      records: prompts.
      temperature: of the think text; 0 is greedy.
      seed: of the keys; the same seed means the same noise for every policy.
    """
    config, loaded = policy_.config, policy_.loaded
    spec = options_lib.eval_spec(config, loaded, tasks.TASKS["rt2i"])
    draw = jax.jit(functools.partial(_draw, model=loaded.model, spec=spec))
    key, size = jax.random.key(seed), min(BATCH, len(records))
    for first in tqdm.trange(0, len(records), size, desc="drawing", unit_scale=size):
        rows = [
            loaded.tokenizer.wrap(records[i % len(records)]["prompt"])
            for i in range(first, first + size)
        ]
        block = TextBlock(*loaded.tokenizer.batch(rows, config.rollout.prompt_tokens))
        images = draw(policy_.params, block, key, jnp.int32(first), jnp.float32(temperature))
        yield from distributed.to_host(images)[: len(records) - first]


def _draw(params, block, key, first, temperature, *, model, spec) -> jax.Array:
    _, images = sample_trajectories(
        model, params, (block,), key, first, jnp.int32(0), temperature, spec=spec
    )
    return images


def judge_policy(
    policy_: Policy, records: Sequence[Mapping], *, temperature: float, seed: int
) -> np.ndarray:
    """Whether all facts hold in each record's image, bool[N]; see `sample_images`."""
    drawn = sample_images(policy_, records, temperature=temperature, seed=seed)
    pairs = zip(drawn, records, strict=True)
    return np.array([checker.exact_all(image, record["facts"]) for image, record in pairs], bool)


def heldout_records(per_type: int, implied: int) -> list[dict]:
    """Held-out prompts: `per_type` of every plain type, and implied ones."""
    make = functools.partial(prompts.records, "heldout", seed=SEED, repeats=True)
    plain = make(per_type * len(requests.PLAIN_TYPES), kinds=("plain",))
    return plain + make(implied, kinds=("implied",))


def exact_shares(images: Sequence[np.ndarray], records: Sequence[Mapping]) -> dict[str, float]:
    """Share of images in which all facts hold, by kind and type of prompt."""
    found = collections.defaultdict(list)
    for image, record in zip(images, records, strict=True):
        exact = checker.exact_all(image, record["facts"])
        for name in (record["kind"], f"{record['kind']}/{record['type']}"):
            found[name].append(exact)
    return {name: float(np.mean(held)) for name, held in sorted(found.items())}


def write_drawings(path: pathlib.Path, images: np.ndarray, records: Sequence[Mapping]) -> None:
    """Keeps images uint8[N, 48, 48, 3] and their records, as JSON texts, in an .npz file."""
    with replacing(path) as file:
        np.savez_compressed(
            file, images=images, records=np.array([json.dumps(each) for each in records])
        )


def measure(args: argparse.Namespace) -> dict[str, float]:
    """The figures that the flags ask for."""
    changes = {"model.path": args.model}
    if args.text_guidance is not None:
        changes["eval.text_guidance"] = args.text_guidance
    config = config_checks.change_options(config_checks.read_config(args.config), changes)
    policy_ = inference.from_config(config)
    if args.skills:
        return measure_skills.measure(policy_, args.examples)
    found = heldout_records(args.per_type, args.implied)
    records = [record for record in found for _ in range(args.repeats)]
    images = np.stack(list(sample_images(policy_, records, temperature=1.0, seed=SEED)))
    if args.drawings is not None:
        write_drawings(args.drawings, images, records)
    same = reconstruction(policy_, args.scenes)
    return {"reconstruction": same, **exact_shares(images, records)}


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default="package:umm")
    add("--config", type=pathlib.Path, default=config_checks.DEFAULT_CONFIG)
    add("--text-guidance", type=float, help="default: the configuration's")
    add("--out", type=pathlib.Path)
    add("--scenes", type=int, default=500, help="that are reconstructed")
    add("--per-type", type=int, default=200, help="prompts of every plain type")
    add("--implied", type=int, default=600, help="implied prompts")
    add("--repeats", type=int, default=1, help="drawings of every prompt")
    add("--drawings", type=pathlib.Path, help=".npz file for the images and their records")
    add("--skills", action="store_true", help="measure captioning, answering, editing, repairing")
    add("--examples", type=int, default=200, help="of each skill")
    args = parser.parse_args(arguments)
    if args.skills and args.drawings is not None:
        parser.error("--drawings goes without --skills: nothing is drawn for prompts then")
    if min(args.scenes, args.per_type, args.implied, args.repeats, args.examples) < 1:
        parser.error("--scenes, --per-type, --implied, --repeats and --examples must be at least 1")
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
