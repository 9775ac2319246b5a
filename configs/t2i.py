"""Images alone, without a text step, in the shapes world: DiffusionNFT on the image half.

    python -m alphagrpo_jax.train --config=configs/t2i.py

Hardware: two CPU cores; time, memory and results stand in docs/results.md with their commands.

Nothing is thought before an image, and the text loss is off: what is learned here, the image half
learns. Prompts are plain ones, since no image solves a riddle that no text has solved. Where it
departs from AlphaGRPO's numbers (docs/algorithms.md): the average follows faster, and the distance
to the base weighs more, since larger steps break this small model (docs/results.md).
"""

from ml_collections import ConfigDict

from configs import grpo


def get_config() -> ConfigDict:
    """Returns the default configuration, changed to images alone."""
    config = grpo.get_config()
    config.task = "t2i"
    config.data.train = "package:data/plain_train.jsonl"
    config.data.heldout = "package:data/plain_heldout.jsonl"
    config.loss.text = "none"
    config.loss.image = "nft"
    config.loss.image_beta = 0.3  # keeps the drawings diverse
    config.rollout.sampler = "ode"
    config.rollout.window = 3
    config.rollout.window_range = (0, 11)
    config.rollout.shared_noise = False
    config.optimizer.learning_rate = 1.6e-3
    config.optimizer.gen_scale = 1.0
    config.optimizer.average_limit = 0.5
    config.optimizer.average_rate = 0.005
    config.optimizer.decay_steps = 480
    config.train.steps = 480
    config.eval.every = 120
    config.eval.prompts = 400
    return config
