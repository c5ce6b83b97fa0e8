"""What the messages of a wrong config say: origin of the value, what was meant, what is valid."""

from __future__ import annotations

import pytest

from corl_jax.config import files as config_files
from corl_jax.config import unknown_keys
from corl_jax.config.options import find_section, find_type, list_keys
from corl_jax.config.unknown_keys import OTHER_NAMES, REMEDIES, suggest_option
from corl_jax.errors import InputError

MINIMAL = """
output_dir: out
model: {path: weights}
data: {path: rows.parquet}
rewards: [{name: format}]
"""
MODEL_KEYS = "path, dtype, remat, attention, logprob_chunk"


@pytest.fixture
def refuse(tmp_path, monkeypatch):
    """Returns a function that gives the problems of run.yaml with overrides."""
    monkeypatch.chdir(tmp_path)

    def refuse(*overrides: str, text: str = MINIMAL) -> list[str]:
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(InputError) as error:
            config_files.load("run.yaml", list(overrides))
        return error.value.problems

    return refuse


# ---- unknown keys


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        # typing errors
        ("train.max_step=5", "train.max_step: unknown key; did you mean train.max_steps?"),
        ("sede=1", "sede: unknown key; did you mean seed?"),
        ("rollout.group_sise=4",
         "rollout.group_sise: unknown key; did you mean rollout.group_size?"),
        ("optimizer.lr=1", "optimizer.lr: unknown key; did you mean optimizer.learning_rate?"),
        ("modle.path=x", "modle: unknown key; did you mean model?"),
        ("modle=x", "modle: unknown key; did you mean model?"),
        # options of other blocks
        ("learning_rate=1", "learning_rate: unknown key; did you mean optimizer.learning_rate?"),
        ("max_steps=10", "max_steps: unknown key; did you mean train.max_steps?"),
        ("learning_rte=1", "learning_rte: unknown key; did you mean optimizer.learning_rate?"),
        ("train.learning_rate=1",
         "train.learning_rate: unknown key; did you mean optimizer.learning_rate?"),
        ("trainer.lr=1", "trainer.lr: unknown key; did you mean optimizer.learning_rate?"),
        ("lora_rank=4", "lora_rank: unknown key; did you mean lora.rank?"),
        ("every=4",
         "every: unknown key; did you mean checkpoint.every, eval.every or log.every?"),
        ("algorithm.grpo.seed=1", "algorithm.grpo.seed: unknown key; did you mean seed?"),
        # names of other libraries
        ("lr=1", "lr: unknown key; did you mean optimizer.learning_rate?"),
        ("beta=0.1", "beta: unknown key; did you mean algorithm.kl_coef?"),
        ("grpo.beta=0.1", "grpo.beta: unknown key; did you mean algorithm.kl_coef?"),
        ("algorithm.grpo.beta=1",
         "algorithm.grpo.beta: unknown key; did you mean algorithm.kl_coef?"),
        ("optimizer.beta=0.9",
         "optimizer.beta: unknown key; did you mean optimizer.b1 or optimizer.b2?"),
        ("num_generations=4", "num_generations: unknown key; did you mean rollout.group_size?"),
        ("grpo.num_generations=4",
         "grpo.num_generations: unknown key; did you mean rollout.group_size?"),
        ("train.batch_size=4",
         "train.batch_size: unknown key; did you mean train.prompts_per_step?"),
        ("epsilon=0.2",
         "epsilon: unknown key; did you mean algorithm.clip_low or algorithm.clip_high?"),
        ("resume_from_checkpoint=true",
         "resume_from_checkpoint: unknown key; the same command again resumes its run"),
        # nothing near
        ("model.bar=1", f"model.bar: unknown key; known in model: {MODEL_KEYS}"),
        ("sft.foo=1",
         "sft.foo: unknown key; known in sft: tasks, caption_column, text_column, t2i_weight, "
         "repa_weight, released, redraw"),
        ("lora.xyz=1", "lora.xyz: unknown key; known in lora: rank, alpha, targets"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_answered_with_what_was_meant(refuse, override, problem):
    assert refuse(override) == [f"command line: {problem}"]


def test_an_unknown_block_is_answered_key_by_key_only_where_that_helps(refuse):
    block = "grpo: {kl_coef: 0.1, clip_low: 0.1, beta: 0.1, foo: 1}\n"
    assert refuse(text=MINIMAL + block) == [
        "run.yaml: grpo.beta: unknown key; did you mean algorithm.kl_coef?",
        "run.yaml: grpo: has a new name; use algorithm",
    ]
    (line,) = refuse(text=MINIMAL + "foo: {bar: 1, baz: {}}\n")
    assert line.startswith("run.yaml: foo: unknown key; known: output_dir, stage, seed, model,")


def test_a_reward_is_compared_with_the_keys_of_rewards_only(refuse):
    assert refuse("rewards=[{name: format, wieght: 2, temperature: 1}]") == [
        "command line: rewards.0.wieght: unknown key; did you mean rewards.0.weight?",
        "command line: rewards.0.temperature: unknown key; known in rewards.0: "
        "name, use, weight, options, timeout_s, max_failures",
    ]


def test_a_key_with_dots_in_a_file_is_a_block(refuse):
    assert refuse(text=MINIMAL + "train.max_steps: 5\n") == [
        "run.yaml: train.max_steps: unknown key; write max_steps within the block train"
    ]


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_every_name_of_another_library_leads_to_an_option(name):
    known = list(list_keys())
    assert all(key in known for key in OTHER_NAMES[name])
    assert name not in known
    # Without its row the name would have another answer, or none.
    locations = [tuple(name.split(".")), ("trainer", name)]
    answers = [suggest_option(location) for location in locations]
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(unknown_keys.OTHER_NAMES, name)
        assert [suggest_option(location) for location in locations] != answers


def test_names_that_are_answered_with_a_remedy_are_no_options():
    assert not {key.rpartition(".")[2] for key in list_keys()} & REMEDIES.keys()


@pytest.mark.parametrize(
    "name",
    ["deepspeed", "use_vllm", "run_name", "min_p", "push_to_hub", "log_completions",
     "ddp_timeout", "remove_unused_columns", "entropy_coef", "off_policy_mask_threshold"],
)  # fmt: skip
def test_names_without_a_counterpart_suggest_nothing(name):
    assert suggest_option((name,)) is None


@pytest.mark.parametrize(
    "name",
    ["output_dir", "max_steps", "learning_rate", "temperature", "max_grad_norm", "seed",
     "num_iterations", "max_prompt_length", "weight_decay", "warmup_steps", "top_k", "top_p"],
)  # fmt: skip
def test_names_that_other_libraries_share_are_found_by_their_name(name):
    (key,) = [key for key in list_keys() if key.rpartition(".")[2] == name]
    assert suggest_option(("trainer", name)) == f"did you mean {key}?"


# ---- where a value is from


def test_each_problem_names_the_file_or_the_command_line(refuse, tmp_path):
    (tmp_path / "base.yaml").write_text(
        MINIMAL + "optimizer: {b1: 2, b2: 3, weight_decay: -1, eps2: 1}\nlog: {every: 0}\n"
    )
    text = "base: base.yaml\noptimizer: {b2: 4}\neval: {rows: 0}\ntrane: {a: 1}\n"
    assert sorted(refuse("optimizer.weight_decay=-2", "train.max_steps=many", text=text)) == [
        "base.yaml: log.every: found 0, expected an integer >= 1",
        "base.yaml: optimizer.b1: found 2, expected a number >= 0 and <= 1",
        "base.yaml: optimizer.eps2: unknown key; known in optimizer: name, learning_rate, "
        "learning_rates, b1, b2, "
        "weight_decay, schedule, warmup_steps, max_grad_norm",
        "command line: optimizer.weight_decay: found -2, expected a number >= 0",
        "command line: train.max_steps: found 'many', expected an integer >= 0 or null",
        "run.yaml: eval.rows: found 0, expected an integer >= 1",
        "run.yaml: optimizer.b2: found 4, expected a number >= 0 and <= 1",
        "run.yaml: trane: unknown key; did you mean train?",
    ]


def test_a_list_is_of_the_file_or_of_the_command_line_as_a_whole(refuse, tmp_path):
    (tmp_path / "base.yaml").write_text(MINIMAL.replace("format", "format, weight: x"))
    problem = "rewards.0.weight: found 'x', expected a number"
    assert refuse(text="base: base.yaml\n") == [f"base.yaml: {problem}"]
    reward = "rewards: [{name: a}, {name: b, weight: y}]\n"
    (line,) = refuse(text=f"base: base.yaml\n{reward}")
    assert line == "run.yaml: rewards.1.weight: found 'y', expected a number"
    (line,) = refuse("rewards=[{name: a, weight: z}]", text=f"base: base.yaml\n{reward}")
    assert line == "command line: rewards.0.weight: found 'z', expected a number"


def test_contradictions_name_the_origin_of_their_first_key(refuse):
    text = MINIMAL + "train: {prompts_per_step: 16, micro_batch: 8}\n"
    (line,) = refuse("train.micro_batch=5", text=text)
    assert line.startswith("command line: train.micro_batch: 5 does not divide train.prompts_per_")
    (line,) = refuse("train.prompts_per_step=12", text=text)
    assert line.startswith(
        "run.yaml: train.micro_batch: 8 does not divide train.prompts_per_step 12"
    )


def test_overrides_leave_an_alias_of_the_file_alone(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + "networks: {blip: &a {dtype: bfloat16}, bert: *a}\n")
    loaded = config_files.load(path, ["networks.blip.dtype=float32"])
    assert loaded.networks.settings_of("blip").dtype == "float32"
    assert loaded.networks.settings_of("bert").dtype == "bfloat16"


# ---- wrong values


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("model=foo", f"model: found 'foo', expected a block with the keys {MODEL_KEYS}; "
         "set one of them as model.path=VALUE"),
        ("networks.blip=5", "networks.blip: found 5, expected a block with the keys path, dtype; "
         "set one of them as networks.blip.path=VALUE"),
        ("networks.ofload=true",
         "networks.ofload: found True, expected a block with the keys path, dtype; "
         "did you mean networks.offload?"),
        ("rewards=format", "rewards: found 'format', expected a list of blocks with the keys "
         "name, use, weight, options, timeout_s, max_failures"),
        ("rewards=[5]", "rewards.0: found 5, expected a block with the keys "
         "name, use, weight, options, timeout_s, max_failures"),
        ("optimizer.learning_rate=.nan",
         "optimizer.learning_rate: found nan, expected a finite number > 0"),
        ("optimizer.name=adam",
         "optimizer.name: found 'adam', expected one of adamw, adafactor, lion, sgd"),
        ("networks.offload=1", "networks.offload: found 1, expected true or false"),
        ("train.trainable=x",
         "train.trainable: found 'x', expected a list of texts or null"),
        ("data.path=[a, 5]",
         "data.path: found ['a', 5], expected a text or a list of texts"),
        ("data.columns=5", "data.columns: found 5, expected a mapping"),
        ("data.columns={prompt: 5}", "data.columns.prompt: found 5, expected a text"),
        ("rollout.group_size=0", "rollout.group_size: found 0, expected an integer >= 1"),
        ("rollout.cfg_scale=1e308", "rollout.cfg_scale: found 1e+308; expected a number that "
         "float32 holds, of 1.2e-38 to 3.4e+38"),
        ("rollout.temperature=1e-50", "rollout.temperature: found 1e-50; expected a number that "
         "float32 holds, of 1.2e-38 to 3.4e+38"),
        ("rollout.top_p=2", "rollout.top_p: found 2, expected a number > 0 and <= 1"),
        ("denoising.eval_steps=10001",
         "denoising.eval_steps: found 10001, expected an integer >= 1 and <= 10000"),
        ("mesh.data=0", "mesh.data: found 0; expected -1, or 1 or more"),
        ("model.dtype=float16",
         "model.dtype: found 'float16', expected one of float32, bfloat16"),
        ("seed={a: 1}", "seed: found {'a': 1}, expected an integer >= 0"),
        ("seed.a=1", "seed: found {'a': 1}, expected an integer >= 0"),
        ("rewards.0.weight=2",
         "rewards.0.weight: rewards is a list, which is given whole: rewards=[..]"),
        ("output_dir.x=2", "output_dir.x: output_dir is 'out', not a block of options"),
        ("seed=yes", "seed: value is not valid YAML: line 1: found yes, which is true in YAML 1.1 "
         "and a text in YAML 1.2; write true, or 'yes' in quotes for the text"),
        # arguments of another form
        ("networks.offload", "networks.offload: found no value, expected true or false, as in "
         "networks.offload=true"),
        ("train.max_steps", "train.max_steps: found no value, expected an integer >= 0 or null, "
         "as in train.max_steps=VALUE"),
        ("max_steps", "found 'max_steps', expected key=value; did you mean train.max_steps?"),
        ("lora.enabled", "found 'lora.enabled', expected key=value; did you mean lora.rank?"),
        ("lora.xyz",
         "found 'lora.xyz', expected key=value; known in lora: rank, alpha, targets"),
        ("nonsense", "found 'nonsense', expected key=value"),
        ("=5", "found '=5', expected key=value"),
        (
            "log.=5",
            "found 'log.=5', expected key=value; known in log: every, images_every, samples_every, "
            "trackers",
        ),
    ],
)  # fmt: skip
def test_a_wrong_value_is_answered_with_the_values_that_are_valid(refuse, override, problem):
    assert refuse(override) == [f"command line: {problem}"]


def test_missing_options_are_named_in_the_file(refuse):
    assert refuse("model.dtype=float32", text="output_dir: out\nrewards: [{name: format}]\n") == [
        "run.yaml: model.path: missing; give it in the file or as model.path=VALUE",
        "run.yaml: data: missing; give it in the file or as data.path=VALUE",
    ]


def test_types_are_found_by_location():
    assert find_type(("rewards", 0, "options")) is not None
    assert find_section(("rewards", 0)).__name__ == "Reward"
    assert find_section(("networks", "blip")).__name__ == "RewardNetwork"
    assert find_type(("data", "columns", "prompt")) is str
    assert find_type(("train", "nothing")) is None and find_type(("seed", "x")) is None
