"""The configs of Show-o: checked on files of the published sizes, trained on a tiny Show-o."""

from __future__ import annotations

import functools
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from corl_jax.config.unmasking import Unmasking
from corl_jax.data.self_questions.generator import make_generated_record, write_records
from corl_jax.policies.show_o import network
from corl_jax.train import __main__ as command
from corl_jax.train import build
from corl_jax.train.stages import STAGES
from tests.support import show_o_files, tiny_runs
from tests.support.tiny_runs import metric_lines

pytestmark = pytest.mark.usefixtures("module_on_one_device")

OWN_IMAGES = ("self_qa", "self_sft", "self_sft_through", "lora", "tpu_v5e_16")
SMALL = (
    "model.dtype=float32", "model.remat=none", "data.max_prompt_length=192",
    "rollout.group_size=2", "rollout.max_new_tokens=8", "train.prompts_per_step=4",
    "train.max_steps=1", "optimizer.warmup_steps=0", "eval.suite=none", "eval.every=0",
    "log.images_every=0", "unmasking.steps=3",
)  # fmt: skip
# Two of the config's networks are on the hub.
LOCAL_REWARDS = "rewards=[{name: t2i_pixel_mse}, {name: qa_accuracy}, {name: format}]"
QUERY = "showo.model.layers.0.self_attn.{}_proj.weight"


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    made = (make_generated_record(1, index) for index in range(136))
    return write_records(tmp_path_factory.mktemp("records") / "rows", made)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny_runs.rows_file(tmp_path_factory.mktemp("rows") / "rows.parquet", 32)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Returns a folder with the published names, shapes and sizes of files."""
    root = tmp_path_factory.mktemp("released")

    @functools.cache
    def make(name: str):
        return show_o_files.full_size_folder(root / name, network.PRESETS[name])

    return make


def test_own_images_are_scored_in_the_form_that_the_config_names():
    """Which form says what an answer's gradient reaches; images of data have no trajectory."""
    config = SimpleNamespace(unmasking=Unmasking(logprobs="trajectory", scored_steps=2))
    found = {}
    for name, stage in STAGES.items():
        plan: Any = SimpleNamespace(config=config, stage=stage)
        form = build.choose_unmasking(plan)
        found[name] = form.logprobs, form.scored_steps
    given, own = ("one_shot", 0), ("trajectory", 2)
    assert found == {
        "rl": own, "self_sft": own, "self_sft_through": own, "sft": given, "vq": given,
    }  # fmt: skip


def train(name: str, model, data, output, *arguments: str):
    paths = (f"model.path={model}", f"data.path={data}", f"output_dir={output}")
    command.main([name, *paths, *arguments])
    return output


def check(capsys, name: str, *arguments) -> tuple[str, float]:
    """What `--check` prints, and the GiB during an update."""
    train(name, *arguments, "--check")
    out = capsys.readouterr().out
    assert re.search(r"^  lm_head +119,862,402 ", out, re.MULTILINE)
    (total,) = re.findall(r"during an update.*?with what is kept +([\d.]+)", out, re.DOTALL)
    return out, float(total)


def test_the_check_passes_on_files_of_the_published_sizes(released, records, tmp_path, capsys):
    """GiB on one GPU: masters, moments and gradients in float32, a copy in bfloat16, reference."""
    large = released("show-o-512x512")
    out, total = check(capsys, "show_o_512/self_qa", large, records, tmp_path / "run")
    assert re.search(r"^  self_answer +self_qa +1  none$", out, re.MULTILINE)
    masters = 1_448_176_770 * 4 / 2**30
    assert 4.5 * masters < total < 50
    out, adapted = check(capsys, "show_o_512/lora", large, records, tmp_path / "run")
    assert "trained: adapters of rank 128, alpha 512, on q_proj, v_proj" in out
    assert adapted < total - 3 * masters


@pytest.mark.slow
def test_the_other_configs_pass_it_too(released, records, rows, tmp_path, capsys):
    small, large = released("show-o"), released("show-o-512x512")
    run = tmp_path / "run"
    for name in ("self_sft", "self_sft_through", "tpu_v5e_16"):
        check(capsys, f"show_o_512/{name}", large, records, run)
    few = (LOCAL_REWARDS, "eval.rows=16")
    check(capsys, "show_o_256/unified", small, rows, run, *few)
    check(capsys, "show_o_512/unified", large, rows, run, *few)
    check(capsys, "show_o_256/sft", small, rows, run, "optimizer.warmup_steps=0")


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN_IMAGES)
def test_the_configs_train_and_export_the_original_files(records, tmp_path, name):
    start = show_o_files.original_folder(tmp_path / "show-o")
    run = train(f"show_o_512/{name}", start, records, tmp_path / "run", *SMALL)
    (line,) = [line for line in metric_lines(run) if "loss" in line]
    assert line["grad_norm"] > 0
    before, after = (
        load_file(folder / "pytorch_model.safetensors") for folder in (start, run / "export")
    )
    assert {key: x.shape for key, x in before.items()} == {k: x.shape for k, x in after.items()}
    moved = [x for x in "qkv" if (before[QUERY.format(x)] != after[QUERY.format(x)]).any()]
    assert moved == (["q", "v"] if name == "lora" else [*"qkv"])
    assert all(np.isfinite(x).all() for x in after.values())
