"""Commands with a Show-o in its original files, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import corl_jax
from corl_jax import evaluation, generate
from corl_jax.errors import Problems
from corl_jax.evaluate import __main__ as evaluate
from corl_jax.evaluate import draw_run
from corl_jax.evaluate.draw_options import check_lengths
from corl_jax.evaluation.drawing import DrawnImage
from corl_jax.evaluation.intervals import Rate
from corl_jax.evaluation.writers.writer import PromptList
from corl_jax.policies.family import Unmasking
from corl_jax.score import __main__ as score
from corl_jax.serve import requests
from corl_jax.serve.engine import Engine
from tests.support import harness_clones, show_o_files
from tests.support.tiny_models import tiny_image

CONTROL = "a <|soi|> circle"
REFUSED = f"the text {CONTROL!r} contains '<|soi|>', a control token of Show-o; remove it"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return show_o_files.original_folder(tmp_path_factory.mktemp("models") / "show-o")


@pytest.fixture(scope="module")
def model(folder):
    return corl_jax.load(folder, dtype="float32")


def refuse(capsys, main, *arguments) -> str:
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in arguments])
    assert error.value.code == 2
    return capsys.readouterr().err


def test_plans_are_refused(folder, tmp_path, capsys):
    said = refuse(
        capsys, generate.main, "image", "--model", folder, "--prompt", "a circle", "--think",
        "--max-new-tokens", 4, "--out", tmp_path / "out",
    )  # fmt: skip
    assert "--think: the task" in said and "which a show_o does not make" in said


def test_control_tokens_are_refused_with_the_number_of_their_prompt(folder, tmp_path, capsys):
    said = refuse(
        capsys, generate.main, "image", "--model", folder, "--prompt", "a circle",
        "--prompt", CONTROL, "--out", tmp_path / "out",
    )  # fmt: skip
    assert f"prompt 1: {REFUSED}" in said


def test_a_list_with_control_tokens_is_refused(model):
    texts, problems = ("a", CONTROL), Problems()
    prompts: Any = [SimpleNamespace(name=str(i), text=text) for i, text in enumerate(texts)]
    check_lengths(model.policy, PromptList(tuple(prompts), ()), problems)
    assert list(problems) == [f"--prompts: prompt 1: {REFUSED}"]


def test_a_server_answers_control_tokens_with_400(model):
    engine = Engine(model.policy, jnp.dtype("float32"), batch_size=2)
    side = model.policy.family.limits(model.policy.sizes).image_side
    engine.prepare_images(requests.read_image_request({"prompt": "a circle"}, side))
    with pytest.raises(requests.ApiError) as error:
        engine.prepare_images(requests.read_image_request({"prompt": CONTROL}, side))
    assert (error.value.status, error.value.message) == (400, f"prompt: {REFUSED}")


def test_a_server_takes_the_number_of_steps(model):
    engine = Engine(model.policy, jnp.dtype("float32"), batch_size=2)
    side = model.policy.family.limits(model.policy.sizes).image_side
    body = {"prompt": "a circle", "seed": 3, "image_steps": 3}
    job = engine.prepare_images(requests.read_image_request(body, side))
    assert job.program.options.unmasking.steps == 3
    (sample,) = engine.draw(job.program, job.rows)
    (expected,) = model.generate_images("a circle", seed=3, image_steps=3)
    np.testing.assert_array_equal(sample.pixels, np.asarray(expected))
    other = engine.prepare_images(requests.read_image_request(body | {"image_steps": 4}, side))
    assert other.program != job.program
    requests.read_image_request(body | {"image_steps": 1024}, side)
    for steps, text in ((0, "found 0"), (1025, "at most 1024"), (10_001, "at most 1024"),
                        (True, "true or false"), (2.5, "")):  # fmt: skip
        with pytest.raises(requests.ApiError, match=f"image_steps: .*{text}") as error:
            requests.read_image_request(body | {"image_steps": steps}, side)
        assert error.value.message.count("image_steps") == 1
    nano = Engine(corl_jax.load("nano", dtype="float32").policy, jnp.dtype("float32"), 1)
    with pytest.raises(requests.ApiError, match="image_steps: found 3; a janus draws") as error:
        nano.prepare_images(requests.read_image_request(body, 32))
    assert error.value.status == 400


def test_an_evaluation_takes_the_number_of_steps(folder, tmp_path, capsys, monkeypatch):
    taken = []

    def draw(policy, texts, pairs, sampling, **_):
        taken.append(sampling)
        yield from (DrawnImage(*pair, np.zeros((16, 16, 3), np.uint8)) for pair in pairs)

    monkeypatch.setattr(draw_run, "draw_prompts", draw)
    clone = harness_clones.make_geneval(tmp_path, {"single_object": 1})
    command = (
        "--suite", "geneval", "--model", folder, "--prompts", clone, "--images-per-prompt", 1,
        "--dtype", "float32", "--out", tmp_path / "out", "--image-steps",
    )  # fmt: skip
    evaluate.main([str(argument) for argument in (*command, 3)])
    assert "image_steps 3, temperature 1" in capsys.readouterr().out
    assert taken[0].unmasking == Unmasking(3, "none") and taken[0].denoising.steps == 3
    assert json.loads((tmp_path / "out/report.json").read_text())["settings"]["image_steps"] == 3
    said = refuse(capsys, evaluate.main, *command, 4)
    assert "holds images of --image-steps 3; this command has 4" in said


def test_the_drawn_worlds_evaluation_takes_the_number_of_steps(
    folder, tmp_path, capsys, monkeypatch
):  # fmt: skip
    taken, row = [], evaluation.SUITES["shapes"]
    report = SimpleNamespace(rates={"a": Rate(1, 0, 1, 1)}, prompts=[])
    watched = dataclasses.replace(
        row, evaluate=lambda inputs: taken.append(inputs.sampling) or report
    )
    monkeypatch.setitem(evaluation.SUITES, "shapes", watched)
    for arguments in ((), ("--image-steps", "3")):
        evaluate.main(["--model", str(folder), "--rows", "1", "--max-new-tokens", "2", *arguments])
    assert [sampling.unmasking.steps for sampling in taken] == [None, 3]
    assert taken[1].denoising.steps == 3
    said = refuse(capsys, evaluate.main, "--model", "nano", "--image-steps", 10_001)
    assert "--image-steps: found 10001; expected a whole number at least 1 and at most" in said
    assert "--image-steps: found 10001; a janus draws the codes of images one by one" in said


def test_a_reward_asks_a_show_o(folder, tmp_path, capsys):
    image = tiny_image(0, (16, 16))
    image.save(tmp_path / "image.png")
    case = {"image": "image.png", "qa_problem": "how many?", "qa_solution": "two"}
    (tmp_path / "cases.jsonl").write_text(json.dumps(case) + "\n")
    cases = ("--input", tmp_path / "cases.jsonl", "--model", folder, "--dtype", "float32")
    score.main([str(x) for x in ("--reward", "answer_logprob", *cases)])
    reward = json.loads(capsys.readouterr().out)["reward"]
    assert 0 < reward < 1 and np.isfinite(reward)
    said = refuse(capsys, score.main, "--reward", "t2i_ti_sim", *cases)
    assert "show_o" in said
