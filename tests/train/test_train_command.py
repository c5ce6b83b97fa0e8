"""The train command from files to files: resuming, refusing, and every objective for two steps.

One device stands for the machine, except where the test is about several.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pandas
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import load_file, save_file

from corl_jax.config import files as config_files
from corl_jax.config.denoising import Denoising
from corl_jax.config.schema import Eval, Rollout
from corl_jax.devices.mesh import make_mesh
from corl_jax.errors import GuardError, InputError
from corl_jax.metrics import Metric
from corl_jax.params import leaf_paths
from corl_jax.plan import programs
from corl_jax.plan import tables as plan_tables
from corl_jax.policies.family import Unmasking
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.policies.janus.family import FAMILY
from corl_jax.runs import directory as run_directory
from corl_jax.runs import export_record
from corl_jax.runs.log import RunLog, StepLog
from corl_jax.runs.outputs import Progress
from corl_jax.runs.pace import Pace, Phases
from corl_jax.runs.watchdog import Watchdog
from corl_jax.tasks import CODES, TASKS, TEXT, Task, Turn
from corl_jax.train import __main__ as command
from corl_jax.train import check as run_check
from corl_jax.train import command as training
from corl_jax.train import fit, loop, memory, milestones, reports, resolve
from corl_jax.train import iteration as rl_iteration
from corl_jax.train.alarms import make_guards
from corl_jax.train.resume import fingerprint_untrained
from corl_jax.train.run import Iteration
from corl_jax.types import Prompts
from corl_jax.weights.checkpoint import load_config, load_params
from corl_jax.weights.export import save_checkpoint
from tests.support import metrics_page, tiny_runs
from tests.support.tiny_models import tiny_parquet, tiny_row
from tests.support.tiny_runs import metric_lines, write_config
from tests.support.tolerances import LOGPROBS

ROOT = Path(__file__).resolve().parents[2]
EVERY_STEP = ("loss", "grad_norm", "learning_rate", "epoch", "step_time", "phase/update_seconds")
JOINT = ("reward", "reward_std", "frac_reward_zero_std")
OF_BOTH = (
    *JOINT, "loss", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean",
    "clip_ratio/region_mean", "completions/mean_length",
    "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max",
)  # fmt: skip
ANSWERS = (
    "mm2t/rewards/format/mean", "mm2t/rewards/qa_accuracy/std", "mm2t/completions/min_length",
    "mm2t/completions/max_length", "mm2t/completions/clipped_ratio", "perf/tokens_per_second",
)  # fmt: skip
MIN_MEAN_MAX = ("min", "mean", "max")
DRAWINGS = ("t2i/rewards/t2i_pixel_mse/mean", "perf/images_per_second")


pytestmark = pytest.mark.usefixtures("module_on_one_device")


@pytest.fixture
def options(model, rows, tmp_path):
    return functools.partial(tiny_runs.options, model, rows, tmp_path / "run")


def train(tree: dict, *arguments: str) -> Path:
    """Runs the command on a config; the run directory."""
    output = Path(tree["output_dir"])
    output.parent.mkdir(parents=True, exist_ok=True)
    path = write_config(output.parent / f"{output.name}.yaml", tree)
    command.main(["--config", str(path), *arguments])
    return output


def refused(capsys, tree: dict, *arguments: str) -> list[str]:
    """The lines that the command prints when it exits with 2."""
    with pytest.raises(SystemExit) as error:
        train(tree, *arguments)
    assert error.value.code == 2
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def unseen(lines: list[dict], *sections: str) -> list[str]:
    """What docs/reference/metrics.md promises in its sections and no line has."""
    return metrics_page.never(sections, {name for line in lines for name in line})


def steady(line: dict) -> dict:
    """A metrics line without what a clock decides."""
    return {k: v for k, v in line.items() if "second" not in k and k != "step_time"}


# ---- GRPO, and resuming


def full_options(options) -> dict:
    """Everything at once: old log-probs, a reference, micro-batches, evaluation, image grids."""
    return options(
        algorithm={"kl_coef": 0.1, "num_iterations": 2, "mask_truncated": True},
        train={"max_steps": 4, "micro_batch": 2},
        eval={"suite": "rewards", "rows": 6, "batch_prompts": 4, "every": 2},
        log={"images_every": 2, "samples_every": 3},
        checkpoint={"every": 3, "keep": 2},
    )


@pytest.fixture(scope="module")
def straight(model, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    return train(full_options(functools.partial(tiny_runs.options, model, rows, folder)))


@pytest.fixture(scope="module")
def resumed(model, rows, tmp_path_factory):
    """The same run in two processes' worth of steps, between two checkpoints of its own.

    The first keeps its reference in host memory.
    """
    folder = tmp_path_factory.mktemp("resumed") / "run"
    tree = full_options(functools.partial(tiny_runs.options, model, rows, folder))
    train(tree, "train.stop_after=2", "algorithm.reference=host")
    assert not (folder / "export").exists() and not (folder / "summary.json").exists()
    assert [line["step"] for line in metric_lines(folder)] == [0, 1, 2, 2]
    return train(tree)


def checkpoint_of(folder: Path, step: int) -> dict[str, np.ndarray]:
    state = ocp.StandardCheckpointer().restore((folder / f"checkpoints/{step}/state").absolute())
    return {path: np.asarray(leaf) for path, leaf in leaf_paths(dict_keys(state))}


def dict_keys(tree):
    return {str(k): dict_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def test_a_run_leaves_what_it_should(straight):
    assert {path.name for path in straight.iterdir()} == {
        ".lock", "config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "images", "export",
        "summary.json", "saved.json", "samples", "provenance.json", "report.html",
    }  # fmt: skip
    lines = metric_lines(straight)
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4]
    # No reward of this run is the user's own, and its images are not made by denoising.
    assert unseen(lines, "Every run", "GRPO") == ["TASK/rewards/NAME/failed", "IMAGE/ratio_first"]
    checkpoints = sorted(path.name for path in (straight / "checkpoints").iterdir())
    assert checkpoints == [".lock", "3", "4"]
    assert json.loads((straight / "saved.json").read_text()) == {"step": 4, "directory": None}
    card = ModelCard.load(straight / "export" / "README.md")
    assert card.data.tags[-1] == "corl_jax" and "| step 0 | step 4 |" in card.text
    names = [f"step_{step:06d}.png" for step in (0, 2, 4)]
    assert sorted(path.name for path in (straight / "images").iterdir()) == names
    files = [f"step_{step:06d}.parquet" for step in (3, 4)]
    assert sorted(path.name for path in (straight / "samples").iterdir()) == files
    summary = json.loads((straight / "summary.json").read_text())
    assert (summary["steps"], summary["optimizer_steps"]) == (4, 8)
    assert summary["first_evaluation"]["step"] == 0 and summary["last_evaluation"]["step"] == 4
    assert summary["seconds"] > 0
    assert list((straight / "tensorboard").iterdir())
    provenance = json.loads((straight / "provenance.json").read_text())
    config = str(straight.with_suffix(".yaml"))
    assert provenance["given"] == {
        "config": config, "files": [config], "overrides": {}, "replaced": {},
    }  # fmt: skip
    assert provenance["steps"] == 4 and provenance["devices"].startswith("1 x cpu")
    assert provenance["versions"]["jax"] == jax.__version__
    assert 0 < provenance["model"]["trained"] < provenance["model"]["parameters"]
    page = (straight / "report.html").read_text()
    assert "finished, 4 steps" in page and page.count('class="shot') > 8


def test_metrics_have_trls_names(straight):
    line = next(x for x in metric_lines(straight) if x["step"] == 2 and "loss" in x)
    both = [f"{task}/{name}" for task in ("t2i", "mm2t") for name in (*OF_BOTH, "kl")]
    wanted = {*EVERY_STEP, *JOINT, *both, *ANSWERS, *DRAWINGS}
    wanted |= {"phase/rollout_seconds", "phase/reward_seconds"}
    assert not wanted - line.keys()
    assert line["learning_rate"] == pytest.approx(1e-3 * (1 - 3 / 8))  # of the step's last update
    assert line["t2i/completions/mean_length"] == 16
    assert 0 < line["t2i/sampling/sampling_logp_difference/max"] < LOGPROBS
    assert 0 < line["t2i/kl"] < 1


def test_extremes_enclose_means(straight):
    for line in metric_lines(straight):
        if "loss" not in line:
            continue
        for task in ("t2i", "mm2t"):
            ratio = [line[f"{task}/sampling/importance_sampling_ratio/{x}"] for x in MIN_MEAN_MAX]
            assert ratio == sorted(ratio) and 0.99 < ratio[0] < ratio[2] < 1.01
            assert line[f"{task}/clip_ratio/low_min"] <= line[f"{task}/clip_ratio/low_mean"]
            assert line[f"{task}/clip_ratio/high_max"] >= line[f"{task}/clip_ratio/high_mean"]
        lengths = [line[f"mm2t/completions/{x}_terminated_length"] for x in MIN_MEAN_MAX]
        if line["mm2t/completions/clipped_ratio"] == 1:
            assert lengths == [None] * 3
        else:
            assert lengths == sorted(lengths) and lengths[2] <= 8


def test_tokens_are_counted_over_the_whole_run(straight, resumed):
    counts = [line["num_tokens"] for line in metric_lines(straight) if "loss" in line]
    # 4 prompts of 2 completions; an image has 16 tokens, and a question those of its image.
    assert counts[0] > 8 * (16 + 16) and counts == sorted(counts)
    assert counts == [line["num_tokens"] for line in metric_lines(resumed) if "loss" in line]


def test_samples_have_the_numbers_of_the_step(straight):
    line = next(x for x in metric_lines(straight) if x["step"] == 3 and "loss" in x)
    table = pandas.read_parquet(straight / "samples" / "step_000003.parquet")
    assert len(table) == 2 * 8 and set(table.step) == {3}
    for task in ("t2i", "mm2t"):
        rows = table[table.task == task]
        assert list(rows.row) == [0, 0, 1, 1, 2, 2, 3, 3] and list(rows.completion) == [0, 1] * 4
        assert rows.reward.mean() == pytest.approx(line[f"{task}/reward"])
        assert rows.length.mean() == pytest.approx(line[f"{task}/completions/mean_length"])
        assert (rows.advantage.groupby(rows.row).sum().abs() < 1e-4).all()
    answers = table[table.task == "mm2t"]
    assert answers.reward_format.mean() == pytest.approx(line["mm2t/rewards/format/mean"])
    assert answers.text.notna().all() and answers.reward_t2i_pixel_mse.isna().all()
    # Both answers to a question have the image that it is about.
    images = [image["bytes"] for image in answers.image]
    assert images[0] == images[1] and len(set(images)) > 1


def test_the_first_steps_metrics_are_of_the_untrained_policy(straight):
    """At the second of two updates the first one's move shows: in the ratio and in the KL."""
    first = metric_lines(straight)[1]
    assert first["t2i/kl"] > 0 and first["t2i/sampling/sampling_logp_difference/mean"] < LOGPROBS


def test_evaluation_lines(straight):
    evaluations = [line for line in metric_lines(straight) if "eval/seconds" in line]
    assert [line["step"] for line in evaluations] == [0, 2, 4]
    name = "eval/t2i/t2i_pixel_mse"
    assert evaluations[0][name] != evaluations[-1][name]
    assert all(line[f"{name}_stderr"] > 0 for line in evaluations)


def test_only_the_trained_part_of_the_export_differs(straight, model):
    config = load_config(model, KIND)
    before, after = (
        dict(leaf_paths(load_params(x, KIND, config))) for x in (model, straight / "export")
    )
    assert before.keys() == after.keys()
    for path, leaf in after.items():
        trained = path.startswith(("language_model/", "lm_head/"))
        assert trained == (not np.array_equal(leaf, before[path])), path


def test_a_resumed_run_gives_the_same_bits(straight, resumed):
    ours, theirs = checkpoint_of(resumed, 4), checkpoint_of(straight, 4)
    assert ours.keys() == theirs.keys() and any("mu" in path for path in ours)
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)
    files = sorted(p.relative_to(straight) for p in (straight / "export").rglob("*.safetensors"))
    assert files
    for file in files:
        assert (resumed / file).read_bytes() == (straight / file).read_bytes(), file
    for image in (straight / "images").iterdir():
        assert (resumed / "images" / image.name).read_bytes() == image.read_bytes()


def test_a_resumed_run_logs_the_same_numbers(straight, resumed):
    found, wanted = (list(map(steady, metric_lines(x))) for x in (resumed, straight))
    assert found == wanted


def test_rerunning_a_finished_run_changes_nothing(resumed, model, rows, capsys):
    def contents():
        return {
            path: path.read_bytes()
            for path in sorted(resumed.rglob("*"))
            if path.is_file() and path.parent.name != "tensorboard" and path.name != ".lock"
        }

    before = contents()
    train(full_options(functools.partial(tiny_runs.options, model, rows, resumed)))
    said = capsys.readouterr().err
    assert "before now; nothing is left to do" in said and "max_steps=8" in said
    assert contents() == before


def damage_record(folder: Path) -> None:
    record = folder / "checkpoints/4/meta/metadata"
    record.write_text(record.read_text().replace('"seed"', '"sead"', 1))


def change_record(folder: Path, **values) -> None:
    path = folder / "export" / export_record.RECORD_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


UNFINISHED = {
    "export gone": lambda folder: shutil.rmtree(folder / "export"),
    "export of another step": lambda folder: change_record(folder, step=3),
    "export of other weights": lambda folder: change_record(folder, trained="0" * 16),
    "export of other frozen weights": lambda folder: change_record(folder, untrained="0" * 16),
    "summary gone": lambda folder: (folder / "summary.json").unlink(),
    "summary of another step": lambda folder: (folder / "summary.json").write_text('{"steps": 3}'),
    "last checkpoint gone": lambda folder: shutil.rmtree(folder / "checkpoints/4"),
    "record damaged": damage_record,
    "other export options": ("export.dtype=bfloat16",),
    "permission to change": ("--allow-changed-config",),
    "nothing": (),
}
"""Change to a finished run -> what is done to its folder, or the arguments of the rerun."""


@pytest.fixture
def resumptions(monkeypatch):
    """The runs that are built, which a test of the command's decision does not wait for."""
    plans = []

    def run_steps(planned, *_):
        plans.append(planned)
        return 0

    monkeypatch.setattr(training, "run_steps", run_steps)
    return plans


@pytest.mark.parametrize("change", UNFINISHED)
def test_only_a_finished_run_without_any_change_is_not_built(
    straight, model, rows, tmp_path, resumptions, change
):
    folder = shutil.copytree(straight, tmp_path / "run")
    action, arguments = UNFINISHED[change], ()
    if callable(action):
        action(folder)
    else:
        arguments = action
    train(full_options(functools.partial(tiny_runs.options, model, rows, folder)), *arguments)
    assert len(resumptions) == (change != "nothing")


def test_a_changed_config_of_a_finished_run_is_refused(straight, model, rows, tmp_path, capsys):
    folder = shutil.copytree(straight, tmp_path / "run")
    tree = full_options(functools.partial(tiny_runs.options, model, rows, folder))
    (line,) = refused(capsys, tree, "optimizer.learning_rate=0.5")
    assert "optimizer.learning_rate: found 0.5" in line


def test_touched_weights_are_compared_bit_by_bit(straight, model, rows, tmp_path, resumptions):
    folder = shutil.copytree(straight, tmp_path / "run")
    tree = full_options(functools.partial(tiny_runs.options, model, rows, folder))
    file = next(Path(model).glob("*.safetensors"))
    before = file.stat()
    try:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        train(tree)
    finally:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(resumptions) == 1
    train(tree)
    assert len(resumptions) == 1


def test_an_extended_run_leaves_nothing_of_the_old_end(straight, model, rows, tmp_path, capsys):
    """Export and summary are of the last step, and of the options that hold then."""
    folder = shutil.copytree(straight, tmp_path / "run")
    tree = full_options(functools.partial(tiny_runs.options, model, rows, folder))
    tree["train"]["max_steps"] = 5
    train(tree, "--allow-changed-config")
    said = capsys.readouterr().err
    assert re.search(r"^resuming from step 4/5 of \d{4}-\d\d-\d\d \d\d:\d\d$", said, re.MULTILINE)
    assert "export is of step 4; it stays as it is until the run has done its 5 steps" in said
    assert "export: was of step 4, now of step 5" in said
    assert json.loads((folder / "summary.json").read_text())["steps"] == 5
    assert not [path for path in folder.iterdir() if path.name.startswith(".export")]
    record = json.loads((folder / "export" / export_record.RECORD_FILE).read_text())
    assert record["step"] == 5
    exported = load_params(folder / "export", KIND)["lm_head"]["kernel"]
    saved = checkpoint_of(folder, 5).items()  # the parameters' moments are among them
    assert any(np.array_equal(exported, x) for path, x in saved if path.endswith("lm_head/kernel"))


@pytest.mark.slow
def test_a_finished_run_with_other_options_is_exported_and_measured_again(
    straight, model, rows, tmp_path
):
    folder = shutil.copytree(straight, tmp_path / "run")
    tree = full_options(functools.partial(tiny_runs.options, model, rows, folder))
    train(tree, "export.layout=original")
    assert json.loads((folder / "export/config.json").read_text())["model_type"] != "corl_jax"
    train(tree, "--allow-changed-config", "rollout.cfg_scale=2", "eval.rows=4")
    generation = json.loads((folder / "export/generation_config.json").read_text())
    assert generation["guidance_scale"] == 2.0
    last = [line for line in metric_lines(folder) if "eval/seconds" in line]
    assert [line["step"] for line in last] == [0, 2, 4, 4]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["last_evaluation"] == {
        k: v for k, v in last[-1].items() if k == "step" or k.startswith("eval/")
    }


def test_a_run_goes_on_from_another_directory(straight, model, rows, tmp_path, monkeypatch):
    """Its paths are spelt from there, one by way of a link; nothing needs a flag."""
    folder = shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(model)
    monkeypatch.chdir(tmp_path / "elsewhere")
    tree = full_options(functools.partial(tiny_runs.options, model, rows, folder))
    tree["output_dir"] = "../run"
    tree["model"]["path"] = "link"
    tree["data"]["path"] = os.path.relpath(rows)
    before = (folder / "export" / export_record.RECORD_FILE).read_bytes()
    train(tree)
    assert not (folder / "config_changes.jsonl").exists()
    assert (folder / "export" / export_record.RECORD_FILE).read_bytes() == before
    # Noted with where they start, so that the way back is as short.
    assert (
        (folder / "config.yaml").read_text().startswith(f'# Relative paths start at "{Path.cwd()}"')
    )
    monkeypatch.chdir(tmp_path)
    tree["output_dir"], tree["model"]["path"] = "run", "elsewhere/link"
    tree["data"]["path"] = os.path.relpath(rows)
    train(tree)


@pytest.mark.slow
def test_a_longer_interruption_between_checkpoints_is_repeated(straight, model, rows, tmp_path):
    """A run that dies before its first checkpoint starts over and logs no step twice."""
    folder = tmp_path / "run"
    tree = full_options(functools.partial(tiny_runs.options, model, rows, folder))

    def dies(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(milestones, "save_state", dies)
        with pytest.raises(KeyboardInterrupt):
            train(tree)
    assert [line["step"] for line in metric_lines(folder)] == [0, 1, 2, 2, 3]
    train(tree, "train.stop_after=1")
    found = list(map(steady, metric_lines(folder)))
    assert found == list(map(steady, metric_lines(straight)))[:2]


# ---- single tasks and other objectives


def test_drawing_alone(options, tmp_path):
    """Data without questions will do, and nothing of the other task is logged."""
    rows = [{k: tiny_row(i)[k] for k in ("prompt", "real_image")} for i in range(8)]
    data = {"path": str(tiny_parquet(tmp_path / "drawings.parquet", rows))}
    tree = options(algorithm={"tasks": "t2i"}, rewards=[{"name": "t2i_pixel_mse"}], data=data)
    lines = metric_lines(train(tree))
    assert [line["step"] for line in lines] == [1, 2]
    line = lines[-1]
    assert not {*EVERY_STEP, *JOINT, *DRAWINGS, *(f"t2i/{name}" for name in OF_BOTH)} - line.keys()
    assert not [name for name in line if name.startswith("mm2t")] and "t2i/kl" not in line
    assert line["reward"] == line["t2i/reward"]


def test_answering_alone(options, monkeypatch):
    """The table of answers comes without drawings, too."""
    tables = []
    monkeypatch.setattr(RunLog, "add_text", lambda *args: tables.append(args))
    tree = options(
        algorithm={"tasks": "mm2t"}, rewards=[{"name": "qa_accuracy"}], log={"images_every": 2}
    )
    lines = metric_lines(train(tree))
    assert not {*EVERY_STEP, *JOINT, "perf/tokens_per_second"} - lines[-1].keys()
    assert not {f"mm2t/{name}" for name in OF_BOTH} - lines[-1].keys()
    assert not [name for name in lines[-1] if name.startswith("t2i")]
    (_, *config), (_, step, name, table) = tables
    assert config[:2] == [0, "config"] and "tasks: mm2t" in config[2]
    assert (step, name) == (2, "mm2t/answers") and "how many squares" in table
    assert "<br>qa\\_accuracy " in table and "<br>advantage " in table


def test_supervised_stage(options):
    tree = options(
        stage="sft",
        rewards=[],
        model={"dtype": "bfloat16"},
        train={"max_steps": 3, "micro_batch": 2},
        optimizer={"learning_rate": 1e-2},
        log={"every": 2},
    )
    lines = metric_lines(train(tree))
    assert [line["step"] for line in lines] == [2, 3]  # the last line always
    # The other is of runs with sft.repa_weight.
    assert unseen(lines, "Every run", "Supervised stages") == ["TASK/alignment"]
    names = [f"{kind}/nll" for kind in ("t2i", "mm2t", "caption")]
    assert not {*EVERY_STEP, *names, "phase/data_seconds"} - lines[0].keys()
    assert lines[1]["loss"] == pytest.approx(sum(lines[1][name] for name in names), rel=1e-3)
    assert lines[1]["mm2t/nll"] < lines[0]["mm2t/nll"]


def test_image_tokenizer(options, model):
    tree = options(stage="vq", rewards=[], train={"trainable": ["vqmodel/.*"]})
    output = train(tree)
    lines = metric_lines(output)
    # The others are of a VAE.
    others = {f"vq/{name}" for name in ("information", "latent_noise", "latent_std", "scale")}
    assert set(unseen(lines, "Every run", "Image tokenizer")) == others
    config = load_config(model, KIND)
    before, after = (
        dict(leaf_paths(load_params(x, KIND, config))) for x in (model, output / "export")
    )
    for path, leaf in after.items():
        assert path.startswith("vqmodel/") == (not np.array_equal(leaf, before[path])), path


@pytest.mark.slow
def test_a_mesh_of_eight_devices(options, monkeypatch):
    """The whole iteration on data x fsdp x tensor: rewards too see rows in order."""
    monkeypatch.setattr(resolve, "make_mesh", make_mesh)
    changes = {"train": {"max_steps": 1}, "algorithm": {"kl_coef": 0.1}, "log": {"images_every": 1}}
    tree = options(**changes, eval={"suite": "rewards", "rows": 4, "batch_prompts": 4})
    spread = train(tree | {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}})
    monkeypatch.undo()
    make = functools.partial(make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(resolve, "make_mesh", make)
    alone = train(tree | {"output_dir": tree["output_dir"] + "-alone"})
    for found, wanted in zip(metric_lines(spread), metric_lines(alone), strict=True):
        assert found.keys() == wanted.keys()
        for name, value in steady(wanted).items():
            if "sampling" not in name:
                assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


# ---- before training


def test_print_config_is_a_config(options, tmp_path, capsys):
    train(options(), "--print-config", "seed=7")
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    loaded = config_files.load(path)
    assert loaded.seed == 7 and loaded.optimizer.schedule == "linear"
    assert not (tmp_path / "run").exists()


def test_check_reports_and_touches_nothing(options, tmp_path, capsys):
    tree = options(eval={"suite": "rewards", "rows": 4, "batch_prompts": 4})
    train(tree, "--check", "train.max_steps=null", "train.epochs=2", "train.micro_batch=2")
    out = capsys.readouterr().out
    for part in (
        "language_model", "total", "GiB", "optimizer", "12 rows to train on, 4 held out",
        "steps: 6 of 4 prompts in 2 micro-batch(es), 6 optimizer steps", "'data': 1", "on cpu",
        "t2i_pixel_mse", "qa_accuracy", "attention: xla",
    ):  # fmt: skip
        assert part in out, part
    assert not (tmp_path / "run").exists()


def plan_and_programs(options) -> tuple:
    """A planned run, what it keeps on a device and its programs, for its own prompts' lengths."""
    planned = resolve.resolve_run(
        config_files.validate(options(algorithm={"kl_coef": 0.1}), "test")
    )
    lengths = memory.measure_prompt_lengths(planned)
    return planned, *programs.make_programs(planned, lengths, jax.numpy.float32)


def test_check_counts_what_is_kept_as_plan_does(options):
    planned, kept, _ = plan_and_programs(options)
    counted = memory.estimate_memory(planned)
    sizes = {
        name: programs.count_shard_bytes(part) / memory.GIB for name, part in kept.by_name().items()
    }
    for ours, theirs in (
        ("parameters, trained", "trained parameters"), ("parameters, frozen", "frozen parameters"),
        ("optimizer", "optimizer"), ("reference", "reference"),
    ):  # fmt: skip
        assert counted[ours] == pytest.approx(sizes[theirs], rel=1e-3), ours
    text = run_check.describe(planned)
    for part in ("whole run, exact", "during an update, at least", "not counted", "--text-prompt"):
        assert part in text


@pytest.mark.slow
def test_check_is_near_what_the_compiler_needs_for_an_update(options):
    planned, kept, listed = plan_and_programs(options)
    counted = memory.estimate_memory(planned)
    (update,) = (program for program in listed if program.name == "update")
    with jax.set_mesh(planned.mesh):
        needed = plan_tables.compile_program(update, kept).temporaries / memory.GIB
    at_least = sum(counted.get(name, 0) for name in memory.WORKING["during an update"])
    assert 0.3 * needed < at_least < 1.2 * needed  # the compiler frees and shares some of it


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as error:
        command.main(["--help"])
    assert error.value.code == 0
    out = capsys.readouterr().out
    for part in (
        "--check",
        "algorithm.mm2t_weight = 0.8",
        "optimizer.learning_rate = 4e-06",
        "resumes",
    ):
        assert part in out


def test_the_command_as_a_user_starts_it(options, tmp_path):
    """In a process of its own, with one device and without the tests' settings."""
    good = write_config(tmp_path / "good.yaml", options())
    start = [sys.executable, "-m", "corl_jax.train", "--config"]
    common = {"cwd": ROOT, "capture_output": True, "text": True, "check": False}
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*start, str(good), "--check"], env=environment, **common)
    assert done.returncode == 0, done.stderr
    assert "steps: 2 of 4 prompts" in done.stdout


def test_wrong_options_are_all_listed(options, capsys):
    tree = options(train={"prompts_per_stp": 4}, seed=-1)
    lines = refused(capsys, tree, "optimizer.b1=3", "nonsense")
    assert len(lines) == 4
    joined = "\n".join(lines)
    for part in (
        "did you mean train.prompts_per_step?",
        "seed: found -1",
        "b1: found 3",
        "'nonsense'",
    ):
        assert part in joined


def test_wrong_files_and_sizes_are_all_listed(options, tmp_path, capsys):
    tree = options(
        model={"path": str(tmp_path / "nowhere")},
        data={"path": str(tmp_path / "none.parquet")},
        mesh={"data": 3},
        rewards=[{"name": "formt"}, {"name": "t2i_qa", "options": {"greedily": True}}],
    )
    joined = "\n".join(refused(capsys, tree))
    for part in ("nowhere", "none.parquet", "mesh: data 3", "did you mean format?", "greedily"):
        assert part in joined, part


def test_what_does_not_fit_the_model_and_data_is_all_listed(options, capsys):
    tree = options(
        data={"max_prompt_length": 4096},
        train={"trainable": ["language_modl/.*"]},
        rewards=[{"name": "format"}, {"name": "t2i_od"}, {"name": "shapes_checker"}],
    )
    joined = "\n".join(refused(capsys, tree))
    for part in (
        "data.max_prompt_length: 4096 plus a completion", "'language_modl/.*' matches no",
        "od_problem", "od_solution", "spec",
    ):  # fmt: skip
        assert part in joined, part


VQ = {"stage": "vq", "rewards": []}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"rewards": [{"name": "format"}]}, ["none scores the images of t2i"]),
        (VQ, ["train.trainable: found language_model, lm_head, which stage"]),
        ({"stage": "sft", "rewards": [], "eval": {"suite": "rewards"}},
         ["eval.suite: found rewards, which scores rewards, but the config lists none"]),
        (VQ | {"eval": {"suite": "rewards"}}, ["but stage vq samples nothing"]),
        ({"stage": "sft", "rewards": [], "sft": {"caption_column": "captoin"}}, ["captoin"]),
        ({"eval": {"suite": "rewards", "rows": 99}}, ["cannot hold out 99 of 16 rows"]),
        ({"eval": {"suite": "shapes", "rows": 4}}, ["spec", "category"]),
        ({"data": {"columns": {"prompt": "caption_of_it"}}}, ["data.columns.prompt"]),
        ({"algorithm": {"name": "grpq"}, "eval": {"suite": "shape", "rows": 4}},
         ["algorithm.name: found 'grpq'; did you mean grpo?", "did you mean shapes?"]),
    ],
)  # fmt: skip
def test_contradictions_are_refused(options, capsys, changes, parts):
    joined = "\n".join(refused(capsys, options(**changes)))
    assert all(part in joined for part in parts), joined


@pytest.mark.parametrize(
    ("trainable", "patterns"),
    [(None, FAMILY.trainable), (["lm_head/.*"], ["lm_head/.*"]), ([], [])],
)
def test_null_alone_trains_what_the_model_recommends(options, trainable, patterns):
    config = config_files.validate(options(train={"trainable": trainable}), "test")
    assert fit.trained_patterns(config, FAMILY) == list(patterns)


def test_a_batch_that_the_mesh_does_not_divide(options, monkeypatch, capsys):
    monkeypatch.setattr(resolve, "make_mesh", make_mesh)
    lines = refused(capsys, options(train={"prompts_per_step": 12}))
    assert "train.prompts_per_step: 12 is not a multiple of the 8 ways" in lines[0]
    assert "nearest: 8 or 16" in lines[0]


def test_heads_that_the_mesh_does_not_divide(options, monkeypatch, capsys):
    monkeypatch.setattr(resolve, "make_mesh", make_mesh)
    (line,) = refused(capsys, options(mesh={"data": 1, "tensor": 8}))
    assert "mesh.tensor: 8 does not divide 4 (heads of language_model), 2 (key heads of" in line
    assert line.endswith("nearest: 2")


def test_a_second_writer_is_refused(options, capsys):
    tree = options()
    with run_directory.open_run_directory(config_files.validate(tree, "test")):
        (line,) = refused(capsys, tree)
    assert f"is being written by process {os.getpid()}" in line


def test_another_config_in_the_same_directory_is_refused(options, capsys):
    tree = options(rollout={"cfg_scale": 3.0})  # as the model has it, where none is given
    with run_directory.open_run_directory(config_files.validate(tree, "test")):
        pass
    lines = refused(
        capsys, tree, "optimizer.learning_rate=1e-5", "train.max_steps=9", "log.every=5"
    )
    assert len(lines) == 2
    assert "optimizer.learning_rate: found 1e-05, the run has 0.001" in lines[0]


# ---- evaluation


def test_columns_of_rewards_may_be_null(options, tmp_path):
    """A reward does not apply to such a row; the row stays."""
    rows = [
        tiny_row(i) | {"qa_solution": None if i % 2 else "<answer>1</answer>"} for i in range(8)
    ]
    data = {"path": str(tiny_parquet(tmp_path / "some.parquet", rows))}
    planned = resolve.resolve_run(config_files.validate(options(data=data), "test"))
    solutions = planned.train_loader.batch(0).columns["qa_solution"]
    solutions += planned.train_loader.batch(1).columns["qa_solution"]
    assert solutions.count(None) == 4 and planned.train_loader.counts["bad"] == 0


def test_check_names_rewards_that_can_score_none_of_the_first_rows(options, tmp_path, capsys):
    rows = [tiny_row(i) | {"qa_solution": None} for i in range(8)]
    data = {"path": str(tiny_parquet(tmp_path / "blank.parquet", rows))}
    train(options(data=data), "--check")
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "qa_accuracy can score none of the first 8 rows" in warnings[0]


def test_check_refuses_question_types_that_are_neither(options, tmp_path, capsys):
    rows = [tiny_row(i) | {"qa_type": "essay"} for i in range(4)]
    data = {"path": str(tiny_parquet(tmp_path / "types.parquet", rows))}
    lines = refused(capsys, options(data=data), "--check")
    assert len(lines) == 4 and "row 0: qa_type: found 'essay', expected MC or OE" in lines[0]


def step_log(tree: dict, run: SimpleNamespace, log: SimpleNamespace) -> StepLog:
    """The log of a run's iterations, without a run directory."""
    config = config_files.validate(tree, "test")
    outputs = SimpleNamespace(
        log=log, guards=make_guards(config.guards), watchdog=Watchdog(),
        saver=SimpleNamespace(poll=lambda: None), progress=Progress(), primary=True,
    )  # fmt: skip
    return training.make_step_log(config, run, outputs)


def test_the_last_iteration_of_a_run_without_rewards_ends_it(options):
    """However short; nothing of it is saved then."""
    run = SimpleNamespace(steps=2, phases=Phases(), tasks=("t2i",), alternate_every=0)
    log = step_log(
        options(log={"every": 9}), run, SimpleNamespace(say=print, pace=Pace(), needs_layout=False)
    )
    done = Iteration({"not_applicable": Metric(1.0)}, {}, {}, [])
    log.add(1, done)
    with pytest.raises(GuardError, match="no reward has applied to any completion of the 2 step"):
        log.add(2, done)


def test_warmup_that_outlasts_the_epochs_is_refused(options):
    """The length of the run is known when its data is read."""
    tree = options(train={"max_steps": None, "epochs": 1.0}, optimizer={"warmup_steps": 500})
    config = config_files.validate(tree, "test")
    with pytest.raises(InputError, match="warmup_steps: found 500, but the run has") as error:
        resolve.resolve_run(config)
    assert len(error.value.problems) == 1


@pytest.mark.parametrize("layout", ["transformers", "none"])
def test_a_run_does_not_replace_the_model_that_it_reads(options, tmp_path, layout):
    """Neither by its export nor by moving an older one away."""
    model = Path(options()["model"]["path"])
    export = tmp_path / "earlier" / "export"
    shutil.copytree(model, export)
    tree = options(output_dir=str(export.parent), export={"layout": layout})
    refused = f"output_dir: its export {export}: is a model to read"
    tree["model"]["path"] = str(export)
    with pytest.raises(InputError, match=re.escape(refused)):
        resolve.resolve_run(config_files.validate(tree, "test"))
    resolve.resolve_run(config_files.validate(tree | {"output_dir": str(tmp_path / "new")}, "test"))


def test_the_drawn_worlds_suite_asks_both_tasks(options, tmp_path):
    """Whatever is trained."""
    extra = {"spec": "{}", "category": "counting"}
    rows = [tiny_row(i) | extra for i in range(8)]
    data = {"path": str(tiny_parquet(tmp_path / "drawn.parquet", rows))}
    tree = options(
        data=data, algorithm={"tasks": "t2i"}, rewards=[{"name": "t2i_pixel_mse"}],
        eval={"suite": "shapes", "rows": 4, "batch_prompts": 2},
    )  # fmt: skip
    planned = resolve.resolve_run(config_files.validate(tree, "test"))
    assert planned.train_loader.options.tasks == ("t2i",)
    batch = planned.evaluations[0].loader.batch(0)
    assert set(batch.encoded) == {"t2i", "mm2t"}


def test_the_reward_suite_gets_the_rewards_of_every_task(monkeypatch):
    def scored(run, task, params, prompts, step):
        return {"r": np.repeat(prompts.index + (10 if task == "mm2t" else 0), 2)}, {}

    monkeypatch.setattr(rl_iteration, "sample", lambda *_: None)
    monkeypatch.setattr(rl_iteration, "decode", lambda run, task, params, prompts, rollout: prompts)
    monkeypatch.setattr(rl_iteration, "score_samples", scored)
    mesh = make_mesh(devices=jax.devices()[:1])
    run = SimpleNamespace(
        tasks=("t2i", "mm2t"), mesh=mesh, family=FAMILY, sizes=FAMILY.presets["janus-pro-1b"],
        processor=SimpleNamespace(special=None, image=None), dtype=None, seed=0,
    )  # fmt: skip
    rollout = Rollout(image_window=3)
    config = SimpleNamespace(rollout=rollout, eval=Eval(), denoising=Denoising())
    beats = []
    evaluation = SimpleNamespace(loader=None, rows=2)
    inputs = reports.make_evaluation_inputs(config, run, evaluation, {}, lambda: beats.append(1))
    scores = inputs.score(Prompts(np.arange(2), {}))
    assert {name: values.tolist() for name, values in scores.items()} == {
        "t2i/r": [0, 0, 1, 1], "mm2t/r": [10, 10, 11, 11]
    }  # fmt: skip
    assert beats
    # Other suites draw in the run's windows, which change no image, and the model's usual steps.
    assert inputs.sampling.image_window == 3 and inputs.sampling.unmasking == Unmasking(
        logprobs="none"
    )


def test_seconds_are_those_of_the_step_that_is_logged(options):
    """Unlogged steps count in the mean; the line of one step has nothing of the next."""
    taken = []
    loader = SimpleNamespace(
        steps_per_epoch=4, counts={"bad": 0}, share_unusable=lambda union: None
    )
    run = SimpleNamespace(
        steps=5, schedule=float, train_loader=loader, completions_per_prompt=2, tasks=("t2i",),
        alternate_every=0, phases=Phases(),
    )  # fmt: skip
    sink = SimpleNamespace(
        needs_layout=False,
        add_metrics=lambda step, values: taken.append((step, values)),
        pace=Pace(),
        raise_alarms=lambda guards, lines: None,
    )
    log = step_log(options(log={"every": 2}), run, sink)
    for step in range(1, 6):
        log.clock.take = lambda: {"step_time": float(step), "phase/rollout_seconds": 2.0}  # noqa: B023
        log.add(step, Iteration({"update/applied": Metric(step)}, {}, {}, []))
    assert [(step, values["step_time"]) for step, values in taken] == [(2, 1.5), (4, 3.5), (5, 5.0)]
    assert all(values["perf/images_per_second"] == 4 for _, values in taken)


def test_problems_of_the_data_come_with_those_of_the_model(options, tmp_path):
    tree = options(model={"path": str(tmp_path)}, data={"columns": {"qa_type": "kind"}})
    with pytest.raises(InputError) as error:
        resolve.resolve_run(config_files.validate(tree, "test"))
    joined = "\n".join(error.value.problems)
    assert "data.columns.qa_type" in joined and str(tmp_path) in joined


# ---- weights and the export, before training


def changed_model(model: Path, folder: Path, change: str) -> Path:
    shutil.copytree(model, folder)
    weights = folder / "model.safetensors"
    if change == "missing":
        weights.unlink()
    elif change == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        tensors = load_file(weights)
        tensors["lm_head/kernel"] = tensors["lm_head/kernel"][:, :-1].copy()
        save_file(tensors, weights)
    return folder


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ("missing", "no weights found"),
        ("truncated", "its header promises"),
        ("misshapen", "lm_head/kernel has shape"),
    ],
)
@pytest.mark.parametrize("arguments", [("--check",), ()])
def test_weights_are_checked_with_the_rest(
    options, model, tmp_path, capsys, change, part, arguments
):
    folder = changed_model(model, tmp_path / "model", change)
    tree = options(model={"path": str(folder)}, data={"path": str(tmp_path / "none.parquet")})
    joined = "\n".join(refused(capsys, tree, *arguments))
    assert part in joined and "none.parquet" in joined
    assert not (tmp_path / "run").exists()


def test_an_option_without_effect_is_a_warning_at_the_start(options, tmp_path, capsys):
    path = write_config(tmp_path / "config.yaml", options(guards={"kl": 0.5}))
    warning = "warning: guards.kl: 0.5 has no effect; only algorithm.kl_coef above 0 reads it"
    command.main(["--config", str(path), "--check"])
    assert capsys.readouterr().err.splitlines().count(warning) == 1
    command.main(["--config", str(path), "train.max_steps=1"])
    assert capsys.readouterr().err.splitlines().count(warning) == 1


def test_rewards_of_another_task_are_a_warning(options, tmp_path, capsys):
    path = write_config(tmp_path / "config.yaml", options(algorithm={"tasks": "t2i"}))
    command.main(["--config", str(path), "--check"])
    printed = capsys.readouterr().err.splitlines()
    for name in ("format", "qa_accuracy"):
        assert f"warning: rewards: {name} has no effect; only a task that makes texts reads it" in (
            printed
        )


LATER_TASKS = {
    "reflect": Task("reflecting", (Turn("generate", (CODES, TEXT)),), ("prompt",), 10, "prompt"),
    "selfplay": Task(
        "self-questioning", (Turn("generate", (CODES,)), Turn("own_image", (TEXT,))),
        ("prompt", "qa_problem"), 7, "prompt",
    ),
    "converse": Task(
        "conversation", (Turn("question", (TEXT,)), Turn("question", (TEXT,))),
        ("real_image", "qa_problem"), 11, "qa_problem",
    ),
    "edit": Task("editing", (Turn("edit", (CODES,)),), ("real_image", "instruction"), 8, "prompt"),
    "denoise": Task("editing", (Turn("edit", ("latents",)),), ("real_image",), 9, "prompt"),
}  # fmt: skip
"""Rows that no family can do yet, as in docs/how_to/add_a_task.md."""


def test_a_row_that_no_run_uses_changes_nothing(options, tmp_path, monkeypatch):
    for name, task in LATER_TASKS.items():
        monkeypatch.setitem(TASKS, name, task)
    path = write_config(tmp_path / "config.yaml", options(algorithm={"tasks": "t2i"}))
    command.main(["--config", str(path), "train.max_steps=1", "export.layout=none"])


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("reflect", "has one turn and needs segments of codes and text, which a janus does not"),
        ("converse", "has 2 turns and needs segments of text, then of text, which a janus does"),
        ("selfplay", "the task selfplay has prompts own_image, which a janus does not encode"),
        ("edit", "the task edit has prompts edit, which a janus does not encode"),
        ("denoise", "has one turn and needs segments of latents, which a janus does not make"),
    ],
)
def test_a_task_that_the_model_cannot_do_is_refused(options, monkeypatch, capsys, name, part):
    monkeypatch.setitem(TASKS, name, LATER_TASKS[name])
    assert part in "\n".join(refused(capsys, options(algorithm={"tasks": name})))


def test_an_export_that_transformers_cannot_express(options, model, tmp_path, capsys):
    """Sizes that only the other layouts can hold."""
    config, params = load_config(model, KIND), load_params(model, KIND)
    config = dataclasses.replace(config, image_token_embed=48)
    width = params["generation_head"]["proj_out"]["kernel"].shape[0]
    params["generation_head"] = {
        "proj_out": {"kernel": np.zeros((width, 48)), "bias": np.zeros(48)},
        "vision_head": {
            "kernel": np.zeros((48, config.vq.num_embeddings)),
            "bias": np.zeros(config.vq.num_embeddings),
        },
    }
    folder = tmp_path / "wide"
    save_checkpoint(folder, KIND, config, params, layout="jax")
    shutil.copytree(
        model, folder, dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("model.safetensors", "config.json"),
    )  # fmt: skip
    tree = options(model={"path": str(folder)}, export={"layout": "transformers"})
    (line,) = refused(capsys, tree, "--check")
    assert "export.layout: image_token_embed is 48" in line
    train(tree, "--check", "export.layout=original")


# ---- the loop


def test_each_step_is_logged_before_its_milestones_and_the_next_step():
    told = []

    def iterate(run, state, prompts, step):
        told.append(f"step {step}")
        return state + prompts, f"done {step}"

    def milestone(name: str, due_at: int) -> milestones.Milestone:
        return milestones.Milestone(
            name, lambda step: step == due_at,
            lambda state, step: told.append(f"{name} {step}, state {state}"),
        )  # fmt: skip

    log = SimpleNamespace(
        begin=lambda: told.append("begin"),
        add=lambda step, result: told.append(f"{step}: {result}"),
        clock=SimpleNamespace(restart=lambda: told.append("restart")),
    )
    run = SimpleNamespace(
        iterate=iterate,
        train_loader=SimpleNamespace(iterate=lambda start, stop: [10, 20, 30, 40][: stop - start]),
    )
    due = [milestone("prepare", 4), milestone("draw", 6), milestone("save", 6)]
    assert loop.train(run, 0, range(3, 7), due, log) == 100
    assert told == [
        "begin", "step 3", "4: done 3", "prepare 4, state 10", "restart", "step 4", "5: done 4",
        "step 5", "6: done 5", "draw 6, state 60", "save 6, state 60", "restart", "step 6",
        "7: done 6",
    ]  # fmt: skip
    told.clear()
    assert loop.train(run, 5, range(7, 7), due, log) == 5 and not told, "nothing is left to do"


def test_digests_are_taken_once_after_the_first_step(options, tmp_path, monkeypatch):
    """Two saves and the look before the second process resumes."""
    taken, steps = [], []
    fingerprint, add = fingerprint_untrained, StepLog.add

    def take(run):
        taken.append(len(steps))
        return fingerprint(run)

    def log(self, step, result):
        steps.append(step)
        return add(self, step, result)

    monkeypatch.setattr(training, "fingerprint_untrained", take)
    monkeypatch.setattr(StepLog, "add", log)
    tree = options(
        algorithm={"tasks": "t2i"}, rewards=[{"name": "t2i_pixel_mse"}], train={"max_steps": 3},
        checkpoint={"every": 1},
    )  # fmt: skip
    path = write_config(tmp_path / "config.yaml", tree)
    command.main(["--config", str(path), "train.stop_after=2"])
    assert taken == [1] and steps == [1, 2]
    command.main(["--config", str(path)])
    assert taken == [1, 2] and steps == [1, 2, 3]
