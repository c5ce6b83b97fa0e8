"""Counts the work of one device in a compiled program: products, memory traffic, collectives.

Each instruction is counted as often as its loop runs.
"""

# XLA's own `cost_analysis` counts the body of a loop once, whatever the number of its rounds: a
# scan over 24 layers counts as one layer. So the instructions are added up here.

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
    nbytes: float = 0.0  # bytes that a device sends


@dataclasses.dataclass
class Cost:
    """The work of one run of a program on one device."""

    flops: float = 0.0  # of matrix products and convolutions
    hbm: float = 0.0  # bytes read and written
    collectives: dict[str, Traffic] = dataclasses.field(default_factory=dict)
    open_loops: int = 0  # loops whose end depends on computed values
    kernels: Counter = dataclasses.field(default_factory=Counter)  # by target; not counted

    @property
    def sent(self) -> float:
        """The bytes that a device sends in all collectives."""
        return sum(traffic.nbytes for traffic in self.collectives.values())


def count_cost(text: str, rounds: int = 1) -> Cost:
    """Counts the cost of a program's text; loops without a known end run `rounds` times."""
    counter = _Counter(hlo.parse_program(text), rounds)
    counter.walk(counter.module.entry, 1, fused=False)
    return counter.cost


class _Counter:
    def __init__(self, module: Module, rounds: int):
        self.module, self.rounds, self.cost = module, rounds, Cost()
        self.seen: set[str] = set()

    def walk(self, name: str, times: int, fused: bool) -> None:
        scope = self.module.computations[name]
        for op in scope.values():
            # all-gather-start -> all-gather; its -done moves nothing.
            kind = op.opcode.removesuffix("-start")
            if op.opcode == "while":
                self._walk_loop(scope, op, times)
            elif op.opcode == "dot":
                self.cost.flops += times * count_dot_flops(scope, op)
            elif op.opcode == "convolution":
                self.cost.flops += times * count_convolution_flops(scope, op)
            elif kind in COLLECTIVES:
                self._count_collective(scope, op, kind, times)
                continue
            elif op.opcode == "custom-call":
                self._count_kernel(scope, op, times)
            for inner in hlo.list_called(op):
                self.walk(inner, times, fused or op.opcode == "fusion")
            if not fused:
                self.cost.hbm += times * count_traffic(self.module, scope, op)

    def _walk_loop(self, scope: Computation, op: Instruction, times: int) -> None:
        count = hlo.count_trips(self.module, scope, op)
        if count is None:
            self.cost.open_loops += 1
            count = self.rounds
        self.walk(op.get_attribute("body") or "", times * count, fused=False)

    def _count_collective(self, scope: Computation, op: Instruction, kind: str, times: int) -> None:
        # An asynchronous collective appears in every fusion that it overlaps, under one channel.
        channel = re.search(r"channel_id=(\d+)", op.attributes)
        if channel is not None:
            if channel[1] in self.seen:
                return
            self.seen.add(channel[1])
        devices = parse_group_size(op.attributes, self.module.partitions)
        results = _list_results(op)
        size = sum(array.nbytes for array in results)
        traffic = self.cost.collectives.setdefault(kind, Traffic())
        traffic.count += times
        traffic.nbytes += times * size * count_sent_bytes(kind, devices)
        operands = [array for name in op.operands for array in scope[name].arrays]
        self.cost.hbm += times * sum(map(_count_hbm_bytes, [*operands, *results]))

    def _count_kernel(self, scope: Computation, op: Instruction, times: int) -> None:
        target = re.search(r'custom_call_target="([^"]*)"', op.attributes)
        name = target[1] if target else "unknown"
        if "gemm" in name or "matmul" in name:
            self.cost.flops += times * count_dot_flops(scope, op)
        elif name not in _HARMLESS:
            self.cost.kernels[name] += times


def _list_results(op: Instruction) -> list[Array]:
    """Returns the arrays that a collective produces."""
    # A `-start` lists its inputs before its results: (f32[4], f32[16]) of an all-gather -> f32[16].
    arrays = [array for array in op.arrays if array.dims]
    if op.opcode.endswith("-start") and len(arrays) > 1:
        return arrays[len(arrays) // 2 :]
    return op.arrays


def count_sent_bytes(kind: str, devices: int) -> float:
    """Returns how many bytes each of `devices` in a ring sends per byte of the result."""
    # 4 devices, result of 1 byte. all-gather: a device passes on 3 of the 4 quarters: 3/4.
    # all-reduce is a reduce-scatter and an all-gather: 2 * 3/4. The result of a reduce-scatter is
    # one quarter of the input, of which 3 are sent on.
    if kind == "reduce-scatter":
        return devices - 1.0
    if kind == "collective-permute":
        return 1.0
    return (2 if kind == "all-reduce" else 1) * (devices - 1) / devices


def parse_group_size(attributes: str, partitions: int) -> int:
    """Returns the number of devices in a group, from any notation of `replica_groups`."""
    if mesh := re.search(r"replica_groups=\w*mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        # A part of an axis names its own size: 'x':(4)2.
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    # [2,4]<=[8]: 2 groups of 4 devices
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(iota[2])
    # {{0,1,2,3},{4,5,6,7}}: 4 devices in the first group
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(match[1].split(","))
    return partitions


# ---- products


def _parse_numbers(text: str, attributes: str) -> list[int]:
    """Returns the numbers of an attribute such as `lhs_contracting_dims={1}`."""
    match = re.search(rf'{text}"?[=:][{{\[]([^}}\]]*)[}}\]]', attributes)
    return [int(number) for number in re.findall(r"\d+", match[1])] if match else []


def count_dot_flops(scope: Computation, op: Instruction) -> float:
    """Counts the operations of a `dot`, or of a library's product with the same attributes."""
    left = scope[op.operands[0]].arrays[0].dims
    summed = _parse_numbers("lhs_contracting_dim(?:ension)?s", op.attributes)
    # [M, K] x [K, N]: 2 M N K, a product and a sum each.
    return 2.0 * math.prod(op.arrays[0].dims) * math.prod(left[dim] for dim in summed)


def count_convolution_flops(scope: Computation, op: Instruction) -> float:
    """Counts the operations of a convolution without padding."""
    # b01f_01io->b01f: batch, two spatial axes, features; kernel with inputs and outputs.
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
    if labels is None:
        return 0.0
    # On TPUs matrix products are convolutions as well.
    image, kernel = (scope[name].arrays[0].dims for name in op.operands[:2])
    out = op.arrays[0].dims
    places = 1
    for axis, window in enumerate(_parse_windows(op.attributes, len(labels[1]) - 2)):
        digit = str(axis)
        places *= _count_valid_places(
            image[labels[1].index(digit)], out[labels[3].index(digit)], window
        )
    features = out[labels[3].index("f")] * kernel[labels[2].index("i")]
    return 2.0 * out[labels[3].index("b")] * features * places


Window = dict[str, tuple[int, ...]]


def _parse_windows(attributes: str, rank: int) -> list[Window]:
    """Returns size, stride, padding and dilations of each spatial axis of a convolution."""
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
    """Counts the pairs of output place and kernel place that read an element of the input."""
    (width,), (stride,), (dilate,), (spread,) = (
        window[name] for name in ("size", "stride", "lhs_dilate", "rhs_dilate")
    )
    # places [out, width]: where each element of the kernel lies on the padded input.
    places = np.arange(out)[:, None] * stride - window["pad"][0] + np.arange(width) * spread
    inside = (places >= 0) & (places <= (size - 1) * dilate) & (places % dilate == 0)
    return int(inside.sum())


# ---- memory traffic


def _count_hbm_bytes(array: Array) -> int:
    return 0 if array.on_chip else array.nbytes


def count_traffic(module: Module, scope: Computation, op: Instruction) -> float:
    """Counts the bytes that an instruction moves between HBM and the chip, without inner ones."""
    if op.opcode in _NO_TRAFFIC or op.opcode.endswith("-done"):
        return 0.0
    if any(f'"{name}"' in op.attributes for name in _BOOKKEEPING):
        return 0.0
    inputs = [scope[name].arrays for name in op.operands if name in scope]
    if op.opcode in ("copy-start", "slice-start"):
        # A copy lists (target, source, context), a slice (inputs, target, ..).
        source = inputs[0][0]
        target = op.arrays[1 if op.opcode == "slice-start" else 0]
        return (0 if source.on_chip else target.nbytes) + _count_hbm_bytes(target)
    if op.opcode in ("dynamic-slice", "slice", "gather"):
        # Only the slice is read, and it is written.
        moved = sum(array.nbytes for array in op.arrays)
        return moved * (2 - inputs[0][0].on_chip - op.arrays[0].on_chip)
    if op.opcode == "dynamic-update-slice":
        # Operand 1 is the update; the rest of the buffer stays where it is.
        return _count_hbm_bytes(inputs[1][0]) + (0 if op.arrays[0].on_chip else inputs[1][0].nbytes)
    if op.opcode == "fusion":
        return _count_fusion_traffic(module, scope, op)
    return float(
        sum(_count_hbm_bytes(array) for arrays in [*inputs, op.arrays] for array in arrays)
    )


def _count_fusion_traffic(module: Module, scope: Computation, op: Instruction) -> float:
    """Counts the bytes that a fusion moves: inputs that it reads, outputs that it writes."""
    inner = module.computations[op.get_attribute("calls") or ""]
    root = module.get_root(op.get_attribute("calls") or "")
    # output_to_operand_aliasing={{1}: (2, {})} -> output 1
    aliased_outputs = {int(index or 0) for index in re.findall(r"\{(\d*)\}: \(\d+", op.attributes)}
    parameters = {int(x.inside): x.name for x in inner.values() if x.opcode == "parameter"}
    users: dict[str, list[Instruction]] = {}
    for user in inner.values():
        for name in user.operands:
            users.setdefault(name, []).append(user)
    total = 0.0
    for place, name in enumerate(op.operands):
        for array in scope[name].arrays if name in scope else ():
            if not array.on_chip and place in parameters:
                total += _count_read_bytes(parameters[place], users, array.nbytes)
    outputs = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for place, (array, made) in enumerate(zip(op.arrays, outputs, strict=False)):
        # The instruction that computed the output, behind changes of its shape.
        while made.opcode in ("bitcast", "copy") and made.operands[0] in inner:
            made = inner[made.operands[0]]
        if made.opcode == "dynamic-update-slice":
            # In place: only the update is written.
            array = inner[made.operands[1]].arrays[0]
        elif place in aliased_outputs:
            continue  # the same buffer as an input: written in place, or returned unchanged
        total += 0 if op.arrays[place].on_chip else array.nbytes
    return total


def _count_read_bytes(name: str, users: dict[str, list[Instruction]], nbytes: int) -> float:
    """Counts the bytes that a fusion reads of an input: slices only, if nothing else reads it."""
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
