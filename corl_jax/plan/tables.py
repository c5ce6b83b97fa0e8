"""Computes memory and time of compiled programs on a chip, and formats the tables."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax

from corl_jax.plan.chips import GIB, Chip
from corl_jax.plan.cost import Cost, count_cost
from corl_jax.plan.programs import Program, ResidentArrays, count_shard_bytes

PRODUCTS, MEMORY, LINKS = 0.6, 0.8, 0.7
"""Fractions of a chip's peak figures that a program is assumed to reach; guessed, not measured."""
REMEDIES = {
    "sample": "rollout.batch_prompts smaller",
    "codes": "train.prompts_per_step smaller, or more devices in data x fsdp",
    "log-probs": "train.micro_batch smaller",
    "update": "train.micro_batch or model.logprob_chunk smaller, model.remat full",
}


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """Memory and cost of a compiled program; bytes of one device."""

    program: Program
    arguments: float
    temporaries: float
    output: float  # without outputs that replace an argument
    code: float
    peak: float  # with all resident arrays, also those that this program does not read
    cost: Cost | None  # None: the compiler found that it does not fit

    def estimate_seconds(self, chip: Chip) -> tuple[float, float, float] | None:
        """Returns the seconds of a call for products, memory and links; None without figures."""
        if self.cost is None or not (chip.peak and chip.bandwidth and chip.links):
            return None
        return (
            self.cost.flops / (PRODUCTS * chip.peak),
            self.cost.hbm / (MEMORY * chip.bandwidth),
            self.cost.sent / (LINKS * chip.links),
        )


def compile_program(program: Program, arrays: ResidentArrays) -> CompiledProgram:
    """Compiles a program; call it within `jax.set_mesh`."""
    resident = count_shard_bytes(arrays.by_name())
    try:
        done = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _parse_needed_bytes(str(error))
        if needed is None:
            raise
        # The compiler has counted the arguments; the other resident arrays come on top.
        rest = resident - count_shard_bytes(program.resident)
        return CompiledProgram(
            program, count_shard_bytes(program.inputs), needed, 0, 0, needed + rest, None
        )
    memory = done.memory_analysis()
    # Donated arguments are outputs as well; they take no further memory.
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    code, temporaries = memory.generated_code_size_in_bytes, memory.temp_size_in_bytes
    # All resident arrays, because those that this program does not read stay in memory too.
    peak = resident + count_shard_bytes(program.inputs) + temporaries + output + code
    arguments = memory.argument_size_in_bytes
    cost = count_cost(done.as_text(), program.rounds)
    return CompiledProgram(program, arguments, temporaries, output, code, peak, cost)


def _parse_needed_bytes(message: str) -> int | None:
    """Returns the bytes that a TPU program needs, from the compiler's message that refuses it."""
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    # "Used 20.1G of 15.7G hbm" or "(20.1G) exceeds"
    match = re.search(r"(?:Used |\()([\d.]+)([KMGT]?)\)? (?:of|exceeds)", message)
    if "RESOURCE_EXHAUSTED" not in message or not match:
        return None
    return round(float(match[1]) * units[match[2]])


def fits(programs: list[CompiledProgram], chip: Chip, reserve: float) -> bool | None:
    """Returns whether every program fits; None without a known capacity."""
    if chip.hbm is None:
        return None
    return all(result.cost is not None and result.peak + reserve <= chip.hbm for result in programs)


def format_table(header: list[str], rows: list[list[Any]]) -> str:
    """Returns a table: the first column left-aligned, the others right-aligned."""
    cells = [header, *[[_format_cell(value) for value in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join(
        "  " + "  ".join(
            cell.ljust(width) if not i else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )  # fmt: skip


def _format_cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 10 else f"{value:,.0f}"
    return str(value)


def format_resident_table(arrays: ResidentArrays, reserve: float) -> str:
    """Returns the table of arrays that stay on each device."""
    parts = {name: count_shard_bytes(part) / GIB for name, part in arrays.by_name().items()}
    if reserve:
        parts["reserved (--reserve)"] = reserve / GIB
    parts["sum"] = sum(parts.values())
    rows = [[name, f"{size:.2f}"] for name, size in parts.items() if size]
    return "kept on each device for the whole run:\n" + format_table(["part", "GiB"], rows)


def explain_overflow(arrays: ResidentArrays, chip: Chip, reserve: float) -> str | None:
    """Returns why no program can fit; None if one might."""
    size = count_shard_bytes(arrays.by_name()) + reserve
    if chip.hbm is None or size <= chip.hbm:
        return None
    return (
        f"does not fit: what is kept takes {size / GIB:.2f} of {chip.hbm / GIB:.2f} GiB before any "
        "program runs; more of the devices in mesh.fsdp, or more devices"
    )


def format_memory_table(programs: list[CompiledProgram], chip: Chip, reserve: float) -> str:
    """Returns the table of each program's memory."""
    capacity = chip.hbm and chip.hbm / GIB
    lines = [
        f"memory of each device in GiB, {f'of {capacity:.2f}' if capacity else 'capacity unknown'}:"
    ]
    header = ["program", "arguments", "temporaries", "output", "code", "with all kept", "fits"]
    rows = []
    for result in programs:
        sizes = (
            result.arguments, result.temporaries, result.output, result.code,
            result.peak + reserve,
        )  # fmt: skip
        verdict = {True: "yes", False: "NO", None: "?"}[fits([result], chip, reserve)]
        rows.append([result.program.name, *[f"{size / GIB:.2f}" for size in sizes], verdict])
    lines.append(format_table(header, rows))
    if any(result.cost is None for result in programs):
        lines.append("  Refused by the compiler: temporaries are then all that it asked for.")
    lines += [
        f"  {result.program.name} does not fit: {REMEDIES[result.program.name.split()[0]]}; or "
        "more of the devices in mesh.fsdp"
        for result in programs
        if fits([result], chip, reserve) is False
    ]
    return "\n".join(lines)


def format_cost_table(programs: list[CompiledProgram], chip: Chip) -> str:
    """Returns the table of each program's work and estimated time."""
    header = ["program", "calls", "TFLOP", "HBM GB", "sent GB"]
    header += ["products s", "memory s", "links s", "call s"]
    rows = []
    for result in programs:
        if result.cost is None:
            continue
        times = result.estimate_seconds(chip)
        span = None if times is None else f"{max(times):.2f} to {sum(times):.2f}"
        rows.append([
            result.program.name, result.program.calls, result.cost.flops / 1e12,
            result.cost.hbm / 1e9, result.cost.sent / 1e9, *(times or (None,) * 3), span,
        ])  # fmt: skip
    lines = ["a call on each device, loops multiplied out:", format_table(header, rows)]
    kinds = [
        [result.program.name, kind, traffic.count, traffic.nbytes / 1e9]
        for result in programs
        if result.cost is not None
        for kind, traffic in sorted(result.cost.collectives.items())
    ]
    if kinds:
        header = ["program", "collective", "count", "sent GB"]
        lines += ["collectives of a call, sent by each device:", format_table(header, kinds)]
    for result in programs:
        if result.cost is not None and result.cost.kernels:
            names = ", ".join(f"{name} x {n}" for name, n in sorted(result.cost.kernels.items()))
            lines.append(f"  {result.program.name}: work inside of kernels is not counted: {names}")
        if result.cost is not None and result.cost.open_loops:
            lines.append(
                f"  {result.program.name}: a loop ends when all answers have; at most "
                f"{result.program.rounds} rounds, which are counted"
            )
    return "\n".join(lines)


def format_iteration(programs: list[CompiledProgram], chip: Chip) -> str:
    """Returns the estimated time of an iteration, with the assumptions."""
    times = [result.estimate_seconds(chip) for result in programs]
    times = [seconds for seconds in times if seconds is not None]
    if len(times) < len(programs) or not (chip.peak and chip.bandwidth and chip.links):
        reason = (
            "a program does not fit" if chip.peak else f"no peak figures of {chip.name} are known"
        )
        return f"time: no estimate, {reason}"
    calls = [result.program.calls for result in programs]
    # Overlapped, the slowest of products, memory and links decides; otherwise they add up.
    least = sum(max(seconds) * n for seconds, n in zip(times, calls, strict=True))
    most = sum(sum(seconds) * n for seconds, n in zip(times, calls, strict=True))
    names = ", ".join(result.program.name for result in programs)
    return "\n".join([
        f"iteration ({names}; no rewards): {least:.1f} s if products, memory and links overlap, "
        f"{most:.1f} s if they do not",
        f"  Assumed: {PRODUCTS:.0%} of {chip.peak / 1e12:,.0f} TFLOP/s (bfloat16), {MEMORY:.0%} of "
        f"{chip.bandwidth / 1e9:,.0f} GB/s of memory, {LINKS:.0%} of {chip.links / 1e9:,.0f} GB/s "
        f"out of the chip over all its links ({chip.source}).",
        "  Every answer is as long as it may be. Not in it: rewards, the host, latency of steps "
        "and of collectives.",
    ])  # fmt: skip
