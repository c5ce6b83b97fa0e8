"""The export that a run leaves: of its last step and its options, or moved out of the way."""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from corl_jax.config.files import validate
from corl_jax.runs import export_record
from corl_jax.runs.export_record import RECORD_FILE, describe_age, list_place_problems
from corl_jax.train import export as model_export


@pytest.fixture
def refresh(tmp_path, monkeypatch):
    """refresh(step, weight, frozen, **export options): lines, and the steps that were written."""
    written = []

    def export(folder, config, run, state, model_dir, primary, beat, generation, extra):
        written.append((extra[RECORD_FILE]["step"], generation.guidance_scale))
        folder.mkdir(exist_ok=True)
        for name, data in extra.items():
            (folder / name).write_text(json.dumps(data))
        return []

    monkeypatch.setattr(model_export, "export", export)
    run = SimpleNamespace(tasks=("t2i",))

    def call(step, weight=1.0, frozen="digest", cfg_scale=3.0, **options):
        tree = {
            "output_dir": "r", "model": {"path": "m"}, "data": {"path": "d"},
            "rewards": [{"name": "format"}], "export": options,
            "rollout": {"cfg_scale": cfg_scale},
        }  # fmt: skip
        state = SimpleNamespace(params={"kernel": jnp.full((2, 2), weight)})
        lines = model_export.refresh_export(
            tmp_path / "export", validate(tree, "test"), run, state, step, frozen, tmp_path, True
        )
        return lines, written.copy()

    return call


def test_an_export_is_written_again_when_anything_of_it_is_old(refresh):
    assert refresh(12)[1] == [(12, 3.0)]
    lines, written = refresh(12)
    assert written == [(12, 3.0)] and "is of step 12 and stays" in lines[0]
    lines, written = refresh(15)
    assert written[-1] == (15, 3.0) and "of step 12, now of step 15" in lines[0]
    refresh(15, weight=2.0)  # the step was made again, from an older checkpoint
    refresh(15, weight=2.0, frozen="other")  # model.path has other weights
    refresh(15, weight=2.0, frozen="other", dtype="bfloat16")
    lines, written = refresh(15, weight=2.0, frozen="other", dtype="bfloat16", cfg_scale=4.0)
    assert len(written) == 6 and written[-1] == (15, 4.0)
    assert "of step 15, written again" in lines[0]


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
