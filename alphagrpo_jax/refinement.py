"""Self-reflective refinement on the host, numpy in and numpy out.

Chooses the initial image that a group repairs, rectifies its rewards, and counts the outcomes.
"""

from typing import NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from alphagrpo_jax.config import InitialChoice, Rectification


def choose_initial(
    reward: np.ndarray, valid: np.ndarray, *, choice: InitialChoice, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the image to repair of each prompt's K (AlphaGRPO, arXiv 2605.12495, SRR stage 1).

    "worst": the one of the lowest reward, the first of equals. "softmax": sampled with
    probabilities `softmax(1 - reward)` over the valid ones.

    Args:
      reward: float[P, K]; values of invalid images are never looked at.
      valid: bool[P, K].
      choice: see above.
      rng: for "softmax"; one number per prompt is drawn from it whatever the choice.
    Returns:
      int64[P], the chosen image, and bool[P], whether the prompt has a valid one at all.
    Raises:
      ValueError: unknown choice, or shapes that differ.
    """
    if choice not in get_args(InitialChoice):
        raise ValueError(f"got choice={choice!r}, expected one of {get_args(InitialChoice)}")
    reward, valid = np.asarray(reward, np.float64), np.asarray(valid, bool)
    if reward.ndim != 2 or reward.shape != valid.shape:
        raise ValueError(
            f"got reward of shape {reward.shape} and valid of shape {valid.shape}, expected both "
            "[prompts, images]"
        )
    draws = rng.random(len(reward))
    if choice == "worst":
        chosen = np.where(valid, reward, np.inf).argmin(axis=1)
    else:
        # Relative to the lowest reward of a row: scorers may give any number, and exp overflows.
        lowest = np.where(valid, reward, np.inf).min(axis=1, keepdims=True)
        excess = np.where(valid, reward, np.inf) - np.where(np.isfinite(lowest), lowest, 0.0)
        weights = np.exp(-excess)
        total = np.cumsum(weights, axis=1)
        reached = total > draws[:, None] * total[:, -1:]
        chosen = reached.argmax(axis=1)
    return chosen, np.asarray(valid.any(axis=1))


class Rectified(NamedTuple):
    """Rewards of P groups after false positives are rectified."""

    reward: np.ndarray  # float64[P, G]
    improved: np.ndarray  # bool[P, G], valid and better than the initial image


def rectify(
    reward: np.ndarray,
    valid: np.ndarray,
    initial: np.ndarray,
    *,
    mode: Rectification,
) -> Rectified:
    """Rectifies false positives: a refinement that did not improve is not reinforced.

    Where `r <= r_initial`, the reward becomes `r_initial` ("released", AlphaGRPO's code), or the
    group's own minimum over valid samples ("paper", arXiv 2605.12495); "none" leaves all as it is.

    Args:
      reward: float[P, G]; values of invalid samples are never looked at.
      valid: bool[P, G].
      initial: float[P], rewards of the images that were repaired.
      mode: see above.
    Returns:
      `Rectified`; `improved` is the same whatever the mode.
    Raises:
      ValueError: unknown mode, or initial rewards that are not finite.
    """
    if mode not in get_args(Rectification):
        raise ValueError(f"got mode={mode!r}, expected one of {get_args(Rectification)}")
    reward, valid = np.asarray(reward, np.float64), np.asarray(valid, bool)
    initial = np.asarray(initial, np.float64)[:, None]
    if not np.isfinite(initial).all():
        raise ValueError("got initial rewards that are not finite; leave such prompts out")
    improved = valid & (np.where(valid, reward, -np.inf) > initial)
    if mode == "none":
        return Rectified(reward, improved)
    floor = initial
    if mode == "paper":
        floor = np.where(valid, reward, np.inf).min(axis=1, keepdims=True)
    return Rectified(np.where(improved | ~valid, reward, floor), improved)


def outcomes(initial: np.ndarray, refined: np.ndarray) -> dict[str, float]:
    """Computes the shares of refinements that improve, keep and spoil an image, by some score.

    Args:
      initial, refined: float[N], e.g. the share of facts that hold.
    """
    change: npt.NDArray[np.float64] = np.sign(
        np.asarray(refined, np.float64) - np.asarray(initial, np.float64)
    )
    return {
        "improved": float(np.mean(change > 0)),
        "kept": float(np.mean(np.equal(change, 0))),
        "spoilt": float(np.mean(change < 0)),
    }
