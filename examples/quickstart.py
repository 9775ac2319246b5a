"""Trains three updates, scores an image, and computes a loss by hand, in the shapes world.

    python examples/quickstart.py [FOLDER]

Takes one to two minutes on two CPU cores, most of it for compiling. The run goes to FOLDER (default
runs/quickstart); run it again and it finds the run finished.
"""

import json
import math
import pathlib
import sys

import jax.numpy as jnp
import numpy as np

from alphagrpo_jax import (
    Config,
    HFVerifier,
    ImageTerms,
    TextTerms,
    change_options,
    dvreward,
    group_advantage,
    grpo_loss,
    inference,
    read_config,
    read_jsonl,
    train,
)

ROOT = pathlib.Path(__file__).resolve().parent.parent
ASSETS = ROOT / "alphagrpo_jax" / "shapes" / "assets"


def small_config() -> Config:
    """Reads the embedded default and makes it tiny: three updates of 2 prompts x 4 trajectories."""
    config = read_config(ROOT / "configs" / "grpo.py")
    return change_options(
        config,
        {
            "train.steps": 3,
            "train.prompts_per_step": 2,
            "train.group_size": 4,
            "train.micro_batch": 8,
            "rollout.micro_batch": 8,
            "verifier.workers": 1,
            "eval.every": 0,
            "eval.prompts": 8,
            "eval.micro_batch": 8,
            "log.samples": 4,
            "log.tensorboard": False,
        },
    )


def train_three_updates(workdir: pathlib.Path) -> None:
    """Trains (or continues, or finds the run finished), then prints the rows of its metrics."""
    code = train.main(small_config(), workdir)
    if code != 0:
        sys.exit(code)
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        names = ("step", "reward/mean", "loss/total", "eval/exact_all")
        print({name: row[name] for name in names if name in row})


def score_an_image(workdir: pathlib.Path) -> float:
    """Generates and scores an image for a held-out prompt; returns the reward."""
    record = read_jsonl(ASSETS / "data" / "heldout.jsonl")[0]
    policy = inference.from_run(workdir)
    generated = inference.generate_images(policy, record.prompt, think=True, count=1, seed=0)
    print(f"{record.prompt!r}: the policy thinks {generated.texts[0]!r}")

    verifier = HFVerifier(ASSETS / "verifier", num_threads=1)
    questions = record.asked_semantic + record.asked_quality
    answers = verifier.answer(generated.images[0], questions)
    p_yes = [answer.p_yes for answer in answers]  # None where the verifier gave no answer
    for question, p in zip(questions, p_yes, strict=True):
        print(f"  {question} P(yes) = {p}")
    count = len(record.asked_semantic)
    reward = dvreward(p_yes[:count], p_yes[count:])

    # DVReward is the geometric mean of the two means; without an answer there is no reward.
    if reward.valid:
        means = [np.mean(np.array(values, float)) for values in (p_yes[:count], p_yes[count:])]
        assert math.isclose(reward.reward, math.sqrt(means[0] * means[1]))
    print(f"  reward {reward.reward:.3f}: semantic {reward.semantic:.3f}, {reward.quality:.3f}")
    return reward.reward


def loss_by_hand() -> tuple[float, float]:
    """Computes the loss of one group of two trajectories by `grpo_loss`, and once more in numpy."""
    config = small_config()
    # One prompt, two trajectories with rewards 1 and 0: A = (r - mean) / (std + 1e-4).
    rewards, valid = np.array([[1.0, 0.0]]), np.array([[True, True]])
    advantage = group_advantage(rewards, valid, options=config.advantage).advantage[0]
    np.testing.assert_allclose(advantage, np.array([0.5, -0.5]) / (0.5 + 1e-4), rtol=1e-6)

    # A think text of three tokens, then an image with two stochastic steps.
    old_text = np.log(np.array([[0.5, 0.5, 0.5], [0.2, 0.4, 0.8]], np.float32))
    new_text = old_text + np.array([[0.1, 0.0, 0.2], [-0.3, 0.0, 0.0]], np.float32)
    old_image = np.zeros((2, 2), np.float32)
    new_image = np.array([[2e-6, -1e-6], [3e-5, 0.0]], np.float32)
    text = TextTerms(
        new_logp=jnp.asarray(new_text),
        old_logp=jnp.asarray(old_text),
        mask=jnp.ones((2, 3), bool),
        advantage=jnp.asarray(advantage),
        entropy=jnp.zeros((2, 3)),
    )
    image = ImageTerms(jnp.asarray(new_image), jnp.asarray(old_image), jnp.asarray(advantage))
    loss, _ = grpo_loss(
        [text],
        [image],
        jnp.array([True, True]),
        text_counts=[2],  # the text counts as much as the two steps of the image behind it
        text_tokens_total=jnp.array([6.0]),
        trajectories_total=jnp.float32(2.0),
        options=config.loss,
    )

    def clipped(log_ratio: np.ndarray, advantage: np.ndarray, low: float, high: float):
        ratio = np.exp(log_ratio)
        return -np.minimum(ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage)

    per_text = clipped((new_text - old_text).mean(axis=1), advantage, 0.20, 0.28)  # per sequence
    per_step = clipped(new_image - old_image, advantage[:, None], 1e-5, 1e-5)
    by_hand = np.mean((2 * per_text + per_step.sum(axis=1)) / (1 + 2))
    print(f"loss {float(loss):.8f}, by hand {by_hand:.8f}")
    return float(loss), float(by_hand)


def main(workdir: pathlib.Path) -> None:
    """Runs the three parts."""
    train_three_updates(workdir)
    score_an_image(workdir)
    np.testing.assert_allclose(*loss_by_hand(), rtol=1e-5, atol=1e-7)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart"))
