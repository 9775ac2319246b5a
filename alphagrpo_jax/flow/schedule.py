"""The schedule of noise levels that a sampler follows."""

import numpy as np


def sigmas(num_points: int, *, shift: float = 3.0) -> np.ndarray:
    """Computes noise levels from pure noise to the image, one more than velocity evaluations.

    `t_k = 1 - k / (N - 1)`, `sigma_k = shift t_k / (1 + (shift - 1) t_k)` (shift of arXiv
    2403.03206, eq. 23), rounded to float32 once, at the end.

    Args:
      num_points: N, at least 2.
      shift: above 1 spends more of the points at high noise.
    Returns:
      float32[N], strictly decreasing, first exactly 1 and last exactly 0.
    Raises:
      ValueError: fewer than 2 points, or a shift that is not positive.
    """
    if num_points < 2:
        raise ValueError(
            f"got num_points={num_points}, expected at least 2 (noise and image); "
            "set rollout.num_points or eval.num_points higher"
        )
    if not shift > 0:
        raise ValueError(f"got shift={shift}, expected a positive number (BAGEL uses 3.0)")
    t = np.linspace(1.0, 0.0, num_points)
    return (shift * t / (1.0 + (shift - 1.0) * t)).astype(np.float32)
