"""Draws the images of a checked plan: over processes and devices, resumed, with a manifest."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import corl_jax
from corl_jax.devices import processes
from corl_jax.devices.batches import num_batch_shards
from corl_jax.devices.mesh import find_layout_problems, make_mesh
from corl_jax.devices.startup import prepare_devices
from corl_jax.errors import InputError, Preempted, Problems
from corl_jax.evaluate.draw_options import IMAGES_AT_ONCE, DrawPlan, make_distributed
from corl_jax.evaluate.running import (
    explain_batch,
    open_folder,
    require_one_process,
    watch_signals,
)
from corl_jax.evaluation.drawing import draw_prompts, round_batch
from corl_jax.evaluation.image_store import (
    ImageStore,
    Record,
    find_finished,
    read_records,
    remove_temporary,
    save_drawings,
    write_whole,
)
from corl_jax.evaluation.manifest import (
    FORMAT,
    MANIFEST,
    NEXT,
    REPORT,
    find_conflicts,
    read_manifest,
)
from corl_jax.evaluation.writers.writer import ImageFile, Outcome
from corl_jax.inference import choose_dtype, choose_steps
from corl_jax.policies import load_policy
from corl_jax.policies.family import SamplingOptions
from corl_jax.rewards.samples import Policy
from corl_jax.train.provenance import find_commit

PACKAGES = ("jax", "jaxlib", "numpy", "transformers")


@dataclasses.dataclass(frozen=True)
class Drawing:
    """An evaluation whose images are drawn."""

    plan: DrawPlan
    mesh: Any  # of this process's devices
    settings: dict[str, Any]
    summary: dict[str, Any]  # counts and seconds


@contextlib.contextmanager
def open_drawing(plan: DrawPlan, *, needs_one_process: bool = False) -> Iterator[Drawing]:
    """Draws all missing images of a plan, and yields while the folder is still locked.

    Raises:
        InputError: devices, mesh or folder do not fit the plan, or there are several processes and
            the plan's suite needs a single one.
        Preempted: a signal came; finished images are kept.
    """
    prepare_devices(make_distributed(plan.args))
    if needs_one_process:
        require_one_process(plan.args.suite)
    with processes.fail_together(), contextlib.ExitStack() as stack:
        mesh, batch_size = plan_devices(plan)
        dtype = choose_dtype(plan.args.dtype)
        settings = plan.settings | {
            "dtype": dtype.name,
            "corl_jax_version": corl_jax.__version__,
            "commit": find_commit(Path(corl_jax.__file__).parent),
        }
        manifest = read_manifest(plan.args.out)
        conflicts = find_conflicts(plan.args.out, manifest, settings, ["dtype"])
        if conflicts:
            raise InputError(conflicts)
        if jax.process_index() == 0:
            stack.enter_context(open_folder(plan.args.out))
        content = describe_manifest(plan, settings, mesh, batch_size)
        missing = prepare_folder(plan, content)
        started = time.monotonic()
        if missing:
            draw_missing(plan, missing, dtype, mesh, batch_size)
        processes.barrier("images drawn")
        seconds = time.monotonic() - started
        summary = finish_folder(plan, content, len(missing), seconds)
        processes.barrier("folder finished")
        yield Drawing(plan, mesh, settings, summary)
        processes.barrier("evaluation finished")


def plan_devices(plan: DrawPlan) -> tuple[Any, int]:
    """Returns the mesh of this process's devices, and the images of a call.

    Raises: InputError if the mesh does not fit the devices or the model.
    """
    # Each process draws its own images with its own copy of the model, so no process waits.
    mesh = make_mesh(**plan.mesh, devices=jax.local_devices())
    family, sizes = plan.model.family, plan.model.sizes
    heads = family.limits(sizes).sharded_heads
    problems = Problems()
    problems.add(find_layout_problems(family.abstract(sizes), heads, mesh, family.rules))
    problems.raise_any()
    batch_size = plan.args.batch_size or IMAGES_AT_ONCE * num_batch_shards(mesh)
    # Of all images, not of those that are left: the shape of a call should stay.
    return mesh, round_batch(min(batch_size, plan.rows * plan.samples), mesh)


def describe_manifest(
    plan: DrawPlan, settings: dict[str, Any], mesh: Any, batch_size: int
) -> dict[str, Any]:
    """Returns the manifest without the records of images."""
    family = plan.model.family
    return {
        "format": FORMAT,
        "complete": False,
        "harness": plan.writer.title,
        "settings": settings,
        "rows": plan.rows,
        "prompts": {
            "files": [str(file.absolute()) for file in plan.prompts.files],
            "count": len(plan.prompts.prompts),
            "longest_tokens": plan.longest,
        },
        "model": {"folder": str(plan.model.folder.absolute()), "family": family.name},
        "image_side": family.limits(plan.model.sizes).image_side,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "devices": {
            "kind": jax.local_devices()[0].device_kind,
            "processes": jax.process_count(),
            "mesh": {name: int(size) for name, size in mesh.shape.items()},
            "batch_size": batch_size,
        },
    }


def prepare_folder(plan: DrawPlan, content: dict[str, Any]) -> list[ImageFile]:
    """Keeps what is drawn already, writes side files; returns the files that are missing.

    Process 0 decides, because another process may see the folder later.
    """
    out = plan.args.out
    is_finished = np.zeros(len(plan.files), np.uint8)
    if jax.process_index() == 0:
        manifest = read_manifest(out)
        records = find_finished(out, plan.files, read_records(out, manifest))
        # Their records are in the manifest from here on.
        save_manifest(out, content | _take_seconds(manifest), records)
        remove_temporary(out)
        if len(records) < len(plan.files):
            (out / NEXT).unlink(missing_ok=True)  # that says that all is there
        for path, text in plan.writer.list_side_files(describe_outcome(plan)).items():
            write_whole(out, path, text.encode())
        is_finished[:] = [file.path in records for file in plan.files]
    first = processes.all_gather(is_finished)[0]
    return [file for file, done in zip(plan.files, first, strict=True) if not done]


def _take_seconds(manifest: dict[str, Any]) -> dict[str, Any]:
    return {"seconds": manifest.get("seconds", 0.0)}


def draw_missing(
    plan: DrawPlan, missing: Sequence[ImageFile], dtype: Any, mesh: Any, batch_size: int
) -> None:
    """Draws this process's part of the missing files."""
    args = plan.args
    index, count = jax.process_index(), jax.process_count()
    # 5 files, 2 processes: [0, 1, 2], [3, 4].
    part = [missing[i] for i in np.array_split(np.arange(len(missing)), count)[index]]
    pairs = [(file.prompt, sample) for file in part for sample in file.samples]
    policy = load_drawing_policy(plan, dtype, mesh)
    sampling = SamplingOptions(
        special=policy.processor.special, cfg_scale=args.cfg_scale, temperature=args.temperature,
        dtype=dtype, **choose_steps(args.image_steps),
    )  # fmt: skip
    texts = [prompt.text for prompt in plan.prompts.prompts]
    images = draw_prompts(
        policy, texts, pairs, sampling, seed=args.seed, batch_size=batch_size, mesh=mesh
    )
    bar = tqdm(total=len(pairs), unit=" images", disable=None if index == 0 else True)
    memory = explain_batch(batch_size, "images", "split the model by --mesh fsdp=N")
    with bar, watch_signals() as signals, memory:

        def advance() -> bool:
            bar.update()
            return not signals

        save_drawings(ImageStore(args.out, index), plan.writer, part, images, advance)
    # A scheduler signals all processes; after a signal to one the others finish their parts.
    if processes.all_gather(np.array([len(signals)], np.int32)).any():
        raise Preempted(
            f"stopped by {signals[0] if signals else 'a signal to another process'}; the same "
            f"command draws the images that are missing in {args.out}"
        )


def load_drawing_policy(plan: DrawPlan, dtype: Any, mesh: Any) -> Policy:
    """Loads the model of a plan onto the mesh, with the processor of the chosen roles."""
    model = load_policy(plan.args.model, dtype, mesh)
    return Policy(model.family, model.sizes, model.params, plan.model.processor, dtype)


def finish_folder(
    plan: DrawPlan, content: dict[str, Any], num_drawn: int, seconds: float
) -> dict[str, Any]:
    """Writes manifest, NEXT.txt and report.json; returns counts and seconds.

    Raises: InputError if files of other processes are not in the folder.
    """
    out = plan.args.out
    images = sum(len(file.samples) for file in plan.files)
    drawn = num_drawn * len(plan.files[0].samples)
    summary: dict[str, Any] = {
        "prompts": plan.rows, "images": images, "files": len(plan.files),
        "drawn_now": drawn, "kept": images - drawn,
    }  # fmt: skip
    if jax.process_index() != 0:
        return summary
    manifest = read_manifest(out)
    records = read_records(out, manifest)
    absent = [file.path for file in plan.files if file.path not in records]
    if absent:
        raise InputError(
            f"--out {out}: {len(absent)} images of other processes are not here, such as "
            f"{absent[0]}; name a folder on a file system that all processes share"
        )
    summary["seconds"] = round(_take_seconds(manifest)["seconds"] + seconds * bool(drawn), 3)
    summary["images_per_second_now"] = round(drawn / seconds, 3) if drawn else None
    own_records = {file.path: records[file.path] for file in plan.files}
    content = content | {"counts": summary, "seconds": summary["seconds"], "complete": True}
    write_whole(out, NEXT, plan.writer.describe_next(describe_outcome(plan)).encode())
    write_report(out, content["settings"], summary)
    save_manifest(out, content, own_records)
    remove_temporary(out)
    return summary


def describe_outcome(plan: DrawPlan) -> Outcome:
    """Returns the evaluation as the harness's writer takes it."""
    side = plan.model.family.limits(plan.model.sizes).image_side
    return Outcome(plan.args.out.absolute(), plan.drawn, plan.samples, side)


def save_manifest(out: Path, content: dict[str, Any], records: dict[str, Record]) -> None:
    """Writes the manifest whole."""
    text = json.dumps(content | {"images": records}, indent=1, ensure_ascii=False)
    write_whole(out, MANIFEST, f"{text}\n".encode(errors="backslashreplace"))


def write_report(out: Path, settings: dict[str, Any], summary: dict[str, Any], **more: Any) -> None:
    """Writes report.json whole."""
    content = {"settings": settings, "counts": summary, **more}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    write_whole(out, REPORT, f"{text}\n".encode(errors="backslashreplace"))


# ---- what the user sees


def tell_plan(plan: DrawPlan) -> None:
    """Prints the settings to stderr before the work begins."""
    settings = plan.settings
    lines = [f"warning: {note}" for note in plan.prompts.notes]
    if plan.rows < len(plan.prompts.prompts):
        lines.append(
            f"warning: --rows {plan.rows} of {len(plan.prompts.prompts)} prompts: the numbers of "
            f"{plan.writer.title} need all"
        )
    lines.append(
        f"sampling: cfg_scale {settings['cfg_scale']:g}, {describe_steps(settings)}"
        f"temperature {settings['temperature']:g}, seed {settings['seed']}, no system prompt; "
        "generation_config.json is not read"
    )
    template = describe_template(settings)
    lines.append(f"prompt: {template}; the longest has {plan.longest} tokens")
    sys.stderr.writelines(f"{line}\n" for line in lines)


def describe_steps(settings: dict[str, Any]) -> str:
    """Returns the chosen number of steps of an image, to stand in a list; else nothing."""
    return f"image_steps {steps}, " if (steps := settings["image_steps"]) else ""


def describe_template(settings: dict[str, Any]) -> str:
    """Returns the chat roles and the prompt made with them."""
    if settings["roles"] is None:
        return "as the model's family makes it"
    return f"roles {settings['roles']}, {settings['template']!r}"


def tell_drawing(drawing: Drawing) -> None:
    """Prints what was drawn, and with what."""
    plan, settings, summary = drawing.plan, drawing.settings, drawing.summary
    rate = summary.get("images_per_second_now")
    speed = f"{rate:.1f} images/s, loading included" if rate else "nothing was missing"
    rows = {
        "suite": f"{settings['suite']}: {plan.rows:,} prompts x {plan.samples} images",
        "model": f"{settings['model']} (weights {settings['model_sha256'][:16]})",
        "settings": f"cfg_scale {settings['cfg_scale']:g}, {describe_steps(settings)}temperature "
        f"{settings['temperature']:g}, seed {settings['seed']}, {settings['dtype']}",
        "prompt": describe_template(settings),
        "version": f"corl_jax {settings['corl_jax_version']}, "
        f"commit {settings['commit'] or 'unknown'}",
        "images": f"{summary['drawn_now']:,} drawn, {summary['kept']:,} kept; {speed}",
        "next": f"{plan.args.out / NEXT}",
    }
    width = max(map(len, rows))
    for label, text in rows.items():
        print(f"{label:{width}}  {text}")
