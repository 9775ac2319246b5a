"""Rows over shards and micro-batches, and which neighbors share a prompt."""

import itertools

import numpy as np
import pytest

from alphagrpo_jax.runtime.rows import RowLayout


@pytest.mark.parametrize("group", [1, 2, 4, 6, 12])
def test_neighbors_that_share_a_prompt_have_one_in_every_micro_batch(group):
    for prompts, shards, micro_batch in itertools.product((1, 2, 8), (1, 2, 3, 5), (1, 4, 7, 96)):
        layout = RowLayout.make(prompts * group, shards=shards, micro_batch=micro_batch)
        sharing = layout.sharing(group)
        owner = np.minimum(np.arange(layout.rows) // group, prompts - 1)
        batches = [np.arange(layout.rows)]
        batches += [layout.rows_of(number)[0] for number in range(layout.micro_batches)]
        for rows in batches:
            runs = owner[rows].reshape(-1, sharing)
            assert (runs == runs[:, :1]).all(), layout


def test_a_whole_group_shares_where_the_layout_lets_it():
    assert RowLayout.make(96, shards=2, micro_batch=96).sharing(12) == 12
    assert RowLayout.make(96, shards=8, micro_batch=48).sharing(12) == 6
    assert RowLayout.make(96, shards=1, micro_batch=7).sharing(12) == 1
