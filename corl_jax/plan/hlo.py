"""Parses compiled XLA programs: instructions, shapes, and how often a loop's body runs."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

WIDTHS = {"pred": 1, "s4": 1, "u4": 1, "bf16": 2, "c64": 8, "c128": 16}
"""Bytes of the types whose names do not end in their number of bits."""
TOKENS = ("token", "opaque")

# bf16[16,64]{1,0:T(8,128)(2,1)S(1)}: type, sizes, layout
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
# ENTRY %main.5 (p: f32[4]) -> f32[4] {
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
# ROOT %add.3 = f32[4]{0} add(%p, %q), metadata={..}
_ASSIGNMENT = re.compile(r"(ROOT )?%?([\w.\-]+) = (.*)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool  # in a memory on the chip, as the layout's S(n) says

    @property
    def nbytes(self) -> int:
        """The size in bytes; 0 for a type that holds no data."""
        if self.dtype in TOKENS:
            return 0
        bits = re.match(r"[a-z]+(\d+)", self.dtype)
        width = WIDTHS.get(self.dtype) or max(1, int(bits[1]) // 8 if bits else 0)
        return math.prod(self.dims) * width


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = result opcode(operands), attributes`."""

    name: str
    result: str
    opcode: str
    inside: str  # the text in the parentheses
    attributes: str
    root: bool

    @functools.cached_property
    def arrays(self) -> list[Array]:
        """The arrays of the result; a tuple has several."""
        return [
            Array(dtype, tuple(map(int, filter(None, dims.split(",")))), "S(" in layout)
            for dtype, dims, layout in _ARRAY.findall(self.result)
        ]

    @functools.cached_property
    def operands(self) -> list[str]:
        """The names of the operands."""
        return _NAME.findall(self.inside)

    def get_attribute(self, name: str) -> str | None:
        """Returns the computation that an attribute such as `body` or `calls` names."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str
    partitions: int

    def get_root(self, name: str) -> Instruction:
        """Returns the instruction that computes the result of a computation."""
        return next(op for op in self.computations[name].values() if op.root)


def parse_program(text: str) -> Module:
    """Parses the text of `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) and (header := _HEADER.match(line)):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif match := _ASSIGNMENT.match(line.strip()):
            current[match[2]] = _parse_instruction(match[2], match[3], bool(match[1]))
    partitions = re.search(r"num_partitions=(\d+)", text.split("\n", 1)[0])
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _parse_instruction(name: str, rest: str, root: bool) -> Instruction:
    # The result is one array, f32[4], or a tuple in parentheses, (f32[4], s32[]).
    end = _find_closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    stop = _find_closing(rest, start)
    return Instruction(name, result, rest[:start], rest[start + 1 : stop], rest[stop + 1 :], root)


def _find_closing(text: str, start: int) -> int:
    """Returns the place of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


# ---- loops


def count_trips(module: Module, parent: Computation, loop: Instruction) -> int | None:
    """Returns how often a `while` runs its body; None if its end depends on computed values."""
    # XLA states the number for most loops; otherwise it is read from the condition.
    known = re.search(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    test = module.get_root(loop.get_attribute("condition") or "")
    scope = module.computations[loop.get_attribute("condition") or ""]
    sides = [_find_source(scope, name) for name in test.operands]
    # The comparison may be fused: its operands are then parameters of the fusion.
    if test.opcode == "fusion":
        called = module.get_root(test.get_attribute("calls") or "")
        inner = module.computations[test.get_attribute("calls") or ""]
        places = [_find_parameter(inner, name) for name in called.operands]
        sides = [
            _find_source(inner, name) if place is None else sides[place]
            for name, place in zip(called.operands, places, strict=True)
        ]
        test = called
    if test.opcode != "compare" or "direction=LT" not in test.attributes or len(sides) != 2:
        return None
    # counter < bound: the left side is a slot of the loop's tuple, the right one a constant or a
    # slot that is constant before the loop.
    (counter, slot), (kind, bound) = sides
    if kind == "slot":
        kind, bound = _find_initial(parent, loop, bound)
    if counter != "slot" or kind != "constant":
        return None
    origin, first = _find_initial(parent, loop, slot)
    step = _find_increment(module, loop, slot)
    # From 0 to below 10 in steps of 4: 0, 4, 8 -> 3 rounds.
    return math.ceil((bound - (first if origin == "constant" else 0)) / step)


Source = tuple[str, int]  # ("constant", value), ("slot", index of the loop's tuple) or ("", 0)


def _find_source(scope: Computation, name: str) -> Source:
    """Returns where the value of a name comes from."""
    op = scope.get(name)
    while op is not None and op.opcode in ("copy", "bitcast", "convert", "copy-done"):
        op = scope.get(op.operands[0])
    if op is None:
        return "", 0
    if op.opcode == "constant" and re.fullmatch(r"-?\d+", op.inside):
        return "constant", int(op.inside)
    if op.opcode == "get-tuple-element":
        index = re.search(r"index=(\d+)", op.attributes)
        return "slot", int(index[1]) if index else 0
    return "", 0


def _find_parameter(scope: Computation, name: str) -> int | None:
    """Returns the number of a parameter; None if the name is not a parameter."""
    op = scope.get(name)
    return int(op.inside) if op is not None and op.opcode == "parameter" else None


def _find_initial(parent: Computation, loop: Instruction, slot: int) -> Source:
    """Returns where a slot of the loop's tuple comes from before the loop."""
    start = parent.get(loop.operands[0])
    if start is None or start.opcode != "tuple":
        return "", 0
    return _find_source(parent, start.operands[slot])


def _find_increment(module: Module, loop: Instruction, slot: int) -> int:
    """Returns the number that a body adds to its counter; 1 if it cannot be read."""
    body = loop.get_attribute("body") or ""
    scope, out = module.computations[body], module.get_root(body)
    if out.opcode != "tuple":
        return 1
    op = scope[out.operands[slot]]
    if op.opcode == "fusion" and (called := op.get_attribute("calls")):
        scope, op = module.computations[called], module.get_root(called)
    if op.opcode != "add":
        return 1
    constants = [
        value for kind, value in (_find_source(scope, x) for x in op.operands) if kind == "constant"
    ]
    return max(1, constants[0]) if constants else 1


def list_called(op: Instruction) -> Iterator[str]:
    """Yields the computations that an instruction runs once: fusions, calls, branches."""
    if op.opcode in ("fusion", "async-start"):
        names = [op.get_attribute("calls")]
    elif op.opcode == "call":
        names = [op.get_attribute("to_apply")]
    elif op.opcode == "conditional":
        match = re.search(r"branch_computations=\{([^}]*)\}", op.attributes)
        names = _NAME.findall(match[1]) if match else []
        names += [op.get_attribute(f"{side}_computation") for side in ("true", "false")]
    else:
        names = []
    yield from filter(None, names)
