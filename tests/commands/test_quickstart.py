"""The quickstart: its arithmetic, and two steps of all of it, twice."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from corl_jax.assets import SHIPPED
from corl_jax.config import files as config_files
from corl_jax.config.shipped import find_config
from corl_jax.errors import InputError
from corl_jax.quickstart import command as quickstart
from corl_jax.quickstart.command import Rise
from corl_jax.quickstart.models import STARTS

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "train.max_steps=2", "train.prompts_per_step=2", "rollout.group_size=2", "log.every=1",
    "rollout.max_new_tokens=4", "eval.rows=4", "eval.batch_prompts=4",
)  # fmt: skip


def test_rise_by_hand():
    rise = Rise.of([1.0, 3.0, 9.0, 9.0, 9.0, 9.0, 6.0, 10.0])
    assert (rise.first, rise.last) == (2.0, 8.0)
    # Two values with deviations 1 and 2: stdev sqrt(2) and sqrt(8), over sqrt(2).
    assert (rise.first_error, rise.last_error) == pytest.approx((1.0, 2.0))
    assert rise.in_errors == pytest.approx(6 / math.sqrt(5))


def test_rise_without_spread_or_with_one_step_a_quarter_has_no_error():
    assert math.isnan(Rise.of([1.0, 2.0]).in_errors)
    assert math.isnan(Rise.of([1.0] * 8).in_errors)


def test_no_row_is_learnt_twice_and_enough_are_held_out(tmp_path):
    rows = {"janus": 1920, "show-o": 1920, "janus-flow": 1440}
    for name, start in STARTS.items():
        config = config_files.load(find_config(start.config))
        assert config.train.max_steps * config.train.prompts_per_step == rows[name]
        assert config.eval.rows >= 400
    work = quickstart.Work(tmp_path, ("train.max_steps=3",))
    commands = [" ".join(command) for _, command, _ in work.list_steps()]
    assert "--rows 96 --seed 21 --split train" in commands[1]
    assert "--rows 512 --seed 22 --split test" in commands[2]
    assert "train.max_steps=3" in commands[3]
    endless = quickstart.Work(tmp_path, ("train.max_steps=null",))
    with pytest.raises(InputError, match="max_steps: found null"):
        endless.list_steps()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output_dir=x", "output_dir: found in the command line, but the quickstart sets it"),
        ("--data.path=x", "data.path: found in the command line"),
        ("eval.suite=none", "eval.suite: found in the command line"),
        ("stage=sft", "stage: found in the command line"),
    ],
)
def test_overrides_that_leave_nothing_to_compare_are_refused_at_once(tmp_path, override, message):
    with pytest.raises(InputError, match=message):
        quickstart.Work(tmp_path, (override,)).list_steps()


def test_a_step_that_fails_ends_with_its_exit_code(capfd):
    with pytest.raises(SystemExit) as ended:
        quickstart.run_command([sys.executable, "-c", "raise SystemExit(2)"])
    assert ended.value.code == 2
    out, err = capfd.readouterr()
    assert "raise SystemExit" in out and "exit code 2" in err


def test_each_model_has_its_folders_and_its_config(tmp_path):
    for name, start in STARTS.items():
        assert start.model in SHIPPED and SHIPPED[start.model].is_dir()
        work = quickstart.Work(tmp_path, (), start)
        commands = [" ".join(command) for _, command, _ in work.list_steps()]
        assert f"to-jax {start.model} {tmp_path / start.folder}" in commands[0]
        assert f"train {start.config} " in commands[3], name
    assert len({start.out for start in STARTS.values()}) == len(STARTS)


def start(out: Path, *overrides: str) -> subprocess.CompletedProcess:
    command = ["corl_jax.quickstart", "--out", str(out), *overrides]
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_two_steps_from_weights_to_pictures_and_again(tmp_path):
    out = tmp_path / "quick"
    done = start(out, *SMALL)
    assert done.returncode == 0, done.stderr
    for command in ("convert to-jax nano", "data --world small", "train quickstart"):
        assert f"-m corl_jax {command} " in done.stdout
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (out / "train" / "export" / name).is_file()
    with Image.open(out / "before_after.png") as picture:
        assert picture.width == 2 * 880, "twice the width of a README"
    page = (out / "train" / "report.html").read_text()
    assert page.count('class="mark"') == 4 * 3, "step 0, and both steps of the slider"
    assert str(out / "train" / "report.html") in done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["reward"]["first"] > 0 and summary["reward"]["first_error"] is None
    assert 0 <= summary["after"]["eval/answer/accuracy"] <= 1
    printed = done.stdout.partition("What came out")[2]
    assert "images that match their prompt" in printed and "answers right" in printed
    assert "compiling for the first evaluation" in done.stderr
    assert "compiling for the first step" in done.stderr
    assert f"corl-jax generate image --model {out / 'train' / 'export'}" in done.stderr

    again = start(out, *SMALL)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("is there already") == 3
    assert "nothing is left to do" in again.stderr and "compiling" not in again.stderr
    assert json.loads((out / "summary.json").read_text()) == summary
