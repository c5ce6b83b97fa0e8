"""What a training says at its start and at its end, by hand."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest

from corl_jax.config import files as config_files
from corl_jax.runs.directory import RunDir
from corl_jax.train import banner, check, ending, memory
from corl_jax.train.resolve import ResolvedRun, resolve_run
from tests.support import tiny_runs

pytestmark = pytest.mark.usefixtures("module_on_one_device")


@pytest.fixture
def options(model, rows, tmp_path):
    return functools.partial(tiny_runs.options, model, rows, tmp_path / "run")


def plan(tree: dict) -> ResolvedRun:
    return resolve_run(config_files.validate(tree, "test"))


def read_block(text: str) -> dict[str, list[str]]:
    """Label -> its texts; all texts of a block begin in one column."""
    lines = text.splitlines()
    column = len(lines[0]) - len(lines[0].partition("  ")[2].lstrip())
    block: dict[str, list[str]] = {}
    label = ""
    for line in lines:
        label = line[:column].strip() or label
        assert line[column - 1] == " " != line[column], line
        block.setdefault(label, []).append(line[column:])
    return block


def start(tree: dict) -> dict[str, list[str]]:
    planned = plan(tree)
    return read_block(banner.describe_start(planned, RunDir(planned.config.output_dir)))


def test_the_start_of_reinforcement_learning(options, model):
    tree = options(
        train={"micro_batch": 2}, algorithm={"num_iterations": 2},
        eval={"suite": "rewards", "rows": 4, "batch_prompts": 4},
        rewards=[{"name": "format", "weight": 0.5}, {"name": "qa_accuracy"},
                 {"name": "t2i_pixel_mse"}],
    )  # fmt: skip
    block = start(tree)
    planned = plan(tree)
    total = memory.count_parameters(planned.family.abstract(planned.sizes))
    assert block["run"] == [tree["output_dir"]]
    assert block["model"][0].startswith(f"{model}: janus, {total:,} parameters, ")
    assert block["devices"] == ["1 x cpu, attention: xla"]
    assert block["data"] == ["12 rows to train on, 4 held out"]
    assert block["steps"] == [
        "2 of 4 prompts, each with 2 images and 2 texts, in 2 micro-batches, 2 updates per step"
    ]
    assert block["rewards"] == ["t2i: t2i_pixel_mse", "mm2t: 0.5 x format, qa_accuracy"]
    assert block["curves"][0].startswith(f"tensorboard --logdir {tree['output_dir']}/tensorboard")
    _, programs = memory.add_up_memory(memory.estimate_memory(planned))
    assert list(programs) == ["during an update", "while sampling"]
    for program, size in programs.items():
        assert f"{1024 * size:.0f} MiB {program}" in block["memory"][0]
    counted, prompts = block["memory"][1:]
    assert counted.startswith("counted from shapes: parameters, optimizer, gradients")
    assert "activations (remat none), attention scores" in counted
    lengths = memory.measure_prompt_lengths(planned)
    assert prompts.startswith(f"prompts padded to t2i {lengths['t2i']}, mm2t {lengths['mm2t']} ")
    assert prompts.endswith("as in the first batch; at most 128 (data.max_prompt_length)")


def test_the_memory_is_that_of_the_check(options):
    """The sums of the table of --check, in GiB with two decimals."""
    planned = plan(options())
    kept, programs = memory.add_up_memory(memory.estimate_memory(planned))
    lines = check.describe(planned).splitlines()
    sums = [float(line.split()[-1]) for line in lines if line.split()[:1] in (["sum"], ["with"])]
    expected = [round(size, 2) for size in (kept, *programs.values())]
    assert sums[:3] == expected


@pytest.mark.parametrize(
    ("changes", "steps", "labels"),
    [
        ({"stage": "sft", "rewards": []}, "2 of 4 rows, stage sft", 7),
        (
            {"stage": "vq", "rewards": [], "train": {"trainable": ["vqmodel/.*"]}},
            "2 of 4 rows, stage vq", 7,
        ),
        ({"lora": {"rank": 3}}, "2 of 4 prompts, each with 2 images and 2 texts", 8),
    ],
    ids=["sft", "vq", "lora"],
)  # fmt: skip
def test_the_start_of_other_stages(options, changes, steps, labels):
    block = start(options(**changes))
    assert block["steps"] == [steps] and len(block) == labels
    assert ("while sampling" in block["memory"][0]) == ("lora" in changes)
    assert block["model"][0].endswith("in adapters of rank 3") == ("lora" in changes)
    assert ("attention" in block["devices"][0]) == (changes.get("stage") != "vq")


def test_resuming_names_the_date_of_the_checkpoint():
    assert banner.describe_resumption(3, 9, None) == "resuming from step 3/9"
    day = 86400 * 365.25
    assert banner.describe_resumption(3, 9, 30 * day).startswith(
        "resuming from step 3/9 of 2000-01-0"
    )


def test_rates_and_means_change():
    first = {"step": 0, "eval/draw/accuracy": 0.25, "eval/draw/accuracy_low": 0.2,
             "eval/draw/accuracy_high": 0.3, "eval/draw/color": 0.5, "eval/draw/color_low": 0.4,
             "eval/draw/color_high": 0.6, "eval/seconds": 9.0}  # fmt: skip
    last = first | {"step": 8, "eval/draw/accuracy": 0.5, "eval/draw/accuracy_high": 0.75}
    assert ending.describe_change(first, last) == [
        ("draw/accuracy", "25.0% (20.0 - 30.0) -> 50.0% (20.0 - 75.0)")
    ], "a category is no headline"
    assert ending.describe_change(first, first) == [("draw/accuracy", "25.0% (20.0 - 30.0)")]
    means = {"step": 0, "eval/t2i/r": None, "eval/t2i/r_stderr": None, "eval/mm2t/f": 1.0,
             "eval/mm2t/f_stderr": 0.25}  # fmt: skip
    assert ending.describe_change(means, means | {"step": 1, "eval/t2i/r": 0.5}) == [
        ("t2i/r", "none -> 0.5"), ("mm2t/f", "1 (0.51 - 1.49) -> 1 (0.51 - 1.49)")
    ]  # fmt: skip
    assert ending.describe_change(None, last) == []


def test_the_end_names_what_to_type(options, tmp_path):
    folder = RunDir(tmp_path / "a run")
    folder.root.mkdir()
    folder.write_json("summary.json", {"steps": 2, "seconds": 3725.4})
    planned = plan(options())
    block = read_block(ending.describe_stop(planned, folder, 2))
    export = f"'{folder.export}'"
    assert block["finished"] == ["all 2 steps in 1 h 2 min"]
    assert "report" not in block, "there is none"
    folder.path("report.html").write_text("")
    named = read_block(ending.describe_stop(planned, folder, 2))["report"]
    assert named == [f"{folder.path('report.html')}, for a browser"]
    assert block["export"] == [f"{folder.export}, in the layout jax"]
    image, text, curves = block["next"]
    prompt = planned.train_loader.source[0]["prompt"]
    assert image.startswith(f"corl-jax generate image --model {export} --prompt '{prompt}' --out")
    assert text.startswith(f"corl-jax generate text --model {export} --image")
    assert "00000_00.png" in text and "<think>" not in text
    assert curves.startswith("tensorboard --logdir")
    again = read_block(ending.describe_end(planned, folder, nothing_to_do=True))
    assert "nothing is left to do" in again["finished"][0]
    assert "train.max_steps=4 --allow-changed-config" in again["extend"][0]
    assert "after step 1/2" in ending.describe_stop(planned, folder, 1)


def test_commands_are_those_that_the_export_allows(options, tmp_path):
    folder = RunDir(tmp_path)
    names = (
        {"export": {"layout": "none"}},
        {"lora": {"rank": 3}, "export": {"lora": "adapter", "layout": "transformers"}},
    )
    for changes in names:
        (command,) = ending.suggest_commands(plan(options(**changes)), folder)
        assert command.startswith("tensorboard")
    drawings, _ = ending.suggest_commands(
        plan(options(algorithm={"tasks": "t2i"}, rewards=[{"name": "t2i_pixel_mse"}])), folder
    )
    assert drawings.startswith("corl-jax generate image")
    epochs = plan(options(train={"max_steps": None, "epochs": 1.5}))
    assert "train.epochs=3 " in ending.suggest_extension(epochs)


@pytest.mark.parametrize("row", [{}, {"prompt": "x" * 200, "qa_problem": None}])
def test_a_row_that_says_nothing_is_named_in_capitals(row):
    planned = SimpleNamespace(train_loader=SimpleNamespace(source=[row]))
    assert ending.read_example(planned) == ("PROMPT", "QUESTION")
