"""Checks that refuse or stop a run with one actionable error message."""

import collections
import contextlib
from collections.abc import Sequence

import numpy as np

from alphagrpo_jax.config import Config, ConfigError
from alphagrpo_jax.rewards import scoring
from alphagrpo_jax.runtime import distributed
from alphagrpo_jax.runtime.errors import MissingFileError, UserError
from alphagrpo_jax.runtime.metrics import MetricsLog
from alphagrpo_jax.runtime.paths import resolve
from alphagrpo_jax.runtime.records import Record, find_line
from alphagrpo_jax.tasks import TASKS
from alphagrpo_jax.types import Rollout

REPORTED_FAILURES = 5  # kinds of verifier failures in one message


class TrainingError(UserError, RuntimeError):
    """Training cannot go on; the message says at which step and why."""


class UnanswerableError(TrainingError):
    """A record can never have a reward, whatever the verifiers do."""


def check_end(config: Config, log: MetricsLog, done: int) -> None:
    """Refuses `train.steps` below the steps done: its row would lack the last evaluation.

    Raises:
      ConfigError: `train.steps` is too small.
    """
    ended = log.is_pending(done) or any(
        row["step"] == done and "eval_greedy/reward/mean" in row for row in log.rows
    )
    if 0 < config.train.steps <= done and not (config.train.steps == done and ended):
        raise ConfigError(
            f"train.steps: got {config.train.steps}, but {done} steps are done; set it above "
            f"{done} (0 evaluates the newest checkpoint)"
        )


def early_decay(config: Config) -> str:
    """Returns a notice if the learning rate falls to 0 before the run ends, else an empty text."""
    decay = config.optimizer.decay_steps
    updates = config.train.steps * config.train.updates_per_batch
    if not 0 < decay < updates:
        return ""
    return (
        f"notice: the learning rate is 0 from applied update {decay} on "
        f"(optimizer.decay_steps={decay}), but the run takes up to {updates}: the rest of them "
        "learn nothing. Start again with a larger optimizer.decay_steps (0: a constant rate)"
    )


def check_validity(
    config: Config, rewards: scoring.Rewards, records: Sequence[Record], where: str
) -> None:
    """Stops a run whose verifiers fail too often, or that has a record nobody can answer.

    Args:
      config: the run's.
      rewards: of N samples.
      records: of the samples, N.
      where: begins the message.
    Raises:
      UnanswerableError: no verifier could answer a question, or score a prompt: the record's group
        would be lost each time.
      TrainingError: more samples are invalid than `reward.max_invalid_fraction` allows.
    """
    if rewards.unanswerable:
        row, question = min(rewards.unanswerable.items(), key=lambda item: item[1] is None)
        record = records[row]
        reason = "another host says why" if question is None else rewards.reasons[row]
        raise UnanswerableError(
            f"{_location(config, record)}: the prompt {record.prompt!r} can never have a reward: "
            f'{reason}. Mend the question, or set its "is_valid" to false where others remain (if '
            'it is the prompt that cannot be scored, give the record a "caption" to be scored by, '
            'or "facts" for the exact checker), then run the same command again: it continues from '
            "the last finished update. Another prompt, or a record less, needs another --workdir, "
            "as the order of the prompts changes"
        )
    invalid = 1.0 - float(np.mean(rewards.valid))
    if invalid > config.reward.max_invalid_fraction:
        common = collections.Counter(rewards.failures).most_common(REPORTED_FAILURES)
        failures = "; ".join(f"{count} x {failure}" for failure, count in common)
        raise TrainingError(
            f"{where}: {invalid:.0%} of the samples have no reward, at most "
            f"{config.reward.max_invalid_fraction:.0%} are allowed (reward.max_invalid_fraction); "
            f"the most frequent failures on this host: {failures}. Mend the verifier, then run the "
            "same command again: it continues from the last checkpoint"
        )


def _location(config: Config, record: Record) -> str:
    """Returns FILE:LINE of a record, or what else tells it."""
    kinds = {TASKS[name].data for name in config.tasks} & {"prompts", "edits"}
    for name in (path for kind in sorted(kinds) for path in config.data.pair(kind)):
        with contextlib.suppress(MissingFileError):  # removed since the run has read it
            path = resolve(name)
            line = find_line(path, record)
            if line is not None:
                return f"{path}:{line}"
    return f"record {record.id or ''}".strip()


def check_sampled(trajectories: Rollout, step: int) -> None:
    """Stops a run whose rewards are all alike because its samples are not finite.

    Raises:
      TrainingError: a log-prob of the sampler, or an image, is NaN or infinite.
    """
    texts, images = distributed.to_host((trajectories.texts, trajectories.images))
    arrays = [sample.log_prob for sample in (*texts, *images)]
    arrays += [sample.latents for sample in images]
    if not all(np.isfinite(values).all() for values in arrays):
        raise TrainingError(
            f"step {step}: the sampled log-probs or images are not finite, so the policy's weights "
            "are broken; the last checkpoint is untouched. Look for broken weights (model.path)"
        )
