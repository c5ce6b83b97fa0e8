"""Compiled XLA programs as text: instructions, shapes, and how often a loop's body runs."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

WIDTHS = {"pred": 1, "s4": 1, "u4": 1, "bf16": 2, "c64": 8, "c128": 16}
"""Bytes of the types whose name does not end in their bits."""
TOKENS = ("token", "opaque")

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ASSIGNMENT = re.compile(r"(ROOT )?%?([\w.\-]+) = (.*)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool  # in a memory nearer than HBM, as the layout's S(n) says

    @property
    def nbytes(self) -> int:
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
    inside: str  # of the parentheses
    attributes: str
    root: bool

    @functools.cached_property
    def arrays(self) -> list[Array]:
        return [
            Array(dtype, tuple(map(int, filter(None, dims.split(",")))), "S(" in layout)
            for dtype, dims, layout in _ARRAY.findall(self.result)
        ]

    @functools.cached_property
    def operands(self) -> list[str]:
        return _NAME.findall(self.inside)

    def get_attribute(self, name: str) -> str | None:
        """The computation that an attribute such as `body` or `calls` names."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str
    partitions: int

    def get_root(self, name: str) -> Instruction:
        return next(each for each in self.computations[name].values() if each.root)


def parse_program(text: str) -> Module:
    """The program of `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) and (header := _HEADER.match(line)):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif found := _ASSIGNMENT.match(line.strip()):
            current[found[2]] = _parse_instruction(found[2], found[3], bool(found[1]))
    partitions = re.search(r"num_partitions=(\d+)", text.split("\n", 1)[0])
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _parse_instruction(name: str, rest: str, root: bool) -> Instruction:
    end = _find_closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    stop = _find_closing(rest, start)
    return Instruction(name, result, rest[:start], rest[start + 1 : stop], rest[stop + 1 :], root)


def _find_closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.start()
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


# ---- loops


def count_trips(module: Module, parent: Computation, loop: Instruction) -> int | None:
    """How often a `while` runs its body; None where its end depends on what it computes."""
    known = re.search(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    test = module.get_root(loop.get_attribute("condition") or "")
    scope = module.computations[loop.get_attribute("condition") or ""]
    sides = [_find_source(scope, name) for name in test.operands]
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
    (counter, slot), (kind, bound) = sides
    if kind == "slot":
        kind, bound = _find_initial(parent, loop, bound)
    if counter != "slot" or kind != "constant":
        return None
    origin, first = _find_initial(parent, loop, slot)
    step = _find_increment(module, loop, slot)
    return math.ceil((bound - (first if origin == "constant" else 0)) / step)


Source = tuple[str, int]  # ("constant", value), ("slot", index of the loop's tuple) or ("", 0)


def _find_source(scope: Computation, name: str) -> Source:
    each = scope.get(name)
    while each is not None and each.opcode in ("copy", "bitcast", "convert", "copy-done"):
        each = scope.get(each.operands[0])
    if each is None:
        return "", 0
    if each.opcode == "constant" and re.fullmatch(r"-?\d+", each.inside):
        return "constant", int(each.inside)
    if each.opcode == "get-tuple-element":
        index = re.search(r"index=(\d+)", each.attributes)
        return "slot", int(index[1]) if index else 0
    return "", 0


def _find_parameter(scope: Computation, name: str) -> int | None:
    each = scope.get(name)
    return int(each.inside) if each is not None and each.opcode == "parameter" else None


def _find_initial(parent: Computation, loop: Instruction, slot: int) -> Source:
    start = parent.get(loop.operands[0])
    if start is None or start.opcode != "tuple":
        return "", 0
    return _find_source(parent, start.operands[slot])


def _find_increment(module: Module, loop: Instruction, slot: int) -> int:
    """What a body adds to its counter; 1 where that cannot be read."""
    body = loop.get_attribute("body") or ""
    scope, out = module.computations[body], module.get_root(body)
    if out.opcode != "tuple":
        return 1
    each = scope[out.operands[slot]]
    if each.opcode == "fusion" and (called := each.get_attribute("calls")):
        scope, each = module.computations[called], module.get_root(called)
    if each.opcode != "add":
        return 1
    constants = [
        value
        for kind, value in (_find_source(scope, x) for x in each.operands)
        if kind == "constant"
    ]
    return max(1, constants[0]) if constants else 1


def list_called(each: Instruction) -> Iterator[str]:
    """Computations that an instruction runs once: fusions, calls, branches, asynchronous ones."""
    if each.opcode in ("fusion", "async-start"):
        names = [each.get_attribute("calls")]
    elif each.opcode == "call":
        names = [each.get_attribute("to_apply")]
    elif each.opcode == "conditional":
        listed = re.search(r"branch_computations=\{([^}]*)\}", each.attributes)
        names = _NAME.findall(listed[1]) if listed else []
        names += [each.get_attribute(f"{side}_computation") for side in ("true", "false")]
    else:
        names = []
    yield from filter(None, names)
