"""What one device does in a compiled program: products, memory traffic, collectives.

XLA's own `cost_analysis` counts the body of a loop once, whatever the number of its rounds (a
scan over 24 layers counts as one layer), so the instructions are added up here, each as often as
its loop runs.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter

import numpy as np

from corl_jax.plan import hlo
from corl_jax.plan.hlo import Array, Computation, Instruction, Module

COLLECTIVES = (
    "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
_NO_TRAFFIC = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "after-all", "opt-barrier", "partition-id", "replica-id", "async-start",
    "async-update", "domain",
}  # fmt: skip
_BOOKKEEPING = {"AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone"}
_HARMLESS = _BOOKKEEPING | {
    "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked", "Sharding", "X64Combine",
}  # fmt: skip


@dataclasses.dataclass
class Traffic:
    """Collectives of one kind."""

    count: int = 0
    nbytes: float = 0.0  # that a device sends


@dataclasses.dataclass
class Cost:
    """Of one run of a program on one device."""

    flops: float = 0.0  # of matrix products and convolutions
    hbm: float = 0.0  # bytes read and written
    collectives: dict[str, Traffic] = dataclasses.field(default_factory=dict)
    open_loops: int = 0  # whose end depends on what they compute
    kernels: Counter = dataclasses.field(default_factory=Counter)  # not counted, by target

    @property
    def sent(self) -> float:
        return sum(traffic.nbytes for traffic in self.collectives.values())


def count_cost(text: str, rounds: int = 1) -> Cost:
    """The cost of a program's text; loops without a known end run `rounds` times."""
    counter = _Counter(hlo.parse_program(text), rounds)
    counter.walk(counter.module.entry, 1, fused=False)
    return counter.cost


class _Counter:
    def __init__(self, module: Module, rounds: int):
        self.module, self.rounds, self.cost = module, rounds, Cost()
        self.seen: set[str] = set()

    def walk(self, name: str, times: int, fused: bool) -> None:
        scope = self.module.computations[name]
        for each in scope.values():
            kind = each.opcode.removesuffix("-start")
            if each.opcode == "while":
                self._walk_loop(scope, each, times)
            elif each.opcode == "dot":
                self.cost.flops += times * count_dot_flops(scope, each)
            elif each.opcode == "convolution":
                self.cost.flops += times * count_convolution_flops(scope, each)
            elif kind in COLLECTIVES:
                self._count_collective(scope, each, kind, times)
                continue
            elif each.opcode == "custom-call":
                self._count_kernel(scope, each, times)
            for inner in hlo.list_called(each):
                self.walk(inner, times, fused or each.opcode == "fusion")
            if not fused:
                self.cost.hbm += times * count_traffic(self.module, scope, each)

    def _walk_loop(self, scope: Computation, each: Instruction, times: int) -> None:
        count = hlo.count_trips(self.module, scope, each)
        if count is None:
            self.cost.open_loops += 1
            count = self.rounds
        self.walk(each.get_attribute("body") or "", times * count, fused=False)

    def _count_collective(
        self, scope: Computation, each: Instruction, kind: str, times: int
    ) -> None:
        # An asynchronous one appears in every fusion that it overlaps, under one channel.
        channel = re.search(r"channel_id=(\d+)", each.attributes)
        if channel is not None:
            if channel[1] in self.seen:
                return
            self.seen.add(channel[1])
        ways = parse_group_size(each.attributes, self.module.partitions)
        results = _list_results(each)
        size = sum(array.nbytes for array in results)
        found = self.cost.collectives.setdefault(kind, Traffic())
        found.count += times
        found.nbytes += times * size * count_sent_bytes(kind, ways)
        operands = [array for name in each.operands for array in scope[name].arrays]
        self.cost.hbm += times * sum(map(_count_hbm_bytes, [*operands, *results]))

    def _count_kernel(self, scope: Computation, each: Instruction, times: int) -> None:
        target = re.search(r'custom_call_target="([^"]*)"', each.attributes)
        name = target[1] if target else "unknown"
        if "gemm" in name or "matmul" in name:
            self.cost.flops += times * count_dot_flops(scope, each)
        elif name not in _HARMLESS:
            self.cost.kernels[name] += times


def _list_results(each: Instruction) -> list[Array]:
    """The arrays that a collective makes; a `-start` lists its inputs before them."""
    arrays = [array for array in each.arrays if array.dims]
    if each.opcode.endswith("-start") and len(arrays) > 1:
        return arrays[len(arrays) // 2 :]
    return each.arrays


def count_sent_bytes(kind: str, ways: int) -> float:
    """Bytes that each of `ways` devices in a ring sends per byte of the result."""
    if kind == "reduce-scatter":
        return ways - 1.0
    if kind == "collective-permute":
        return 1.0
    return (2 if kind == "all-reduce" else 1) * (ways - 1) / ways


def parse_group_size(attributes: str, partitions: int) -> int:
    """Devices that take part together, from any of the notations of `replica_groups`."""
    if mesh := re.search(r"replica_groups=\w*mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        # A part of an axis names its own size: 'x':(4)2.
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(listed[1].split(","))
    return partitions


# ---- products


def _parse_numbers(text: str, attributes: str) -> list[int]:
    found = re.search(rf'{text}"?[=:][{{\[]([^}}\]]*)[}}\]]', attributes)
    return [int(number) for number in re.findall(r"\d+", found[1])] if found else []


def count_dot_flops(scope: Computation, each: Instruction) -> float:
    """Of a `dot`, or of a library's product with the same dimension numbers."""
    left = scope[each.operands[0]].arrays[0].dims
    summed = _parse_numbers("lhs_contracting_dim(?:ension)?s", each.attributes)
    return 2.0 * math.prod(each.arrays[0].dims) * math.prod(left[dim] for dim in summed)


def count_convolution_flops(scope: Computation, each: Instruction) -> float:
    """Products with padding left out; on TPUs matrix products are convolutions as well."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.attributes)
    if labels is None:
        return 0.0
    image, kernel = (scope[name].arrays[0].dims for name in each.operands[:2])
    out = each.arrays[0].dims
    places = 1
    for axis, window in enumerate(_parse_windows(each.attributes, len(labels[1]) - 2)):
        digit = str(axis)
        places *= _count_valid_places(
            image[labels[1].index(digit)], out[labels[3].index(digit)], window
        )
    features = out[labels[3].index("f")] * kernel[labels[2].index("i")]
    return 2.0 * out[labels[3].index("b")] * features * places


Window = dict[str, tuple[int, ...]]


def _parse_windows(attributes: str, rank: int) -> list[Window]:
    text = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(re.findall(r"(\w+)=(\S+)", text[1])) if text else {}
    usual = {"size": "1", "stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}
    columns = {
        name: fields[name].split("x") if name in fields else [value] * rank
        for name, value in usual.items()
    }
    return [
        {name: tuple(map(int, values[axis].split("_"))) for name, values in columns.items()}
        for axis in range(rank)
    ]


def _count_valid_places(size: int, out: int, window: Window) -> int:
    """Pairs of an output place and a kernel place that meet an element of the input."""
    (width,), (stride,), (dilate,), (spread,) = (
        window[name] for name in ("size", "stride", "lhs_dilate", "rhs_dilate")
    )
    places = np.arange(out)[:, None] * stride - window["pad"][0] + np.arange(width) * spread
    inside = (places >= 0) & (places <= (size - 1) * dilate) & (places % dilate == 0)
    return int(inside.sum())


# ---- memory traffic


def _count_hbm_bytes(array: Array) -> int:
    return 0 if array.on_chip else array.nbytes


def count_traffic(module: Module, scope: Computation, each: Instruction) -> float:
    """Bytes that an instruction moves between HBM and the chip, its inner ones not looked at."""
    if each.opcode in _NO_TRAFFIC or each.opcode.endswith("-done"):
        return 0.0
    if any(f'"{name}"' in each.attributes for name in _BOOKKEEPING):
        return 0.0
    inputs = [scope[name].arrays for name in each.operands if name in scope]
    if each.opcode in ("copy-start", "slice-start"):
        source, target = (arrays[0] for arrays in (inputs[0], each.arrays[::1]))
        if each.opcode == "slice-start":
            target = each.arrays[1]
        return (0 if source.on_chip else target.nbytes) + _count_hbm_bytes(target)
    if each.opcode in ("dynamic-slice", "slice", "gather"):
        moved = sum(array.nbytes for array in each.arrays)
        return moved * (2 - inputs[0][0].on_chip - each.arrays[0].on_chip)
    if each.opcode == "dynamic-update-slice":
        return _count_hbm_bytes(inputs[1][0]) + (
            0 if each.arrays[0].on_chip else inputs[1][0].nbytes
        )
    if each.opcode == "fusion":
        return _count_fusion_traffic(module, scope, each)
    return float(
        sum(_count_hbm_bytes(array) for arrays in [*inputs, each.arrays] for array in arrays)
    )


def _count_fusion_traffic(module: Module, scope: Computation, each: Instruction) -> float:
    inner = module.computations[each.get_attribute("calls") or ""]
    root = module.get_root(each.get_attribute("calls") or "")
    kept = {int(index or 0) for index in re.findall(r"\{(\d*)\}: \(\d+", each.attributes)}
    parameters = {int(x.inside): x.name for x in inner.values() if x.opcode == "parameter"}
    users: dict[str, list[Instruction]] = {}
    for user in inner.values():
        for name in user.operands:
            users.setdefault(name, []).append(user)
    total = 0.0
    for place, name in enumerate(each.operands):
        for array in scope[name].arrays if name in scope else ():
            if not array.on_chip and place in parameters:
                total += _count_read_bytes(parameters[place], users, array.nbytes)
    outputs = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for place, (array, made) in enumerate(zip(each.arrays, outputs, strict=False)):
        while made.opcode in ("bitcast", "copy") and made.operands[0] in inner:
            made = inner[made.operands[0]]
        if made.opcode == "dynamic-update-slice":
            array = inner[made.operands[1]].arrays[0]
        elif place in kept:
            continue  # the same buffer as an input's: in place, or handed through
        total += 0 if each.arrays[place].on_chip else array.nbytes
    return total


def _count_read_bytes(name: str, users: dict[str, list[Instruction]], nbytes: int) -> float:
    """Bytes of a fusion's input that are looked at: the slices, if nothing else reads it."""
    moved = 0.0
    for user in users.get(name, ()):
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            moved += sum(array.nbytes for array in user.arrays)
        elif user.opcode == "bitcast":
            moved += _count_read_bytes(user.name, users, nbytes)
        elif not (
            user.opcode in ("tuple", *COLLECTIVES)
            or (user.opcode == "dynamic-update-slice" and user.operands[0] == name)
            or "AsyncCollective" in user.attributes
        ):
            return nbytes
    return min(moved, nbytes)
