"""Stage 4: group-relative advantages from rewards; host side, numpy in and numpy out."""

import dataclasses

import numpy as np

from alphagrpo_jax.config import AdvantageOptions
from alphagrpo_jax.types import Advantages, BatchAdvantages, BatchRewards

MIN_VALID = 2  # a group with fewer valid samples has nothing to be compared with
ANCHOR_EPS = 1e-8  # added to the mean square of baseline "anchor"


def of_batch(rewards: BatchRewards, options: AdvantageOptions) -> BatchAdvantages:
    """Computes the advantages of a batch's text and image steps within each prompt's group.

    Args:
      rewards: shaped rewards of P groups of G trajectories.
      options: scale and baseline. Without initial images (no refining task), for texts that are
        rewarded apart from the images, or where nothing improved, the baseline is the group's mean.
    """

    def compute(total: np.ndarray, initial: np.ndarray | None) -> Advantages:
        refines = initial is not None and rewards.improved
        total_options = options if refines else dataclasses.replace(options, baseline="group")
        return group_advantage(total, rewards.valid, total_options, initial=initial)

    text = compute(rewards.text, rewards.text_initial)
    image = compute(rewards.image, rewards.image_initial)
    return BatchAdvantages(text, image.advantage, left_out=not rewards.improved)


def group_advantage(
    reward: np.ndarray,
    valid: np.ndarray,
    options: AdvantageOptions,
    *,
    initial: np.ndarray | None = None,
    eps: float = 1e-4,
) -> Advantages:
    """Computes each trajectory's advantage over a baseline: `A = (r - b) / scale`.

    AlphaGRPO (arXiv 2605.12495), section 3; GRPO (arXiv 2402.03300). Baselines `b`: "group", the
    mean of the group's valid rewards; "initial", the reward of the image that the group refines;
    "anchor", the larger of the two. Scales: population standard deviation of the raw rewards of all
    valid samples ("global_raw"), of group-centered rewards ("global_centered"), or per group
    ("group"), each plus eps; "none" divides by 1 (ReMax). Baseline "anchor" has the scale
    `sqrt(mean (r - b)^2 + 1e-8)` of each group, whatever `std`, without eps (as released).

    Args:
      reward: float[P, G]; values of invalid samples are never looked at.
      valid: bool[P, G].
      options: scale (`std`) and baseline, see above.
      initial: float[P], rewards of the initial images, for "initial" and "anchor".
      eps: see above.
    Returns:
      `Advantages`, with metrics `group/zero_std_fraction` (of the used groups, those whose valid
      rewards are all equal), `group/left_out_fraction` and `advantage/scale` (mean over groups).
    Raises:
      ValueError: wrong shapes, missing `initial`, or a valid reward not finite.
    """
    reward, valid = _checked(reward, valid)
    std, baseline = options.std, options.baseline
    if baseline != "group":
        _check_initial(initial, baseline, len(reward))
    used = valid & (valid.sum(axis=1, keepdims=True) >= MIN_VALID)
    rewards = np.where(valid, reward, 0.0)
    mean = _masked_mean(rewards, valid, axis=1)  # [P, 1]
    equal = _all_equal(reward, valid)  # [P]
    offset = _baseline(mean, baseline, initial)
    centered = np.where(used, rewards - offset, 0.0)
    # Rounding of the mean must not pass for a difference.
    centered[equal & (offset == mean)[:, 0]] = 0.0
    scale = _scale(rewards, centered, mean, valid, used, std, baseline)
    has_eps = baseline != "anchor" and std != "none"
    advantage = centered / (scale + eps if has_eps else scale)
    groups = used.any(axis=1)
    metrics = {
        "group/zero_std_fraction": float(equal[groups].mean()) if groups.any() else 0.0,
        "group/left_out_fraction": float(1.0 - groups.mean()),
        "advantage/scale": float(np.mean(scale)),
    }
    return Advantages(advantage.astype(np.float32), used, metrics)


def _baseline(mean: np.ndarray, baseline: str, initial: np.ndarray | None) -> np.ndarray:
    """Returns what each group's rewards are compared with, float64[P, 1]."""
    if baseline == "group":
        return mean
    initial_reward = np.asarray(initial, np.float64)[:, None]
    return initial_reward if baseline == "initial" else np.maximum(mean, initial_reward)


def _scale(
    rewards: np.ndarray,
    centered: np.ndarray,
    mean: np.ndarray,
    valid: np.ndarray,
    used: np.ndarray,
    std: str,
    baseline: str,
) -> np.ndarray:
    """Computes the divisor without eps, float64 broadcastable to [P, G]."""
    if baseline == "anchor":
        return np.sqrt(_masked_mean(np.square(centered), used, axis=1) + ANCHOR_EPS)
    if std == "none":
        return np.ones((1, 1))
    axis = 1 if std == "group" else None
    if std == "global_raw":
        center = _masked_mean(rewards, valid, axis=None)
        return np.sqrt(_masked_mean(np.square(rewards - center), valid, axis=None))
    return np.sqrt(_masked_mean(np.square(rewards - mean), valid, axis=axis))


def _masked_mean(values: np.ndarray, mask: np.ndarray, *, axis: int | None) -> np.ndarray:
    """Averages over the masked entries (0 where there are none), dimensions kept."""
    count = np.maximum(mask.sum(axis=axis, keepdims=True), 1)
    return np.where(mask, values, 0.0).sum(axis=axis, keepdims=True) / count


def _all_equal(reward: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Tells whether all valid rewards of each group are the same number, bool[P]."""
    high = np.where(valid, reward, -np.inf).max(axis=1)
    low = np.where(valid, reward, np.inf).min(axis=1)
    return high <= low


def _checked(reward: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the inputs as float64 and bool, after checking shapes and finite valid rewards."""
    reward = np.asarray(reward, np.float64)
    valid = np.asarray(valid, bool)
    if reward.ndim != 2 or reward.shape != valid.shape:
        raise ValueError(
            f"got reward of shape {reward.shape} and valid of shape {valid.shape}, "
            "expected both [prompts, group size]"
        )
    bad = valid & ~np.isfinite(reward)
    if bad.any():
        where = tuple(int(index) for index in np.argwhere(bad)[0])
        raise ValueError(
            f"got reward {reward[where]} at (prompt, member) {where}, which is marked valid; "
            "expected a finite number: mark samples without a reward invalid"
        )
    return reward, valid


def _check_initial(initial: np.ndarray | None, baseline: str, prompts: int) -> None:
    """Refuses initial rewards that are missing, of another number, or not finite."""
    if initial is None or np.shape(initial) != (prompts,) or not np.isfinite(initial).all():
        raise ValueError(
            f"baseline={baseline!r} needs the finite rewards of {prompts} initial images, "
            f"got {initial!r}"
        )
