"""The run directory: locked, faithful to its config, never half written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import psutil
import pytest
import yaml

from corl_jax.atomic_files import replace_file
from corl_jax.config import files as config_files
from corl_jax.errors import InputError
from corl_jax.runs import directory as run_directory

ROOT = Path(__file__).resolve().parents[2]


def make_config(root, **changes):
    tree = {
        "output_dir": str(root),
        "model": {"path": "weights"},
        "data": {"path": "rows.parquet"},
        "rewards": [{"name": "format", "weight": 1.0}],
    }
    return config_files.validate(tree | changes, "test")


def open_once(config):
    with run_directory.open_run_directory(config) as run:
        return run


def refused(config):
    with pytest.raises(InputError) as error, run_directory.open_run_directory(config):
        pass
    return error.value.problems


def test_a_new_run_holds_its_resolved_config(tmp_path):
    config = make_config(tmp_path / "a" / "b")
    run = open_once(config)
    assert config_files.load(run.config) == config
    assert sorted(path.name for path in run.root.iterdir()) == [".lock", "config.yaml"]


def test_the_same_config_and_harmless_changes_resume(tmp_path):
    rewards = [{"use": "judge.py:score", "timeout_s": 1.0}]
    open_once(make_config(tmp_path, eval={"suite": "shapes"}, rewards=rewards))
    rewards = [{"use": "judge.py:score", "timeout_s": 2.0, "max_failures": 9}]
    changed = make_config(
        tmp_path,
        rewards=rewards,
        data={"path": "rows.parquet", "cache_rows": 4, "max_bad_fraction": 0.5},
        train={"stop_after": 3},
        log={"every": 5},
        checkpoint={"keep": 2, "directory": str(tmp_path / "elsewhere")},
        eval={"suite": "shapes", "every": 7},
        mesh={"fsdp": 2},
    )
    run = open_once(changed)
    assert config_files.load(run.config) != changed  # whether it resumes is not known yet
    run.keep_config(changed)
    assert config_files.load(run.config) == changed


def test_every_other_difference_is_listed_and_nothing_is_written(tmp_path):
    run = open_once(make_config(tmp_path))
    before = run.config.read_bytes()
    rewards = [{"name": "format", "weight": 2.0}, {"name": "qa_accuracy"}]
    found = refused(
        make_config(tmp_path, seed=1, rewards=rewards, log={"every": 9}, eval={"rows": 8})
    )
    text = "\n".join(found)
    for part in (
        "seed: found 1, the run has 0",
        "rewards.0.weight: found 2.0, the run has 1.0",
        "rewards.1.name: found 'qa_accuracy', the run has no such option",
        "eval.rows: found 8, the run has 64",
    ):
        assert part in text
    assert "log.every" not in text
    assert len(found) == 6  # the new reward has five options, two of which may differ
    assert run.config.read_bytes() == before


def test_differences_of_plain_dicts():
    old = {"a": {"b": 1, "gone": 2}, "train": {"stop_after": 1}, "list": [1, 2]}
    new = {"a": {"b": 1.0}, "train": {"stop_after": None}, "list": [1]}
    assert run_directory.list_differences(old, new) == [
        "a.gone: not given, the run has 2",
        "list.1: not given, the run has 2",
    ]
    assert run_directory.list_differences(new, new) == []


def test_the_same_files_under_other_spellings_are_no_change(tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    (first / "rows.parquet").write_bytes(b"rows")
    (first / "judge.py").write_text("")
    (second / "link.parquet").symlink_to(first / "rows.parquet")
    start = str(first)
    monkeypatch.chdir(second)

    def changed(key, was, now):
        old, new = ({}, {})
        for tree, value in ((old, was), (new, now)):
            section, name = key.split(".")
            tree[section] = {name: value}
        return run_directory.list_differences(old, new, start)

    for spelt in ("../first/rows.parquet", "link.parquet", f"{first}/./rows.parquet"):
        assert not changed("data.path", "rows.parquet", spelt)
    assert not changed("data.path", ["rows.parquet"], ["../first/rows.parquet"])
    assert not changed("data.path", "*.parquet", "../first/*.parquet")
    assert not changed("data.path", "hf://datasets/a/b", "hf://datasets/a/b")
    assert changed("data.path", "hf://datasets/a/b", "hf://datasets/a/c")
    assert changed("data.path", "rows.parquet", "../first/judge.py")
    assert changed("model.dtype", "../first", "../first/.")  # no path
    rewards = [{"rewards": [{"use": use}]} for use in ("judge.py:f", "../first/judge.py:f")]
    assert not run_directory.list_differences(*rewards, start)
    assert run_directory.list_differences(
        rewards[0], {"rewards": [{"use": "../first/judge.py:g"}]}, start
    )

    # One spelling, two files: only while the old one is there and of another size.
    (second / "rows.parquet").write_bytes(b"rows")
    assert not changed("data.path", "rows.parquet", "rows.parquet")  # copied along
    (second / "rows.parquet").write_bytes(b"others")
    (line,) = changed("data.path", "rows.parquet", "rows.parquet")
    assert f"the run has 'rows.parquet', from {first}" in line
    (first / "rows.parquet").unlink()
    assert not changed("data.path", "rows.parquet", "rows.parquet")  # moved


def test_an_export_whose_replacement_was_killed_comes_back(tmp_path):
    config = make_config(tmp_path)
    open_once(config)
    (tmp_path / ".export.a1.old").mkdir()
    (tmp_path / ".export.a1.old" / "config.json").write_text("{}")
    (tmp_path / ".export.a1.partial").mkdir()
    open_once(config)
    assert (tmp_path / "export" / "config.json").is_file()
    (tmp_path / ".export.b2.old").mkdir()  # killed when the new one was in its place
    open_once(config)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "config.yaml", "export"]


def test_an_option_that_is_newer_than_the_run_counts_as_its_default(tmp_path):
    run = open_once(make_config(tmp_path))
    tree = yaml.safe_load(run.config.read_text())
    del tree["algorithm"]["mm2t_weight"], tree["sft"]
    run.config.write_text(yaml.safe_dump(tree))
    open_once(make_config(tmp_path))
    run.config.write_text(yaml.safe_dump(tree))
    (line,) = refused(make_config(tmp_path, algorithm={"mm2t_weight": 0.3}))
    assert "algorithm.mm2t_weight: found 0.3, the run has 0.8" in line


def test_directories_that_are_no_runs(tmp_path):
    (tmp_path / "file").write_text("")
    assert "output_dir" in refused(make_config(tmp_path / "file"))[0]
    assert "output_dir" in refused(make_config(tmp_path / "file" / "below"))[0]
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    open_once(make_config(other))  # strangers' files are left alone
    (other / "config.yaml").unlink()
    (other / "metrics.jsonl").write_text("")
    assert "metrics.jsonl but no config.yaml" in refused(make_config(other))[0]


@pytest.mark.parametrize("text", ["a: [1", "- a", "\x00", ""])
def test_a_config_file_that_is_broken(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    (line,) = refused(make_config(tmp_path))
    assert "config.yaml" in line and "choose another output_dir" in line
    assert (tmp_path / "config.yaml").read_text() == text


def test_only_the_first_process_touches_the_directory(tmp_path):
    with run_directory.open_run_directory(make_config(tmp_path / "run"), primary=False) as run:
        assert run.checkpoints == tmp_path / "run" / "checkpoints"
    assert not (tmp_path / "run").exists()


def test_a_second_writer_is_refused_and_told_who_writes(tmp_path):
    config = make_config(tmp_path)
    with run_directory.open_run_directory(config):
        (line,) = refused(config)
        assert f"process {os.getpid()} on " in line
    open_once(config)


HOLD = """
import os, sys, time
from pathlib import Path
from corl_jax.runs.directory import lock_directory
with lock_directory(Path(sys.argv[1])):
    child = os.fork() if sys.argv[2] == "fork" else 1
    if not child:
        time.sleep(60)
    print(child, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("mode", ["alone", "fork"])
def test_the_lock_of_a_killed_process_is_free_also_with_a_child_alive(tmp_path, mode):
    command = [sys.executable, "-c", HOLD, str(tmp_path), mode]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        child = int(holder.stdout.readline())
        (line,) = refused(make_config(tmp_path))
        assert f"process {holder.pid} on " in line
        holder.kill()
        holder.wait()
        open_once(make_config(tmp_path))
        assert mode == "alone" or psutil.pid_exists(child), "the child was to be alive all along"
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
        if mode == "fork":
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", ""])
def test_no_name_leads_out_of_the_directory(tmp_path, name):
    run = run_directory.RunDir(tmp_path)
    with pytest.raises(ValueError, match="does not stay inside"):
        run.path(name)
    with pytest.raises(ValueError, match="does not stay inside"):
        run.write_json(name, {})


def test_json_is_written_whole_or_not_at_all(tmp_path):
    run = run_directory.RunDir(tmp_path)
    value = {
        "steps": np.int64(3),
        "loss": jnp.float32(0.5),
        "half": jnp.bfloat16(0.25),
        "nan": float("nan"),
        "all": np.array([1.0, np.inf]),
        "path": tmp_path,
        "none": None,
        "flag": np.bool_(True),
    }
    path = run.write_json("summary.json", value)
    assert json.loads(path.read_text()) == {
        "steps": 3,
        "loss": 0.5,
        "half": 0.25,
        "nan": None,
        "all": [1.0, None],
        "path": str(tmp_path),
        "none": None,
        "flag": True,
    }
    before = path.read_bytes()
    with pytest.raises(TypeError, match="found object, expected a dict"):
        run.write_json("summary.json", {"x": object()})
    with pytest.raises(KeyboardInterrupt), replace_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["summary.json"]


def test_leftovers_of_a_killed_process_are_cleared_away(tmp_path):
    (tmp_path / "images").mkdir()
    for name in (".summary.json.123.tmp", "images/.step_000001.png.123.tmp"):
        (tmp_path / name).write_text("half")
    (tmp_path / "config.yaml").write_text(config_files.dump(make_config(tmp_path)))
    open_once(make_config(tmp_path))
    assert not list(tmp_path.rglob(".*.tmp"))


# ---- where the checkpoints are


def gone(run, steps, directory):
    """What is said of the steps that are found; empty when they will do."""
    try:
        run.require_saved(steps, directory, directory or run.checkpoints)
    except InputError as error:
        return str(error)
    return ""


def test_saved_steps_have_to_be_found(tmp_path):
    run = open_once(make_config(tmp_path))
    assert not gone(run, [], None)  # nothing was saved
    run.note_saved(4, None)
    line = gone(run, [], None)
    for part in ("saved.json: step 4 was saved", "has no checkpoint", str(run.checkpoints)):
        assert part in line
    assert not gone(run, [2], None)  # the newest was damaged, or removed on purpose
    assert not gone(run, [2, 4], "other")
    line = gone(run, [1, 2], "other")
    assert "other has steps 1, 2 (checkpoint.directory was None)" in line
    run.note_saved(6, "other")
    assert not gone(run, [3], "other")
    assert "step 6 was saved" in gone(run, [3], None)
    run.path("saved.json").write_text("{")
    assert "saved.json: unreadable" in gone(run, [3], None)


def test_two_runs_cannot_share_a_place_of_checkpoints(tmp_path):
    shared = tmp_path / "shared"
    one, two = run_directory.RunDir(tmp_path / "one"), run_directory.RunDir(tmp_path / "two")
    one.root.mkdir()
    two.root.mkdir()
    with run_directory.lock_checkpoints(one, str(shared)) as place:
        assert place == str(shared)
        with pytest.raises(InputError) as error, run_directory.lock_checkpoints(two, str(shared)):
            pass
        assert f"checkpoint.directory: {shared} is being written by process" in str(error.value)
        with run_directory.lock_checkpoints(two, str(shared), primary=False):
            pass
    with run_directory.lock_checkpoints(two, None) as place:  # whose own another run may name
        assert place == two.checkpoints
        with pytest.raises(InputError), run_directory.lock_checkpoints(one, str(place)):
            pass
    with run_directory.lock_checkpoints(one, "gs://bucket/run") as place:
        assert place == "gs://bucket/run"
    with (
        run_directory.open_run_directory(make_config(tmp_path / "same")) as run,
        run_directory.lock_checkpoints(run, str(run.root)),
    ):
        pass
