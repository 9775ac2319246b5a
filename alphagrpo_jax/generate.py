"""Generates, edits, answers and repairs, with the shipped model or a run's newest checkpoint.

    python -m alphagrpo_jax.generate --prompt "a red circle" --out x.png --think --n 4
    python -m alphagrpo_jax.generate --prompt "a red circle" --out x.png --refine 2 --keep best
    python -m alphagrpo_jax.generate --image x.png --edit "make the circle blue" --out y.png
    python -m alphagrpo_jax.generate --image x.png --ask "What colour is the circle?"

Prints what the model writes. `--prompt` writes one image file, a grid if there are several images.
With `--refine N` the model looks at its image N times, says what is wrong and generates it anew:
every round's image is written beside OUT (OUT's name with _0, _1, ...) as soon as the round ends,
the one kept to OUT; reflections, rewards and what is kept to OUT's name with _rounds.json. Small
images are written enlarged. `--keep`:

  last   the last round's, without a verifier
  best   the one that the verifier rates highest, over all rounds
  gated  a round replaces the image only if the verifier rates it higher
"""

import argparse
import contextlib
import json
import math
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image

from alphagrpo_jax import config_checks, inference
from alphagrpo_jax.config import Config, ConfigError
from alphagrpo_jax.runtime import cli
from alphagrpo_jax.runtime import images as images_lib
from alphagrpo_jax.runtime.errors import InputError, UserError
from alphagrpo_jax.runtime.files import replace_text
from alphagrpo_jax.runtime.paths import resolve
from alphagrpo_jax.runtime.records import Record, parse_record, read_jsonl
from alphagrpo_jax.runtime.texts import is_writable
from alphagrpo_jax.runtime.tokenizer import Tokenizer
from alphagrpo_jax.shapes import grammar
from alphagrpo_jax.training import run_folder
from alphagrpo_jax.training import verifiers as verifiers_lib

MIN_SIDE = 96  # pixels; smaller images are enlarged for the eye
FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # of images that are written


def to_picture(images: np.ndarray) -> Image.Image:
    """Tiles uint8[N, H, W, 3] as a grid, small images enlarged by a whole factor."""
    scale = math.ceil(MIN_SIDE / images.shape[1])
    large = images.repeat(scale, axis=1).repeat(scale, axis=2)
    if len(large) == 1:
        return Image.fromarray(large[0])
    return Image.fromarray(images_lib.grid(large, math.ceil(math.sqrt(len(large)))))


def apply_flags(config: Config, options: argparse.Namespace) -> Config:
    """Changes a configuration's sampling, model and verifier to those that the flags name.

    Raises:
      ConfigError: image guidance where the text guidance is off.
    """
    flags = {
        "eval.temperature": options.temperature,
        "eval.top_p": options.top_p,
        "eval.num_points": options.num_points,
        "eval.text_guidance": options.text_guidance,
        "rollout.edit_guidance.text_scale": options.text_guidance,
        "rollout.edit_guidance.image_scale": options.image_guidance,
        "model.path": options.model,
    }
    changes = {key: flag for key, flag in flags.items() if flag is not None}
    if options.verifier is not None:
        changes |= {"verifier.kind": "hf", "verifier.path": options.verifier}
        changes |= {"verifier.endpoints": ()}
    changed_config = config_checks.change_options(config, changes)
    text_scale = changed_config.rollout.edit_guidance.text_scale
    if options.image_guidance is not None and text_scale <= 1:
        raise ConfigError(
            f"without effect: --image-guidance {options.image_guidance}, as the text guidance of "
            f"edits is {text_scale}, which is off; give --text-guidance above 1 as well"
        )
    return changed_config


def read_config(options: argparse.Namespace) -> Config:
    """Reads the configuration that the flags name, and changes it as they say."""
    if options.checkpoint:
        config = run_folder.run_config(options.checkpoint)
    else:
        config = config_checks.read_config(options.config)
    return apply_flags(config, options)


def open_policy(options: argparse.Namespace, config: Config) -> inference.Policy:
    """Loads the policy that the flags name; it samples as `config` says."""
    if not options.checkpoint:
        return inference.from_config(config)
    policy = inference.from_run(options.checkpoint, model_path=options.model)
    return policy._replace(config=config)


def find_questions(options: argparse.Namespace) -> Record:
    """Returns the record whose questions rate the rounds: of `--record`, or by the shapes grammar.

    Raises:
      InputError: there are no questions about this prompt.
    """
    if options.record:
        records = [r for r in read_jsonl(options.record) if r.prompt == options.prompt]
        if not records:
            raise InputError(
                f"{options.record} has no record of the prompt {options.prompt!r}, whose questions "
                f"--keep {options.keep} needs; add one (decompose writes them)"
            )
        return records[0]
    try:
        return parse_record(grammar.record(options.prompt))
    except grammar.GrammarError as error:
        raise InputError(
            f"--keep {options.keep} needs questions about the prompt, and it is none of the shapes "
            f"world ({error}); give a file of records with --record, or use --keep last"
        ) from error


def run(options: argparse.Namespace) -> None:
    """Generates, edits, answers or refines, as the flags say; writes images and prints texts."""
    # Loading the model takes long: bad input is refused before it.
    image = None if options.image is None else images_lib.open_rgb(options.image)
    rates = options.refine and options.keep != "last"
    record = find_questions(options) if rates else None
    config = read_config(options)
    text = options.prompt or options.edit or options.ask
    inference.check_text(text, Tokenizer.from_folder(resolve(config.model.path)))
    if rates:
        verifiers_lib.verifier_factories(config)
    if options.out is not None:
        pathlib.Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    policy = open_policy(options, config)
    if options.ask is not None:
        assert image is not None  # `parse_flags` refuses --ask without --image
        think, answer = inference.answer_question(policy, image, options.ask, seed=options.seed)
        print(f"thinks: {think}\n{answer}")
        return
    assert options.out is not None  # `parse_flags` refuses an image without --out
    out = pathlib.Path(options.out)
    if options.refine:
        _refine(policy, options, image, record, out)
        return
    if options.edit is not None:
        assert image is not None
        generated = inference.edit_image(
            policy, image, options.edit, count=options.n, seed=options.seed
        )
    else:
        generated = inference.generate_images(
            policy, options.prompt, think=options.think, count=options.n, seed=options.seed
        )
    to_picture(generated.images).save(out)
    for number, text in enumerate(generated.texts, start=1):
        print(f"{number}: {text}")
    print(out)


def _refine(
    policy: inference.Policy,
    options: argparse.Namespace,
    image: Image.Image | None,
    record: Record | None,
    out: pathlib.Path,
) -> None:
    rounds = inference.refine(
        policy,
        options.prompt,
        rounds=options.refine,
        keep=options.keep,
        think=options.think,
        record=record,
        image=image,
        seed=options.seed,
    )
    verifier = _verifier_name(policy.config) if record else None
    log = {"prompt": options.prompt, "keep": options.keep, "verifier": verifier, "rounds": []}
    kept_number, log_path = None, out.with_name(f"{out.stem}_rounds.json")
    try:
        with contextlib.closing(rounds):
            for number, image_round in enumerate(rounds):
                path = out.with_stem(f"{out.stem}_{number}")
                to_picture(image_round.image[None]).save(path)
                if image_round.is_kept:
                    kept_number = number
                    to_picture(image_round.image[None]).save(out)
                text, reward = image_round.text, image_round.reward
                log["rounds"].append({"image": path.name, "text": text, "reward": reward})
                log["kept"] = kept_number
                replace_text(log_path, json.dumps(log, indent=2, ensure_ascii=False) + "\n")
                score = "" if reward is None else f" (verifier: {reward:.3f})"
                print(f"round {number}{score}: {text}\n  {path}")
    except UserError as error:
        if not log["rounds"]:
            raise
        result = "none is kept" if kept_number is None else f"{out} is round {kept_number}"
        raise InputError(
            f"after round {len(log['rounds']) - 1}: {error}; all rounds so far are written beside "
            f"{out}, with {log_path.name}; {result}"
        ) from error
    rated = f"by the verifier {verifier}" if record else "without a verifier"
    print(f"kept round {kept_number} ({options.keep}, {rated}): {out}; reflections: {log_path}")


def _verifier_name(config: Config) -> str:
    """Returns the name of the verifier that rates the rounds."""
    remote = f"{config.verifier.model} at {', '.join(config.verifier.endpoints)}"
    if config.verifier.kind == "openai":
        return remote
    return (
        f"{config.verifier.path} and {remote}"
        if config.verifier.endpoints
        else config.verifier.path
    )


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(
        prog="python -m alphagrpo_jax.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--prompt", help="what to draw")
    add("--image", help="an image file to edit, ask about, or repair")
    add("--edit", help="what to change in --image")
    add("--ask", help="a question about --image")
    add("--out", help=f"the image to write: a name with {', '.join(FORMATS)}")
    add("--think", action="store_true", help="write a think text before each image")
    add("--n", type=cli.COUNT, default=1, help="how many images")
    add(
        "--refine", type=cli.AMOUNT, default=0, help="how often the image is looked at and repaired"
    )
    add("--keep", choices=inference.KEEP_MODES, default="last", help="which round's image")
    add("--record", help="a file of records with questions about the prompt, for --keep")
    add("--verifier", help="a folder or package:NAME, for --keep, instead of the configuration's")
    add("--seed", type=cli.SEED, default=0)
    add("--checkpoint", help="a run's folder: its newest checkpoint draws")
    add(
        "--config", default=config_checks.DEFAULT_CONFIG, help="without --checkpoint; a Python file"
    )
    add("--model", help="a folder or package:NAME, instead of the configuration's")
    add("--temperature", type=float, help="of texts; 0 is greedy")
    add("--top-p", type=float, help="of texts")
    add("--num-points", type=cli.COUNT, help="of the schedule: one more than steps")
    add("--text-guidance", type=float, help="scale, of edits and repairs too; at most 1 is off")
    add("--image-guidance", type=float, help="scale of edits and repairs; needs text guidance")
    options = parser.parse_args(arguments)
    if options.top_p is not None and not 0 < options.top_p <= 1:
        parser.error("--top-p must be in (0, 1]")
    if options.num_points == 1:
        parser.error("--num-points must be at least 2")
    if (options.temperature or 0) < 0:
        parser.error("--temperature must not be negative")
    _check_usage(parser, options)
    return options


def _check_usage(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    actions = [name for name in ("prompt", "edit", "ask") if vars(options)[name] is not None]
    if len(actions) != 1:
        parser.error(f"give one of --prompt, --edit and --ask, got {actions or 'none'}")
    (action,) = actions
    text = vars(options)[action]
    if not text.strip() or not is_writable(text):
        parser.error(f"--{action}: got {text!r}, expected a text in UTF-8 that is not empty")
    if action in ("edit", "ask") and options.image is None:
        parser.error(f"--{action} needs --image")
    if action == "prompt" and options.image is not None and not options.refine:
        parser.error("--image with --prompt needs --refine; to change an image use --edit")
    if action != "ask" and options.out is None:
        parser.error("--out is needed")
    if options.refine and action != "prompt":
        parser.error("--refine needs --prompt")
    if options.refine and options.n > 1:
        parser.error("--refine repairs one image; leave --n out")
    if options.keep != "last" and not options.refine:
        parser.error(f"--keep {options.keep} needs --refine")
    image_flags = ("out", "num_points", "text_guidance", "image_guidance")
    has_image_flags = any(vars(options)[name] is not None for name in image_flags) or options.n > 1
    has_first_image = options.refine and options.image is not None
    without_effect = {
        "--think with --edit or --ask, which always think": options.think and action != "prompt",
        "--think with --refine and --image: the first image is given": (
            options.think and has_first_image
        ),
        "--n, --out, --num-points or guidance with --ask": has_image_flags and action == "ask",
        "--image-guidance without --edit or --refine": (
            options.image_guidance is not None and action == "prompt" and not options.refine
        ),
        "--record or --verifier without --keep best or gated": (
            (options.record or options.verifier) and options.keep == "last"
        ),
    }
    for flags, is_used in without_effect.items():
        if is_used:
            parser.error(f"without effect: {flags}; leave it out")
    if options.out is not None and pathlib.Path(options.out).suffix.lower() not in FORMATS:
        parser.error(f"--out {options.out}: expected a name that ends with one of {FORMATS}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
