"""Self-reflective refinement in the shapes world: the policy repairs its own failed images.

    python -m alphagrpo_jax.train --config=configs/srr.py

Hardware: two CPU cores; time, memory and results stand in docs/results.md with their commands.
Four initial images are sampled per prompt without thinking; the one with the lowest reward is
repaired. A refinement that is no better than its initial image is not reinforced
(`srr.rectification`). The reward is the verifier's alone: the form of the think text adds nothing.

`loss.text_loss_weight` stays at the default's 1, so that a reflection weighs as much as all trained
steps of its image; the paper's recipe for refinement has 1 / W (`configs/bagel_7b_srr.py`). In this
small world what is learned comes through the text: without a text loss the default gains nothing.
Where else it departs from the paper's numbers, `configs/grpo.py` says why.
"""

from ml_collections import ConfigDict

from configs import grpo


def get_config() -> ConfigDict:
    """Returns the default configuration, changed to refinement."""
    config = grpo.get_config()
    config.task = "srr"
    config.train.steps = 120
    config.train.text_chunk = 37  # of 74 slots
    config.optimizer.decay_steps = 120
    config.eval.every = 40
    config.eval.prompts = 200
    config.checkpoint.every = 20
    return config
