"""generation_config.json: read as transformers acts on it, refused by key, carried and written."""

from __future__ import annotations

import argparse
import json
import shutil
from types import SimpleNamespace

import pytest

from corl_jax import sampling_options
from corl_jax.assets import MINI_JANUS
from corl_jax.config.files import validate
from corl_jax.data import instructions
from corl_jax.errors import InputError
from corl_jax.policies.generation_config import FILE, Generation, read_generation
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.train import export
from corl_jax.weights.checkpoint import load_config, load_params
from corl_jax.weights.export import convert, save_checkpoint


def write(folder, **values):
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_text(json.dumps(values))
    return folder


def test_the_shipped_mini_is_sampled_as_it_was_measured():
    """configs/mini/sft.yaml evaluated it with guidance 3 and answers of 48 tokens."""
    stated = read_generation(MINI_JANUS)
    assert (stated.guidance_scale, stated.temperature, stated.max_new_tokens) == (3.0, 1.0, 48)
    assert (stated.top_k, stated.top_p, stated.is_greedy) == (0, 1.0, False)
    assert stated.instruction == "auto" and not stated.not_applied


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("guidance_scale", "x"), ("guidance_scale", -1), ("guidance_scale", float("nan")),
        ("guidance_scale", float("inf")), ("guidance_scale", True), ("guidance_scale", [3]),
        ("guidance_scale", 10**400), ("temperature", -0.5), ("temperature", "1"), ("top_k", 2.5),
        ("top_k", -1), ("top_p", 1.5), ("top_p", float("nan")), ("max_new_tokens", 0),
        ("max_new_tokens", 1e3), ("max_new_tokens", 10**12), ("do_sample", "yes"),
        ("question_instruction", "poem"), ("question_instruction", ["open"]),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_used_is_refused_by_its_key(tmp_path, key, value):
    with pytest.raises(InputError) as error:
        read_generation(write(tmp_path, **{key: value}))
    (problem,) = error.value.problems
    assert problem.startswith(f"{tmp_path / FILE}: {key} is ") and "expected" in problem
    assert len(problem) < 400


def test_a_temperature_of_0_is_read_where_nothing_is_drawn(tmp_path):
    with pytest.raises(InputError, match="temperature is 0"):
        read_generation(write(tmp_path, temperature=0, do_sample=True))
    assert read_generation(write(tmp_path, temperature=0, do_sample=False)).is_greedy
    assert read_generation(write(tmp_path, temperature=0.0)).is_greedy


def test_values_mean_what_transformers_does_with_them(tmp_path):
    assert read_generation(tmp_path) == Generation()
    # Guidance is applied above 1 only; null is what is not stated.
    assert read_generation(write(tmp_path, guidance_scale=0.5)).guidance_scale == 1.0
    assert read_generation(write(tmp_path, guidance_scale=None)).guidance_scale is None
    assert 0 < read_generation(write(tmp_path, top_p=0)).top_p < 1e-3
    assert not read_generation(write(tmp_path, guidance_scale=5)).is_greedy
    stated = read_generation(write(tmp_path, repetition_penalty=1.2, num_beams=1, max_length=600))
    assert stated.not_applied == ("repetition_penalty 1.2", "max_length 600")


def complete(folder, **given):
    names = ("cfg_scale", "temperature", "top_k", "top_p", "max_new_tokens", "instruction")
    args = argparse.Namespace(model=str(folder), greedy=None, **dict.fromkeys(names))
    for name, value in given.items():
        setattr(args, name, value)
    assert not sampling_options.complete_options(args, names)
    return args


def test_options_come_from_the_command_line_then_the_checkpoint_then_the_default(tmp_path):
    args = complete(write(tmp_path, guidance_scale=3, max_new_tokens=40, top_k=7), top_k=9)
    assert (args.cfg_scale, args.max_new_tokens, args.top_k) == (3.0, 40, 9)
    assert (args.temperature, args.top_p, args.instruction, args.greedy) == (1, 1, "none", False)
    assert "cfg_scale 3 (checkpoint)" in args.sampling and "top_k 9 (given)" in args.sampling
    assert "temperature 1 (default)" in args.sampling
    assert complete(tmp_path / "nowhere").cfg_scale == 5.0


def test_do_sample_false_is_greedy_unless_sampling_is_asked_for(tmp_path):
    write(tmp_path, do_sample=False, temperature=0.7)
    assert complete(tmp_path).greedy and complete(tmp_path).temperature is None
    assert not complete(tmp_path, temperature=0.9).greedy
    assert not complete(tmp_path, greedy=False).greedy
    assert complete(tmp_path, greedy=False).temperature == 0.7


def test_a_wrong_file_is_a_problem_of_the_command(tmp_path):
    args = argparse.Namespace(model=str(write(tmp_path, guidance_scale="x")), greedy=None)
    args.cfg_scale = None
    (problem,) = sampling_options.complete_options(args, ("cfg_scale",))
    assert "guidance_scale is 'x'" in problem


# ---- carried and written


def test_conversions_carry_it_through_every_layout(tmp_path):
    stated = read_generation(MINI_JANUS)
    source = MINI_JANUS
    for layout in ("jax", "original", "transformers"):
        convert(source, tmp_path / layout, KIND, layout=layout)
        source = tmp_path / layout
        assert read_generation(source) == stated
        assert (source / FILE).read_bytes() == (MINI_JANUS / FILE).read_bytes()


def test_a_conversion_hands_no_wrong_value_on(tmp_path):
    folder = shutil.copytree(MINI_JANUS, tmp_path / "model")
    write(folder, guidance_scale="x")
    with pytest.raises(InputError, match="guidance_scale is 'x'"):
        convert(folder, tmp_path / "out", KIND, layout="jax")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["jax", "original", "transformers"])
def test_an_export_states_the_runs_values(tmp_path, layout):
    config, params = load_config(MINI_JANUS, KIND), load_params(MINI_JANUS, KIND)
    run = Generation(guidance_scale=7.0, temperature=0.5, top_k=4, max_new_tokens=9)
    save_checkpoint(
        tmp_path / "out",
        KIND,
        config,
        params,
        layout=layout,
        assets_from=MINI_JANUS,
        generation=run.as_json(),
    )
    data = json.loads((tmp_path / "out" / FILE).read_text())
    assert (data["guidance_scale"], data["temperature"], data["top_k"]) == (7.0, 0.5, 4)
    assert data["max_new_tokens"] == 9 and data["question_instruction"] == "auto"
    assert data["generation_kwargs"] == {"boi_token_id": 546}


def sampled(tasks, questions=(), **blocks):
    config = validate(
        {
            "output_dir": "r", "model": {"path": "m"}, "data": {"path": "d"},
            "rewards": [{"name": "format"}],
            "rollout": {"cfg_scale": 3.0, "max_new_tokens": 40, "temperature": 0.9}, **blocks,
        },
        "test",
    )  # fmt: skip
    source = SimpleNamespace(column=lambda name: list(questions))
    run = SimpleNamespace(tasks=tasks, train_loader=SimpleNamespace(source=source))
    return export.describe_sampling(config, run).as_json()


def test_what_a_run_did_not_sample_is_left_to_its_source():
    both = {"do_sample": True, "temperature": 0.9, "guidance_scale": 3.0}
    both |= {"top_k": 0, "top_p": 1.0, "max_new_tokens": 40}
    plain = {"question_instruction": "none"}
    assert sampled(("t2i", "mm2t"), ["what?"]) == both | plain
    assert sampled(("t2i",)) == {k: both[k] for k in ("do_sample", "temperature", "guidance_scale")}
    assert "guidance_scale" not in sampled(("mm2t",), [None])
    assert sampled(("t2i",), eval={"suite": "shapes"}) == both
    assert sampled(("mm2t",), compat={"text_top_k_50": True})["top_k"] == 50
    asked = [
        instructions.ask_open_ended("what?"),
        instructions.ask_multiple_choice("which?", ["a", "b"]),
    ]
    assert sampled(("mm2t",), asked)["question_instruction"] == "auto"


# ---- instructions


def test_a_question_gets_the_instruction_of_the_training():
    plain, listed = "How many are there?", "Which?\nA. one\nB. two"
    assert instructions.add_instruction(plain, "auto") == instructions.ask_open_ended(plain)
    for instruction in ("auto", "choice"):
        asked = instructions.add_instruction(listed, instruction)
        assert asked == instructions.MCQ.format(question=listed)
    assert instructions.add_instruction(listed, "open") == instructions.ask_open_ended(listed)
    assert instructions.add_instruction(plain, "none") == plain
    braces = "What is {this}?"
    assert braces in instructions.add_instruction(braces, "open")
    for instruction in instructions.INSTRUCTIONS:  # one that has it stays
        asked = instructions.ask_open_ended(plain)
        assert instructions.add_instruction(asked, instruction) == asked


def test_lists_of_options_are_told_from_sentences():
    assert instructions.lists_options("Which?\nOptions:\nA. one\nB. two\nC. three")
    assert instructions.lists_options("Which?\n(A) one\n(B) two")
    assert instructions.lists_options("Which?\n A) one\n B) two")
    for text in ("A. b", "I saw A. Then B. came", "A cat\nB movie", "B. one\nA. two"):
        assert not instructions.lists_options(text), text


def test_the_instruction_of_a_data_set_is_recognised():
    choice = instructions.ask_multiple_choice("which?", ["a", "b"])
    open_ended = instructions.ask_open_ended("what?")
    recognise = instructions.recognize_instruction
    assert recognise([choice, choice]) == "choice" and recognise([open_ended]) == "open"
    assert recognise([choice, open_ended]) == "auto"
    assert recognise([choice, "what?"]) is None and recognise([]) is None
