"""Generating, refining, editing and answering in one run, in the shapes world.

    python -m alphagrpo_jax.train --config=configs/mixed.py

Hardware: two CPU cores; time, memory and results stand in docs/results.md with their commands.
Every update holds two batches, each of one task sampled by weight.
"""

from ml_collections import ConfigDict

from configs import grpo


def get_config() -> ConfigDict:
    """Returns the default configuration, changed to four tasks."""
    config = grpo.get_config()
    config.task = "mixed"
    config.mixed.tasks = ("rt2i", "srr", "ti2i", "ti2t")
    config.mixed.weights = (2.0, 2.0, 1.0, 1.0)
    config.mixed.batches = 2
    config.data.edit_train = "package:data/edit_train.jsonl"
    config.data.edit_heldout = "package:data/edit_heldout.jsonl"
    config.data.answer_train = "package:data/answer_train.jsonl"
    config.data.answer_heldout = "package:data/answer_heldout.jsonl"
    config.train.steps = 80
    config.train.prompts_per_step = 4
    config.optimizer.decay_steps = 80
    config.eval.every = 40
    config.eval.prompts = 100
    config.checkpoint.every = 20
    return config
