"""Reads from a compiled program's text which devices exchange with each other."""

import math
import re

import numpy as np

NONE = np.zeros((0, 0), np.int64)


def device_groups(text: str) -> np.ndarray:
    """Reads the groups of a collective's devices, int64[groups, ways]; may be empty.

    Args:
      text: what stands behind the collective's opcode.
    """
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        return np.array(re.findall(r"\{(\d+),(\d+)\}", pairs[1]), dtype=np.int64).reshape(-1, 2)
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, source = _integers(iota[1]), _integers(iota[2])
        numbers = np.arange(math.prod(source)).reshape(source)
        numbers = numbers.transpose(_integers(iota[3])) if iota[3] else numbers
        return numbers.reshape(-1, shape[-1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", text):
        return _mesh_groups(mesh[1], mesh[2])
    if explicit := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        rows = [_integers(row) for row in re.findall(r"\{([\d,]+)\}", explicit[1])]
        return np.array(rows, dtype=np.int64) if len({len(r) for r in rows}) == 1 else NONE
    return NONE


def _mesh_groups(axes: str, reduced: str) -> np.ndarray:
    """Reads groups that are written as axes of a mesh: mesh['a'=2,'b'=4] {'b'}."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    parts: dict[str, tuple[int, int, int]] = {}  # axis -> sizes before, of and behind the group
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", reduced):
        total = sizes.get(name, 1)
        low, middle = (int(before), int(size)) if size else (1, total)
        parts[name] = (low, middle, max(1, total // (low * middle)))
    shape: list[int] = []
    inner: list[int] = []
    for name, size in sizes.items():
        if name in parts:
            inner.append(len(shape) + 1)
            shape.extend(parts[name])
        else:
            shape.append(size)
    numbers = np.arange(math.prod(shape)).reshape(shape)
    outer = [axis for axis in range(len(shape)) if axis not in inner]
    ways = math.prod(shape[axis] for axis in inner)
    return numbers.transpose(outer + inner).reshape(-1, ways)


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
