"""Reads what a compiler made of a function: its loops, collectives and traffic to memory.

The text of an optimized XLA module lists computations, each a list of instructions in SSA form.
Figures of a loop's body count as often as the loop runs, which the compiler's own do not.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

import numpy as np

from alphagrpo_jax.planning.groups import device_groups

BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "token": 0, "opaque": 0}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
# A TPU's compiler splits a collective over slices: what leaves a slice is a send by the host, of
# this device's share, which says what it is a part of.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="([\w-]+)"')
# Instructions that move nothing by themselves, or whose inner computations are counted instead.
STILL = frozenset(
    {
        "add-dependency",
        "after-all",
        "bitcast",
        "call",
        "conditional",
        "constant",
        "domain",
        "get-tuple-element",
        "opt-barrier",
        "parameter",
        "partition-id",
        "recv",
        "replica-id",
        "send",
        "tuple",
        "while",
    }
)
_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,<=?]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(
    r"(calls|body|condition|to_apply|branch_computations|called_computations)="
    r"(?:%([\w.\-]+)|\{([^}]*)\})"
)
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    bytes: float
    near: bool  # in memory beside the core, not in the device's large memory


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of the result
    operands: tuple[str, ...]
    called: dict[str, tuple[str, ...]]  # attribute -> computations
    text: str  # what stands behind the opcode
    is_root: bool

    @property
    def bytes(self) -> float:
        """Bytes of the result."""
        return sum(array.bytes for array in self.arrays)

    @property
    def far_bytes(self) -> float:
        """Bytes of the result that lie in the device's large memory."""
        return sum(array.bytes for array in self.arrays if not array.near)


Computation = dict[str, Instruction]  # by name


@dataclasses.dataclass
class Traffic:
    """Adds up what runs of a computation move, on one device."""

    memory: float = 0.0  # bytes to and from the large memory
    collectives: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    network: float = 0.0  # bytes of collectives that cross slices
    unknown_loops: int = 0

    def add(self, other: "Traffic", times: float) -> None:
        """Adds `times` runs of another computation."""
        self.memory += times * other.memory
        self.network += times * other.network
        self.unknown_loops += other.unknown_loops
        for kind, (count, size) in other.collectives.items():
            total = self.collectives.setdefault(kind, [0.0, 0.0])
            total[0] += times * count
            total[1] += times * size

    @property
    def collective_bytes(self) -> float:
        """Bytes that a device sends, over all kinds."""
        return sum(size for _, size in self.collectives.values())


class Module:
    """An optimized module."""

    def __init__(self, text: str, slices: Sequence[int] = ()) -> None:
        """Parses the text of a module.

        Args:
          text: as `compiled.as_text()` gives it.
          slices: number of the slice of every device, in the mesh's order; empty for one slice.
        """
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        self.slices = np.asarray(slices)
        current: Computation = {}
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
            elif name := _NAME.match(line):
                current[name[2]] = _instruction(name, line)

    @property
    def parameter_bytes(self) -> float:
        """Bytes of the module's parameters on one device, without padding."""
        instructions = self.computations[self.entry].values()
        return sum(x.bytes for x in instructions if x.opcode == "parameter")

    def traffic(self, *, while_steps: int) -> Traffic:
        """Computes what one call of the module moves.

        Args:
          while_steps: how often a loop runs whose length the module does not tell.
        """
        return self._of_computation(self.entry, while_steps)

    def per_step(self) -> Traffic:
        """Computes what one step of the outermost loop of unknown length moves: a text's token."""
        total = Traffic()
        for computation in self._reachable(self.entry):
            for instruction in self.computations[computation].values():
                if instruction.opcode == "while" and self.trips(instruction) is None:
                    for part in ("body", "condition"):
                        for name in instruction.called.get(part, ()):
                            total.add(self._of_computation(name, 1), 1)
        return total

    def _reachable(self, start: str) -> list[str]:
        names, index = [start], 0
        while index < len(names):
            for instruction in self.computations.get(names[index], {}).values():
                for called in instruction.called.values():
                    names.extend(name for name in called if name not in names)
            index += 1
        return [name for name in names if name in self.computations]

    @functools.cache  # noqa: B019 (as long as the module)
    def _of_computation(self, name: str, while_steps: int) -> Traffic:
        total = Traffic()
        for instruction in self.computations.get(name, {}).values():
            total.memory += self._memory(name, instruction)
            if kind := collective_kind(instruction.opcode):
                size = self._collective_bytes(kind, instruction)
                entry = total.collectives.setdefault(kind, [0.0, 0.0])
                entry[0] += 1
                entry[1] += size
                total.network += size if self._crosses(instruction) else 0.0
            if sent := self._sent_between_slices(instruction):
                kind, size = sent
                total.add(Traffic(collectives={kind: [1.0, size]}, network=size), 1)
            times = 1.0
            if instruction.opcode == "while":
                trips = self.trips(instruction)
                total.unknown_loops += trips is None
                times = while_steps if trips is None else trips
            for attribute, called in instruction.called.items():
                if attribute == "to_apply":
                    continue  # of one element
                for inner in called:
                    traffic = self._of_computation(inner, while_steps)
                    if instruction.opcode == "fusion":  # its memory is counted at its edges
                        traffic = dataclasses.replace(traffic, memory=0.0)
                    total.add(traffic, times)
        return total

    def trips(self, loop: Instruction) -> int | None:
        """Returns how often a loop's body runs; None: the module does not tell."""
        if known := re.search(r'"known_trip_count":\s*\{"n":"(\d+)"', loop.text):
            return int(known[1])
        condition = self.computations.get(loop.called.get("condition", ("",))[0], {})
        root = next((x for x in condition.values() if x.is_root), None)
        if root is None or root.opcode != "compare" or "direction=LT" not in root.text:
            return None
        limit = condition.get(root.operands[1])
        counter = condition.get(root.operands[0])
        if limit is None or counter is None or limit.opcode != "constant":
            return None
        index = re.search(r"index=(\d+)", counter.text)
        value = re.match(r"\((\d+)\)", limit.text)
        if index is None or value is None:
            return None
        return -(-int(value[1]) // self._increment(loop, int(index[1])))

    def _increment(self, loop: Instruction, index: int) -> int:
        """Returns by how much a loop's counter grows in one run of its body."""
        body = self.computations.get(loop.called.get("body", ("",))[0], {})
        root = next((x for x in body.values() if x.is_root), None)
        add = body.get(root.operands[index]) if root and index < len(root.operands) else None
        while add is not None and add.opcode in ("copy", "bitcast"):
            add = body.get(add.operands[0])
        if add is None or add.opcode != "add":
            return 1
        constants = [body[name] for name in add.operands if name in body]
        values = [re.match(r"\((\d+)\)", x.text) for x in constants if x.opcode == "constant"]
        return max([int(value[1]) for value in values if value], default=1) or 1

    # ------------------------------------------------------------------ memory
    def _memory(self, name: str, instruction: Instruction) -> float:
        """Returns the bytes that an instruction reads from and writes to the large memory."""
        opcode = instruction.opcode
        if opcode in STILL or opcode.endswith(("-done", "-update")) or collective_kind(opcode):
            return 0.0
        computation = self.computations[name]
        operands = [computation[x] for x in instruction.operands if x in computation]
        if opcode == "fusion":
            inner = self.computations[instruction.called["calls"][0]]
            parameters = _parameters(inner)
            read = sum(
                min(self._read(inner, parameter, operand.bytes), operand.bytes)
                for parameter, operand in zip(parameters, operands, strict=False)
                if operand.far_bytes
            )
            return read + (self._written(inner, instruction) if instruction.far_bytes else 0.0)
        if opcode in ("dynamic-slice", "gather", "slice", "slice-start", "dynamic-slice-start"):
            return 2.0 * min(instruction.far_bytes, instruction.bytes)
        if opcode == "dynamic-update-slice":
            return 2.0 * operands[1].bytes if len(operands) > 1 else instruction.far_bytes
        if opcode == "copy-start":
            return sum(array.bytes for array in instruction.arrays[:2] if not array.near)
        return instruction.far_bytes + sum(operand.far_bytes for operand in operands)

    def _read(self, computation: Computation, name: str, full: float) -> float:
        """Returns the bytes that a fused computation reads of one of its arrays."""
        total = 0.0
        for user in computation.values():
            if name not in user.operands:
                continue
            first = user.operands[0] == name
            if user.opcode in ("dynamic-slice", "slice", "gather") and first:
                total += user.bytes
            elif user.opcode == "dynamic-update-slice" and first:
                continue  # written in place
            elif user.opcode in ("bitcast", "reshape", "transpose"):
                total += self._read(computation, user.name, full)
            elif user.opcode == "fusion":
                inner = self.computations[user.called["calls"][0]]
                parameter = _parameters(inner)[user.operands.index(name)]
                total += self._read(inner, parameter, full)
                root = next((x for x in inner.values() if x.is_root), None)
                if root and _origin(inner, root).name == parameter:  # handed on in another shape
                    total += self._read(computation, user.name, full)
            else:
                return full
        return total

    def _written(self, computation: Computation, fusion: Instruction) -> float:
        """Returns the bytes that a fused computation writes."""
        root = next((x for x in computation.values() if x.is_root), None)
        if root is None:
            return fusion.far_bytes
        outputs = [root]
        if root.opcode == "tuple":
            outputs = [computation[x] for x in root.operands if x in computation]
        total = 0.0
        for output, array in zip(outputs, fusion.arrays, strict=False):
            output = _origin(computation, output)
            update = None
            if output.opcode == "dynamic-update-slice":
                update = computation.get(output.operands[1])
            total += 0.0 if array.near else update.bytes if update else array.bytes
        return total

    # ------------------------------------------------------------- collectives
    def _collective_bytes(self, kind: str, instruction: Instruction) -> float:
        """Returns the bytes that a device sends, by rings."""
        size = _result_bytes(kind, instruction)
        ways = self.groups(instruction).shape[1]
        share = (ways - 1) / ways if ways else 1.0
        if kind == "all-reduce":
            return 2.0 * size * share
        if kind == "reduce-scatter":
            return size * max(ways - 1, 0)
        if kind in ("collective-permute", "collective-broadcast"):
            return size
        return size * share

    def groups(self, instruction: Instruction) -> np.ndarray:
        """Returns which devices exchange with each other, int64[groups, ways]; may be empty."""
        return device_groups(instruction.text)

    def _sent_between_slices(self, instruction: Instruction) -> tuple[str, float] | None:
        """Returns the kind and bytes of what a device sends to other slices by its host."""
        transfer = _BETWEEN_SLICES.search(instruction.text)
        if instruction.opcode != "send" or transfer is None:
            return None
        ways = max(2, len(set(self.slices.tolist())))
        kind = transfer[1].lower().replace("_", "-")
        share = {
            "all-reduce": 2 * (ways - 1) / ways,
            "all-gather": ways - 1.0,
            "all-to-all": (ways - 1) / ways,
            "reduce-scatter": (ways - 1) / ways,
        }.get(kind, 1.0)
        return f"{kind} between slices", instruction.arrays[0].bytes * share

    def _crosses(self, instruction: Instruction) -> bool:
        """Tells whether a collective exchanges between slices."""
        groups = self.groups(instruction)
        if len(set(self.slices.tolist())) < 2:
            return False
        if not groups.size or groups.max() >= len(self.slices):
            return True
        members = self.slices[groups]
        return bool((members != members[:, :1]).any())


def _origin(computation: Computation, instruction: Instruction) -> Instruction:
    """Follows an array back through changes of its shape alone."""
    while instruction.opcode in ("bitcast", "reshape") and instruction.operands[0] in computation:
        instruction = computation[instruction.operands[0]]
    return instruction


def collective_kind(opcode: str) -> str | None:
    """Returns the kind of a collective; None for other instructions and for the end of one."""
    name = opcode.removesuffix("-start")
    return name if name in COLLECTIVES else None


def _instruction(name: re.Match[str], line: str) -> Instruction:
    """Parses `%name = shape opcode(operands), attributes`."""
    text = line[name.end() :]
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    shape, text = text[:end], text[end:].strip()
    opcode, _, _ = text.partition("(")
    text = text[len(opcode) :]
    end = _closing(text, 0) if text.startswith("(") else 0
    operands = tuple(re.findall(r"%([\w.\-]+)", text[:end]))
    called: dict[str, tuple[str, ...]] = {}
    for attribute, single, names in _CALLED.findall(text[end:]):
        called[attribute] = (single,) if single else tuple(re.findall(r"%([\w.\-]+)", names))
    return Instruction(
        name[2], opcode.strip(), arrays(shape), operands, called, text, bool(name[1])
    )


def _closing(text: str, start: int) -> int:
    """Returns the position behind the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index + 1
    return len(text)


def arrays(shape: str) -> tuple[Array, ...]:
    """Reads a shape such as `bf16[2,3]{1,0:T(8,128)S(1)}`, or a tuple of them."""
    result = []
    for dtype, dimensions, layout in _ARRAY.findall(shape):
        bits = BITS.get(dtype)
        if bits is None:
            width = re.search(r"\d+", dtype)
            bits = int(width[0]) if width else 32
        count = math.prod(int(size.lstrip("<=")) for size in dimensions.split(",") if size)
        space = re.search(r"S\((\d+)\)", layout)
        result.append(Array(count * bits / 8, space is not None and space[1] != "0"))
    return tuple(result)


def _result_bytes(kind: str, instruction: Instruction) -> float:
    """Returns the bytes of a collective's result, of one that has only begun, too."""
    sizes = [array.bytes for array in instruction.arrays]
    if not instruction.opcode.endswith("-start") or len(sizes) < 2 or kind == "all-reduce":
        return sum(sizes)
    # (operands, results, marks): as many operands as the instruction has.
    count = len(instruction.operands)
    return sum(sizes[count : 2 * count])


def _parameters(computation: Computation) -> list[str]:
    """Returns the names of a computation's parameters, in order."""
    numbered = []
    for instruction in computation.values():
        if instruction.opcode == "parameter":
            number = re.match(r"\((\d+)\)", instruction.text)
            numbered.append((int(number[1]) if number else 0, instruction.name))
    return [name for _, name in sorted(numbered)]
