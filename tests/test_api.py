"""The Python API: samples of the commands, lists and single values, trainings in one process."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import corl_jax
from corl_jax import cli, generate, policies
from corl_jax.api import LoadedModel
from corl_jax.assets import SHIPPED
from corl_jax.config import files as config_files
from corl_jax.config.schema import Config
from corl_jax.config.shipped import find_config
from corl_jax.errors import InputError, Preempted
from corl_jax.runs.log import StepLog
from corl_jax.train.from_python import read_stages
from docs.examples.bag_family import FAMILY
from tests.support import bag_runs, tiny_runs
from tests.support.tiny_models import tiny_image

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "how_to" / "use_from_python.md"
PROMPTS = ["a red circle", "two blue squares left of one green triangle"]
QUESTIONS = ["how many squares?", "left of what?"]
TOKENS = 8


@pytest.fixture(scope="module", autouse=True)
def family():
    """The small second family beside Janus."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(policies.FAMILIES, FAMILY.name, FAMILY)
        yield


@pytest.fixture(scope="module")
def bag(tmp_path_factory):
    """A checkpoint of the second family, rows and rewards."""
    return bag_runs.write_files(tmp_path_factory.mktemp("bag"))


@pytest.fixture(scope="module", params=["janus", "bag"])
def place(request, model, bag):
    return {"janus": model, "bag": bag[0]}[request.param]


@pytest.fixture(scope="module")
def loaded(place):
    return corl_jax.load(place)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two files."""
    folder = tmp_path_factory.mktemp("pictures")
    files = [folder / f"{number}.png" for number in range(2)]
    for number, file in enumerate(files):
        tiny_image(number).save(file)
    return files


def same(image, other) -> bool:
    return np.array_equal(np.asarray(image), np.asarray(other))


# ---- the package


def test_importing_the_package_is_light():
    code = (
        "import sys, corl_jax\n"
        "assert {'load', 'train'} <= set(dir(corl_jax)) and corl_jax.__version__\n"
        "assert not {'jax', 'numpy', 'pydantic', 'PIL'} & sys.modules.keys()\n"
        "assert not hasattr(corl_jax, 'loads')\n"
        "import corl_jax.train.loop\n"
        "assert callable(corl_jax.train) and corl_jax.train.loop.train\n"
        "assert corl_jax.load.__module__ == 'corl_jax.api'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- sampling


def test_images_are_those_of_the_command(loaded, place, tmp_path):
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    generate.main([
        "image", "--model", str(place), *prompts, "--out", str(tmp_path / "out"),
        "--images-per-prompt", "2", "--seed", "7", "--cfg-scale", "2",
    ])  # fmt: skip
    images = loaded.generate_images(PROMPTS, n=2, seed=7, cfg_scale=2, batch_size=3)
    assert [len(row) for row in images] == [2, 2]
    for prompt, row in enumerate(images):
        for number, image in enumerate(row):
            drawn = Image.open(tmp_path / "out" / generate.name_image(prompt, number))
            assert image.mode == "RGB" and image.size == drawn.size
            # Another batch differs by rounding.
            assert np.abs(np.asarray(image, int) - np.asarray(drawn, int)).max() <= 1
    (first,) = loaded.generate_images(PROMPTS[0], seed=7, cfg_scale=2)
    assert np.abs(np.asarray(first, int) - np.asarray(images[0][0], int)).max() <= 1
    (again,) = loaded.generate_images(PROMPTS[0], seed=None, cfg_scale=2, batch_size=None)
    (zero,) = loaded.generate_images(PROMPTS[0], seed=0, cfg_scale=2)
    assert same(again, zero) and not same(again, first)
    assert loaded.generate_images([]) == []


def test_answers_are_those_of_the_command(loaded, place, pictures, tmp_path):
    lines = [
        json.dumps({"image": str(file), "question": question})
        for file, question in zip(pictures, QUESTIONS, strict=True)
    ]
    (tmp_path / "cases.jsonl").write_text("\n".join(lines))
    generate.main([
        "text", "--model", str(place), "--input", str(tmp_path / "cases.jsonl"),
        "--out", str(tmp_path / "answers.jsonl"), "--seed", "3", "--top-k", "5",
        "--max-new-tokens", str(TOKENS), "--system-prompt", "Count.",
    ])  # fmt: skip
    expected = [
        json.loads(line)["text"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()
    ]
    options = {"seed": 3, "top_k": 5, "max_new_tokens": TOKENS, "system_prompt": "Count."}
    assert loaded.answer(pictures, QUESTIONS, **options) == expected
    assert loaded.answer(pictures[0], QUESTIONS[0], **options) == expected[0]


def test_images_in_any_form_and_lists_of_one_side(loaded, pictures):
    image = Image.open(pictures[0])
    array = np.asarray(image)
    options = {"greedy": True, "max_new_tokens": TOKENS}
    forms = [str(pictures[0]), pictures[0], image, array, jax.numpy.asarray(array)]
    texts = loaded.answer(forms, QUESTIONS[0], **options)
    assert len(texts) == len(forms) and len(set(texts)) == 1
    pairs = [loaded.answer(image, question, **options) for question in QUESTIONS]
    assert loaded.answer(image, QUESTIONS, **options) == pairs
    assert loaded.answer((image,), QUESTIONS, **options) == pairs
    assert loaded.answer([], QUESTIONS[0], **options) == []


def test_options_are_as_the_checkpoint_states(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    stated = {"do_sample": False, "max_new_tokens": 3}
    (folder / "generation_config.json").write_text(json.dumps(stated))
    greedy = corl_jax.load(folder)
    assert same(*greedy.generate_images(PROMPTS[0], n=2))
    assert not same(*greedy.generate_images(PROMPTS[0], n=2, greedy=False))
    asked = [[image, question] for image in (tiny_image(0),) for question in QUESTIONS]
    for image, question in asked:
        short = greedy.answer(image, question)
        assert short == greedy.answer(image, question, max_new_tokens=3, greedy=True)
        assert greedy.answer(image, question, max_new_tokens=TOKENS).startswith(short)


def test_dtype_and_how_a_model_is_shown(model):
    assert repr(corl_jax.load(model)) == f"<janus of {model}, float32>"
    half = corl_jax.load(str(model), dtype="bfloat16")
    assert "bfloat16" in repr(half) and isinstance(half, LoadedModel)
    with pytest.raises(InputError, match="dtype: found 'half'; expected float32 or bfloat16"):
        corl_jax.load(model, dtype="half")
    with pytest.raises(InputError, match="nowhere: no such directory"):
        corl_jax.load("nowhere")


# ---- refusals


@pytest.fixture
def tiny(model):
    return corl_jax.load(model)


def problems_of(call, *args, **options) -> list[str]:
    with pytest.raises(InputError) as error:
        call(*args, **options)
    return error.value.problems


def test_problems_of_images_are_told_together(tiny):
    lines = problems_of(
        tiny.generate_images, ["", 4, "a \ud83d"], 0, seed=-1, cfg_scale=-1, temperature=0,
        batch_size=1.5,
    )  # fmt: skip
    starts = [
        "batch_size: found 1.5; expected a whole number at least 1",
        "n: found 0; expected a whole number at least 1",
        "seed: found -1; expected a whole number",
        "temperature: found 0; expected a number above 0; give greedy in its place",
        "cfg_scale: found -1; expected a number at least 0",
        "prompt 0: found an empty text",
        "prompt 1: found int; expected a text",
        "prompt 2: holds a lone surrogate",
    ]
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True)), lines
    (line,) = problems_of(tiny.generate_images, ["a dog", "a very long text " * 200])
    assert line.startswith("prompt 1: found ") and "expected at most 496" in line
    with pytest.raises(TypeError, match="'cfg_scal'; did you mean cfg_scale"):
        tiny.generate_images("a dog", cfg_scal=2)


def test_problems_of_answers_are_told_together(tiny, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    images = [str(tmp_path / "broken.png"), "nowhere.png", np.zeros((4, 4, 3)), "$NO_SUCH_VAR/x"]
    lines = problems_of(
        tiny.answer, images, ["what?", 4], max_new_tokens=0, top_k="3", top_p=2,
        instruction="brief", greedy=True, temperature=0.5,
    )  # fmt: skip
    starts = [
        "temperature: found 0.5, which greedy would ignore",
        "top_p: found 2, which greedy would ignore",
        "max_new_tokens: found 0; expected a whole number at least 1",
        "top_k: found '3'; expected a whole number at least 0",
        "top_p: found 2; expected a number above 0 and at most 1",
        "instruction: found 'brief'; expected one of auto, choice, open, none",
        "image 0: image: found 10 bytes",
        "image 1: image: cannot read nowhere.png: No such file",
        "image 2: found an array of float64 [4, 4, 3]; expected uint8",
        "image 3: $NO_SUCH_VAR/x: $NO_SUCH_VAR is not set",
        "question 1: found int; expected a text",
        "found 4 images and 2 questions; expected as many of both",
    ]
    assert len(lines) == len(starts), lines
    for start in starts:
        assert any(line.startswith(start) for line in lines), (start, lines)
    (line,) = problems_of(tiny.answer, tiny_image(0), "what?", max_new_tokens=2000)
    assert line.startswith("max_new_tokens: found 2000; expected less than 496")
    (line,) = problems_of(tiny.answer, tiny_image(0), ["what?", "x " * 900], max_new_tokens=8)
    assert line.startswith("question 1: found ")


# ---- trainings


def test_a_config_in_any_form_is_the_same(model, rows, tmp_path):
    tree = tiny_runs.options(model, rows, tmp_path / "run")
    file = tiny_runs.write_config(tmp_path / "run.yaml", tree)
    expected = config_files.load(file)
    in_python = tree | {"output_dir": tmp_path / "run", "data": {**tree["data"], "path": rows}}
    for form in (file, str(file), tree, in_python, expected):
        assert read_stages(form, {}) == {"": expected}
        (changed,) = read_stages(
            form, {"seed": 3, "train": {"stop_after": 1}, "optimizer.learning_rate": 0.5}
        ).values()
        assert (changed.seed, changed.train.stop_after, changed.train.max_steps) == (3, 1, 2)
        assert changed.optimizer.learning_rate == 0.5
        (replaced,) = read_stages(form, {"rewards": ({"name": "format"},)}).values()
        assert [reward.name for reward in replaced.rewards] == ["format"]
    assert tree["train"] == {"prompts_per_step": 4, "max_steps": 2}, "the caller's dict"
    (named,) = read_stages("minimal", {"output_dir": tmp_path}).values()
    assert named == config_files.load(find_config("minimal"), [f"output_dir={tmp_path}"])
    assert isinstance(named, Config)


def test_wrong_input_of_a_training_is_raised(model, rows, tmp_path, bag):
    lines = problems_of(corl_jax.train, "minimal", max_stps=1, train={"max_step": 2}, seed="x")
    assert sorted(lines) == [
        "argument: max_stps: unknown key; did you mean train.max_steps?",
        "argument: seed: found 'x', expected an integer >= 0",
        "argument: train.max_step: unknown key; did you mean train.max_steps?",
    ]
    assert "no file and no config" in problems_of(corl_jax.train, "minimol")[0]
    (line,) = problems_of(corl_jax.train, "minimal", {"seed.x": 1})
    assert line == "argument: seed: found {'x': 1}, expected an integer >= 0"
    minimal = read_stages("minimal", {})[""].model_dump()
    (line,) = problems_of(corl_jax.train, minimal | {"seed": -1}, train={"max_steps": 1})
    assert line == "config: seed: found -1, expected an integer >= 0"
    tree = bag_runs.options(bag, tmp_path / "run", data={"path": "no_such_rows"})
    assert any("no_such_rows" in line for line in problems_of(corl_jax.train, tree))
    assert not (tmp_path / "run").exists()


def process_state() -> tuple:
    """What a training changes while it lasts."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return (*handlers, jax.sharding.get_mesh())


@pytest.mark.usefixtures("one_device")
def test_two_trainings_then_sampling_in_one_process(bag, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = process_state()
    tree = bag_runs.options(bag, Path("first"))
    stopped = corl_jax.train(tree, train={"stop_after": 6})
    assert (stopped.output_dir, stopped.steps, stopped.export) == (Path("first"), 6, None)
    first = corl_jax.train(tree, {"log.every": 2}, log={"every": 1})  # resumes
    assert config_files.load("first/config.yaml").log.every == 1, "keywords win"
    assert first.steps == 12 and first.export == Path("first/export")
    assert first.first_evaluation["step"] == 0 and first.last_evaluation["step"] == 12
    name = "eval/mm2t/qa_accuracy"
    assert first.last_evaluation[name] > first.first_evaluation[name] + 0.3
    assert corl_jax.train(tree) == first  # is done already
    assert process_state() == before
    again = corl_jax.train(tree, output_dir="again")
    assert again.last_evaluation[name] == first.last_evaluation[name]
    assert again.export == Path("again/export")
    with pytest.raises(InputError, match=r"seed: found 5"):
        corl_jax.train(tree, seed=5)

    # A model of another family in between, then both trained ones.
    assert corl_jax.load(model).generate_images(PROMPTS[0], greedy=True)
    bare = {"eval": {"suite": "none"}, "export": {"layout": "none"}, "train": {"max_steps": 1}}
    other = corl_jax.train(tree, output_dir="bare", **bare)
    assert (other.steps, other.export, other.last_evaluation) == (1, None, None)
    trained = [corl_jax.load(result.export) for result in (first, again)]
    images = [each.generate_images("a red picture 1", n=4, seed=2) for each in trained]
    assert all(same(*pair) for pair in zip(*images, strict=True))
    answers = [each.answer(images[0][0], "how many? 1", greedy=True) for each in trained]
    assert answers == ["<answer>two</answer>"] * 2
    assert process_state() == before


@pytest.fixture
def interruptible():
    """Whoever runs the tests in the background may ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("one_device", "interruptible")
def test_ctrl_c_saves_and_a_second_one_raises(bag, tmp_path, monkeypatch):
    tree = bag_runs.options(bag, tmp_path / "run", eval={"suite": "none"})
    straight = corl_jax.train(tree, output_dir=tmp_path / "straight")
    before, add = process_state(), StepLog.add

    def press(times: int, step: int):
        def add_and_press(log, done, iteration):
            for _ in range(times if done == step else 0):
                os.kill(os.getpid(), signal.SIGINT)
            return add(log, done, iteration)

        monkeypatch.setattr(StepLog, "add", add_and_press)

    press(times=1, step=2)
    with pytest.raises(Preempted, match="stopped by SIGINT after step 2 of 12, which is saved"):
        corl_jax.train(tree)
    press(times=2, step=4)
    with pytest.raises(KeyboardInterrupt):
        corl_jax.train(tree)
    assert process_state() == before
    monkeypatch.setattr(StepLog, "add", add)
    result = corl_jax.train(tree)
    assert result.steps == 12
    weights = [(run.export / "model.safetensors").read_bytes() for run in (straight, result)]
    assert weights[0] == weights[1]


# ---- the page


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_the_page_runs(model, tmp_path, monkeypatch, capsys):
    """Every block of the page in its order, with a tiny model in place of the shipped ones."""
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": TOKENS}))
    for name in SHIPPED:
        monkeypatch.setitem(SHIPPED, name, folder)
    text, names = PAGE.read_text(encoding="utf-8"), {}
    blocks = re.findall(r"```python\n(.*?)```|\n    (corl-jax [^\n]*)\n", text, re.DOTALL)
    assert len(blocks) == 6 and text.count("```") == 10
    for code, command in blocks:
        if command:
            cli.main(shlex.split(command)[1:])
        else:
            exec(compile(code, str(PAGE), "exec"), names)
    assert [image.size for image in names["images"]] == [(16, 16)] * 4
    assert isinstance(names["text"], str) and len(names["texts"]) == 2
    assert isinstance(names["trained"], LoadedModel)
    assert names["result"].steps == 2 and names["result"].export.is_dir()
    assert "no_such_rows" in capsys.readouterr().out
