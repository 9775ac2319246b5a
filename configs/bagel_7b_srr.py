"""BAGEL-7B-MoT, self-reflective refinement, with the numbers of AlphaGRPO (arXiv 2605.12495).

    python -m alphagrpo_jax.train --config=configs/bagel_7b_srr.py \\
      --config.model.path=BAGEL-7B-MoT --config.verifier.endpoints='("http://HOST:8000/v1",)' \\
      --config.data.train=train.jsonl --config.data.heldout=heldout.jsonl

Hardware, sizes and what is untested: as in `configs/bagel_7b_rt2i.py`.
Expected (the authors'): TIIF-Bench overall 75.2 / 78.6 -> 79.1 / 79.5 (short / long).
"""

from ml_collections import ConfigDict

from configs import bagel_7b_rt2i


def get_config() -> ConfigDict:
    """Returns the text-to-image configuration of BAGEL-7B, changed to refinement."""
    config = bagel_7b_rt2i.get_config()
    config.task = "srr"
    config.rollout.num_points = 40
    config.rollout.window = 5
    config.rollout.window_range = (0, 15)
    config.loss.text_loss_weight = 0.2
    config.srr.num_points = 40
    config.srr.text_tokens = 512
    config.srr.queue_prompts = 56
    return config
