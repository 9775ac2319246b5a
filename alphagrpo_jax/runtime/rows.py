"""Rows of a batch over the devices, and the micro-batches that they are cut into."""

import dataclasses
import math
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """B rows over the shards of a mesh; hashable, a static argument of jit.

    Every shard holds the same number of neighboring rows, so the batch is filled up with padding
    behind its last row. A micro-batch takes the same rows of every shard: nothing moves between
    devices. The last one repeats rows of the one before where the shards' rows run out.
    """

    count: int  # B
    shards: int
    micro_rows: int  # rows of a micro-batch on one shard

    @classmethod
    def make(cls, count: int, *, shards: int, micro_batch: int) -> Self:
        """Cuts `count` rows into micro-batches of at most `micro_batch` rows over all shards.

        A micro-batch has at least one row on every shard.
        """
        shard_rows = -(-count // shards)
        return cls(count, shards, min(shard_rows, max(1, micro_batch // shards)))

    @property
    def shard_rows(self) -> int:
        """Number of rows on one shard."""
        return -(-self.count // self.shards)

    @property
    def rows(self) -> int:
        """Number of rows with padding."""
        return self.shards * self.shard_rows

    @property
    def micro_batch(self) -> int:
        """Number of rows of a micro-batch over all shards."""
        return self.shards * self.micro_rows

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches."""
        return -(-self.shard_rows // self.micro_rows)

    def sharing(self, group: int) -> int:
        """Returns the greatest size of equal runs of neighboring rows that no group's end cuts.

        Of all rows and of those of a micro-batch, on every shard, if row `i` is of group
        `i // group`. Runs of padding lie behind the last group.
        """
        return math.gcd(group, self.shard_rows, self.micro_rows)

    def rows_of(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns which rows a micro-batch holds.

        Returns:
          int64[R] row numbers in the batch; bool[R], False at padding and repeated rows.
        """
        first = min(number * self.micro_rows, self.shard_rows - self.micro_rows)
        local = first + np.arange(self.micro_rows)
        rows = (np.arange(self.shards)[:, None] * self.shard_rows + local).ravel()
        new = np.tile(local >= number * self.micro_rows, self.shards)
        return rows, new & (rows < self.count)

    def new_rows(self, number: jax.Array) -> jax.Array:
        """Tells in jit which rows of a micro-batch are not repeated, bool[R]."""
        first = jnp.minimum(number * self.micro_rows, self.shard_rows - self.micro_rows)
        local = first + jnp.arange(self.micro_rows, dtype=jnp.int32)
        return jnp.tile(local >= number * self.micro_rows, self.shards)

    def take(self, x: jax.Array, number: jax.Array, axis: int = 0) -> jax.Array:
        """Takes a micro-batch's rows of an array that has all rows at `axis`."""
        by_shard = (*x.shape[:axis], self.shards, self.shard_rows, *x.shape[axis + 1 :])
        # The slice starts early enough to be whole: the last one may repeat rows.
        rows = jax.lax.dynamic_slice_in_dim(
            x.reshape(by_shard), number * self.micro_rows, self.micro_rows, axis + 1
        )
        return rows.reshape(*x.shape[:axis], self.micro_batch, *x.shape[axis + 1 :])

    def join(self, micro_batches: list[jax.Array], axis: int = 0) -> jax.Array:
        """Puts the rows of all micro-batches at `axis` together again, without repeated ones."""
        if self.micro_batches == 1:
            return micro_batches[0]
        by_shard = [
            x.reshape(*x.shape[:axis], self.shards, self.micro_rows, *x.shape[axis + 1 :])
            for x in micro_batches
        ]
        last = self.shard_rows - (self.micro_batches - 1) * self.micro_rows
        by_shard[-1] = jax.lax.slice_in_dim(
            by_shard[-1], self.micro_rows - last, self.micro_rows, axis=axis + 1
        )
        joined = jnp.concatenate(by_shard, axis=axis + 1)
        return joined.reshape(*joined.shape[:axis], self.rows, *joined.shape[axis + 2 :])
