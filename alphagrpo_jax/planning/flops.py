"""Counts the floating point operations of a traced function, loops and recomputation included."""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core
from jax.interpreters import partial_eval


def count_flops(jaxpr: core.ClosedJaxpr, *, while_steps: int) -> float:
    """Counts the FLOPs of all matrix products and convolutions, over all devices.

    The compiler's own count takes a loop's body once; here a scan counts as often as it runs.
    Products that no result needs are left out, as every compiler does: the derivative by a frozen
    weight is traced too.

    Args:
      jaxpr: of the function.
      while_steps: how often the body of a loop of unknown length runs.
    """
    needed, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    return _count(core.ClosedJaxpr(needed, jaxpr.consts), while_steps)


def _count(jaxpr: core.ClosedJaxpr, while_steps: int) -> float:
    """Counts all products, needed or not."""
    return sum(_equation_flops(equation, while_steps) for equation in jaxpr.jaxpr.eqns)


def _equation_flops(equation: core.JaxprEqn, while_steps: int) -> float:
    name, options = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = options["dimension_numbers"]
        shape = _shape(equation.invars[0])
        depth = math.prod(shape[axis] for axis in contracted)
        return 2.0 * math.prod(_shape(equation.outvars[0])) * depth
    if name == "conv_general_dilated":
        kernel = _shape(equation.invars[1])
        out_features = kernel[options["dimension_numbers"].rhs_spec[0]]
        per_output = math.prod(kernel) / out_features
        return 2.0 * math.prod(_shape(equation.outvars[0])) * per_output
    inner = [_count(jaxpr, while_steps) for jaxpr in _inner(options)]
    if name == "cond":
        return max(inner, default=0.0)
    if name == "shard_map":  # inside are the shapes of one device
        return options["mesh"].size * sum(inner)
    if name == "pallas_call":  # inside are the shapes of one tile
        return math.prod(options["grid_mapping"].grid) * sum(inner)
    times = {"scan": options.get("length", 1), "while": while_steps}.get(name, 1)
    return times * sum(inner)


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def _inner(options: dict[str, Any]) -> Iterator[core.ClosedJaxpr]:
    """Returns the functions that an equation calls."""
    for value in options.values():
        for candidate in value if isinstance(value, tuple | list) else (value,):
            if isinstance(candidate, core.ClosedJaxpr):
                yield candidate
            elif isinstance(candidate, core.Jaxpr):
                yield core.ClosedJaxpr(candidate, ())
