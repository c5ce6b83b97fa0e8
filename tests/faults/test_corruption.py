"""Checkpoints that were damaged on the disk: the one before is used, or none, never wrong (T7b)."""

from __future__ import annotations

import dataclasses
import random
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.errors import InputError
from corl_jax.runs.checkpoints import Checkpoints

TRIES = 200

# Reads that were under way beside a failed one find the event loop closed: Python complains.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state_of(step: int) -> dict:
    rng = np.random.default_rng(step)
    return {
        "step": jnp.int32(step),
        "noise": jnp.asarray(rng.standard_normal((64, 33)), jnp.float32),
        "half": jnp.asarray(rng.standard_normal((40, 8)), jnp.bfloat16),
        "moments": {"mu": jnp.zeros((64, 33)), "nu": jnp.full((64, 33), 1e-8)},
    }


def meta_of(step: int) -> dict:
    return {"config": {"seed": 1}, "data": {"step": step, "left_out": {"bad": [3, 5]}}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with the finished steps 3 and 6."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (3, 6):
            checkpoints.save(step, state_of(step), meta_of(step))
    return folder


def right(restored) -> bool:
    """Whether the step is the one that it claims to be, bit by bit."""
    wanted = state_of(restored.step)
    same = jax.tree.map(
        lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), restored.tree, wanted
    )
    return all(jax.tree.leaves(same)) and restored.meta == meta_of(restored.step)


def resume(folder: Path):
    with Checkpoints(folder, keep=2) as checkpoints:
        return checkpoints.restore_newest(state_of(0), {"seed": 1})


def truncated(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(max(path.stat().st_size, 1))])


def deleted(path: Path, rng: random.Random) -> None:
    path.unlink()


def emptied(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def flipped(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def zeroed(path: Path, rng: random.Random) -> None:
    """A block that the disk gave back empty."""
    content = bytearray(path.read_bytes())
    start = rng.randrange(max(len(content), 1))
    content[start : start + 512] = bytes(len(content[start : start + 512]))
    path.write_bytes(content)


DAMAGES = (truncated, deleted, emptied, flipped, zeroed)


def test_no_damage_is_silent(saved, tmp_path, figure):
    """Every file by turns, and every damage; the newest step or, each fourth time, both."""
    files = sorted(p.relative_to(saved / "6") for p in (saved / "6").rglob("*") if p.is_file())
    counts = dict.fromkeys(("newest", "fallback", "refused", "wrong"), 0)
    for number in range(TRIES):
        rng = random.Random(number)
        work = tmp_path / str(number)
        shutil.copytree(saved, work)
        damage, file = DAMAGES[number % len(DAMAGES)], files[number // 5 % len(files)]
        if number % 3 == 0:  # where most of the bytes are
            file = max(files, key=lambda name: (saved / "6" / name).stat().st_size)
        for step in (6, 3) if number % 4 == 0 else (6,):
            path = work / str(step) / file
            if not path.exists():  # named by its content
                path = max(path.parent.iterdir(), key=lambda path: path.stat().st_size)
            damage(path, rng)
        try:
            restored = resume(work)
        except InputError as error:
            counts["refused"] += "no checkpoint is sound" in str(error)
            assert sorted(p.name for p in work.iterdir() if p.name.isdigit()) == ["3", "6"]
            continue
        if not right(restored):
            counts["wrong"] += 1
        elif restored.step == 6:  # what was damaged carries nothing
            counts["newest"] += 1
        else:
            counts["fallback"] += 1
            assert "/6: " in restored.warnings[0] and "step 3 is used" in restored.warnings[0]
            assert (work / "6.corrupt-0").is_dir()
    time.sleep(0.05)
    note = f"{counts['fallback']} fell back, {counts['refused']} refused, {counts['newest']} idle"
    figure(
        "T7b", fault="files of a checkpoint damaged", tries=TRIES,
        hits=counts["fallback"] + counts["refused"], losses=counts["wrong"], note=note,
    )  # fmt: skip
    assert counts["wrong"] == 0 and sum(counts.values()) == TRIES
    assert counts["fallback"] > TRIES / 4 and counts["refused"] > 0


@pytest.mark.parametrize("name", ["an empty directory", "a file", "a copy", "no meta", "no state"])
def test_what_only_looks_like_a_newer_step(saved, tmp_path, name, figure):
    work = tmp_path / "c"
    shutil.copytree(saved, work)
    newer = work / "999"
    if name == "a file":
        newer.write_text("")
    elif name == "an empty directory":
        newer.mkdir()
    else:
        shutil.copytree(work / "6", newer)
    if name in ("no meta", "no state"):
        shutil.rmtree(newer / name.split()[1])
    restored = resume(work)
    figure("T7b", fault="not a checkpoint, by a newer name", tries=1, losses=not right(restored))
    assert right(restored) and restored.step == 6
    assert (work / "999.corrupt-0").exists() == (name != "a file")
    if name == "a copy":
        assert "a checkpoint of step 6 under another name" in restored.warnings[0]


def test_what_was_put_aside_neither_counts_nor_stands_in_the_way(saved, tmp_path):
    work = tmp_path / "c"
    shutil.copytree(saved, work)
    (work / "6" / "meta" / "metadata").unlink()
    with Checkpoints(work, keep=2) as checkpoints:
        assert checkpoints.restore_newest(state_of(0), {"seed": 1}).step == 3
        for step in (6, 9):
            checkpoints.save(step, state_of(step), meta_of(step))
        assert checkpoints.steps() == [6, 9]
    (work / "9" / "meta" / "metadata").unlink()
    (work / "6.corrupt-0").rename(work / "9.corrupt-0")
    assert resume(work).step == 6
    assert sorted(p.name for p in work.iterdir()) == ["6", "9.corrupt-0", "9.corrupt-1"]


def test_a_mismatch_is_refused_and_nothing_is_put_aside(saved, tmp_path):
    """An older step would fit no better."""
    work = tmp_path / "c"
    shutil.copytree(saved, work)
    wanted = state_of(0) | {"more": jnp.zeros(2)}
    with Checkpoints(work) as checkpoints:
        with pytest.raises(InputError, match="more: missing"):
            checkpoints.restore_newest(wanted, {"seed": 1})
        with pytest.raises(InputError, match="seed: found 2, the run has 1"):
            checkpoints.restore_newest(state_of(0), {"seed": 2})
        allowed = checkpoints.restore_newest(state_of(0), {"seed": 2}, allow_changes=True)
    assert dataclasses.asdict(allowed)["changes"] == ["seed: found 2, the run has 1"]
    assert sorted(p.name for p in work.iterdir()) == ["3", "6"]
