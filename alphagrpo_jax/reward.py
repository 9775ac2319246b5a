"""Stage 3: the rewards of a batch."""

import dataclasses

import numpy as np

from alphagrpo_jax.advantage import Advantages, group_advantage
from alphagrpo_jax.config import Config
from alphagrpo_jax.refinement import rectify
from alphagrpo_jax.rewards import formats, scoring
from alphagrpo_jax.runtime import distributed
from alphagrpo_jax.training import options as options_lib
from alphagrpo_jax.training.checks import check_validity
from alphagrpo_jax.training.context import Run
from alphagrpo_jax.types import BatchAdvantages, InitialImageQueue, RolloutBatch


def _submit_reflections(run: Run, drawn: RolloutBatch) -> None:
    """Asks the verifiers about the reflections, beside the images that they speak of."""
    group = run.config.train.group_size
    for index in distributed.own_rows(len(drawn.ids)):
        asked = formats.reflection_questions(drawn.records[index].prompt, drawn.texts[0][index])
        image = drawn.batch.images[index // group]
        run.pool.submit((*drawn.ids[index], "reflection"), image, asked)


def gather(
    run: Run, drawn: RolloutBatch, reflection: np.ndarray | None, step: int
) -> scoring.Rewards:
    """Stage 3: the rewards of a batch.

    Args:
      run: the run.
      drawn: the batch.
      reflection: from `gather_reflections`; a sample without a verdict is invalid.
      step: number of the update.
    Raises:
      TrainingError: the verifiers failed too often.
    """
    task = drawn.batch.task
    if task.reward == "answer":
        return scoring.answer_scores(drawn.records, drawn.texts[-1], drawn.thinks)
    options = options_lib.scoring_options(run.config, task)
    scores = scoring.gather(run.pool, drawn.ids, drawn.records, drawn.thinks, options)
    if reflection is not None:
        scores = scoring.without(scores, np.isnan(reflection), "no verdict on the reflection")
    check_validity(run.config, scores, f"step {step}")
    return scores


def gather_reflections(run: Run, drawn: RolloutBatch) -> np.ndarray | None:
    """1 where a reflection has the form that is asked for, else 0; None where none is asked for.

    float64[B]; NaN where the verifier gave no answer.
    """
    mode = run.config.srr.reflection_format
    if not drawn.batch.task.refines or mode == "none":
        return None
    if mode == "rule":
        return np.array([formats.reflection_rule(text) for text in drawn.texts[0]])
    own = distributed.own_rows(len(drawn.ids))
    outcomes = run.pool.gather((*drawn.ids[index], "reflection") for index in own)
    judged = [
        float(min(outcome.p_yes) > 0.5) if outcome.valid else np.nan
        for outcome in outcomes.values()
    ]
    return distributed.merge_rows(np.array(judged), len(drawn.ids))


def advantage_of(
    config: Config,
    drawn: RolloutBatch,
    scores: scoring.Rewards,
    reflection: np.ndarray | None = None,
) -> BatchAdvantages:
    """Stage 4: advantages within each prompt's group.

    Args:
      config: the run's.
      drawn: a batch.
      scores: its rewards.
      reflection: from `gather_reflections`; known for every valid sample.
    """
    shape = (config.train.prompts_per_step, config.train.group_size)
    task, initial = drawn.batch.task, drawn.batch.initial
    valid, reward = scores.valid, scores.reward
    metrics: dict[str, float] = {}
    moves = True
    if reflection is not None:
        metrics["reward/reflection"] = float(np.mean(reflection[valid])) if valid.any() else 0.0
    if initial is not None:
        mode = config.srr.rectification
        groups = (reward.reshape(shape), valid.reshape(shape))
        rectified = rectify(*groups, initial.reward, initial.lowest, mode=mode)
        reward = rectified.reward.ravel()
        moves = mode == "none" or bool(rectified.improved.any())
        metrics |= _refinement_metrics(scores, valid, rectified.improved, initial, shape)
    options = options_lib.scoring_options(config, task)
    text, image = scoring.totals(scores, options, reward=reward, reflection=reflection)
    metrics["reward/total"] = float(np.mean(text[valid])) if valid.any() else float("nan")
    if not moves:
        text = image = np.zeros_like(text)

    def advantages(total: np.ndarray) -> Advantages:
        baseline, compared = "group", None
        if initial is not None and moves and config.advantage.baseline != "group":
            baseline = config.advantage.baseline
            # The initial image has no text: it is given what its group's texts add on average.
            added = np.where(valid, total - reward, 0.0).reshape(shape).sum(axis=1)
            compared = initial.reward + added / np.maximum(valid.reshape(shape).sum(axis=1), 1)
        return group_advantage(
            total.reshape(shape),
            valid.reshape(shape),
            dataclasses.replace(config.advantage, baseline=baseline),
            initial=compared,
        )

    own = advantages(text)
    other = own.advantage if image is text else advantages(image).advantage
    return BatchAdvantages(own, other, metrics | own.metrics, left_out=not moves)


def _refinement_metrics(
    scores: scoring.Rewards,
    valid: np.ndarray,
    improved: np.ndarray,
    initial: InitialImageQueue,
    shape: tuple[int, int],
) -> dict[str, float]:
    gain = scores.reward.reshape(shape) - initial.reward[:, None]
    counted = valid.reshape(shape)
    return {
        "srr/initial_reward": float(initial.reward.mean()),
        "srr/gain": float(gain[counted].mean()) if counted.any() else float("nan"),
        "srr/improved_fraction": float(improved[counted].mean()) if counted.any() else 0.0,
    }
