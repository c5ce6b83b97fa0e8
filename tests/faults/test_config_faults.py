"""Configs that cannot run (T17, T18, T19): exit code 2, the key and the value, no device."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from corl_jax.config import files as config_files
from corl_jax.errors import InputError
from corl_jax.train import __main__ as command
from tests.support import tiny_runs

ROOT = Path(__file__).resolve().parents[2]
# Of processor time, from the shell to the message: about 2 here, which is what imports take.
SECONDS = 60.0


@pytest.fixture(scope="module")
def options(tmp_path_factory, model):
    """A config that runs; the tests spoil it."""
    root = tmp_path_factory.mktemp("config")
    rows = tiny_runs.rows_file(root / "rows.parquet", 32)
    return tiny_runs.options(model, rows, root / "run", train={"prompts_per_step": 8})


def refused(capsys, tmp_path: Path, tree: dict, *overrides: str) -> list[str]:
    """The lines of the train command, which ends with exit code 2 and makes no directory."""
    path = tiny_runs.write_config(tmp_path / "run.yaml", tree)
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        command.main(["--config", str(path), *overrides])
    assert error.value.code == 2 and not Path(tree["output_dir"]).exists()
    return capsys.readouterr().err.splitlines()


# ---- T17: unknown keys

TYPOS = {
    "sede=1": "seed", "modle.path=x": "model", "model.pth=x": "model.path",
    "train.max_step=5": "train.max_steps",
    "rollout.groupsize=4": "rollout.group_size", "rollout.temprature=1.0": "rollout.temperature",
    "optimizer.lr=1e-4": "optimizer.learning_rate",
    "optimizer.learningrate=1e-4": "optimizer.learning_rate",
    "algorithm.kl_coeff=0.1": "algorithm.kl_coef",
    "algorithm.num_iteration=2": "algorithm.num_iterations",
    "checkpoint.evry=5": "checkpoint.every", "data.columns.promt=x": "prompt",
    "networks.blib.path=x": "blip", "compat.text_topk_50=true": "compat.text_top_k_50",
    "rewards=[{nmae: format}]": "rewards.0.name", "eval.suit=none": "eval.suite",
    "mesh.fdsp=2": "mesh.fsdp",
}  # fmt: skip


def test_typos_are_answered_with_the_nearest_name(figure, options, capsys, tmp_path):
    for typo, meant in TYPOS.items():
        lines = refused(capsys, tmp_path, options, typo)
        assert any(f"unknown key; did you mean {meant}?" in line for line in lines), (typo, lines)
    figure("T17", fault="unknown keys", tries=len(TYPOS), losses=0)


def test_a_typo_ends_the_command_before_a_device_starts(figure, options, tmp_path):
    path = tiny_runs.write_config(tmp_path / "run.yaml", options)
    code = (
        "import sys\n"
        "from corl_jax.train.__main__ import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        "    from jax._src import xla_bridge\n"
        "    print('devices:', xla_bridge.backends_are_initialized())\n"
    )
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, "--config", str(path), "train.max_step=5"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == 2 and done.stdout == "devices: False\n", done.stderr
    assert "train.max_step: unknown key; did you mean train.max_steps?" in done.stderr
    figure("T17", fault="the whole command", tries=1, losses=0,
           note=f"{spent:.1f} s of processor, {wall:.1f} s of clock")  # fmt: skip
    assert spent < SECONDS


# ---- T18: wrong types and values

WRONG = [
    "optimizer.learning_rate='1e-4'", "optimizer.learning_rate=true",
    "optimizer.learning_rate=.nan",
    "optimizer.learning_rate=.inf", "optimizer.learning_rate=-1e-4", "optimizer.learning_rate=0",
    "optimizer.b1=1.5", "optimizer.name=adam", "rollout.group_size=0", "rollout.group_size=2.0",
    "rollout.group_size=true", "rollout.top_p=0", "rollout.top_p=1.1", "rollout.temperature=0",
    "rollout.max_new_tokens=0", "rollout.cfg_scale=.nan", "train.prompts_per_step=-8",
    "train.prompts_per_step='8'", "train.prompts_per_step=1e3", "train.epochs=0",
    "train.trainable=x",
    "train.max_steps=[1]", "train=5", "seed=-1", "seed=null", "model.dtype=float16", "data.path=7",
    "data.max_bad_fraction=2", "algorithm.kl_coef=-0.1", "algorithm.tasks=both",
    "algorithm.scale=std", "algorithm.reduction=mean", "algorithm.kl_estimator=k4",
    "algorithm.image_token_share=0", "algorithm.importance_cap=0", "algorithm.redraws=-1",
    "rewards=format", "rewards=[{name: format, weight: .nan}]", "rewards=[{weight: 1}]",
    "mesh.data=0", "mesh.fsdp=-2", "mesh.tensor=true", "checkpoint.keep=0", "eval.suite=all",
    "eval.suite=5",
]  # fmt: skip


def test_wrong_values_are_refused_by_key(figure, options, capsys, tmp_path):
    for wrong in WRONG:
        key = wrong.partition("=")[0]
        lines = refused(capsys, tmp_path, options, wrong)
        assert any(f"{key}" in line and ("found" in line or "needs" in line) for line in lines), (
            wrong, lines,
        )  # fmt: skip
    figure("T18", fault="wrong types and values", tries=len(WRONG), losses=0)


def test_all_wrong_values_are_refused_together(figure, options, tmp_path):
    several = [wrong for wrong in WRONG if wrong.partition("=")[0].count(".") == 1]
    last = {wrong.partition("=")[0]: wrong for wrong in several}  # of two for a key, the second
    path = tiny_runs.write_config(tmp_path / "run.yaml", options)
    with pytest.raises(InputError) as error:  # the command prints the first twenty
        config_files.load(path, list(last.values()))
    lines = error.value.problems
    missing = [key for key in last if not any(f"{key}: found" in line for line in lines)]
    figure("T18", fault="all at once", tries=len(last), losses=len(missing))
    assert not missing


# ---- T19: sizes that do not divide

SIZES = {
    ("train.prompts_per_step=12",): ("train.prompts_per_step: 12", "8 ways", "8 or 16"),
    ("train.micro_batch=4",): ("train.micro_batch: 4", "8 ways"),
    ("train.micro_batch=3",): ("train.micro_batch: 3 does not divide", "8", "2 or 4"),
    ("rollout.batch_prompts=4",): ("rollout.batch_prompts: 4", "8 ways"),
    ("rollout.batch_prompts=5",): ("rollout.batch_prompts: 5 does not divide", "nearest: 4 or 8"),
    ("mesh.data=16",): ("data 16", "8 device(s)"),
    ("mesh.fsdp=3",): ("fsdp 3", "8 device(s)"),
    ("mesh.data=2", "mesh.fsdp=2"): ("data 2 x fsdp 2 x tensor 1", "8 device(s)"),
    ("mesh.data=-1", "mesh.fsdp=-1"): ("data -1 x fsdp -1", "8 device(s)"),
    ("eval.suite=rewards", "eval.rows=4", "eval.batch_prompts=6"): (
        "eval.batch_prompts: 6", "8 ways",
    ),
    ("eval.suite=rewards", "eval.rows=32"): ("cannot hold out 32 of 32 rows",),
    ("data.max_prompt_length=600",): ("data.max_prompt_length: 600", "512"),
}  # fmt: skip


def test_sizes_that_do_not_divide_are_refused_with_their_numbers(figure, options, capsys, tmp_path):
    for overrides, parts in SIZES.items():
        text = "\n".join(refused(capsys, tmp_path, options, *overrides))
        assert all(part in text for part in parts), (overrides, text)
    figure("T19", fault="batches and meshes that do not divide", tries=len(SIZES), losses=0)


def test_the_config_that_was_spoilt_is_sound(options, capsys, tmp_path):
    path = tiny_runs.write_config(tmp_path / "run.yaml", options)
    command.main(["--config", str(path), "--check"])
    assert "mesh: {'data': 8" in capsys.readouterr().out
    assert config_files.load(path).train.prompts_per_step == 8
    assert yaml.safe_load(path.read_text()) == options
