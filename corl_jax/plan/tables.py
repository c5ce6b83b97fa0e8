"""Memory and time of compiled programs on a chip, and the tables that show them."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax

from corl_jax.plan.chips import GIB, Chip
from corl_jax.plan.cost import Cost, count_cost
from corl_jax.plan.programs import Program, ResidentArrays, count_shard_bytes

PRODUCTS, MEMORY, LINKS = 0.6, 0.8, 0.7
"""Shares of a chip's peak figures that a program is taken to reach; a guess, not a measurement."""
REMEDIES = {
    "sample": "rollout.batch_prompts smaller",
    "codes": "train.prompts_per_step smaller, or more devices in data x fsdp",
    "log-probs": "train.micro_batch smaller",
    "update": "train.micro_batch or model.logprob_chunk smaller, model.remat full",
}


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """One program as the compiler left it; bytes of one device."""

    program: Program
    arguments: float
    temporaries: float
    output: float  # beside what takes the place of an argument
    code: float
    peak: float  # with all that the run keeps, also what this program does not read
    cost: Cost | None  # None: the compiler found that it does not fit

    def estimate_seconds(self, chip: Chip) -> tuple[float, float, float] | None:
        """Of a call: at products, at memory, at links; None for a chip without figures."""
        if self.cost is None or not (chip.peak and chip.bandwidth and chip.links):
            return None
        return (
            self.cost.flops / (PRODUCTS * chip.peak),
            self.cost.hbm / (MEMORY * chip.bandwidth),
            self.cost.sent / (LINKS * chip.links),
        )


def compile_program(program: Program, kept: ResidentArrays) -> CompiledProgram:
    """Compiles a program, within `jax.set_mesh`."""
    everything = count_shard_bytes(kept.by_name())
    try:
        done = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _parse_needed_bytes(str(error))
        if needed is None:
            raise
        rest = everything - count_shard_bytes(program.resident)
        return CompiledProgram(
            program, count_shard_bytes(program.inputs), needed, 0, 0, needed + rest, None
        )
    memory = done.memory_analysis()
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    code, temporaries = memory.generated_code_size_in_bytes, memory.temp_size_in_bytes
    peak = everything + count_shard_bytes(program.inputs) + temporaries + output + code
    arguments = memory.argument_size_in_bytes
    cost = count_cost(done.as_text(), program.rounds)
    return CompiledProgram(program, arguments, temporaries, output, code, peak, cost)


def _parse_needed_bytes(message: str) -> int | None:
    """Bytes that a TPU program would take, as the compiler says when it refuses it."""
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = re.search(r"(?:Used |\()([\d.]+)([KMGT]?)\)? (?:of|exceeds)", message)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        return None
    return round(float(found[1]) * units[found[2]])


def fits(listed: list[CompiledProgram], chip: Chip, reserve: float) -> bool | None:
    """Whether every program does; None without a known capacity."""
    if chip.hbm is None:
        return None
    return all(each.cost is not None and each.peak + reserve <= chip.hbm for each in listed)


def format_table(header: list[str], rows: list[list[Any]]) -> str:
    """Columns: the first to the left, numbers to the right."""
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


def format_resident_table(kept: ResidentArrays, reserve: float) -> str:
    """What is on each device all the time."""
    parts = {name: count_shard_bytes(part) / GIB for name, part in kept.by_name().items()}
    if reserve:
        parts["reserved (--reserve)"] = reserve / GIB
    parts["sum"] = sum(parts.values())
    rows = [[name, f"{size:.2f}"] for name, size in parts.items() if size]
    return "kept on each device for the whole run:\n" + format_table(["part", "GiB"], rows)


def explain_overflow(kept: ResidentArrays, chip: Chip, reserve: float) -> str | None:
    """Why no program can fit, whatever it adds."""
    size = count_shard_bytes(kept.by_name()) + reserve
    if chip.hbm is None or size <= chip.hbm:
        return None
    return (
        f"does not fit: what is kept takes {size / GIB:.2f} of {chip.hbm / GIB:.2f} GiB before any "
        "program runs; more of the devices in mesh.fsdp, or more devices"
    )


def format_memory_table(listed: list[CompiledProgram], chip: Chip, reserve: float) -> str:
    """What each program adds to what is kept."""
    capacity = chip.hbm and chip.hbm / GIB
    lines = [
        f"memory of each device in GiB, {f'of {capacity:.2f}' if capacity else 'capacity unknown'}:"
    ]
    header = ["program", "arguments", "temporaries", "output", "code", "with all kept", "fits"]
    rows = []
    for each in listed:
        sizes = (each.arguments, each.temporaries, each.output, each.code, each.peak + reserve)
        verdict = {True: "yes", False: "NO", None: "?"}[fits([each], chip, reserve)]
        rows.append([each.program.name, *[f"{size / GIB:.2f}" for size in sizes], verdict])
    lines.append(format_table(header, rows))
    if any(each.cost is None for each in listed):
        lines.append("  Refused by the compiler: temporaries are then all that it asked for.")
    lines += [
        f"  {each.program.name} does not fit: {REMEDIES[each.program.name.split()[0]]}; or more of "
        "the devices in mesh.fsdp"
        for each in listed
        if fits([each], chip, reserve) is False
    ]
    return "\n".join(lines)


def format_cost_table(listed: list[CompiledProgram], chip: Chip) -> str:
    """What each call of a program does on a device, and the time that this takes."""
    header = ["program", "calls", "TFLOP", "HBM GB", "sent GB"]
    header += ["products s", "memory s", "links s", "call s"]
    rows = []
    for each in listed:
        if each.cost is None:
            continue
        times = each.estimate_seconds(chip)
        span = None if times is None else f"{max(times):.2f} to {sum(times):.2f}"
        rows.append([
            each.program.name, each.program.calls, each.cost.flops / 1e12, each.cost.hbm / 1e9,
            each.cost.sent / 1e9, *(times or (None,) * 3), span,
        ])  # fmt: skip
    lines = ["a call on each device, loops multiplied out:", format_table(header, rows)]
    kinds = [
        [each.program.name, kind, found.count, found.nbytes / 1e9]
        for each in listed
        if each.cost is not None
        for kind, found in sorted(each.cost.collectives.items())
    ]
    if kinds:
        header = ["program", "collective", "count", "sent GB"]
        lines += ["collectives of a call, sent by each device:", format_table(header, kinds)]
    for each in listed:
        if each.cost is not None and each.cost.kernels:
            names = ", ".join(f"{name} x {n}" for name, n in sorted(each.cost.kernels.items()))
            lines.append(f"  {each.program.name}: work inside of kernels is not counted: {names}")
        if each.cost is not None and each.cost.open_loops:
            lines.append(
                f"  {each.program.name}: a loop ends when all answers have; at most "
                f"{each.program.rounds} rounds, which are counted"
            )
    return "\n".join(lines)


def format_iteration(listed: list[CompiledProgram], chip: Chip) -> str:
    """The estimated time of a whole iteration, with what was assumed."""
    times = [each.estimate_seconds(chip) for each in listed]
    times = [each for each in times if each is not None]
    if len(times) < len(listed) or not (chip.peak and chip.bandwidth and chip.links):
        return f"time: no estimate, {'a program does not fit' if chip.peak else 'no figures'}"
    calls = [each.program.calls for each in listed]
    least = sum(max(each) * n for each, n in zip(times, calls, strict=True))
    most = sum(sum(each) * n for each, n in zip(times, calls, strict=True))
    names = ", ".join(each.program.name for each in listed)
    return "\n".join([
        f"iteration ({names}; no rewards): {least:.1f} s if products, memory and links overlap, "
        f"{most:.1f} s if they do not",
        f"  Assumed: {PRODUCTS:.0%} of {chip.peak / 1e12:,.0f} TFLOP/s (bfloat16), {MEMORY:.0%} of "
        f"{chip.bandwidth / 1e9:,.0f} GB/s of memory, {LINKS:.0%} of {chip.links / 1e9:,.0f} GB/s "
        f"out of the chip over all its links ({chip.source}).",
        "  Every answer is as long as it may be. Not in it: rewards, the host, latency of steps "
        "and of collectives.",
    ])  # fmt: skip
