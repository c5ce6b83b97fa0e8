"""The config: what is read, what is refused, and in which words."""

from __future__ import annotations

import re
import textwrap
import typing

import pytest
import yaml

from corl_jax.config import files as config_files
from corl_jax.config import options, readers, unknown_keys
from corl_jax.config.schema import Checkpoint, Config, RewardNetwork, Section
from corl_jax.config.stages import STAGE_FACTS
from corl_jax.errors import InputError
from corl_jax.evaluation import SUITES
from corl_jax.rewards import registry
from corl_jax.train.optimizer import learning_rate

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
        config_files.load(path, list(overrides))
    return error.value.problems


def test_defaults_are_the_papers_and_the_config_is_frozen(write):
    loaded = config_files.load(write(MINIMAL))
    assert loaded.rollout.group_size == 8 and loaded.rollout.cfg_scale is None
    assert loaded.algorithm.mm2t_weight == 0.8 and loaded.optimizer.learning_rate == 4e-6
    with pytest.raises(ValueError, match="frozen"):
        loaded.seed = 1


def test_dump_reads_back_as_the_same_config(write):
    loaded = config_files.load(
        write(MINIMAL), ["optimizer.learning_rate=3e-7", "train.max_steps=5"]
    )
    again = config_files.load(write(config_files.dump(loaded), "again.yaml"))
    assert again == loaded
    assert yaml.safe_load(config_files.dump(loaded))["optimizer"]["learning_rate"] == 3e-7


def test_base_is_relative_to_the_file_and_blocks_are_merged(write, tmp_path):
    write(MINIMAL + "    optimizer: {b1: 0.8, b2: 0.9}\n", "base.yaml")
    (tmp_path / "deeper").mkdir()
    path = write(
        "base: ../base.yaml\noptimizer: {b2: 0.5}\nrewards: [{name: a}]", "deeper/run.yaml"
    )
    loaded = config_files.load(path, ["optimizer.b1=0.7"])
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
    loaded = config_files.load(write(MINIMAL), [f"optimizer.learning_rate={text}"])
    assert loaded.optimizer.learning_rate == value
    option = config_files.load(write(MINIMAL), [f"rewards=[{{name: x, options: {{y: {text}}}}}]"])
    assert option.rewards[0].options["y"] == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("010", 10), ("089", 89), ("-007", -7), ("0o10", 8), ("0x1F", 31), ("1_000", 1000),
     ("1_000_000", 1_000_000), (".5", 0.5), ("1.", 1.0), ("010.5", 10.5), ("+3", 3),
     ("1:30", "1:30"), ("190:20:30.5", "190:20:30.5"), ("0b11", "0b11"), ("2024_01", "2024_01"),
     ("0_7", "0_7"), ("2026-11-29", "2026-11-29"), ("2026-11-29 10:00:00", "2026-11-29 10:00:00"),
     ("1e5", 1e5), ("y", "y"), ("n", "n"), ("True", True), ("FALSE", False), ("~", None)],
)  # fmt: skip
def test_numbers_are_those_of_yaml_1_2(write, text, value):
    rewards = f"rewards=[{{name: x, options: {{y: {text}}}}}]"
    read = config_files.load(write(MINIMAL), [rewards]).rewards[0].options["y"]
    assert read == value and type(read) is type(value)


def test_an_octal_of_yaml_1_1_is_no_octal(write):
    assert config_files.load(write(MINIMAL + "    train: {max_steps: 010}\n")).train.max_steps == 10
    (line,) = problems(write(MINIMAL), "train.max_steps=1:30")
    assert "train.max_steps: found '1:30'" in line


@pytest.mark.parametrize("word", ["yes", "No", "ON", "off"])
def test_words_that_yaml_1_1_takes_for_truth_are_refused_unless_quoted(write, word):
    (line,) = problems(write(MINIMAL), f"sft.caption_column={word}")
    assert word in line and "YAML 1.1" in line and f"'{word}' in quotes" in line
    (line,) = problems(write(MINIMAL + f"    networks: {{offload: {word}}}\n"))
    assert "line 6" in line and "write " + ("true" if word in ("yes", "ON") else "false") in line
    quoted = config_files.load(write(MINIMAL), [f"sft.caption_column='{word}'"])
    assert quoted.sft.caption_column == word


@pytest.mark.parametrize(
    "text", ["1e5", "010", "0o7", "yes", "off", "1:30", "2026-11-29", "1_000", "null", "~x", ""]
)
def test_texts_that_look_like_numbers_survive_being_written_out(write, text):
    loaded = config_files.load(write(MINIMAL), [f"sft.caption_column='{text}'"])
    dumped = config_files.dump(loaded)
    assert config_files.load(write(dumped, "again.yaml")) == loaded
    assert yaml.safe_load(dumped)["sft"]["caption_column"] == text  # readers of YAML 1.1 too


def test_words_stay_words(write):
    loaded = config_files.load(write(MINIMAL), ["output_dir=run1e", "data.path=[a, b]"])
    assert loaded.output_dir == "run1e" and loaded.data.path == ["a", "b"]


# ---- blocks without options


def test_empty_blocks_have_their_defaults(write):
    blocks = [name for name, field in Config.model_fields.items()
              if isinstance(field.annotation, type) and name not in ("model", "data")]  # fmt: skip
    blocks = [name for name in blocks if name not in ("output_dir", "stage", "seed")]
    text = MINIMAL + "".join(f"    {name}:\n      # x: 1\n" for name in blocks)
    assert config_files.load(write(text)) == config_files.load(write(MINIMAL))
    nested = """
        output_dir: out
        model: {path: weights}
        data:
          path: rows.parquet
          columns:
        rewards:
          - name: format
            options:
              # strip: true
        networks: {blip: , bert: }
        train: {trainable: }
        guards: {fatal: }
    """
    assert config_files.load(write(nested)) == config_files.load(write(MINIMAL))


def test_empty_block_or_list_leaves_that_of_the_base(write):
    write(MINIMAL + "    algorithm: {kl_coef: 0.1}\n    networks: {blip: {path: b}}\n", "base.yaml")
    path = write("base: base.yaml\nalgorithm:\nrewards:\n  # - name: x\nnetworks: {blip: }\n")
    assert config_files.load(path) == config_files.load(path.with_name("base.yaml"))
    assert config_files.load(path, ["algorithm.clip_low=0.5"]).algorithm.kl_coef == 0.1


def test_null_of_an_option_is_a_value(write):
    write(MINIMAL + "    train: {max_steps: 5}\n    eval: {path: [a]}\n", "base.yaml")
    loaded = config_files.load(write("base: base.yaml\ntrain: {max_steps: }\neval: {path: }\n"))
    assert loaded.train.max_steps is None and loaded.eval.path is None


def test_empty_required_block_is_missing(write):
    (line,) = problems(write("output_dir: o\nmodel:\ndata: {path: x}\nrewards: [{name: format}]"))
    assert "model: missing" in line


def test_empty_list_of_rewards_is_no_reward(write):
    (line,) = problems(write("output_dir: o\nmodel: {path: m}\ndata: {path: x}\nrewards:\n"))
    assert "needs at least one" in line


# ---- paths

NO_PATHS = {
    "sft.tasks", "data.name", "data.split", "data.revision", "eval.split",
    "rewards.name", "sft.caption_column", "sft.text_column", "train.trainable", "lora.targets",
    "algorithm.name",
    "algorithm.tasks", "eval.suite", "eval.suites.suite", "eval.suites.name",
    "distributed.coordinator_address",
}  # fmt: skip


def texts(section, prefix=""):
    """The key and the field of every option that is free text or a list of it."""
    fields = {name: field.annotation for name, field in section.model_fields.items()}
    if options.named_block(section):
        fields["blip"] = options.named_block(section)
    for name, kind in fields.items():
        inner = typing.get_args(kind)[0] if typing.get_origin(kind) is list else kind
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from texts(inner, f"{prefix}{name}.")
        elif "text" in options.describe_type(kind):
            yield f"{prefix}{name}"


PATHS = sorted(set(texts(Config)) - NO_PATHS)


def load_with(write, key, value):
    """The config with one path, and how it was read."""
    overrides = {
        "rewards.use": f"rewards=[{{use: '{value}/r.py:f'}}]",
        "eval.path": f"eval.path={value}",
        "eval.suites.path": f"eval.suites=[{{suite: tsv, path: '{value}'}}]",
    }
    loaded = config_files.load(write(MINIMAL), [overrides.get(key, f"{key}={value}")])
    for part in key.split("."):
        loaded = getattr(loaded, part)
        loaded = loaded[0] if part in ("rewards", "suites") else loaded
    return loaded


@pytest.mark.parametrize("key", PATHS)
def test_every_option_that_names_a_place_expands_it(write, monkeypatch, key):
    """An option of text is a path, for which config.fields has types, or stands in NO_PATHS."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("CORL_PLACE", "/scratch/me")
    end = "/r.py:f" if key == "rewards.use" else ""
    for text, place in (
        ("~/x", "/home/me/x"), ("$CORL_PLACE/x", "/scratch/me/x"),
        ("${CORL_PLACE}x/*.parquet", "/scratch/mex/*.parquet"), ("a/~b", "a/~b"),
    ):  # fmt: skip
        assert load_with(write, key, text) == place + end
    monkeypatch.delenv("CORL_PLACE")
    (line,) = problems_of(load_with, write, key, "$CORL_PLACE/x")
    assert f"{key.partition('.')[0]}" in line and "$CORL_PLACE is not set" in line


def problems_of(function, *arguments):
    with pytest.raises(InputError) as error:
        function(*arguments)
    return error.value.problems


def test_paths_in_lists_buckets_scorers_and_bases_are_expanded(write, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("CORL_PLACE", str(tmp_path))
    write(MINIMAL, "base.yaml")
    path = write("base: $CORL_PLACE/base.yaml\n")
    monkeypatch.chdir("/")
    overrides = ["data.path=[a, ~/b, $CORL_PLACE/c]", "eval.path=[~/e]"]
    loaded = config_files.load("$CORL_PLACE/" + path.name, overrides)
    assert loaded.data.path == ["a", "/home/me/b", f"{tmp_path}/c"]
    assert loaded.eval.path == ["/home/me/e"]
    reward = "rewards=[{name: t2i_ti_sim, options: {scorer: ~/janus}}]"
    assert config_files.load(path, [reward]).rewards[0].options == {"scorer": "/home/me/janus"}
    monkeypatch.setenv("CORL_PLACE", "bucket")
    tree = {"directory": "gs://$CORL_PLACE/runs"}
    assert Checkpoint.model_validate(tree).directory == "gs://bucket/runs"
    monkeypatch.delenv("CORL_PLACE")
    (line,) = problems(path)
    assert line.startswith(f"{path}: base: ") and "$CORL_PLACE is not set" in line


def test_unknown_home_is_refused_with_the_key(write, monkeypatch):
    (line,) = problems(write(MINIMAL), "output_dir=~nobody-of-this-name/x")
    assert "output_dir: found '~nobody-of-this-name/x'; the home directory" in line


def test_the_written_config_keeps_the_expanded_path(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    dumped = config_files.dump(config_files.load(write(MINIMAL), ["output_dir=~/run"]))
    monkeypatch.setenv("HOME", "/home/you")
    assert config_files.load(write(dumped, "again.yaml")).output_dir == "/home/me/run"


# ---- lengths


@pytest.mark.parametrize(
    ("overrides", "limit"),
    [
        (["train.max_steps=3", "optimizer.warmup_steps=500"], 3),
        (["train.max_steps=3", "optimizer.warmup_steps=3"], 3),
        (["train.max_steps=3", "algorithm.num_iterations=2", "optimizer.warmup_steps=6"], 6),
        (["train.max_steps=1", "optimizer.warmup_steps=1"], 1),
    ],
)
def test_warmup_that_outlasts_the_run(write, overrides, limit):
    (line,) = problems(write(MINIMAL), *overrides)
    assert "never reaches optimizer.learning_rate" in line and f"less than {limit};" in line
    fewer = [*overrides[:-1], f"optimizer.warmup_steps={limit - 1}"]
    options = config_files.load(write(MINIMAL), fewer).optimizer
    rates = [float(learning_rate(options, limit)(update)) for update in range(limit)]
    assert max(rates) == pytest.approx(options.learning_rate)


def test_every_problem_is_reported_at_once(write):
    text = MINIMAL + "    train: {prompts_per_step: 0, micro_batches: 2}\n    sede: 1\n"
    found = problems(write(text), "optimizer.b1=2", "no-equals-sign", "seed.x.y=1")
    joined = "\n".join(found)
    for part in (
        "train.prompts_per_step: found 0",
        "train.micro_batches: unknown key; did you mean train.micro_batch?",
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
        "rollout.group_size=0",
        "rollout.top_p=0",
        "algorithm.mask_truncated=1",
        "algorithm.tasks=both",
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
    assert line.endswith("data.path: found 5, expected a text or a list of texts")


def test_unknown_key_of_a_reward_names_its_place(write):
    (line,) = problems(write(MINIMAL), "rewards=[{name: a}, {name: b, wieght: 2}]")
    assert "rewards.1.wieght: unknown key; did you mean rewards.1.weight?" in line


def test_missing_keys_say_how_to_give_them(write):
    lines = problems(write(""))
    assert any(
        "model: missing; give it in the file or as model.path=VALUE" in line for line in lines
    )
    assert any("output_dir: missing" in line for line in lines)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["train.micro_batch=5"], "does not divide train.prompts_per_step 16"),
        (["rollout.batch_prompts=3"], "nearest: 2 or 4"),
        (["rewards=[]"], "needs at least one"),
        (["compat.text_top_k_50=true", "rollout.top_k=7"], "contradicts compat.text_top_k_50"),
        (
            ["compat.image_logprobs_unshifted=true", "algorithm.image_logprobs=guided"],
            "needs algorithm.image_logprobs conditional",
        ),
        (["eval.suite=rewards", "eval.split=test"], "eval.split: found test of the data that"),
        (
            ["stage=sft", "rewards=[]", "sft.tasks=t2i", "sft.t2i_weight=0"],
            "sft.t2i_weight: found 0",
        ),
        (
            ["eval.suite=rewards", "eval.split=test", "data.split=test"],
            "expected two splits",
        ),
    ],
)
def test_options_that_contradict_each_other(write, overrides, part):
    (line,) = problems(write(MINIMAL), *overrides)
    assert part in line


@pytest.mark.parametrize(
    ("overrides", "found", "reader"),
    [
        (["sft.t2i_weight=0.2"], "sft.t2i_weight: 0.2", "stage sft"),
        (
            ["stage=sft", "rewards=[]", "sft.tasks=mm2t", "sft.t2i_weight=0.2"],
            "sft.t2i_weight: 0.2", "a task that makes images",
        ),
        (
            ["stage=sft", "rewards=[]", "sft.tasks=t2i", "sft.caption_column=text"],
            "sft.caption_column: 'text'", "a task that makes texts",
        ),
        (["stage=vq", "rewards=[]", "algorithm.kl_coef=0.1"], "algorithm.kl_coef: 0.1", "stage rl"),
        (["algorithm.reference=host"], "algorithm.reference: 'host'", "algorithm.kl_coef above 0"),
        (
            ["algorithm.reference=host", "algorithm.kl_coef=0.1", "lora.rank=4"],
            "algorithm.reference: 'host'", "a run with lora.rank 0",
        ),
        (
            ["stage=sft", "rewards=[]", "compat.text_top_k_50=true"],
            "compat.text_top_k_50: True", "a stage with rollouts",
        ),
        (
            ["compat.mc_as_open_ended=true"],
            "compat.mc_as_open_ended: True", "the reward qa_accuracy",
        ),
        (
            ["compat.answer_single_line=true"],
            "compat.answer_single_line: True", "the reward qa_accuracy or oc_accuracy",
        ),
        (
            ["compat.ti_sim_fixed_spans=true"],
            "compat.ti_sim_fixed_spans: True", "the reward t2i_ti_sim",
        ),
        (
            ["compat.format_without_strip=true", "rewards=[{name: format_tag}]"],
            "compat.format_without_strip: True", "the reward format",
        ),
        (
            ["compat.text_top_k_50=true", "algorithm.tasks=t2i"],
            "compat.text_top_k_50: True", "a task that makes texts or plans",
        ),
        (
            ["compat.image_logprobs_unshifted=true", "algorithm.tasks=mm2t"],
            "compat.image_logprobs_unshifted: True", "a task that makes images",
        ),
        (
            ["optimizer.name=sgd", "optimizer.b2=0.9"],
            "optimizer.b2: 0.9", "optimizer.name adamw or lion",
        ),
        (
            ["optimizer.name=adafactor", "optimizer.b1=0.8"],
            "optimizer.b1: 0.8", "optimizer.name adamw or lion or sgd",
        ),
        (
            ["rewards=[{name: format, timeout_s: 5.0}]"],
            "rewards.0.timeout_s: 5.0", "a reward by `use`",
        ),
        (["guards.kl=2.0"], "guards.kl: 2.0", "algorithm.kl_coef above 0"),
        (["guards.fatal=[kl]"], "guards.fatal: 'kl'", "algorithm.kl_coef above 0"),
        (
            ["guards.held_out=2.0"],
            "guards.held_out: 2.0", "an eval.suite other than none, or eval.suites",
        ),
        (
            ["guards.duplicates=0.4", "algorithm.tasks=mm2t"],
            "guards.duplicates: 0.4", "a task that makes images",
        ),
        (
            ["guards.max_failed_reward_fraction=0.4"],
            "guards.max_failed_reward_fraction: 0.4", "a reward by `use` or by http",
        ),
        (
            ["stage=sft", "rewards=[]", "guards.entropy=0.2"],
            "guards.entropy: 0.2", "a stage with rollouts",
        ),
        (
            ["stage=sft", "rewards=[]", "unmasking.logprobs=complement"],
            "unmasking.logprobs: 'complement'", "a stage with rollouts",
        ),
        (["eval.every=5"], "eval.every: 5", "an eval.suite other than none, or eval.suites"),
        (
            ["stage=vq", "rewards=[]", "train.micro_batch=8"],
            "train.micro_batch: 8", "a stage that trains the language model",
        ),
        (
            ["train.epochs=2.0", "train.max_steps=5"],
            "train.epochs: 2.0", "a run without train.max_steps",
        ),
        (
            ["algorithm.mm2t_weight=0.5", "algorithm.tasks=mm2t"],
            "algorithm.mm2t_weight: 0.5", "algorithm.tasks unified",
        ),
        (
            ["algorithm.mm2t_weight=0.5", "algorithm.advantages=separate"],
            "algorithm.mm2t_weight: 0.5",
            "algorithm.advantages unified_reward or unified_advantage",
        ),
        (
            ["algorithm.clip_low=0.1"], "algorithm.clip_low: 0.1",
            "algorithm.num_iterations above 1",
        ),
        (
            ["algorithm.mask_truncated=true", "algorithm.tasks=t2i"],
            "algorithm.mask_truncated: True", "a task that makes texts or plans",
        ),
        (
            ["rollout.max_new_tokens=9", "algorithm.tasks=t2i"],
            "rollout.max_new_tokens: 9", "a task that makes texts or plans, or an eval.suite",
        ),
        (
            ["algorithm.earlier_loss_weight=0.5"],
            "algorithm.earlier_loss_weight: 0.5", "algorithm.tasks think or self_qa",
        ),
        (
            ["rollout.cfg_scale=2.0", "algorithm.tasks=mm2t"],
            "rollout.cfg_scale: 2.0", "a task that makes images, or an eval.suite",
        ),
        (
            ["denoising.schedule=linspace", "algorithm.tasks=mm2t", "log.images_every=0"],
            "denoising.schedule: 'linspace'",
            "a rollout of images, an eval.suite or log.images_every",
        ),
        (
            ["stage=sft", "unmasking.steps=9", "log.images_every=0", "eval.suite=shapes"],
            "unmasking.steps: 9", "a rollout of images, the suite rewards or log.images_every",
        ),
        (
            ["denoising.eval_steps=9", "log.images_every=0"], "denoising.eval_steps: 9",
            "an eval.suite or log.images_every with a task that makes images",
        ),
        (
            ["export.dtype=float32", "export.layout=none"],
            "export.dtype: 'float32'", "an export.layout other than none",
        ),
        (["export.lora=adapter"], "export.lora: 'adapter'", "lora.rank above 0"),
        (["lora.alpha=12.0"], "lora.alpha: 12.0", "lora.rank above 0"),
        (
            ["distributed.initialize=never", "distributed.process_id=1"],
            "distributed.process_id: 1", "distributed.initialize auto or always",
        ),
    ],
)  # fmt: skip
def test_an_option_without_effect_is_named_with_its_reader(write, overrides, found, reader):
    lines = readers.find_unused_options(config_files.load(write(MINIMAL), overrides))
    assert lines == [f"{found} has no effect; only {reader} reads it"]


def test_every_row_of_the_table_of_readers_names_options():
    known = list(flat_keys(Config))
    for row in readers.READERS:
        assert any(re.fullmatch(row.options, key) for key in known), row.options


def flat_keys(section, prefix=""):
    """The key of every option; the first item of a list stands for all."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        inner = (*typing.get_args(kind), None)[0]
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from flat_keys(kind, f"{prefix}{name}.")
            continue
        yield prefix + name
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from flat_keys(inner, f"{prefix}{name}.0.")


def test_stages_are_those_of_the_table():
    assert typing.get_args(Config.model_fields["stage"].annotation) == tuple(STAGE_FACTS)


def test_a_fatal_alarm_that_is_switched_off_is_refused(write):
    (line,) = problems(write(MINIMAL), "guards.fatal=[entropy]", "guards.entropy=null")
    assert line.endswith("guards.fatal: found entropy, but guards.entropy is null; drop it")


def test_networks_are_named_by_the_user(write):
    loaded = config_files.load(write(MINIMAL), ["networks.blip.dtype=bfloat16"])
    assert loaded.networks.settings_of("blip").dtype == "bfloat16"
    assert loaded.networks.settings_of("bert") == RewardNetwork()
    (line,) = problems(write(MINIMAL), "networks.blip.pth=x")
    assert "networks.blip.pth: unknown key; did you mean networks.blip.path?" in line


def test_options_that_only_look_ignored(write):
    path = write(MINIMAL)
    for overrides in (
        ["stage=sft", "eval.suite=rewards"],  # the evaluation scores them
        ["stage=sft", "eval.suite=rewards", "compat.format_without_strip=true"],
        ["stage=vq", "rewards=[]", "compat.bfloat16_master=true", "algorithm.kl_coef=0.0"],
        ["stage=sft", "eval.suite=rewards", "unmasking.steps=9", "log.images_every=0"],
        ["optimizer.name=sgd", "optimizer.b1=0.5"],  # its momentum
        ["optimizer.name=lion", "optimizer.b2=0.5"],
        ["guards.kl=null"],  # switched off
    ):
        assert not readers.find_unused_options(config_files.load(path, overrides)), overrides


def test_the_suite_of_rewards_is_that_of_the_table():
    assert [name for name, suite in SUITES.items() if suite.uses_rewards] == [readers.REWARD_SUITE]


def test_switches_of_rewards_are_the_registrys():
    found = {switch: tuple(x[0] for x in effects) for switch, effects in registry.COMPAT.items()}
    assert found == readers.SWITCH_USERS


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


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("objective=grpo", "stage"), ("grpo.kl_coef=0.1", "algorithm"),
        ("algorithm.plan_loss_weight=0.5", "algorithm.earlier_loss_weight"),
    ],
)  # fmt: skip
def test_a_key_of_an_earlier_version_is_refused_with_its_new_name(write, old, new):
    with pytest.raises(InputError, match=f"has a new name; use {new}"):
        config_files.load(write(MINIMAL), [old])


def test_a_file_of_an_earlier_version_is_refused_with_the_new_name(write):
    block = "    algorithm: {tasks: think, plan_loss_weight: 0.5}\n"
    (line,) = problems(write(MINIMAL + block))
    assert line.endswith(
        "algorithm.plan_loss_weight: has a new name; use algorithm.earlier_loss_weight"
    )


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("rollout.pixel_dtype", "the value is float32; remove it"),
        ("optimizer.eps", "the value is 1e-8; remove it"),
        ("algorithm.scale_by_std", "set algorithm.scale to group, batch or none; remove it"),
        (
            "algorithm.multi_objective_aggregation",
            "algorithm.name gdpo normalizes each reward; remove it",
        ),
        ("vq", "the weights are constants of corl_jax/policies/FAMILY/tokenizer_training.py; "),
    ],
)
def test_a_key_that_is_gone_is_refused_with_what_holds_instead(write, key, reason):
    (line,) = problems(write(MINIMAL), f"{key}=1")
    assert f": {key}: is no option any more; {reason}" in line


def test_no_key_that_is_gone_is_an_option():
    text = options.describe()
    assert not [key for key in unknown_keys.REMOVED if f"  {key} = " in text]


def test_an_unknown_key_unlike_any_other_lists_the_known_ones(write):
    (line,) = problems(write(MINIMAL), "networks.blip.foo=1")
    assert line.endswith("networks.blip.foo: unknown key; known in networks.blip: path, dtype")
    (line,) = problems(write(MINIMAL), "model.bar=true")
    assert "unknown key; known in model: path, dtype, remat, attention" in line


@pytest.mark.parametrize(
    ("override", "choices"),
    [
        ("algorithm.name=", "grpo"),
        ("eval.suite=null", "shapes: the drawn world's exact checker; rewards: "),
        ("algorithm.tasks=[t2i,mm2t]", "t2i: image generation; mm2t: image understanding; unif"),
        ("algorithm.tasks=both", "known: unified, t2i, mm2t"),
    ],
)
def test_choices_of_a_table_are_named(write, override, choices):
    (line,) = problems(write(MINIMAL), override)
    assert choices in line


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ("{prompt: 5}", "data.columns.prompt: found 5, expected a text"),
        ("{5: x}", "data.columns.5.[key]: found 5; Input should be a valid string"),
    ],
)
def test_names_of_columns_are_text(write, columns, problem):
    assert problems(write(MINIMAL), f"data.columns={columns}") == [f"command line: {problem}"]
