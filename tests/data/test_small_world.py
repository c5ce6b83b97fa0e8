"""The small drawn world: rows, its checker, its questions, and rows with the faults of the web."""

from __future__ import annotations

import collections
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from corl_jax.data import __main__ as data_command
from corl_jax.data.drawn_world import checker, generator, scene
from corl_jax.data.drawn_world.scene import SMALL
from corl_jax.errors import InputError
from corl_jax.rewards.text import format_reward, qa_accuracy
from tools.small_models import web

ROWS = 600


@pytest.fixture(scope="module")
def rows():
    return [generator.make_row(11, index, world="small", encode=False) for index in range(ROWS)]


def test_checker_accepts_what_the_renderer_draws(rows):
    images = np.stack([row["real_image"] for row in rows])
    passed = checker.check_all(images, [row["spec"] for row in rows])
    assert np.mean(passed) >= 0.995


def test_checker_refuses_other_demands(rows):
    detections = checker.detect_all(np.stack([row["real_image"] for row in rows]))
    specs = [json.loads(row["spec"]) for row in rows]
    keys = [scene.normalize_spec(spec) for spec in specs]
    passed = collections.defaultdict(list)
    for first in range(ROWS):
        second = (first * 7 + 3) % ROWS
        if keys[first] != keys[second]:
            verdict = checker.satisfies(detections[first], specs[second])
            passed[specs[second]["category"]].append(verdict)
    verdicts = [verdict for listed in passed.values() for verdict in listed]
    assert np.mean(verdicts) < 0.08
    assert set(passed) == set(scene.CATEGORIES)


def test_pictures_hold_one_object_a_cell_of_the_worlds_shapes_and_colors(rows):
    for row in rows[:100]:
        assert row["real_image"].shape == (32, 32, 3)
        cells = set()
        detections = checker.detect(row["real_image"])
        for detection in detections:
            assert detection.shape in SMALL.shapes
            assert detection.color in SMALL.colors
            cells.add(tuple(int(2 * place) for place in detection.center))
        assert len(cells) == len(detections) <= 3


def test_worked_answers_are_right_and_well_formed(rows):
    for row in rows:
        answer, kind = row["sft_answer"], row["qa_type"]
        assert format_reward(answer) == 1.0
        assert qa_accuracy(answer, row["qa_solution"], kind, problem=row["qa_problem"]) == 1.0


def test_questions_stand_without_instructions(rows):
    for row in rows:
        question, *options = row["qa_problem"].split("\n")
        assert question.endswith("?")
        assert bool(options) == (row["qa_type"] == "MC")


def test_splits_share_no_held_out_demand():
    def demands(split):
        rows = (
            generator.make_row(2, i, split=split, world="small", encode=False) for i in range(400)
        )
        specs = (json.loads(row["spec"]) for row in rows)
        return {
            scene.normalize_spec(spec)
            for spec in specs
            if spec["category"] in scene.SPLIT_CATEGORIES
        }

    train, test = demands("train"), demands("test")
    assert train and test and not train & test


def test_the_command_writes_the_small_world(tmp_path):
    data_command.main(
        ["--out", str(tmp_path / "data"), "--rows", "3", "--seed", "5", "--world", "small"]
    )
    (file,) = (tmp_path / "data").glob("*.parquet")
    table = pq.read_table(file).to_pylist()
    assert table == [generator.make_row(5, index, world="small") for index in range(3)]
    with pytest.raises(InputError, match="--image-size: 31 found, an integer of at least 32"):
        generator.write_rows(tmp_path / "other", 1, 0, image_size=31, world="small")


@pytest.mark.parametrize(("side", "world"), [(32, "small"), (47, "small"), (48, "full")])
def test_the_world_fits_the_size_of_pictures(side, world):
    assert scene.choose_world(side) == world


def test_rows_from_the_web_have_their_faults_in_the_shares_asked_for(tmp_path):
    file = web.write(tmp_path / "web", 300, 1, "small", 0.5, 0.7)
    read = pq.read_table(file).to_pylist()
    sound = [generator.make_row(1, index, split="train", world="small") for index in range(300)]
    other_prompt = np.mean([a["prompt"] != b["prompt"] for a, b in zip(read, sound, strict=True)])
    terse = [row["sft_answer"].startswith("<think></think><answer>") for row in read]
    assert 0.4 < other_prompt < 0.6  # 3.3 standard deviations of 300 draws
    assert 0.61 < np.mean(terse) < 0.79
    for name in ("real_image", "spec", "qa_problem", "qa_solution"):
        assert [row[name] for row in read] == [row[name] for row in sound]
