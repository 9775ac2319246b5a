"""Measures the effect of RT2I training by the exact checker, which training never sees.

    python -m alphagrpo_jax.studies.rt2i --out docs/study --run runs/seed0 --run runs/seed1 ...
    python -m alphagrpo_jax.studies.rt2i --out docs/study --run runs/no_text --name no_text_loss

Generates an image for every held-out prompt (300 of every plain type, 800 implied, 240 with the
held-out riddles), with the untrained policy (sampled, with greedy think texts, and sampled with
other noise) and with the final policy of every run, all with the settings of --config. The exact
checker judges each image. OUT/POLICY.json keeps the judgements of one policy: the study may run
over several sittings and generates only what is missing. OUT/summary_NAME.json has the figures
(those of docs/results.md).

Gains are differences of the share of correct images, paired by prompt and noise, with 95 %
bootstrap intervals over runs and over clusters of prompts (see `bootstrap`). The held-out riddles
are four clusters only: their interval says little. `noise_floor` compares the untrained policy with
itself under other noise, which no training has changed.
"""

import argparse
import functools
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
from alphagrpo_jax.runtime import cli
from alphagrpo_jax.runtime.errors import InputError
from alphagrpo_jax.runtime.files import replace_text
from alphagrpo_jax.runtime.metrics import METRICS, read_rows
from alphagrpo_jax.shapes import prompts, requests, riddles
from alphagrpo_jax.studies import bootstrap, verdicts
from alphagrpo_jax.studies.bootstrap import Gain
from alphagrpo_jax.studies.measure import judge_policy
from alphagrpo_jax.training import run_folder

PER_PLAIN_TYPE, IMPLIED, HELDOUT_RIDDLES = 300, 800, 240
SEED, OTHER_SEED = 100, 101  # of the evaluation keys
UNTRAINED, GREEDY, AGAIN = "untrained", "untrained_greedy", "untrained_again"
TRAINING_METRICS = ("eval/reward/mean", "eval/reward_minus_exact")


def study_records() -> tuple[list[dict], list[str]]:
    """Generates the study's records and the group of each; always the same."""
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
    heldout_riddles = prompts.records(
        "heldout",
        HELDOUT_RIDDLES,
        kinds=("implied",),
        seed=SEED,
        pool=riddles.HELDOUT,
        forms=prompts.ONE_RIDDLE_FORMS,
        name="study-riddles",
        repeats=True,
    )
    groups = [f"plain/{record['type']}" for record in plain]
    groups += ["implied"] * len(implied) + ["heldout_riddles"] * len(heldout_riddles)
    return [*plain, *implied, *heldout_riddles], groups


class FinishedRun(NamedTuple):
    """A finished run."""

    folder: pathlib.Path
    step: int
    digest: str  # of its last state
    rows: list[dict]  # of its metrics

    @property
    def name(self) -> str:
        """Returns the name of the run's folder."""
        return self.folder.name


def read_finished_run(folder: pathlib.Path, config: Config, model: str) -> FinishedRun:
    """Reads the step, state digest and metrics of a finished run.

    Args:
      folder: the run's folder.
      config: the study's configuration.
      model: digest of the study's untrained model.
    Raises:
      InputError: the folder has no run, an unfinished one, or one of another task or model.
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
    run = from_config_dict(json.loads(path.read_text()))
    got = {
        "task": run.task,
        "dtype": run.model.dtype,
        "model": verdicts.model_digest(run.model.path),
    }
    expected = {"task": config.task, "dtype": config.model.dtype, "model": model}
    for name, value in expected.items():
        if got[name] != value:
            raise InputError(
                f"the run in {folder} was made with {name} {got[name]}, expected {value} as of "
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
    """Loads the policy at a run's end, to be sampled with the settings of the study.

    Raises:
      InputError: the newest checkpoint is not of the run's last step.
    """
    policy = inference.from_run(run.folder)
    if policy.step != run.step:
        raise InputError(
            f"the newest checkpoint in {run.folder} is of step {policy.step}, expected {run.step}, "
            f"the last state in {METRICS}; run it again"
        )
    return policy._replace(config=config)


def bars(gain: Mapping[str, Gain], over_greedy: Mapping[str, Gain]) -> list[dict]:
    """Compares gains with the bars set for training: bar, value, and if it is met.

    Args:
      gain: over the untrained policy, by group.
      over_greedy: gains over the untrained policy with greedy think texts, by group.
    """
    types = [group.value for name, group in gain.items() if name.startswith("plain/")]
    values = [
        ("gain on all", gain["all"].value, 0.15),
        ("gain on implied", gain["implied"].value, 0.30),
        ("gain on plain", gain["plain"].value, -0.03),
        ("least gain on a plain type", min(types), -0.05),
        ("gain over greedy on implied", over_greedy["implied"].value, 0.15),
    ]
    return [
        {"bar": f"{name} >= {bar}", "value": round(value, 4), "met": round(value, 9) >= bar}
        for name, value, bar in values
    ]


def summary(
    after: np.ndarray,
    untrained: Mapping[str, np.ndarray],
    groups: Sequence[str],
    clusters: Sequence[str],
) -> dict:
    """Computes shares before and after, gains with intervals by group, noise floor and bars.

    Args:
      after: bool[R, N].
      untrained: bool[N] of `UNTRAINED`, `GREEDY` and `AGAIN`.
      groups, clusters: N names each.
    """
    over = functools.partial(bootstrap.gains, groups=groups, clusters=clusters)
    gain, over_greedy = over(after, untrained[UNTRAINED]), over(after, untrained[GREEDY])
    floor = over(untrained[AGAIN][None], untrained[UNTRAINED])
    before, greedy = (bootstrap.shares(untrained[name], groups) for name in (UNTRAINED, GREEDY))
    ends = [bootstrap.shares(exact, groups) for exact in after]
    members: dict[str, list[str]] = {}
    for name, label in zip(groups, clusters, strict=True):
        members.setdefault(name, []).append(label)
    figures = {}
    for name, group_gain in gain.items():
        labels = members.get(name)
        sizes = {} if labels is None else {"prompts": len(labels), "clusters": len(set(labels))}
        figures[name] = sizes | {
            "untrained": round(before[name], 4),
            "untrained_greedy": round(greedy[name], 4),
            "trained": [round(end[name], 4) for end in ends],
            "gain": round(group_gain.value, 4),
            "interval_95": group_gain.interval,
            "gain_over_greedy": round(over_greedy[name].value, 4),
            "gain_over_greedy_interval_95": over_greedy[name].interval,
        }
    noise = {
        name: {"gain": round(group_gain.value, 4), "interval_95": group_gain.interval}
        for name, group_gain in floor.items()
    }
    return {"groups": figures, "noise_floor": noise, "bars": bars(gain, over_greedy)}


def training_metrics(rows: Sequence[Mapping]) -> dict[str, list[float]]:
    """Returns the first and the last value of each of a run's `TRAINING_METRICS`."""
    ends = {}
    for name in TRAINING_METRICS:
        values = [row[name] for row in rows if name in row]
        if values:
            ends[name] = [values[0], values[-1]]
    return ends


def study(args: argparse.Namespace) -> dict:
    """Judges the policies that have no judgements yet, and compares all of them.

    Raises:
      InputError, MissingFileError, CheckpointError: see `read_finished_run` and `verdicts`.
    """
    config = config_checks.read_config(args.config)
    model = verdicts.model_digest(config.model.path)
    names = [folder.resolve().name for folder in args.run]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(
            f"got several --run folders named {repeated}; judgements are kept by folder name, so "
            "expected different ones; rename them"
        )
    runs = [read_finished_run(folder, config, model) for folder in args.run]
    args.out.mkdir(parents=True, exist_ok=True)
    records, groups = study_records()
    common = verdicts.verdict_key(config, records)

    def judged(name: str, policy: Callable[[], Policy], how: dict, **about: object) -> np.ndarray:
        return verdicts.load_or_judge(
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
    clusters = [bootstrap.cluster(record) for record in records]
    return {
        "name": args.name,
        "runs": [run.name for run in runs],
        **summary(np.stack(after), untrained, groups, clusters),
        "training": {run.name: training_metrics(run.rows) for run in runs},
    }


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(description=(__doc__ or "").split("\n")[0])
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
