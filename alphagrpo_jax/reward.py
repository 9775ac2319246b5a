"""Stage 3: sends samples to the verifiers, gathers their rewards and shapes them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from alphagrpo_jax.refinement import rectify
from alphagrpo_jax.rewards import formats, scoring
from alphagrpo_jax.runtime import distributed
from alphagrpo_jax.runtime.records import Record
from alphagrpo_jax.training.checks import check_validity
from alphagrpo_jax.training.context import Run
from alphagrpo_jax.types import BatchRewards, InitialImageQueue, PromptBatch, RolloutBatch


def submit_images(
    run: Run,
    batch: PromptBatch,
    sample_ids: Sequence[Any],
    images: np.ndarray,
    records: Sequence[Record],
    rows: np.ndarray,
) -> None:
    """Sends one micro-batch of sampled images to the verifiers, which answer in the background.

    Args:
      run: the run.
      batch: the prompts that the images belong to.
      sample_ids: N ids in the verifier pool.
      images: uint8[N, Hpx, Wpx, 3].
      records: N records with the questions.
      rows: int64[N], numbers of the images in the batch.
    """
    task = run.tasks[batch.task.name]
    if task.task.reward == "image":
        scoring.submit(run.verifier, sample_ids, images, records, task.scoring, rows=rows)


def submit_reflections(run: Run, rollout: RolloutBatch) -> None:
    """Asks the verifiers about the reflections, beside the images that they describe.

    Does nothing unless the task refines images and `srr.reflection_format` is "verifier".
    """
    config, batch = run.config, rollout.batch
    if not batch.task.refines or config.srr.reflection_format != "verifier":
        return
    for index in distributed.own_rows(len(rollout.sample_ids)):
        questions = formats.reflection_questions(
            rollout.records[index].prompt, rollout.texts[0][index]
        )
        assert batch.images is not None  # a refining task has input images
        image = batch.images[index // config.train.group_size]
        run.verifier.submit((*rollout.sample_ids[index], "reflection"), image, questions)


def gather(run: Run, rollout: RolloutBatch, step: int) -> BatchRewards:
    """Waits for the verifiers' answers and turns them into the shaped rewards of a batch.

    Args:
      run: the run.
      rollout: the batch, its images and reflections submitted.
      step: number of the update.
    Raises:
      TrainingError: the verifiers failed too often.
      StoppedError: a stop has ended the wait on some process.
    """
    reflection = reflection_scores(run, rollout)
    rewards = collect(run, rollout, reflection, step)
    return shape(run, rollout, rewards, reflection)


def collect(
    run: Run, rollout: RolloutBatch, reflection: np.ndarray | None, step: int
) -> scoring.Rewards:
    """Waits for a batch's answers and returns its rewards before shaping.

    A sample whose reflection has no verdict is invalid.

    Raises:
      TrainingError: the verifiers failed too often.
    """
    task = rollout.batch.task
    if task.reward == "answer":
        return scoring.answer_scores(rollout.records, rollout.texts[-1], rollout.think_texts)
    rewards = scoring.gather(
        run.verifier,
        rollout.sample_ids,
        rollout.records,
        rollout.think_texts,
        run.tasks[task.name].scoring,
    )
    if reflection is not None:
        rewards = scoring.without(rewards, np.isnan(reflection), "no verdict on the reflection")
    check_validity(run.config, rewards, rollout.records, f"step {step}")
    return rewards


def reflection_scores(run: Run, rollout: RolloutBatch) -> np.ndarray | None:
    """Scores the form of each reflection: 1 as asked for, 0 not, NaN without an answer.

    Returns:
      float64[B]; None where no form is asked for.
    """
    mode = run.config.srr.reflection_format
    if not rollout.batch.task.refines or mode == "none":
        return None
    if mode == "rule":
        return np.array([formats.reflection_rule(text) for text in rollout.texts[0]])
    rows = distributed.own_rows(len(rollout.sample_ids))
    sample_ids = [(*rollout.sample_ids[row], "reflection") for row in rows]
    results = scoring.gather_together(run.verifier, sample_ids)
    scores = [
        float(min(result.p_yes) > 0.5) if result.valid and result.p_yes is not None else np.nan
        for result in results.values()
    ]
    return distributed.merge_rows(np.array(scores), len(rollout.sample_ids))


def shape(
    run: Run,
    rollout: RolloutBatch,
    rewards: scoring.Rewards,
    reflection: np.ndarray | None = None,
) -> BatchRewards:
    """Rectifies the rewards of refinements and adds what the texts' form is worth.

    Args:
      run: the run.
      rollout: the batch.
      rewards: from `collect`.
      reflection: from `reflection_scores`; known for every valid sample.
    """
    config, initial = run.config, rollout.batch.initial
    group_shape = (config.train.prompts_per_step, config.train.group_size)
    valid, reward = rewards.valid, rewards.reward
    metrics = rewards.metrics()
    improved = True
    if reflection is not None:
        metrics["reward/reflection"] = float(np.mean(reflection[valid])) if valid.any() else 0.0
    if initial is not None:
        mode = config.srr.rectification
        groups = (reward.reshape(group_shape), valid.reshape(group_shape))
        rectified = rectify(*groups, initial.reward, mode=mode)
        reward = rectified.reward.ravel()
        improved = mode == "none" or bool(rectified.improved.any())
        metrics |= _refinement_metrics(rewards, rectified.improved, initial, group_shape)
    scoring_options = run.tasks[rollout.batch.task.name].scoring
    text, image = scoring.totals(rewards, scoring_options, reward=reward, reflection=reflection)
    metrics["reward/total"] = float(np.mean(text[valid])) if valid.any() else float("nan")
    text_initial = image_initial = None
    if initial is not None:
        image_initial = _initial_total(image - reward, valid, initial, group_shape)
        # An initial image has no text: with a reward of their own, texts have only each other.
        text_initial = None if scoring_options.isolate else image_initial
    if not improved:
        text = image = np.zeros_like(text)
    return BatchRewards(
        text.reshape(group_shape),
        image.reshape(group_shape),
        valid.reshape(group_shape),
        text_initial,
        image_initial,
        improved,
        metrics,
    )


def _initial_total(
    shaping: np.ndarray, valid: np.ndarray, initial: InitialImageQueue, shape: tuple[int, int]
) -> np.ndarray:
    """Returns the initial images' totals, float64[P], to be compared with those of their groups.

    An initial image has no text: it is given what its group's texts add on average.
    """
    added = np.where(valid, shaping, 0.0).reshape(shape).sum(axis=1)
    return initial.reward + added / np.maximum(valid.reshape(shape).sum(axis=1), 1)


def _refinement_metrics(
    rewards: scoring.Rewards,
    improved: np.ndarray,
    initial: InitialImageQueue,
    shape: tuple[int, int],
) -> dict[str, float]:
    gain = rewards.reward.reshape(shape) - initial.reward[:, None]
    counted = rewards.valid.reshape(shape)
    return {
        "srr/initial_reward": float(initial.reward.mean()),
        "srr/gain": float(gain[counted].mean()) if counted.any() else float("nan"),
        "srr/improved_fraction": float(improved[counted].mean()) if counted.any() else 0.0,
    }
