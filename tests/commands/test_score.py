"""`python -m corl_jax.score`: files in, numbers out, and every problem at once."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from corl_jax.data.drawn_world import generator
from corl_jax.params import map_with_path
from corl_jax.policies.janus import network
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.policies.janus.family import FAMILY
from corl_jax.policies.janus.prompts import Processor
from corl_jax.rewards import registry
from corl_jax.score.__main__ import main
from corl_jax.score.command import _read_value
from corl_jax.weights.export import save_checkpoint
from tests.support.tiny_models import tiny_image, tiny_tokenizer_dir
from tests.support.tiny_networks import network_dir

ROOT = Path(__file__).resolve().parents[2]


def cases(folder, *rows):
    path = folder / "cases.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def run(capsys, *arguments):
    """(rewards, stderr) of the command in this process."""
    main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return [json.loads(line)["reward"] for line in out.splitlines()], err


def problems(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    return err


def test_the_command_end_to_end(tmp_path):
    path = cases(
        tmp_path,
        {"completion": "<think>a</think><answer>B</answer>", "id": 7},
        "",
        {"completion": "B"},
    )
    done = subprocess.run(
        [sys.executable, "-m", "corl_jax.score", "--reward", "format", "--input", path],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"index": 0, "line": 1, "reward": 1.0},
        {"index": 1, "line": 3, "reward": 0.0},
    ]
    assert done.stderr == "format: mean 0.5000 over 2 of 2 cases\n"


def test_a_reward_of_lengths_needs_them(tmp_path, capsys):
    path = cases(
        tmp_path, {"completion": "a", "num_tokens": 7}, {"completion": "b", "num_tokens": 12}
    )
    options = ("--reward", "soft_overlong", "--input", path)
    assert run(capsys, *options, "max_tokens=10", "buffer=4")[0] == [-0.25, -1]
    assert "option max_tokens: found null, which is rollout.max_new_tokens" in problems(
        capsys, *options
    )
    bare = cases(tmp_path, {"completion": "a"}, {"completion": "b", "num_tokens": "12"})
    printed = problems(capsys, "--reward", "soft_overlong", "--input", bare, "max_tokens=10")
    assert "line 1: num_tokens is missing" in printed
    assert "line 2: num_tokens: found '12', expected a number of tokens" in printed


def test_answers_with_short_names_options_and_nulls(tmp_path, capsys):
    path = cases(
        tmp_path,
        {"completion": "<answer>A. red</answer>", "problem": "?\nA. red\nB. blue",
         "solution": "A", "type": "MC"},
        {"completion": "x", "qa_solution": None, "qa_type": "OE"},
    )  # fmt: skip
    rewards, err = run(capsys, "--reward", "qa_accuracy", "--input", path)
    assert rewards == [1.0, None]
    assert "mean 1.0000 over 1 of 2 cases" in err
    rewards, err = run(
        capsys, "--reward", "qa_accuracy", "mc=false", "--input", path, "--model", "nowhere"
    )
    assert rewards == [0.0, None]
    assert "--model is not loaded" in err


def test_an_answer_without_a_type_is_open_ended(tmp_path, capsys):
    path = cases(tmp_path, {"completion": "A. red", "solution": "A"},
                 {"completion": "A. red", "solution": "A", "type": "MC"})  # fmt: skip
    assert run(capsys, "--reward", "qa_accuracy", "--input", path)[0] == [0.0, 1.0]
    found, _ = run(capsys, "--reward", "qa_accuracy", "default_type=MC", "--input", path)
    assert found == [1.0, 1.0]
    err = problems(capsys, "--reward", "qa_accuracy", "default_type=MCQ", "--input", path)
    assert "option default_type: found 'MCQ'" in err


def test_question_types_in_usual_spellings_and_no_others(tmp_path, capsys):
    case = {"completion": "B. dog", "problem": "?\nA. cat\nB. dog", "solution": "B"}
    spelt = ("MC", "mcq", "MCQ", "Multiple Choice", "multiple-choice", "multi_choice")
    path = cases(tmp_path, *(case | {"type": kind} for kind in spelt))
    assert run(capsys, "--reward", "qa_accuracy", "--input", path)[0] == [1.0] * len(spelt)
    path = cases(tmp_path, case | {"type": "open-ended"}, case | {"type": "essay"})
    err = problems(capsys, "--reward", "qa_accuracy", "--input", path)
    assert "line 2: qa_type: found 'essay', expected MC or OE" in err and "line 1" not in err
    err = problems(capsys, "--reward", "t2i_qa", "--input", path, "--model", "nowhere")
    assert "line 2: qa_type: found 'essay', expected MC or OE" in err


def test_a_reward_of_the_users_own_reads_columns_of_any_kind(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "def longer(texts, qa_type, least):\n"
        "    return [float(len(t) > n) for t, n in zip(texts, least)]\n"
    )
    path = cases(tmp_path, {"completion": "four", "qa_type": "essay", "least": 3})
    assert run(capsys, "--reward", f"{tmp_path}/mine.py:longer", "--input", path)[0] == [1.0]


def test_images_relative_to_the_file(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    row = generator.make_row(0, 0, encode=False)
    Image.fromarray(row["real_image"]).save(tmp_path / "pictures" / "a.png")
    tiny_image(0, (64, 64)).save(tmp_path / "b.png")
    path = cases(
        tmp_path,
        {"image": "pictures/a.png", "spec": row["spec"], "real_image": "pictures/a.png"},
        {"image": "b.png", "spec": json.loads(row["spec"]), "real_image": None},
    )
    assert run(capsys, "--reward", "shapes_checker", "--input", path)[0] == [1.0, 0.0]
    assert run(capsys, "--reward", "t2i_pixel_mse", "--input", path)[0] == [1.0, None]


def test_a_reward_of_ones_own_gets_all_that_a_case_says(tmp_path, capsys):
    file = tmp_path / "own.py"
    file.write_text(
        "def share(texts, *, of: int, **columns):\n"
        "    return [len(t) / of if n is None else n for t, n in zip(texts, columns['given'])]\n"
    )
    path = cases(tmp_path, {"completion": "four", "given": None}, {"completion": "x", "given": 9})
    found, err = run(capsys, "--reward", f"{file}:share", "--input", path, "of=8")
    assert found == [0.5, 9.0] and "share: mean 4.7500" in err
    err = problems(capsys, "--reward", f"{file}:shares", "--input", path)
    assert "share" in err and "reward:" in err


def test_a_reward_of_ones_own_gets_images_as_they_are(tmp_path, capsys):
    """Decoded to RGB, upright, each in its own size."""
    file = tmp_path / "own.py"
    file.write_text(
        "def shape(images, side):\n"
        "    assert all(image.mode == 'RGB' for image in images)\n"
        "    return [image.width / image.height for image in images]\n"
    )
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter to the right
    tiny_image(0, (16, 8)).convert("L").save(tmp_path / "flat.png")
    tiny_image(0, (16, 8)).save(tmp_path / "turned.jpg", exif=turned)
    tiny_image(0, (30, 10)).convert("CMYK").save(tmp_path / "wide.tiff")
    names = ("flat.png", "turned.jpg", "wide.tiff")
    path = cases(tmp_path, *({"image": name, "side": None} for name in names))
    assert run(capsys, "--reward", f"{file}:shape", "--input", path)[0] == [2.0, 0.5, 3.0]


OWN = """
import random
calls = []
def boom(texts): return one_half(texts)
def one_half(texts): return 1 / 0
def one_number(texts): return 1.0
def chatty(texts):
    print("scoring", {"reward": 99})
    return [0.5] * len(texts)
def counts(texts):
    calls.append(1)
    return [len(calls), 1.0, None if len(calls) == 2 else 2.0]
def fails_later(texts):
    calls.append(1)
    if len(calls) in (2, 3):
        raise OSError(f"call {len(calls)}")
    return [0.0, 1.0, None]
"""


@pytest.fixture
def own(tmp_path):
    """(FILE.py, cases of three answers)"""
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return file, cases(tmp_path, *({"completion": text} for text in ("x", "y", "z")))


def test_a_failing_reward_of_ones_own_fails_the_command(own, capsys):
    """With the user's traceback, and none of ours."""
    file, path = own
    for name, lines in {
        "boom": ["in boom", "def one_half", "ZeroDivisionError: division by zero"],
        "one_number": ["TypeError: returned float; expected a list or array of 3 numbers"],
    }.items():
        with pytest.raises(SystemExit) as caught:
            main(["--reward", f"{file}:{name}", "--input", path])
        out, err = capsys.readouterr()
        assert caught.value.code == 1 and out == ""
        assert err.startswith(f"error: reward {name} ({file}:{name}): its call failed with\n")
        assert all(line in err for line in lines), err
        assert "corl_jax/" not in err


def test_what_a_reward_prints_stays_out_of_standard_output(own, capfd):
    file, path = own
    main(["--reward", f"{file}:chatty", "--input", path])
    out, err = capfd.readouterr()
    assert [json.loads(line)["reward"] for line in out.splitlines()] == [0.5] * 3
    assert "scoring {'reward': 99}\n" in err


def test_repeated_calls_show_what_differs(own, capsys):
    file, path = own
    main(["--reward", f"{file}:counts", "--input", path, "--repeat", "3"])
    out, err = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == [
        {"index": 0, "line": 1, "reward": 1.0, "rewards": [1.0, 2.0, 3.0]},
        {"index": 1, "line": 2, "reward": 1.0, "rewards": [1.0, 1.0, 1.0]},
        {"index": 2, "line": 3, "reward": 2.0, "rewards": [2.0, None, 2.0]},
    ]
    assert "3 calls differ in 2 of 3 cases, most in that of line 3, which is null at times" in err
    main(["--reward", "format", "--input", path, "--repeat", "2"])
    out, err = capsys.readouterr()
    assert [json.loads(line)["rewards"] for line in out.splitlines()] == [[0.0, 0.0]] * 3
    assert err == "format: mean 0.0000 over 6 of 6 cases; 2 calls gave the same\n"
    assert "--repeat: found 0" in problems(
        capsys, "--reward", "format", "--input", path, "--repeat", "0"
    )


def test_calls_that_fail_after_the_first_are_shown(own, capsys):
    file, path = own
    with pytest.raises(SystemExit) as caught:
        main(["--reward", f"{file}:fails_later", "--input", path, "--repeat", "4"])
    out, err = capsys.readouterr()
    assert caught.value.code == 1
    assert [json.loads(line)["rewards"] for line in out.splitlines()] == [
        [0.0, None, None, 0.0], [1.0, None, None, 1.0], [None] * 4,
    ]  # fmt: skip
    assert "2 calls gave the same" in err
    assert "2 of 4 calls failed (2, 3), the first of them with" in err and "OSError: call 2" in err


def test_a_reward_that_asks_a_network(tmp_path, capsys):
    clip = network_dir(tmp_path / "clip", "clip")
    vgg = network_dir(tmp_path / "vgg", "vgg")
    for i in range(2):
        tiny_image(i, (16, 16)).save(tmp_path / f"{i}.png")
    row = {"image": "0.png", "prompt": "a", "real_image": "0.png"}
    path = cases(tmp_path, row, row | {"real_image": "1.png"}, row | {"real_image": None})
    arguments = ("--reward", "t2i_bid_cycle_reward", "--input", path, "image_term=lpips")
    err = problems(capsys, *arguments, "--network", f"lpips={clip}", "--network", "vgg=x")
    assert "networks.lpips" not in err and "--network: found 'vgg=x'" in err
    err = problems(capsys, *arguments, "--network", f"lpips={clip}")
    assert "holds a clip network, expected vgg" in err and "--model: missing" in err
    err = problems(capsys, *arguments, "--network", f"lpips={vgg}", "--network", f"clip={clip}")
    assert "warning: networks.clip: has no effect" in err and "--model: missing" in err


def test_a_reward_that_asks_the_policy(tmp_path, capsys, tiny_config):
    assets = tiny_tokenizer_dir(tmp_path / "assets", image_size=16, patch_size=4)
    processor = Processor.from_dir(assets)
    llama = dataclasses.replace(tiny_config.llama, vocab_size=len(processor.tokenizer))
    config = dataclasses.replace(tiny_config, llama=llama)
    rng = np.random.default_rng(0)
    params = map_with_path(
        lambda path, leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(np.float32),
        network.abstract(config),
    )
    model = tmp_path / "model"
    save_checkpoint(model, KIND, config, params, layout="jax")
    for file in assets.iterdir():
        shutil.copy(file, model)
    for i in range(2):
        tiny_image(i, (16, 16)).save(tmp_path / f"{i}.png")
    rows = [{"image": f"{i}.png", "prompt": f"a red circle {i}"} for i in range(2)]
    path = cases(tmp_path, *rows, {"image": "0.png", "prompt": None})
    rewards, _ = run(capsys, "--reward", "t2i_ti_sim", "--input", path, "--model", model)
    assert rewards[2] is None
    samples = registry.Samples(
        {"prompt": [row["prompt"] for row in rows]},
        images=np.stack([np.asarray(tiny_image(i, (16, 16))) for i in range(2)]),
    )
    context = registry.Context(FAMILY, config, params, processor, jnp.float32, 0, 0)
    expected = registry.REGISTRY["t2i_ti_sim"].function(samples, context)
    np.testing.assert_allclose(rewards[:2], expected, atol=1e-6)

    (model / "tokenizer.json").unlink()
    err = problems(capsys, "--reward", "t2i_ti_sim", "--input", path, "--model", model, "chunk=0")
    assert "tokenizer.json" in err and "option chunk: found 0" in err


def test_all_problems_of_arguments_and_lines_at_once(tmp_path, capsys):
    tiny_image(0, (16, 16)).save(tmp_path / "small.png")
    tiny_image(0, (16, 8)).save(tmp_path / "flat.png")
    path = cases(
        tmp_path,
        "{",
        [1],
        {"image": "none.png", "prompt": 3, "real_image": "small.png"},
        {"prompt": "a", "real_image": None},
        {"image": None, "prompt": "a", "real_image": None},
    )
    err = problems(
        capsys, "--reward", "t2i_bid_cycle_reward", "--input", path, "caption=me",
        "max_new_tokens=many", "oops", "--seed", "-1",
    )  # fmt: skip
    for expected in (
        "argument 'oops': expected key=value",
        "option caption: found 'me'; Input should be 'policy' or 'blip'",
        "option max_new_tokens: found 'many'",
        "--seed: found -1",
        "line 1: not JSON",
        "line 2: found list, expected an object",
        "line 3: image: image: cannot read",
        "line 3: prompt: found 3, expected a text",
        "line 4: image is missing; found prompt, real_image",
        "line 5: image: found null, expected a path",
    ):
        assert expected in err, (expected, err)

    path = cases(tmp_path, {"image": "small.png", "spec": {}}, {"image": "flat.png", "spec": None})
    err = problems(capsys, "--reward", "shapes_checker", "--input", path)
    assert "line 1: spec: found {}" in err
    path = cases(tmp_path, {"image": "small.png", "spec": None},
                 {"image": "flat.png", "spec": None})  # fmt: skip
    err = problems(capsys, "--reward", "shapes_checker", "--input", path)
    assert "line 2: image: found 16x8 pixels, line 1 has 16x16" in err


def test_wrong_files_and_names(tmp_path, capsys):
    assert "--reward: missing" in problems(capsys)
    absent = tmp_path / "none.jsonl"
    err = problems(capsys, "--reward", "fromat", "--input", absent)
    assert "did you mean format?" in err and "No such file" in err
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe{}")
    assert "not UTF-8" in problems(
        capsys, "--reward", "format", "--input", tmp_path / "bytes.jsonl"
    )
    assert "found no cases" in problems(
        capsys, "--reward", "format", "--input", cases(tmp_path, "")
    )
    both = cases(tmp_path, {"completion": "x", "solution": "a", "qa_solution": "b", "type": "OE"})
    assert "found both solution and qa_solution" in problems(
        capsys, "--reward", "qa_accuracy", "--input", both
    )
    neither = cases(tmp_path, {"completion": "x"})
    assert "cls_solution or qa_solution is missing" in problems(
        capsys, "--reward", "oc_accuracy", "--input", neither
    )
    assert "given twice" in problems(
        capsys, "--reward", "format", "--input", neither, "strip=true", "strip=false"
    )


def test_boxes_as_lists_or_texts():
    assert _read_value("od_solution", [[0, 1, 2, 3.5]], Path())[0] is None
    assert "expected [[x1" in _read_value("od_solution", [[0, 1, 2]], Path())[0]
    assert "expected [[x1" in _read_value("od_solution", [[0, 1, 2, True]], Path())[0]


def test_the_list_names_every_reward(capsys):
    main(["--list"])
    out = capsys.readouterr().out
    for name in registry.REGISTRY:
        assert f"\n{name}\n" in f"\n{out}"
    assert "columns: qa_solution [qa_type] [qa_problem]" in out
    assert "mc=True" in out
