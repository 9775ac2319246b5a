"""Position ids of image tokens, their fixed sin-cos table, and the timestep embedding."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

TIME_FEATURES = 256
MAX_PERIOD = 10000.0


def grid_ids(grid: tuple[int, int], side: int) -> np.ndarray:
    """Returns the table row `row * side + col` of every token of an image.

    Args:
      grid: token rows and columns.
      side: rows and columns of the table.
    Returns:
      int32[rows * cols].
    Raises:
      ValueError: the image has more tokens per side than the table.
    """
    rows, cols = grid
    if rows > side or cols > side:
        raise ValueError(
            f"image of {rows} x {cols} tokens exceeds the position table of {side} x {side}; "
            "use a smaller image"
        )
    return (np.arange(rows)[:, None] * side + np.arange(cols)[None]).reshape(-1).astype(np.int32)


def interpolated_grid_ids(grid: tuple[int, int], side: int) -> np.ndarray:
    """Returns table rows with the image stretched over the full table (`interpolate_pos`).

    Args:
      grid: token rows and columns.
      side: rows and columns of the table.
    Returns:
      int32[rows * cols].
    """
    boundaries = np.arange(1 / side, 1.0, 1 / side, dtype=np.float32)
    rows, cols = (
        np.searchsorted(
            boundaries, np.arange(0, 1 - 1e-6, 1 / count, dtype=np.float32), side="right"
        )
        for count in grid
    )
    return (rows[:, None] * side + cols[None]).reshape(-1).astype(np.int32)


@functools.lru_cache(maxsize=8)
def sincos_table(width: int, side: int) -> np.ndarray:
    """Computes the fixed two-dimensional sin-cos table.

    The first half of the features encodes the column, the second half the row; each half is
    [sin, cos] of `coordinate * 10000^(-i / (width / 4))`.

    Args:
      width: features, a multiple of 4.
      side: rows and columns of the table.
    Returns:
      float32[side * side, width], computed in float64.
    """
    omega = 1.0 / MAX_PERIOD ** (np.arange(width // 4, dtype=np.float64) / (width / 4.0))
    angles = np.arange(side, dtype=np.float64)[:, None] * omega[None]
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    col = np.broadcast_to(line[None], (side, side, width // 2))
    row = np.broadcast_to(line[:, None], (side, side, width // 2))
    table = np.concatenate([col, row], axis=-1).reshape(side * side, width).astype(np.float32)
    table.setflags(write=False)
    return table


def timestep_features(t: jax.Array) -> jax.Array:
    """Computes `[cos, sin]` of `t * 10000^(-i / 128)`; `t` is not rescaled, it lies in [0, 1].

    Args:
      t: float[B].
    Returns:
      float32[B, 256].
    """
    chex.assert_rank(t, 1)
    half = TIME_FEATURES // 2
    frequency = jnp.exp(-np.log(MAX_PERIOD) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequency[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
