"""The study behind docs/results.md: what training changed, by the yardstick it never saw.

    python -m alphagrpo_jax.studies.rt2i --out docs/study --run runs/seed0 --run runs/seed1 ...
    python -m alphagrpo_jax.studies.rt2i --out docs/study --run runs/no_text --name no_text_loss

Draws held-out prompts (at least 300 of every plain type, 800 implied) from the untrained policy (as
sampled, with greedy think texts, and again with other noise) and from the end of every run, all
with the settings of --config, and lets the exact checker judge each image. Every policy's
judgements are kept in one small JSON file, so that the study may run over several sittings; what
is there is not drawn again.

Gains are differences of shares of right images, paired by prompt and noise. Intervals are 95 %
bootstrap intervals over runs and over clusters of prompts: prompts that ask for one combination,
or pose the same riddles, succeed or fail together. (The held-out riddles are four clusters only:
their interval says little.) `noise_floor` compares the untrained policy with itself under other
noise, which no training has changed.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tqdm

from alphagrpo_jax import config_checks, inference
from alphagrpo_jax.config import Config
from alphagrpo_jax.config_checks import from_config_dict
from alphagrpo_jax.inference import Policy
from alphagrpo_jax.models.name_table import AE, EMA
from alphagrpo_jax.runtime import cli
from alphagrpo_jax.runtime.errors import InputError
from alphagrpo_jax.runtime.files import replace_text
from alphagrpo_jax.runtime.metrics import METRICS, read_rows
from alphagrpo_jax.runtime.paths import existing_file, resolve
from alphagrpo_jax.shapes import checker, prompts, requests, riddles
from alphagrpo_jax.studies.measure import judge_policy
from alphagrpo_jax.training import run_folder

PER_PLAIN_TYPE, IMPLIED, HELDOUT_RIDDLES = 300, 800, 240
SEED, OTHER_SEED = 100, 101  # of the evaluation keys
RESAMPLES = 10_000
UNTRAINED, GREEDY, AGAIN = "untrained", "untrained_greedy", "untrained_again"
TRAINING_METRICS = ("eval/reward/mean", "eval/reward_minus_exact")


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


def cluster(record: Mapping) -> str:
    """What prompts share that succeed or fail together: combination or, if implied, riddles."""
    if record["kind"] == "plain":
        return record["combination"]
    return " + ".join(sorted(record["riddles"]))


def load_or_judge(path: pathlib.Path, make: Callable[[], np.ndarray], about: Mapping) -> np.ndarray:
    """The judgements in `path`, or those that `make` finds, written there.

    Args:
      path: of a JSON file.
      make: finds bool[N].
      about: everything that the judgements depend on.
    Raises:
      ValueError: the file is about something else, or no such file.
    """
    about = json.loads(json.dumps(about))  # as it is read back
    if path.exists():
        try:
            found = json.loads(path.read_text())
            marks, of = found["exact"], found["about"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} holds no judgements ({error!r}); delete it to draw again"
            ) from error
        names = sorted(name for name in {*of, *about} if of.get(name) != about.get(name))
        if names:
            raise InputError(
                f"{path} is about other {', '.join(names)}: got "
                f"{[of.get(name) for name in names]}, expected "
                f"{[about.get(name) for name in names]}; choose another --out, or delete the file "
                "to draw again"
            )
        return np.array([mark == "1" for mark in marks], bool)
    exact = make()
    marks = "".join("1" if value else "0" for value in exact)
    replace_text(path, json.dumps({"about": about, "exact": marks}) + "\n")
    return exact


def files_digest(*files: str | pathlib.Path) -> str:
    """SHA-256 of the SHA-256 digests of the files' contents."""
    digest = hashlib.sha256()
    for path in files:
        with pathlib.Path(path).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def model_digest(path: str) -> str:
    """That of a model's weights, given as in `model.path`."""
    hint = "give a folder in the official layout"
    return files_digest(*(existing_file(resolve(path) / name, hint) for name in (EMA, AE)))


def sampling_settings(config: Config) -> dict:
    """What drawing depends on, besides weights, prompts and keys."""
    chosen, rollout_ = config.eval, config.rollout
    return {
        "task": config.task,
        "dtype": config.model.dtype,
        "size": [config.model.height, config.model.width],
        "top_p": chosen.top_p,
        "num_points": chosen.num_points,
        "text_guidance": chosen.text_guidance,
        "shift": rollout_.shift,
        "guidance": dataclasses.asdict(rollout_.guidance),
        "tokens": [rollout_.prompt_tokens, rollout_.text_tokens],
    }


class FinishedRun(NamedTuple):
    """A finished run."""

    folder: pathlib.Path
    step: int
    digest: str  # of its last state
    rows: list[dict]  # of its metrics

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.folder.name


def read_finished_run(folder: pathlib.Path, config: Config, model: str) -> FinishedRun:
    """Reads what a run says about itself.

    Args:
      folder: the run's.
      config: of the study.
      model: digest of the study's untrained model.
    Raises:
      ValueError: no run, an unfinished one, or one that the study cannot be compared with.
    """
    folder = folder.resolve()
    path = folder / run_folder.CONFIG_FILE
    if not path.is_file():
        raise InputError(
            f"--run {folder} is not a run's folder: it has no {path.name}; give the --workdir of "
            "a training"
        )
    if not run_folder.is_finished(folder):
        raise InputError(
            f"the run in {folder} is not finished: it has no {run_folder.DONE_FILE}; continue it "
            "to its end first"
        )
    own = from_config_dict(json.loads(path.read_text()))
    alike = {"task": own.task, "dtype": own.model.dtype, "model": model_digest(own.model.path)}
    expected = {"task": config.task, "dtype": config.model.dtype, "model": model}
    for name, value in expected.items():
        if alike[name] != value:
            raise InputError(
                f"the run in {folder} was made with {name} {alike[name]}, expected {value} as of "
                "the untrained policy; give the --config that fits the run"
            )
    rows = read_rows(folder / METRICS)
    states = [row for row in rows if "state/digest" in row]
    if not states:
        raise InputError(
            f"{folder / METRICS} has no state/digest, expected one in its last row; run it again"
        )
    return FinishedRun(folder, states[-1]["step"], states[-1]["state/digest"], rows)


def final_policy(run: FinishedRun, config: Config) -> Policy:
    """The policy at a run's end, drawing with the settings of the study.

    Raises:
      ValueError: its newest checkpoint is of another step.
    """
    policy = inference.from_run(run.folder)
    if policy.step != run.step:
        raise InputError(
            f"the newest checkpoint in {run.folder} is of step {policy.step}, expected {run.step}, "
            f"the last state in {METRICS}; run it again"
        )
    return policy._replace(config=config)


class Gain(NamedTuple):
    """A mean of paired differences, and the same of every bootstrap sample."""

    value: float
    resampled: np.ndarray  # float64[RESAMPLES]

    @property
    def interval(self) -> list[float]:
        """The middle 95 % of the bootstrap samples, [low, high]."""
        return [round(float(x), 4) for x in np.quantile(self.resampled, [0.025, 0.975])]


def resample(
    gains: np.ndarray, clusters: Sequence[str], runs: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Means of bootstrap samples: clusters drawn with replacement, whole, and runs likewise.

    Args:
      gains: float64[R, N].
      clusters: N names.
      runs: int[RESAMPLES, R], how often each sample holds each run.
      rng: draws the clusters.
    Returns:
      float64[RESAMPLES].
    """
    names, of = np.unique(np.asarray(clusters), return_inverse=True)
    count = len(names)
    sums = np.stack([np.bincount(of, row, count) for row in gains])  # [R, C]
    drawn = rng.multinomial(count, np.full(count, 1 / count), len(runs)).astype(np.float64)
    totals = (drawn @ sums.T * runs).sum(axis=1) / runs.sum(axis=1)
    return totals / (drawn @ np.bincount(of, minlength=count))


def gains(
    after: np.ndarray,
    before: np.ndarray,
    groups: Sequence[str],
    clusters: Sequence[str],
    *,
    seed: int = 0,
) -> dict[str, Gain]:
    """Gains by group, of `plain` (types weigh alike) and of `all` (plain and implied weigh alike).

    Args:
      after: bool[R, N], R runs on the same N prompts.
      before: bool[N].
      groups: N names; "implied" and at least one of "plain/..." are among them.
      clusters: N names.
      seed: of the resampling; all groups of a sample hold the same runs.
    """
    rng, names, labels = np.random.default_rng(seed), np.array(groups), np.array(clusters)
    count = len(after)
    runs = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES)
    found: dict[str, Gain] = {}
    for name in dict.fromkeys(groups):
        rows = np.flatnonzero(names == name)
        paired = after[:, rows].astype(np.float64) - before[rows]
        found[name] = Gain(float(paired.mean()), resample(paired, labels[rows], runs, rng))
    found["plain"] = _mean([gain for name, gain in found.items() if name.startswith("plain/")])
    found["all"] = _mean([found["plain"], found["implied"]])
    return found


def _mean(parts: Sequence[Gain]) -> Gain:
    values, resampled = zip(*parts, strict=True)
    return Gain(float(np.mean(values)), np.mean(resampled, axis=0))


def shares(exact: np.ndarray, groups: Sequence[str]) -> dict[str, float]:
    """Share of right images by group, of `plain` and of `all`, weighed as in `gains`.

    Args:
      exact: bool[N].
      groups: N names.
    """
    names = np.array(groups)
    found = {name: float(exact[names == name].mean()) for name in dict.fromkeys(groups)}
    found["plain"] = float(np.mean([v for name, v in found.items() if name.startswith("plain/")]))
    found["all"] = (found["plain"] + found["implied"]) / 2
    return found


def bars(gain: Mapping[str, Gain], over_greedy: Mapping[str, Gain]) -> list[dict]:
    """What the training is held to: which bar, the value found, and whether it is met."""
    types = [each.value for name, each in gain.items() if name.startswith("plain/")]
    found = [
        ("gain on all", gain["all"].value, 0.15),
        ("gain on implied", gain["implied"].value, 0.30),
        ("gain on plain", gain["plain"].value, -0.03),
        ("least gain on a plain type", min(types), -0.05),
        ("gain over greedy on implied", over_greedy["implied"].value, 0.15),
    ]
    return [
        {"bar": f"{name} >= {bar}", "value": round(value, 4), "met": round(value, 9) >= bar}
        for name, value, bar in found
    ]


def summary(
    after: np.ndarray,
    untrained: Mapping[str, np.ndarray],
    groups: Sequence[str],
    clusters: Sequence[str],
) -> dict:
    """Shares before and after, gains with intervals by group, the noise floor and the bars.

    Args:
      after: bool[R, N].
      untrained: bool[N] of `UNTRAINED`, `GREEDY` and `AGAIN`.
      groups, clusters: N names each.
    """
    over = functools.partial(gains, groups=groups, clusters=clusters)
    gain, over_greedy = over(after, untrained[UNTRAINED]), over(after, untrained[GREEDY])
    floor = over(untrained[AGAIN][None], untrained[UNTRAINED])
    before, greedy = (shares(untrained[name], groups) for name in (UNTRAINED, GREEDY))
    ends = [shares(exact, groups) for exact in after]
    members: dict[str, list[str]] = {}
    for name, label in zip(groups, clusters, strict=True):
        members.setdefault(name, []).append(label)
    found = {}
    for name, each in gain.items():
        own = members.get(name)
        found[name] = {
            **({} if own is None else {"prompts": len(own), "clusters": len(set(own))}),
            "untrained": round(before[name], 4),
            "untrained_greedy": round(greedy[name], 4),
            "trained": [round(end[name], 4) for end in ends],
            "gain": round(each.value, 4),
            "interval_95": each.interval,
            "gain_over_greedy": round(over_greedy[name].value, 4),
            "gain_over_greedy_interval_95": over_greedy[name].interval,
        }
    noise = {
        name: {"gain": round(each.value, 4), "interval_95": each.interval}
        for name, each in floor.items()
    }
    return {"groups": found, "noise_floor": noise, "bars": bars(gain, over_greedy)}


def training_metrics(rows: Sequence[Mapping]) -> dict[str, list[float]]:
    """First and last value of a run's own `TRAINING_METRICS`."""
    found = {}
    for name in TRAINING_METRICS:
        values = [row[name] for row in rows if name in row]
        if values:
            found[name] = [values[0], values[-1]]
    return found


def study(args: argparse.Namespace) -> dict:
    """Draws and judges what is not kept yet, and compares.

    Raises:
      ValueError, FileNotFoundError, CheckpointError: see `read_finished_run` and `load_or_judge`.
    """
    config = config_checks.read_config(args.config)
    model = model_digest(config.model.path)
    names = [folder.resolve().name for folder in args.run]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(
            f"got several --run folders named {twice}; judgements are kept by folder name, so "
            "expected different ones; rename them"
        )
    runs = [read_finished_run(folder, config, model) for folder in args.run]
    args.out.mkdir(parents=True, exist_ok=True)
    records, groups = study_records()
    common = {
        "prompts": hashlib.sha256(json.dumps(records).encode()).hexdigest(),
        "checker": checker.RULES,
        "model": model,
        "settings": sampling_settings(config),
    }

    def judged(name: str, policy: Callable[[], Policy], how: dict, **about: object) -> np.ndarray:
        return load_or_judge(
            args.out / f"{name}.json",
            lambda: judge_policy(policy(), records, **how),
            {"policy": name, **common, **how, **about},
        )

    sampled = {"temperature": config.eval.temperature, "seed": SEED}
    ways = {
        UNTRAINED: sampled,
        GREEDY: sampled | {"temperature": 0.0},
        AGAIN: sampled | {"seed": OTHER_SEED},
    }
    pretrained = functools.partial(inference.from_config, config)
    untrained = {name: judged(name, pretrained, how) for name, how in ways.items()}
    after = [
        judged(
            f"run_{run.name}",
            functools.partial(final_policy, run, config),
            sampled,
            step=run.step,
            state=run.digest,
        )
        for run in runs
    ]
    found = summary(np.stack(after), untrained, groups, [cluster(record) for record in records])
    return {
        "name": args.name,
        "runs": [run.name for run in runs],
        **found,
        "training": {run.name: training_metrics(run.rows) for run in runs},
    }


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--run", type=pathlib.Path, action="append", required=True)
    parser.add_argument("--name", default="default", help="of this set of runs")
    parser.add_argument("--config", type=pathlib.Path, default=config_checks.DEFAULT_CONFIG)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Measures what is missing, writes the summary and prints it."""
    text = json.dumps(study(options), indent=2)
    replace_text(options.out / f"summary_{options.name.replace(' ', '_')}.json", text + "\n")
    tqdm.tqdm.write(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
