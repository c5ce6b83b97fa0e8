"""The export that a run leaves: of its last step and its options, or moved out of the way."""

from __future__ import annotations

import hashlib
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import yaml

import corl_jax
from corl_jax.config import files as config_files
from corl_jax.config.files import validate
from corl_jax.runs import export_record
from corl_jax.runs.export_record import RECORD_FILE, describe_age, list_place_problems
from corl_jax.train import export as model_export

EVALUATIONS = [
    {"step": 0, "eval/draw/accuracy": 0.25, "eval/draw/accuracy_low": 0.2,
     "eval/draw/accuracy_high": 0.3, "eval/t2i/format": 0.5, "eval/t2i/format_stderr": 0.1,
     "eval/seconds": 3.0},
    {"step": 6, "eval/draw/accuracy": 0.5},
    {"step": 12, "eval/draw/accuracy": 0.75, "eval/draw/accuracy_low": 0.7,
     "eval/draw/accuracy_high": 0.8, "eval/t2i/format": None, "eval/t2i/format_stderr": None},
]  # fmt: skip


@pytest.fixture
def refresh(tmp_path, monkeypatch):
    """refresh(step, weight, frozen, **export options): lines, and the steps that were written."""
    written = []

    def export(folder, config, run, state, model_dir, primary, beat, generation, extra):
        written.append((extra[RECORD_FILE]["step"], generation.guidance_scale))
        folder.mkdir(exist_ok=True)
        for name, data in extra.items():
            write = (folder / name).write_bytes
            write(data if isinstance(data, bytes) else json.dumps(data).encode())
        return []

    monkeypatch.setattr(model_export, "export", export)
    run = SimpleNamespace(
        tasks=("t2i",), family=SimpleNamespace(name="janus"),
        train_loader=SimpleNamespace(source=range(1234)),
    )  # fmt: skip

    def call(step, weight=1.0, frozen="digest", cfg_scale=3.0, evaluations=(), path="m", **options):
        tree = {
            "output_dir": "r", "model": {"path": path}, "data": {"path": ["owner/rows", "/data/d"]},
            "rewards": [{"name": "format"}], "export": {"layout": "transformers"} | options,
            "rollout": {"cfg_scale": cfg_scale},
        }  # fmt: skip
        state = SimpleNamespace(params={"kernel": jnp.full((2, 2), weight)}, average=None)
        lines = model_export.refresh_export(
            tmp_path / "export",
            validate(tree, "test"),
            run,
            state,
            step,
            frozen,
            tmp_path,
            True,
            evaluations,
        )
        return lines, written.copy()

    return call


def test_an_export_is_written_again_when_anything_of_it_is_old(refresh):
    assert refresh(12)[1] == [(12, 3.0)]
    lines, written = refresh(12)
    assert written == [(12, 3.0)] and not lines
    lines, written = refresh(15)
    assert written[-1] == (15, 3.0) and "of step 12, now of step 15" in lines[0]
    refresh(15, weight=2.0)  # the step was made again, from an older checkpoint
    refresh(15, weight=2.0, frozen="other")  # model.path has other weights
    refresh(15, weight=2.0, frozen="other", dtype="bfloat16")
    lines, written = refresh(15, weight=2.0, frozen="other", dtype="bfloat16", cfg_scale=4.0)
    assert len(written) == 6 and written[-1] == (15, 4.0)
    assert "of step 15, written again" in lines[0]
    last = {"frozen": "other", "weight": 2.0, "dtype": "bfloat16", "cfg_scale": 4.0}
    assert len(refresh(15, **last, evaluations=EVALUATIONS)[1]) == 7
    assert len(refresh(15, **last, evaluations=EVALUATIONS)[1]) == 7


def test_an_export_that_says_nothing_of_itself_is_old(refresh, tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    lines, written = refresh(4)
    assert written == [(4, 3.0)] and "of an unknown step, now of step 4" in lines[0]


def test_without_an_export_an_old_one_is_moved_away(refresh, tmp_path):
    refresh(12)
    assert refresh(12, layout="none")[0] == []  # it is of this very step
    (tmp_path / "export_of_step_12").mkdir()
    (line,) = refresh(15, layout="none")[0]
    assert not (tmp_path / "export").exists()
    assert (tmp_path / "export_of_step_12-1" / RECORD_FILE).is_file() and "is now" in line
    assert refresh(15, layout="none") == ([], [(12, 3.0)])


def test_guidance_that_transformers_cannot_express_is_said(refresh):
    assert any("rollout.cfg_scale 0.5" in line for line in refresh(1, cfg_scale=0.5)[0])


def test_the_place_of_an_export_is_looked_at_before_training(tmp_path):
    folder = tmp_path / "export"
    assert list_place_problems(folder) == []
    folder.mkdir()
    assert list_place_problems(folder) == []
    (folder / "notes.txt").write_text("mine")
    assert "found files that are not of an export; move it away" in list_place_problems(folder)[0]
    (folder / "adapter_config.json").write_text("{}")
    assert list_place_problems(folder) == []
    (tmp_path / "link").symlink_to(folder)
    assert "found a file or a link, expected a folder" in list_place_problems(tmp_path / "link")[0]


def test_the_age_of_an_export_is_told_while_the_run_is_longer(tmp_path):
    folder = tmp_path / "export"
    assert describe_age(folder, 15) is None
    folder.mkdir()
    for text in ("{", "[1]", '{"step": "../x"}'):
        (folder / RECORD_FILE).write_text(text)
        assert "of an unknown step" in describe_age(folder, 15)
    (folder / RECORD_FILE).write_text('{"step": 12}')
    assert "of step 12" in describe_age(folder, 15) and describe_age(folder, 12) is None
    assert export_record.read_record(folder) == {"step": 12}


# ---- the model card


def read_card(folder):
    """The metadata and the text of an export's card."""
    _, metadata, text = (folder / "export" / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_a_card_says_how_the_model_was_made(refresh, tmp_path):
    refresh(12, evaluations=EVALUATIONS, path="someone/Janus-Pro@main")
    metadata, text = read_card(tmp_path)
    assert metadata == {
        "base_model": "someone/Janus-Pro", "base_model_relation": "finetune",
        "library_name": "transformers", "datasets": ["owner/rows"], "pipeline_tag": "any-to-any",
        "tags": ["reinforcement-learning", "grpo", "janus", "corl_jax"],
    }  # fmt: skip
    assert "|  | step 0 | step 12 |" in text
    assert "| `draw/accuracy` | 25.0% (20.0 - 30.0) | 75.0% (70.0 - 80.0) |" in text
    assert "| `t2i/format` | 0.5 (0.304 - 0.696) | - |" in text  # 1.96 standard errors
    assert "seconds" not in text and "accuracy_low" not in text
    assert "`owner/rows`, `d`, 1,234 rows" in text and "12 of 16 prompts" in text
    assert "| `format` | 1 |" in text and "not evaluated for safety" in text
    for version in (corl_jax.__version__, jax.__version__):
        assert version in text
    options = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL).group(1))
    assert options["model"] == {"path": "someone/Janus-Pro@main"}
    assert options["data"]["path"] == ["owner/rows", "d"]
    # The digest is of the file that a run directory has.
    resolved = config_files.dump(
        validate(options | {"data": {"path": ["owner/rows", "/data/d"]}}, "test")
    )
    assert hashlib.sha256(resolved.encode()).hexdigest() in text


def test_the_card_of_the_base_model_is_kept(refresh, tmp_path):
    base = "---\nlicense: mit\nbase_model: deepseek/Janus\nlanguage: en\n---\n# The base\n"
    (tmp_path / "README.md").write_text(base)
    refresh(12, path=str(tmp_path))
    metadata, text = read_card(tmp_path)
    assert metadata["license"] == "mit" and metadata["base_model"] == "deepseek/Janus"
    assert "language" not in metadata and str(tmp_path) not in text
    assert (tmp_path / "export" / "README_of_base_model.md").read_text() == base
    assert "`README_of_base_model.md` is the model card that came with the base model" in text


@pytest.mark.parametrize(
    "card", [b"---\n: [\n---\n", b"---\n- a\n---\n", b"\xff\xfe", b"# no\n---\n"]
)
def test_a_card_that_is_no_yaml_stops_no_export(refresh, tmp_path, card):
    (tmp_path / "README.md").write_bytes(card)
    refresh(12, path=str(tmp_path))
    assert "license" not in read_card(tmp_path)[0]
    assert (tmp_path / "export" / "README_of_base_model.md").read_bytes() == card
