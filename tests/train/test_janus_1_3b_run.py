"""The configs of Janus-1.3B run on a tiny checkpoint in its layout, with its roles."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas
import pytest

from corl_jax.data.self_questions.generator import make_generated_record, write_records
from corl_jax.policies import inspect_policy
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.policies.janus.tokens import STRINGS
from corl_jax.train import __main__ as command
from corl_jax.weights.export import convert
from tests.support.tiny_models import tiny_tokenizer_dir
from tests.support.tiny_runs import metric_lines

pytestmark = pytest.mark.usefixtures("module_on_one_device")

CONFIGS = ("self_qa", "self_sft", "self_sft_through", "tpu_v5e_16")
SMALL = (
    "model.dtype=float32", "model.remat=none", "data.max_prompt_length=256",
    "rollout.group_size=2", "rollout.max_new_tokens=8", "train.prompts_per_step=4",
    "train.max_steps=1", "optimizer.warmup_steps=0", "eval.suite=none", "log.images_every=0",
    "log.samples_every=1", "eval.every=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def released(model, tmp_path_factory) -> Path:
    """The tiny model as Janus-1.3B's files are: no tokens for roles, and none for images."""
    folder = tmp_path_factory.mktemp("released") / "Janus-1.3B"
    convert(model, folder, KIND, layout="original")
    tiny_tokenizer_dir(
        folder, image_size=16, patch_size=4, role_tokens=False, sft_format="deepseek_old"
    )
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    # The id stays, with another meaning, so that all others stay as well.
    for token in data["added_tokens"]:
        token["content"] = token["content"].replace(STRINGS["image"], "<unused>")
    vocab = data["model"]["vocab"]
    vocab["<unused>"] = vocab.pop(STRINGS["image"])
    file.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    made = (make_generated_record(1, index) for index in range(16))
    return write_records(tmp_path_factory.mktemp("records") / "rows", made)


def train(name: str, released: Path, records: Path, output: Path, *arguments: str) -> Path:
    paths = (f"model.path={released}", f"data.path={records}", f"output_dir={output}")
    command.main([f"janus_1_3b/{name}", *SMALL, *paths, *arguments])
    return output


def check_run(run: Path, released: Path) -> None:
    (line,) = [line for line in metric_lines(run) if "loss" in line]
    assert line["grad_norm"] > 0 and 0 <= line["self_qa/rewards/self_answer/mean"] <= 1
    table = pandas.read_parquet(run / "samples" / "step_000001.parquet")
    assert len(table) == 8 and table["prompt"].str.startswith("a photo of ").all()
    exported, before = (inspect_policy(folder).processor for folder in (run / "export", released))
    assert exported.special == before.special
    assert exported.choose_roles(None).name == "old"
    assert exported.mm2t_ids("What?") == before.mm2t_ids("What?")


def test_the_check_reads_such_a_checkpoint(released, records, tmp_path, capsys):
    for name in CONFIGS:
        train(name, released, records, tmp_path / "run", "--check")
        out = capsys.readouterr().out
        assert "data: 16 rows to train on" in out and "steps: 1 of 4 prompts" in out
        assert re.search(r"^  self_answer +self_qa +1  none$", out, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_the_configs_train(released, records, tmp_path, name):
    check_run(train(name, released, records, tmp_path / "run"), released)
    settings = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert settings["model_type"] == "janus"  # transformers' layout, from the original one
