"""A second family of a few dozen lines goes through the unchanged program."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from corl_jax import generate, policies
from corl_jax.errors import InputError
from corl_jax.policies import load_policy
from corl_jax.policies.family import TurnProgram
from corl_jax.score import __main__ as score
from corl_jax.tasks import CODES, TASKS, TEXT, Task, Turn
from corl_jax.train import __main__ as command
from docs.examples.bag_family import FAMILY, PALETTE, WORDS, BagSizes
from tests.support import bag_runs, tiny_runs

STEPS = 12


@pytest.fixture(autouse=True)
def family(monkeypatch):
    monkeypatch.setitem(policies.FAMILIES, FAMILY.name, FAMILY)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return bag_runs.write_files(tmp_path_factory.mktemp("bag"))


def run(files, output, *more, **changes):
    path = tiny_runs.write_config(
        output.with_suffix(".yaml"), bag_runs.options(files, output, **changes)
    )
    command.main(["--config", str(path), *more])
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def numbers(lines):
    """The metrics without times."""
    return [
        {name: x for name, x in line.items() if "second" not in name and "time" not in name}
        for line in lines
    ]


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(policies.FAMILIES, FAMILY.name, FAMILY)
        output = tmp_path_factory.mktemp("runs") / "whole"
        return output, run(files, output)


def test_it_learns_both_tasks(trained):
    output, lines = trained
    evaluations = [line for line in lines if "eval/mm2t/qa_accuracy" in line]
    for name in ("eval/mm2t/qa_accuracy", "eval/t2i/red"):
        assert evaluations[-1][name] > evaluations[0][name] + 0.3
    assert (output / "images" / f"step_{STEPS:06d}.png").is_file()
    last = [line for line in lines if "t2i/sampling/sampling_logp_difference/max" in line][-1]
    for task in ("t2i", "mm2t"):
        assert last[f"{task}/sampling/sampling_logp_difference/max"] < 1e-5


def test_it_resumes_to_the_bit(files, trained, tmp_path):
    run(files, tmp_path / "halves", "train.stop_after=6")
    resumed = run(files, tmp_path / "halves")
    drop = ("perf/", "data/")
    whole, halves = (
        [{k: x for k, x in line.items() if not k.startswith(drop)} for line in numbers(lines)]
        for lines in (trained[1], resumed)
    )
    assert whole == halves


def test_its_export_is_loaded_and_sampled(trained, tmp_path):
    model = load_policy(trained[0] / "export")
    assert model.family is FAMILY and model.sizes == BagSizes()
    generate.main([
        "image", "--model", str(trained[0] / "export"), "--prompt", "a red picture 1",
        "--images-per-prompt", "4", "--out", str(tmp_path / "images"),
    ])  # fmt: skip
    picture = np.asarray(Image.open(tmp_path / "images" / "00000_00.png"))
    assert picture.shape == (4, 4, 3) and {tuple(x) for x in picture.reshape(-1, 3)} <= {
        tuple(color) for color in PALETTE
    }
    Image.fromarray(picture).save(tmp_path / "picture.png")
    generate.main([
        "text", "--model", str(trained[0] / "export"), "--image", str(tmp_path / "picture.png"),
        "--question", "how many? 1", "--greedy", "--out", str(tmp_path / "answers.jsonl"),
    ])  # fmt: skip
    answer = json.loads((tmp_path / "answers.jsonl").read_text())
    assert answer["text"] in WORDS


def test_it_answers_questions_about_its_own_images(files, tmp_path):
    """A reward asks the policy, whose answers get better with training."""
    asked = {"name": "t2i_qa", "options": {"max_new_tokens": 2}}
    lines = run(files, tmp_path / "run", rewards=[asked, {"name": "qa_accuracy"}])
    name = "eval/t2i/t2i_qa"
    scores = [line[name] for line in lines if name in line]
    assert scores[0] < 1 and scores[-1] == 1


def test_a_turn_of_two_segments_learns(files, tmp_path, monkeypatch):
    """A word, then an image in one turn; the reward of the image teaches both."""
    text, codes = FAMILY.turns[(TEXT,),], FAMILY.turns[(CODES,),]

    def sample(sizes, params, prompts, keys, options):
        other_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
        first = text.sample(sizes, params, prompts, other_keys, options)
        return *first, *codes.sample(sizes, params, prompts, keys, options)

    def logprobs(sizes, params, prompts, segments, options):
        first = text.logprobs(sizes, params, prompts, segments[:1], options)
        return *first, *codes.logprobs(sizes, params, prompts, segments[1:], options)

    thinking = dataclasses.replace(FAMILY, turns={((TEXT, CODES),): TurnProgram(sample, logprobs)})
    monkeypatch.setitem(policies.FAMILIES, FAMILY.name, thinking)
    task = Task("thinking", (Turn("generate", (TEXT, CODES)),), ("prompt",), 6, "prompt")
    monkeypatch.setitem(TASKS, "think", task)
    rewards = [{"use": f"{files[2]}:red"}]
    lines = run(files, tmp_path / "run", "algorithm.tasks=think", rewards=rewards)
    scores = [line["eval/think/red"] for line in lines if "eval/think/red" in line]
    assert scores[-1] > scores[0] + 0.3
    # The log-probs of both segments are those of the sampler.
    difference = "sampling/sampling_logp_difference/max"
    last = [line for line in lines if any(difference in name for name in line)][-1]
    found = {name: value for name, value in last.items() if difference in name}
    assert len(found) == 2 and max(found.values()) < 1e-5, found


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"lora": {"rank": 2}}, "lora.rank: found 2, but the model is a bag"),
        (
            {"algorithm": {"tasks": "self_qa"}},
            "the task self_qa has 2 turns and needs segments of codes, then of text, which a bag",
        ),
        ({"stage": "vq", "rewards": [], "eval": {"suite": "none"}}, "has no image tokenizer"),
        (
            {"rewards": [{"name": "t2i_ti_sim"}, {"name": "format"}]},
            "t2i_ti_sim reads hidden states, which a bag does not give",
        ),
        (
            {
                "rewards": [
                    {"name": "t2i_ti_sim", "options": {"scorer": "initial"}},
                    {"name": "format"},
                ]
            },
            "t2i_ti_sim reads hidden states, which a bag does not give",
        ),
    ],
)
def test_what_the_family_lacks_is_refused(files, tmp_path, capsys, changes, problem):
    tree = bag_runs.options(files, tmp_path / "run", **changes)
    path = tiny_runs.write_config(tmp_path / "run.yaml", tree)
    with pytest.raises(SystemExit, match="2"):
        command.main(["--config", str(path)])
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_command_that_scores_refuses_it_too(files, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        score.main([
            "--reward", "t2i_ti_sim", "--model", str(files[0]), "--input", str(tmp_path / "none"),
        ])  # fmt: skip
    assert "t2i_ti_sim reads hidden states, which a bag does not give" in capsys.readouterr().err


def test_a_scorer_that_answers_no_questions_is_refused(files, tmp_path, monkeypatch, capsys):
    """Of the policy and of a frozen scorer; a reward that asks nobody is not."""
    mute = dataclasses.replace(FAMILY, turns={((CODES,),): FAMILY.turns[(CODES,),]})
    monkeypatch.setitem(policies.FAMILIES, FAMILY.name, mute)
    tree = bag_runs.options(
        files, tmp_path / "run", algorithm={"tasks": "t2i"},
        rewards=[
            {"name": "t2i_qa"}, {"name": "t2i_oc", "options": {"scorer": str(files[0])}},
            {"use": f"{files[2]}:red"},
        ],
    )  # fmt: skip
    path = tiny_runs.write_config(tmp_path / "run.yaml", tree)
    with pytest.raises(SystemExit, match="2"):
        command.main(["--config", str(path)])
    found = capsys.readouterr().err
    for name in ("t2i_qa", "t2i_oc"):
        assert f"rewards: {name} asks questions, which a bag does not answer" in found
    assert found.count("which a bag") == 2 and not (tmp_path / "run").exists()


def test_a_config_that_names_no_family_is_refused_by_its_reader(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    with pytest.raises(InputError, match="model_type is 'other'"):
        policies.inspect_policy(tmp_path)
