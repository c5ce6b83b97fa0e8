"""The config: what is read, what is refused, and in which words."""

from __future__ import annotations

import textwrap

import pytest
import yaml

from corl_jax import config_checks, config_file
from corl_jax.errors import InputError
from corl_jax.rewards import registry

MINIMAL = """
    output_dir: out
    model: {path: weights}
    data: {path: rows.parquet}
    rewards: [{name: format}]
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return path

    return write


def problems(path, *overrides):
    with pytest.raises(InputError) as error:
        config_file.load(path, list(overrides))
    return error.value.problems


def test_defaults_are_the_papers_and_the_config_is_frozen(write):
    loaded = config_file.load(write(MINIMAL))
    assert loaded.rollout.group_size == 8 and loaded.rollout.cfg_scale == 5.0
    assert loaded.grpo.mm2t_weight == 0.8 and loaded.optimizer.learning_rate == 4e-6
    with pytest.raises(ValueError, match="frozen"):
        loaded.seed = 1


def test_dump_reads_back_as_the_same_config(write):
    loaded = config_file.load(write(MINIMAL), ["optimizer.learning_rate=3e-7", "train.max_steps=5"])
    again = config_file.load(write(config_file.dump(loaded), "again.yaml"))
    assert again == loaded
    assert yaml.safe_load(config_file.dump(loaded))["optimizer"]["learning_rate"] == 3e-7


def test_base_is_relative_to_the_file_and_blocks_are_merged(write, tmp_path):
    write(MINIMAL + "    optimizer: {b1: 0.8, b2: 0.9}\n", "base.yaml")
    (tmp_path / "deeper").mkdir()
    path = write(
        "base: ../base.yaml\noptimizer: {b2: 0.5}\nrewards: [{name: a}]", "deeper/run.yaml"
    )
    loaded = config_file.load(path, ["optimizer.b1=0.7"])
    assert (loaded.optimizer.b1, loaded.optimizer.b2) == (0.7, 0.5)
    assert [reward.name for reward in loaded.rewards] == ["a"]  # lists are replaced, not merged


def test_base_that_leads_back_to_itself(write):
    write("base: b.yaml", "a.yaml")
    assert "leads back to itself" in problems(write("base: a.yaml", "b.yaml"))[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("2E+3", 2000.0), ("1.e-3", 1e-3), ("0.5", 0.5), ("3", 3.0)],
)
def test_numbers_as_people_write_them(write, text, value):
    loaded = config_file.load(write(MINIMAL), [f"optimizer.eps={text}"])
    assert loaded.optimizer.eps == value
    option = config_file.load(write(MINIMAL), [f"rewards=[{{name: x, options: {{y: {text}}}}}]"])
    assert option.rewards[0].options["y"] == value


def test_words_stay_words(write):
    loaded = config_file.load(write(MINIMAL), ["output_dir=run1e", "data.path=[a, b]"])
    assert loaded.output_dir == "run1e" and loaded.data.path == ["a", "b"]


def test_every_problem_is_reported_at_once(write):
    text = MINIMAL + "    train: {prompts_per_step: 0, micro_batches: 2}\n    sede: 1\n"
    found = problems(write(text), "optimizer.b1=2", "no-equals-sign", "seed.x.y=1")
    joined = "\n".join(found)
    for part in (
        "train.prompts_per_step: found 0",
        "train.micro_batches: unknown key; did you mean micro_batch?",
        "sede: unknown key; did you mean seed?",
        "optimizer.b1: found 2",
        "no-equals-sign",
    ):
        assert part in joined
    assert all("\n" not in line for line in found)


@pytest.mark.parametrize(
    "override",
    [
        "train.prompts_per_step=true",
        "train.prompts_per_step='16'",
        "train.prompts_per_step=1.5",
        "optimizer.learning_rate=true",
        "optimizer.learning_rate=.nan",
        "optimizer.learning_rate=.inf",
        "optimizer.learning_rate=-1e-4",
        "optimizer.learning_rate='1e-4'",
        "rollout.group_size=1",
        "rollout.top_p=0",
        "grpo.mask_truncated=1",
        "grpo.tasks=both",
        "mesh.data=true",
        "seed=-1",
        "data.path=5",
        "train=null",
        "rewards=format",
    ],
)
def test_wrong_values_are_refused_with_key_and_value(write, override):
    (line,) = problems(write(MINIMAL), override)
    assert f": {override.partition('=')[0]}: found " in line


def test_a_value_of_several_types_is_one_problem(write):
    (line,) = problems(write(MINIMAL), "data.path=5")
    assert "valid string or Input should be a valid list" in line and "str:" not in line


def test_unknown_key_of_a_reward_names_its_place(write):
    (line,) = problems(write(MINIMAL), "rewards=[{name: a}, {name: b, wieght: 2}]")
    assert "rewards.1.wieght: unknown key; did you mean weight?" in line


def test_missing_keys_say_how_to_give_them(write):
    lines = problems(write(""))
    assert any("model: missing; give it in the file or as model=VALUE" in line for line in lines)
    assert any("output_dir: missing" in line for line in lines)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["train.micro_batch=5"], "does not divide train.prompts_per_step 16"),
        (["rollout.batch_prompts=3"], "nearest divisors 2, 4"),
        (["rewards=[]"], "needs at least one"),
        (["compat.text_top_k_50=true", "rollout.top_k=7"], "contradicts compat.text_top_k_50"),
        (
            ["compat.image_logprobs_unshifted=true", "grpo.image_logprobs=guided"],
            "needs grpo.image_logprobs conditional",
        ),
    ],
)
def test_options_that_contradict_each_other(write, overrides, part):
    (line,) = problems(write(MINIMAL), *overrides)
    assert part in line


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["sft.cfg_dropout=0.2"], "sft.cfg_dropout: found 0.2, but objective grpo does not read"),
        (["vq.commitment=1.0"], "leave it at 0.25 or set objective to vq"),
        (["objective=sft"], "rewards: found format, but objective sft learns from none"),
        (["objective=vq", "rewards=[]", "grpo.kl_coef=0.1"], "grpo.kl_coef: found 0.1"),
        (["grpo.reference=host"], "grpo.reference: found host, but with grpo.kl_coef 0"),
        (["objective=sft", "rewards=[]", "vq.commitment=1.0"], "vq.commitment: found 1.0"),
        (["objective=sft", "rewards=[]", "compat.text_top_k_50=true"], "sft has no rollouts"),
        (["compat.mc_as_open_ended=true"], "rewards is listed (qa_accuracy)"),
        (["compat.answer_single_line=true"], "(qa_accuracy or oc_accuracy)"),
        (["compat.ti_sim_fixed_spans=true"], "(t2i_ti_sim)"),
        (["compat.format_without_strip=true", "rewards=[{name: format_tag}]"], "(format)"),
        (["compat.text_top_k_50=true", "grpo.tasks=t2i"], "grpo.tasks t2i leaves out"),
        (["compat.image_logprobs_unshifted=true", "grpo.tasks=mm2t"], "mm2t leaves out"),
        (["optimizer.name=lion", "optimizer.eps=1e-6"], "lion does not use it; leave it at 1e-08"),
        (["optimizer.name=sgd", "optimizer.b2=0.9"], "optimizer.b2: found 0.9, but sgd"),
        (["optimizer.name=adafactor", "optimizer.b1=0.8"], "optimizer.b1: found 0.8"),
    ],
)
def test_options_that_the_run_would_ignore(write, overrides, part):
    (line,) = problems(write(MINIMAL), *overrides)
    assert part in line


def test_options_that_only_look_ignored(write):
    path = write(MINIMAL)
    for overrides in (
        ["objective=sft", "eval.suite=rewards"],  # the evaluation scores them
        ["objective=sft", "eval.suite=rewards", "compat.format_without_strip=true"],
        ["objective=vq", "rewards=[]", "compat.bfloat16_master=true", "grpo.kl_coef=0.0"],
        ["optimizer.name=sgd", "optimizer.b1=0.5"],  # its momentum
        ["optimizer.name=lion", "optimizer.b2=0.5"],
    ):
        config_file.load(path, overrides)


def test_switches_of_rewards_are_the_registrys():
    found = {switch: tuple(x[0] for x in effects) for switch, effects in registry.COMPAT.items()}
    assert found == config_checks.SWITCH_USERS


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [1", "not valid YAML"),
        ("- a", "expected a mapping"),
        ("seed: 1\nseed: 2", "seed is given twice"),
        ("train:\n  epochs: 1.0\n  epochs: 2.0", "epochs is given twice"),
    ],
)
def test_files_that_are_no_config(write, text, part):
    assert part in problems(write(text))[0]


def test_file_that_is_not_there(tmp_path):
    assert "No such file" in problems(tmp_path / "none.yaml")[0]
