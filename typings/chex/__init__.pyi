from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

_Array = jax.Array | np.ndarray[Any, Any]

def assert_rank(
    inputs: _Array | Sequence[_Array], expected_ranks: int | set[int] | Sequence[int | set[int]]
) -> None: ...
def assert_shape(inputs: _Array | Sequence[_Array], expected_shapes: Sequence[Any]) -> None: ...
def assert_equal_shape(inputs: Sequence[_Array | None]) -> None: ...
def assert_type(inputs: _Array | Sequence[_Array], expected_types: Any) -> None: ...
