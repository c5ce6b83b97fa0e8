"""What shipped configs cost: their files, their steps, and the figures that follow from these."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from corl_jax.errors import InputError
from corl_jax.rewards.networks import NETWORKS
from corl_jax.train.resolve import resolve_run
from corl_jax.weights import storage
from corl_jax.weights.checkpoint import open_checkpoint
from corl_jax.weights.layouts import KINDS
from tools.bench import epoch, epoch_page, start
from tools.bench.random_files import draw_on_reading, draw_values, write_reward_network
from tools.bench.sizes import SIZES

SMALL = [
    "data.max_prompt_length=100", "rollout.max_new_tokens=8", "train.prompts_per_step=8",
    "train.micro_batch=8", "rollout.group_size=2", "rollout.batch_prompts=8",
]  # fmt: skip
FEW_ROWS = 2
STARTED = {"devices": 2, "seconds": 7.0}


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Writes few different rows: each has an image to compress."""
    monkeypatch.setattr(start, "ROWS", FEW_ROWS)


def make_step(seconds: float, compiling: float = 0.0) -> dict[str, object]:
    return {
        "record": "step", "step_time": seconds, "phase/compile_seconds": compiling,
        "phase/rollout_seconds": 0.5 * seconds, "phase/reward_seconds": 0.1 * seconds,
        "phase/update_seconds": 0.3 * seconds, "prompt_tokens": {"t2i": 32},
        "process_peak_gib": 40.0,
    }  # fmt: skip


def summarise(name: str, *steps: dict[str, object]) -> dict[str, object]:
    return epoch.summarise(name, epoch.load_config(name), STARTED, steps)


# ---- figures


def test_figures_by_hand():
    """10 s a step of 16 prompts with 8 images and 8 answers each, on two devices."""
    figures = summarise("janus_pro_1b/unified", make_step(99, 80), make_step(8), make_step(12))
    assert figures["completions"] == 16 * 8 * 2
    assert figures["step_s"] == 10 and figures["rollout_s"] == 5
    assert figures["other_s"] == pytest.approx(1.0)
    assert figures["rollouts_per_hour"] == pytest.approx(256 * 360)
    assert figures["gpu_hours_per_1000_steps"] == pytest.approx(2 * 10_000 / 3600)
    assert figures["gpu_hours_per_1000_rollouts"] == pytest.approx(2 * 10_000 / 256 / 3600)
    assert figures["epoch_rows"] == 22_415, "less those held out"
    assert figures["gpu_hours_per_epoch"] == pytest.approx(22_415 / 16 * 20 / 3600)
    assert figures["run_steps"] == 1401, "as the header of the config says"
    assert figures["peak_gib"] == 40


def test_steps_that_compile_are_not_counted():
    steps = make_step(99, 80), make_step(50, 40), make_step(10)
    assert summarise("janus_pro_1b/t2i", *steps)["step_s"] == 10
    with pytest.raises(InputError, match="1 of 1 steps behind the first 1 compiled"):
        summarise("janus_pro_1b/t2i", *steps[:2])


def test_tasks_in_turn_count_the_same():
    name = "janus_pro_1b/alternating"
    steps = make_step(99, 80), make_step(99, 80), make_step(4), make_step(10)
    figures = summarise(name, *steps)
    assert figures["step_s"] == 7 and figures["completions"] == 128
    assert figures["run_steps"] == 2802, "as the header of the config says"
    with pytest.raises(InputError, match="give more steps"):
        summarise(name, *steps, make_step(50, 40), make_step(10))


def test_supervised_steps_have_no_rollouts_and_own_data_no_epoch():
    figures = summarise("janus_pro_1b/sft", make_step(99, 80), make_step(10))
    assert "gpu_hours_per_1000_rollouts" not in figures and "gpu_hours_per_epoch" not in figures
    assert figures["gpu_hours_per_1000_steps"] == pytest.approx(2 * 10_000 / 3600)


# ---- files


@pytest.mark.parametrize(
    "name", ["janus_pro_7b/unified", "show_o_512/self_qa", "janus_flow_1_3b/t2i"]
)
def test_a_config_keeps_its_own_shape(name, tmp_path):
    original = epoch.load_config(name)
    config = epoch.prepare(name, ["mesh.fsdp=1"], 3, epoch.Files(tmp_path, is_tiny=True))
    changed = {"output_dir", "model", "data", "eval", "log", "networks", "export", "mesh"}
    before, after = (x.model_dump(exclude=changed) for x in (original, config))
    before["train"] |= {"max_steps": 3}
    before["optimizer"] |= {"warmup_steps": 0}
    assert before == after
    assert config.model.model_dump(exclude={"path"}) == original.model.model_dump(exclude={"path"})
    assert config.eval.suite == "none" and config.export.layout == "none"


@pytest.mark.parametrize(
    "name", ["janus_pro_1b/think", "show_o_256/unified", "janus_flow_1_3b/think"]
)
def test_prepared_configs_resolve_with_their_own_lengths(name, tmp_path):
    few = ["train.prompts_per_step=8", "train.micro_batch=8"]
    planned = resolve_run(epoch.prepare(name, few, 2, epoch.Files(tmp_path, is_tiny=True)))
    assert planned.steps == 2 and not planned.warnings
    assert {network.name for network in planned.networks} == {"blip", "bert", "lpips"}
    first, second = planned.train_loader.iterate(0, 2)
    assert sorted(first.index % 8) == sorted(second.index % 8), "so all steps have equal shapes"


def test_tasks_in_turn_are_measured_as_often(tmp_path):
    config = epoch.prepare(
        "janus_pro_1b/alternating", SMALL, 4, epoch.Files(tmp_path, is_tiny=True)
    )
    assert config.train.max_steps == 2 + 4


def test_options_of_the_measurement_cannot_be_given(tmp_path):
    with pytest.raises(InputError, match=r"train\.max_steps=9: the measurement sets this option"):
        epoch.prepare(
            "janus_pro_1b/t2i", ["train.max_steps=9"], 3, epoch.Files(tmp_path, is_tiny=True)
        )
    with pytest.raises(InputError, match="found the stages self_sft, rl"):
        epoch.load_config("janus_1_3b/self_sft_then_rl")


def test_many_rows_repeat_a_few(tmp_path):
    rows = pq.read_table(epoch.Files(tmp_path, is_tiny=True).write_rows(5, ("t2i",))).to_pylist()
    assert len(rows) == 5 and rows[:3] == rows[2:]
    assert len({row["prompt"] for row in rows}) == FEW_ROWS


def test_weights_are_drawn_and_take_no_room(tmp_path):
    kind, config = KINDS[NETWORKS["bert"].kind], SIZES["1b"].networks["bert"]
    folder = write_reward_network(tmp_path / "bert", "bert", config)
    file = (folder / "model.safetensors").stat()
    assert file.st_size > 400e6 and file.st_blocks * 512 < 1e6
    before = storage.SafetensorsStore
    with draw_on_reading(tmp_path), open_checkpoint(folder, kind) as checkpoint:
        shapes = checkpoint.leaves.shapes
        path = max(shapes, key=lambda path: math.prod(shapes[path]))
        values = checkpoint.leaves.read(path, None)
    assert storage.SafetensorsStore is before
    assert values.shape == shapes[path]
    assert values.std() == pytest.approx(0.02, rel=0.01)


def test_values_by_name():
    assert (draw_values("norm/scale", (3,), np.dtype(np.float32)) == 1).all()
    assert (draw_values("dense/bias", (3,), np.dtype(np.float32)) == 0).all()
    noise = draw_values("dense/kernel", (5, 2**20), np.dtype(np.float32))
    assert np.isfinite(noise).all() and len(np.unique(noise[:, 0])) == 5


# ---- the page


def write_results(file: Path, tiny: bool = False) -> Path:
    environment = {
        "record": "environment", "device": "NVIDIA H200", "devices": 1, "tiny": tiny,
        "versions": {"python": "3.12.3", "jax": "0.11.2"}, "date": "2026-12-01T10:00:00+00:00",
        "overrides": ["train.micro_batch=4"],
    }  # fmt: skip
    figures = summarise("janus_pro_7b/unified", make_step(99, 80), make_step(36))
    records = environment, {"record": "epoch", **figures}
    file.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return file


def test_the_page_has_a_row_for_each_config(tmp_path, capsys):
    file = write_results(tmp_path / "results.jsonl")
    epoch_page.main([str(file), str(file)])
    page = capsys.readouterr().out
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) == 2
    assert rows[0].startswith("| `janus_pro_7b/unified`, adapters of rank 16 | 16 x 16 | 36.00 |")
    assert "22,415; 28.0" in rows[0] and "1,401; 28.0" in rows[0]
    assert "1 x NVIDIA H200, Python 3.12.3, jax 0.11.2, 2026-12-01" in page
    assert "    python -m tools.bench.epoch janus_pro_7b/unified train.micro_batch=4" in page


def test_the_page_takes_no_other_results(tmp_path):
    with pytest.raises(InputError, match="results of --tiny"):
        epoch_page.read_records([write_results(tmp_path / "tiny.jsonl", tiny=True)])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="no results found"):
        epoch_page.read_records([tmp_path / "empty.jsonl"])


# ---- the command


@pytest.mark.slow
def test_steps_are_made_and_those_that_fail_are_named(tmp_path, capfd):
    out = tmp_path / "epoch.jsonl"
    with pytest.raises(SystemExit, match="janus_1_3b/self_sft_then_rl: not measured"):
        epoch.main(
            ["janus_1_3b/self_sft_then_rl", "janus_pro_1b/sft", "--tiny", "--steps", "2", *SMALL,
             "--out", str(out)]
        )  # fmt: skip
    environment, figures = map(json.loads, out.read_text().splitlines())
    assert environment["record"] == "environment" and environment["tiny"]
    assert figures["config"] == "janus_pro_1b/sft" and figures["prompts"] == 8
    assert 0 < figures["update_s"] < figures["step_s"]
    said = capfd.readouterr().err
    assert "janus_pro_1b/sft, step 2:" in said and "found the stages self_sft, rl" in said
