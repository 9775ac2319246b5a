"""What the first four calls of `train.main` do: prompts, rollout, reward, advantage."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from alphagrpo_jax.prompts import image_block
from alphagrpo_jax.reward import (
    _submit_reflections,
)
from alphagrpo_jax.rewards import scoring
from alphagrpo_jax.runtime import distributed
from alphagrpo_jax.runtime.tokenizer import Tokenizer
from alphagrpo_jax.training import options as options_lib
from alphagrpo_jax.training.context import Run
from alphagrpo_jax.types import PromptBatch, Rollout, RolloutBatch, TextSample, TrainState


def sample(run: Run, state: TrainState, step: int, batch: PromptBatch) -> RolloutBatch:
    """Stage 2 and the start of stage 3: draws a batch's trajectories, micro-batch by micro-batch.

    The images of one micro-batch go to the verifiers while the device draws the next.
    """
    config, group = run.config, run.config.train.group_size
    steps, data = run.steps.tasks[batch.task.name], run.data[batch.task.name].train
    own = jax.random.fold_in(jax.random.fold_in(state.key, step), batch.number)
    key, window_key = jax.random.split(own)
    lo, hi = config.rollout.window_range
    start = jax.random.randint(window_key, (), lo, hi - config.rollout.window + 1)
    count = config.rollout.micro_batch // group  # prompts
    temperature = jnp.float32(config.rollout.temperature)
    weights = run.weights(state)
    launched = []
    for first in range(0, len(batch.rows), count):
        part = slice(first, first + count)
        images = None if batch.images is None else image_block(run.loaded, batch.images[part])
        given = steps.train.prefill(weights, data.inputs(batch.rows[part], images))
        number = jnp.int32(first * group)
        launched.append(steps.train.generate(weights, given, key, number, start, temperature))
    records = [data.records[row] for row in np.repeat(batch.rows, group)]
    ids = [(step, batch.number, number) for number in range(len(records))]
    if batch.task.reward == "image":
        options = options_lib.scoring_options(config, batch.task)
        for number, (_, images) in enumerate(launched):
            first = number * count * group
            part = slice(first, first + count * group)
            shown = distributed.to_host(images)
            scoring.submit(run.pool, ids[part], shown, records[part], options, first=first)
    parts = [trajectories for trajectories, _ in launched]
    whole = parts[0] if len(parts) == 1 else steps.join(parts)
    samples = distributed.to_host(whole.texts)
    texts = [decode_texts(run.loaded.tokenizer, each.tokens, each.mask) for each in samples]
    drawn = RolloutBatch(batch, whole, records, ids, texts, _text_metrics(samples))
    if batch.task.refines and config.srr.reflection_format == "verifier":
        _submit_reflections(run, drawn)
    return drawn


def decode_steps(tokenizer: Tokenizer, trajectories: Rollout) -> list[list[str]]:
    """The texts of each text step."""
    samples = distributed.to_host(trajectories.texts)
    return [decode_texts(tokenizer, sample.tokens, sample.mask) for sample in samples]


def decode_texts(tokenizer: Tokenizer, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """Texts of int32[B, T] tokens without their two delimiters."""
    return [tokenizer.decode(row[held][1:-1]) for row, held in zip(tokens, mask, strict=True)]


def _text_metrics(samples: Sequence[TextSample]) -> dict[str, float]:
    """Means over the texts of all text steps; samples are numpy."""
    if not samples:
        return {}
    lengths = np.concatenate([sample.scored.sum(axis=1) for sample in samples])
    truncated = np.concatenate([sample.truncated for sample in samples])
    return {
        "text/length": float(lengths.mean()),
        "text/truncated_fraction": float(truncated.mean()),
    }


# ------------------------------------------------------------------------------- 3 reward


# ---------------------------------------------------------------------------- 4 advantage
