"""A config with several stages: what each becomes, and what is refused with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from corl_jax.config import files as config_files
from corl_jax.config.chains import (
    WHEN_HANDED_ON,
    dump_stages,
    has_stages,
    load_stages,
    make_stages,
    stand_in_starts,
)
from corl_jax.errors import InputError
from corl_jax.plan import __main__ as plan

HEAD = """
output_dir: runs/x
model: {path: mini}
data: {path: rows}
rewards: [{name: format}]
algorithm: {tasks: mm2t}
optimizer: {b2: 0.98}
"""
STAGES = """
stages:
  - {name: first, optimizer: {learning_rate: 1.0e-3}, train: {max_steps: 5}}
  - {name: second, seed: 4, rollout: }
"""
TWO = HEAD + STAGES


@pytest.fixture
def write(tmp_path):
    def write_text(text: str, name: str = "run.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write_text


def problems_of(path: Path, *overrides: str) -> list[str]:
    """What is refused, without the folder of the file."""
    with pytest.raises(InputError) as error:
        load_stages(path, overrides)
    return [line.replace(f"{path.parent}/", "") for line in error.value.problems]


def test_a_stage_has_its_options_on_top_of_those_of_the_file(write):
    first, second = load_stages(write(TWO)).values()
    assert (first.optimizer.learning_rate, first.optimizer.b2) == (1e-3, 0.98)
    assert (second.optimizer.learning_rate, second.optimizer.b2) == (4e-6, 0.98)
    assert (first.train.max_steps, second.train.max_steps) == (5, None)
    assert (first.seed, second.seed) == (0, 4)


def test_a_stage_starts_from_the_export_of_the_one_before(write):
    first, second = load_stages(write(TWO)).values()
    assert (first.output_dir, second.output_dir) == ("runs/x/first", "runs/x/second")
    assert (first.model.path, second.model.path) == ("mini", "runs/x/first/export")
    # Small updates must not be rounded away between two stages, unless the user says so.
    assert (first.export.dtype, second.export.dtype) == ("float32", "keep")
    assert load_stages(write(TWO), ["export.dtype=keep"])["first"].export.dtype == "keep"
    assert WHEN_HANDED_ON.tree == {"export": {"dtype": "float32"}}


def test_the_command_line_sets_options_of_all_stages_or_of_one(write):
    overrides = ["stages.second.train.max_steps=7", "train.max_steps=6", "output_dir=runs/y"]
    first, second = load_stages(write(TWO), overrides).values()
    assert (first.train.max_steps, second.train.max_steps) == (6, 7)
    assert (first.output_dir, second.model.path) == ("runs/y/first", "runs/y/first/export")


def test_upper_files_and_python_win_over_the_stages_of_a_base(write):
    write(TWO, "below.yaml")
    path = write("base: below.yaml\ntrain: {max_steps: 9}\nstages: {second: {seed: 5}}")
    stages = load_stages(path)
    assert [config.train.max_steps for config in stages.values()] == [9, 9]
    assert [config.seed for config in stages.values()] == [0, 5]
    stages = make_stages(path, {"seed": 6, "stages.first.seed": 7})
    assert [config.seed for config in stages.values()] == [7, 6]
    other = write("base: below.yaml\nstages: [{name: other}]")
    assert list(load_stages(other)) == ["other"]


def test_stages_that_are_written_out_are_read_again(write):
    stages = load_stages(write(TWO))
    assert load_stages(write(dump_stages(stages), "again.yaml")) == stages


def test_a_config_without_stages_is_one_run(write):
    for text in (HEAD, HEAD + "stages: \n", HEAD + "stages: []\n"):
        stages = load_stages(write(text))
        assert not has_stages(stages) and dump_stages(stages) == config_files.dump(stages[""])
        assert stages == {"": config_files.load(write(HEAD))}


def test_until_an_export_is_there_the_model_before_stands_in(write, tmp_path):
    stages = load_stages(write(TWO + "  - {name: third}\n"), [f"output_dir={tmp_path / 'x'}"])
    assert [config.model.path for config in stand_in_starts(stages).values()] == ["mini"] * 3
    (tmp_path / "x" / "first" / "export").mkdir(parents=True)
    paths = [config.model.path for config in stand_in_starts(stages).values()]
    assert paths == ["mini", *[str(tmp_path / "x/first/export")] * 2]


# ---- what is refused


def test_every_problem_has_its_place(write):
    text = HEAD + (
        "sed: 1\nstages:\n  - {name: a, optimizer: {x: 1}}\n"
        "  - {name: b, seed: no-number, output_dir: y, distributed: {initialize: never}}\n"
        "  - {name: c, model: {path: z}, rewards: [{name: format, weigt: 2}]}\n"
    )
    lines = problems_of(write(text), "stages.b.train.max_steps=-1", "stages.d.seed=1", "stages=1")
    for start in (
        "run.yaml: sed: unknown key; did you mean seed?",
        "run.yaml: stages[0].optimizer.x: unknown key; known in optimizer: name,",
        "run.yaml: stages[1].seed: found 'no-number', expected an integer >= 0",
        "run.yaml: stages[1].output_dir: is no option of one stage: ",
        "run.yaml: stages[1].distributed.initialize: is no option of one stage: ",
        "run.yaml: stages[2].model.path: is no option of one stage: it starts from the stage",
        "run.yaml: stages[2].rewards.0.weigt: unknown key; did you mean rewards.0.weight?",
        "command line: stages.b.train.max_steps: found -1, expected an integer >= 0",
        "command line: stages.d: no stage of this name; known: a, b, c",
        "command line: found 'stages=1', expected stages.NAME.key=value with one of the stages a,",
    ):
        assert sum(line.startswith(start) for line in lines) == 1, (start, lines)
    assert len(lines) == 10


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("sft", "stages: found 'sft', expected a list of blocks with a name and options"),
        ("[sft]", "stages[0]: found 'sft', expected a block with a name and options"),
        ("[{seed: 1}]", "stages[0].name: missing; give the stage a name"),
        ("[{name: a/b}]", "stages[0].name: found 'a/b', expected a text of letters, digits"),
        ("[{name: a}, {name: a}]", "stages[1].name: found 'a' again"),
        ("{a: {seed: 1}}", "stages: found options by name, but no list of stages below them"),
        (
            "[{name: a, export: {layout: none}}, {name: b}]",
            "stages[0].export.layout: found none, but b starts from the export of a",
        ),
        (
            "[{name: a, lora: {rank: 2}, export: {lora: adapter}}, {name: b}]",
            "stages[0].export.lora: found adapter, but b starts from the export of a",
        ),
        (
            "[{name: a, checkpoint: {directory: c}}, {name: b, checkpoint: {directory: c}}]",
            "stages[1].checkpoint.directory: found c, which a has too",
        ),
    ],
)
def test_a_list_of_stages_that_cannot_be_is_refused(write, value, expected):
    (line,) = problems_of(write(f"{HEAD}stages: {value}\n"))
    assert line.startswith(f"run.yaml: {expected}"), line


def test_a_contradiction_names_the_stage_that_makes_it(write):
    text = HEAD + "stages: [{name: a, optimizer: {warmup_steps: 5}, train: {max_steps: 5}}]"
    (line,) = problems_of(write(text))
    assert line.startswith("run.yaml: stages[0].optimizer.warmup_steps: found 5, but the run has 5")


def test_what_reads_one_run_refuses_several(write):
    with pytest.raises(InputError, match=r"run\.yaml: stages: found several stages, expected one"):
        config_files.load(write(TWO))


def test_a_plan_names_the_stages_that_it_leaves_out(write, monkeypatch, capsys):
    from corl_jax.plan import command

    monkeypatch.setattr(command, "run_plan", lambda args, config: config.seed != 4)
    text = TWO + "  - {name: third, stage: sft, rewards: [], algorithm: {}}\n"
    with pytest.raises(SystemExit) as error:
        plan.main([str(write(text)), "--topology", "local"])
    assert error.value.code == 1
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "stage first", "stage second", "stage third is not planned: it samples no completions",
    ]  # fmt: skip
