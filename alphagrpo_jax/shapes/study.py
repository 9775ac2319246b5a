"""The study behind the README's figures: what training changed, by the yardstick it never saw.

    python -m alphagrpo_jax.shapes.study --out docs/study --run runs/seed0 --run runs/seed1 ...
    python -m alphagrpo_jax.shapes.study --out docs/study --run runs/no_text --name no_text_loss

Draws held-out prompts (at least 300 of every plain type, 800 implied) from the untrained policy, as
sampled and with greedy think texts, and from every run's newest checkpoint, with the same keys, and
lets the exact checker judge each image. Every policy's judgements are kept in one small JSON file,
so that the study may run over several sittings; what is there is not drawn again. Differences are
paired by prompt; intervals are bootstrapped over prompts (and runs).
"""

import argparse
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from alphagrpo_jax import build, trained
from alphagrpo_jax.rollout import rollout
from alphagrpo_jax.runtime import distributed
from alphagrpo_jax.shapes import checker, prompts, requests, riddles
from alphagrpo_jax.trained import Trained
from alphagrpo_jax.types import TextBlock

PER_PLAIN_TYPE, IMPLIED, HELDOUT_RIDDLES = 300, 800, 240
SEED = 100
BATCH = 100
RESAMPLES = 10_000
UNTRAINED, GREEDY = "untrained", "untrained_greedy"


def study_records() -> tuple[list[dict], list[str]]:
    """Records and the group of each; a function of nothing."""
    plain = prompts.records(
        "heldout",
        PER_PLAIN_TYPE * len(requests.PLAIN_TYPES),
        kinds=("plain",),
        seed=SEED,
        name="study-plain",
        repeats=True,
    )
    implied = prompts.records(
        "heldout", IMPLIED, kinds=("implied",), seed=SEED, name="study-implied", repeats=True
    )
    unseen = prompts.records(
        "heldout",
        HELDOUT_RIDDLES,
        kinds=("implied",),
        seed=SEED,
        pool=riddles.HELDOUT,
        forms=prompts.ONE_RIDDLE_FORMS,
        name="study-riddles",
        repeats=True,
    )
    groups = [f"plain/{each['type']}" for each in plain]
    groups += ["implied"] * len(implied) + ["heldout_riddles"] * len(unseen)
    return [*plain, *implied, *unseen], groups


def judge(policy: Trained, records: Sequence[dict], *, temperature: float, seed: int) -> np.ndarray:
    """Draws one image per record and checks it.

    Args:
      policy: whose images.
      records: prompts with facts.
      temperature: of the think text; 0 is greedy.
      seed: of the evaluation keys, the same for every policy.
    Returns:
      bool[N]: all facts hold.
    """
    config, loaded = policy.config, policy.loaded
    options = build.eval_options(config, loaded)
    draw = jax.jit(functools.partial(_draw, model=loaded.model, options=options))
    key, exact = jax.random.key(seed), []
    for first in tqdm.trange(0, len(records), BATCH, desc="drawing", unit_scale=BATCH):
        part = [records[i % len(records)] for i in range(first, first + BATCH)]
        block = _block(loaded.tokenizer, part, config.rollout.prompt_tokens)
        images = draw(policy.params, block, key, jnp.int32(first), jnp.float32(temperature))
        for image, record in zip(distributed.to_host(images), part, strict=True):
            exact.append(all(checker.facts(image, record["facts"]).values()))
    return np.array(exact[: len(records)], bool)


def _draw(params, block, key, first, temperature, *, model, options) -> jax.Array:
    _, images = rollout(
        model, params, (block,), key, first, jnp.int32(0), temperature, options=options
    )
    return images


def _block(tokenizer, records: Sequence[dict], length: int) -> TextBlock:
    tokens = np.zeros((len(records), length), np.int32)
    mask = np.zeros((len(records), length), bool)
    for row, record in enumerate(records):
        ids = tokenizer.wrap(record["prompt"])
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    return TextBlock(tokens, mask)


def kept(path: pathlib.Path, make: Callable[[], np.ndarray], about: dict) -> np.ndarray:
    """The judgements in `path`, or those that `make` finds, written there.

    Raises:
      ValueError: the file is about other prompts or another policy.
    """
    if path.exists():
        found = json.loads(path.read_text())
        if found["about"] != about:
            raise ValueError(
                f"{path} is about {found['about']}, expected {about}; delete it to draw again"
            )
        return np.array([mark == "1" for mark in found["exact"]], bool)
    exact = make()
    marks = "".join("1" if value else "0" for value in exact)
    path.write_text(json.dumps({"about": about, "exact": marks}) + "\n")
    return exact


def members(groups: Sequence[str]) -> dict[str, np.ndarray]:
    """Indices of each group of prompts, and of all plain ones, types weighing alike."""
    names = np.array(groups)
    result = {name: np.flatnonzero(names == name) for name in dict.fromkeys(groups)}
    result["plain"] = np.flatnonzero(np.char.startswith(names, "plain/"))
    return result


def difference(
    after: np.ndarray, before: np.ndarray, *, seed: int = 0
) -> tuple[float, list[float]]:
    """Mean of the paired differences and its 95 % bootstrap interval.

    Args:
      after: bool[R, N], R runs on the same N prompts.
      before: bool[N].
      seed: of the resampling, over runs and prompts.
    """
    gains = after.astype(np.float64) - before
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        runs = rng.integers(len(gains), size=len(gains))
        columns = rng.integers(gains.shape[1], size=gains.shape[1])
        means[i] = gains[runs].mean(axis=0)[columns].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(gains.mean()), [round(float(low), 4), round(float(high), 4)]


def summary(
    exact: dict[str, np.ndarray], runs: Sequence[str], groups: Sequence[str]
) -> dict[str, dict]:
    """Shares before and after, differences and intervals, by group of prompts.

    Besides the groups: `all` (implied and plain weigh alike) and, for implied prompts, the
    comparison with the untrained policy's greedy think texts.
    """
    after = np.stack([exact[run] for run in runs])
    before, greedy = exact[UNTRAINED], exact[GREEDY]
    result = {}
    for name, rows in members(groups).items():
        gain, interval = difference(after[:, rows], before[rows])
        result[name] = {
            "prompts": len(rows),
            "untrained": round(float(before[rows].mean()), 4),
            "untrained_greedy": round(float(greedy[rows].mean()), 4),
            "trained": [round(float(x), 4) for x in after[:, rows].mean(axis=1)],
            "gain": round(gain, 4),
            "interval_95": interval,
            "gain_over_greedy": round(float(after[:, rows].mean() - greedy[rows].mean()), 4),
        }
    plain, implied = result["plain"], result["implied"]
    result["all"] = {"gain": round((plain["gain"] + implied["gain"]) / 2, 4)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--run", type=pathlib.Path, action="append", required=True)
    parser.add_argument("--name", default="default", help="of this set of runs")
    parser.add_argument("--config", type=pathlib.Path, default=trained.DEFAULT_CONFIG)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    records, groups = study_records()
    digest = hashlib.sha256(json.dumps(records).encode()).hexdigest()[:16]
    pretrained = trained.from_config(trained.read_config(args.config))
    exact = {}
    for name, temperature in ((UNTRAINED, 1.0), (GREEDY, 0.0)):
        make = functools.partial(judge, pretrained, records, temperature=temperature, seed=SEED)
        about = {"prompts": digest, "policy": name, "model": pretrained.config.model.path}
        exact[name] = kept(args.out / f"{name}.json", make, about)
    for run in args.run:
        policy = trained.from_run(run)
        make = functools.partial(judge, policy, records, temperature=1.0, seed=SEED)
        about = {"prompts": digest, "policy": run.name, "steps": policy.step}
        exact[run.name] = kept(args.out / f"run_{run.name}.json", make, about)
    found = summary(exact, [run.name for run in args.run], groups)
    text = json.dumps({"name": args.name, "runs": [r.name for r in args.run], **found}, indent=2)
    (args.out / f"summary_{args.name.replace(' ', '_')}.json").write_text(text + "\n")
    tqdm.tqdm.write(text)


if __name__ == "__main__":
    main()
