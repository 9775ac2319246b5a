"""Images to token rows and back; the feature order of a token is (p_row, p_col, channel)."""

import chex
import jax


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """Cuts an image or latent into `patch` x `patch` tokens, row major.

    Args:
      x: [B, H, W, C]; H and W multiples of `patch`.
      patch: side of a token.
    Returns:
      [B, (H / patch) * (W / patch), patch * patch * C].
    """
    chex.assert_rank(x, 4)
    batch, height, width, channels = x.shape
    if height % patch or width % patch:
        raise ValueError(
            f"image of {height} x {width} (height x width) cannot be cut into patches of {patch}; "
            f"resize it to multiples of {patch}"
        )
    rows, cols = height // patch, width // patch
    x = x.reshape(batch, rows, patch, cols, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * cols, patch * patch * channels)


def unpatchify(tokens: jax.Array, patch: int, grid: tuple[int, int]) -> jax.Array:
    """Puts tokens back together, the inverse of `patchify`.

    Args:
      tokens: [B, M, patch * patch * C].
      patch: side of a token.
      grid: token rows and columns, `M = rows * cols`.
    Returns:
      [B, rows * patch, cols * patch, C].
    """
    rows, cols = grid
    chex.assert_shape(tokens, (None, rows * cols, None))
    batch, _, width = tokens.shape
    channels = width // patch**2
    x = tokens.reshape(batch, rows, cols, patch, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * patch, cols * patch, channels)
