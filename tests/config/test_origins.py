"""What a run was started with: its config's files, and the options on top of them."""

from __future__ import annotations

import datetime

from corl_jax.config import files as config_files
from corl_jax.config.origins import IN_PYTHON, Origin, record_call, record_command
from corl_jax.config.schema import Config

LOWEST = """
output_dir: out
model: {path: weights}
data: {path: rows.parquet}
rewards: [{name: format}]
train: {max_steps: 4}
"""


def test_a_command_names_its_files_and_what_replaces_their_values(tmp_path):
    (tmp_path / "lowest.yaml").write_text(LOWEST)
    (tmp_path / "middle.yaml").write_text("base: lowest.yaml\ntrain: {max_steps: 9}\n")
    top = tmp_path / "top.yaml"
    top.write_text("base: middle.yaml\n")
    origin = record_command(
        str(top),
        [
            "seed=1",
            "seed=2",
            "train.max_steps=3",
            "train={max_steps: 5}",
            "rewards.x=1",
            "model.x.y=a=b",
        ],
    )
    assert origin == Origin(
        str(top),
        [str(tmp_path / name) for name in ("top.yaml", "middle.yaml", "lowest.yaml")],
        {"seed": 2, "train.max_steps": 3, "train": {"max_steps": 5}, "rewards.x": 1,
         "model.x.y": "a=b"},
        {"train.max_steps": 9, "train": {"max_steps": 9}},
    )  # fmt: skip


def test_shipped_configs_go_by_their_names():
    origin = record_command("janus_pro_7b/unified", [])
    assert origin.files == ["janus_pro_7b/unified", "janus_pro_1b/unified"]
    assert origin.overrides == origin.replaced == {}


def test_a_call_in_python_records_the_same(tmp_path):
    options = {
        "train": {"max_steps": 3}, "seed": 1, "output_dir": tmp_path, "day": datetime.date.min,
    }  # fmt: skip
    given = {
        "train.max_steps": 3, "seed": 1, "output_dir": str(tmp_path), "day": "0001-01-01",
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(LOWEST)
    config = config_files.load(tmp_path / "run.yaml")
    assert isinstance(config, Config)
    tree = {"output_dir": "out", "train": {"max_steps": 4}}
    for form, seed in ((tmp_path / "run.yaml", {}), (tree, {}), (config, {"seed": config.seed})):
        origin = record_call(form, options)
        assert origin.overrides == given
        assert origin.replaced == {"output_dir": "out", "train.max_steps": 4} | seed
        assert (origin.config == IN_PYTHON) == (not origin.files)
