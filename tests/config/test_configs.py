"""The shipped configs load and hold the paper's values; the docs describe what the code has.

`python -m tests.config.test_configs` writes the option tables of docs/reference/configuration.md.
"""

from __future__ import annotations

import ast
import functools
import io
import pkgutil
import re
import tokenize
from pathlib import Path

import pytest
import yaml

from corl_jax.cli import COMMANDS
from corl_jax.config import files as config_files
from corl_jax.config import options
from corl_jax.config.chains import dump_stages, load_stages
from corl_jax.config.readers import find_unused_options
from corl_jax.config.schema import Compat, Config, EvalSuite, Reward, Section
from corl_jax.config.shipped import describe_config, list_configs, list_studies
from corl_jax.data.columns import COLUMNS
from corl_jax.errors import InputError
from corl_jax.params import partition
from corl_jax.plan.command import find_sizes
from corl_jax.policies import FAMILIES
from corl_jax.policies.janus import network
from corl_jax.policies.janus.family import FAMILY
from corl_jax.rewards import networks, registry
from corl_jax.train import fit, resolve
from corl_jax.train.recipe_options import find_denoising_problems
from corl_jax.train.stages import STAGES as STAGE_TABLE

ROOT = Path(__file__).resolve().parents[2]
CONFIGS, DOCS = ROOT / "configs", ROOT / "docs"
FILES = [f"{name}.yaml" for name in list_configs()]
JANUS = [name for name in FILES if name.startswith(("janus_pro_", "janus_1_3b"))]
SHOW_O = [name for name in FILES if name.startswith("show_o_")]
JANUS_FLOW = [name for name in FILES if name.startswith("janus_flow_")]
PAPER = [*JANUS, *SHOW_O, *JANUS_FLOW]
STAGES = ("unified", "refined_t2i", "refined_mc", "refined_oe")
# Beside unified training: each task alone, both in turn, and supervised training.
PARADIGMS = ("t2i", "mm2t", "alternating", "cold_sft")
# Training on own images.
SELF = ("self_qa", "self_sft", "self_sft_through")
DEVICES = (1, 2, 4, 8)
# 15 of them choose between algorithms of the field: a row of RECIPES gives each its default, and
# few configs set one. 4 belong to models that draw the codes of an image in any order, and 13 to
# those that make images by denoising. 1 has the learning rates of groups of parameters, 1 the
# alignment with an image encoder, and `rollout.image_window` trades the length of a pass for their
# number: which window pays depends on the device, the rows and the trained model.
MAX_OPTIONS = 148
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
FILE_ENDINGS = (".py", ".yaml", ".json", ".jsonl", ".md", ".parquet", ".safetensors", ".html")

# The paper's table of values: G, beta, prompt tokens, answer tokens, prompts a step, peak rate.
TABLE = {
    "unified": (8, 0.0, 1024, 512, 16, 4e-6),
    "refined_t2i": (16, 0.02, 256, 512, 16, 1e-6),
    "refined_mc": (16, 0.02, 1024, 512, 32, 1e-6),
    "refined_oe": (16, 0.02, 1024, 512, 32, 1e-6),
}
DRAWING, ANSWERING = ["t2i_bid_cycle_reward", "t2i_ti_sim"], ["qa_accuracy", "format"]
REWARDS = {
    "unified": ("unified", DRAWING + ANSWERING),
    "refined_t2i": ("t2i", DRAWING),
    "refined_mc": ("mm2t", ANSWERING),
    "refined_oe": ("mm2t", ANSWERING),
}


def load(name: str) -> Config:
    return config_files.load(CONFIGS / name)


def load_runs(name: str) -> list[Config]:
    """The config of each stage of a file."""
    return [*load_stages(CONFIGS / name).values()]


def flat(config: Config) -> dict:
    """Every option by its whole key; lists are values."""

    def leaves(tree, prefix=""):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(leaves(config.model_dump()))


def differing(a: Config, b: Config) -> set[str]:
    left, right = flat(a), flat(b)
    return {key for key in left.keys() | right.keys() if left.get(key) != right.get(key)}


# ---- every config


def test_the_minimal_config_is_a_run_in_twelve_lines():
    lines = (CONFIGS / "minimal.yaml").read_text().splitlines()
    assert len(lines) <= 12 and all("#" in line for line in lines)
    assert load("minimal.yaml").stage == "rl"


def test_the_promised_configs_are_there():
    promised = {f"janus_pro_{size}/{stage}.yaml" for size in ("1b", "7b") for stage in STAGES}
    promised |= {f"janus_pro_{size}/released.yaml" for size in ("1b", "7b")}
    promised |= {f"{model}/{name}.yaml" for model in ("janus_pro_1b", "mini") for name in PARADIGMS}
    promised |= {"quickstart.yaml", "mini/unified.yaml"}
    promised |= {f"janus_1_3b/{name}.yaml" for name in (*SELF, "tpu_v5e_16")}
    promised |= {"mini/refined_t2i.yaml", "mini/refined_mm2t.yaml"}
    promised |= {f"show_o_512/{name}.yaml" for name in (*SELF, "unified", "lora", "tpu_v5e_16")}
    promised |= {"show_o_256/unified.yaml", "show_o_256/sft.yaml"}
    assert promised <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_config_loads_and_its_rewards_fit_its_tasks(name):
    for config in load_runs(name):
        bound = registry.bind_rewards(config.rewards, config.compat)
        stage = STAGE_TABLE[config.stage]
        if not stage.samples:
            assert not config.rewards
            continue
        by_task = registry.group_by_task(bound, stage.tasks(config))
        assert all(by_task.values()) and sum(map(len, by_task.values())) == len(bound)


@pytest.mark.parametrize("name", FILES)
def test_config_survives_being_written_out(name, tmp_path):
    stages = load_stages(CONFIGS / name)
    (tmp_path / "again.yaml").write_text(dump_stages(stages))
    assert load_stages(tmp_path / "again.yaml") == stages


@pytest.mark.parametrize("name", FILES)
def test_trainable_patterns_match_parameters(name):
    # mini_show_o/vq.yaml -> show_o
    family = next((FAMILIES[key] for key in ("show_o", "janus_flow") if key in name), FAMILY)
    shapes = family.abstract(next(iter(family.presets.values())))
    for config in load_runs(name):
        trained, frozen = partition(shapes, config.train.trainable or family.trainable)
        assert trained and frozen


@pytest.mark.parametrize("name", FILES)
def test_config_has_no_option_without_effect(name):
    assert not any(map(find_unused_options, load_runs(name)))


def test_there_are_few_options():
    """A new option needs two shipped configs that differ in it, or a user who asked for it."""
    count = sum(
        not isinstance(field.annotation, type) or not issubclass(field.annotation, Section)
        for key, kind in sections().items()
        if key not in LISTS  # a list counts as one
        for field in kind.model_fields.values()
    )
    assert count <= MAX_OPTIONS


def test_run_directories_are_distinct():
    folders = [config.output_dir for name in FILES for config in load_runs(name)]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("name", PAPER)
def test_head_comment_keeps_its_promise(name):
    head = re.match(r"(#.*\n)+", (CONFIGS / name).read_text())
    assert head, "no head comment"
    assert f"corl-jax train {name.removesuffix('.yaml')}\n" in head[0]
    for word in ("Hardware:", "Expect:", "Differs from the "):
        assert f"# {word}" in head[0], word
    for before in re.findall(r"configs/[\w/]+\.yaml", head[0]):
        assert (ROOT / before).is_file(), before


# ---- base


WITH_BASE = [name for name in PAPER if "base" in yaml.safe_load((CONFIGS / name).read_text())]


@pytest.mark.parametrize("name", WITH_BASE)
def test_a_file_holds_no_key_that_its_base_already_says(name):
    own = yaml.safe_load((CONFIGS / name).read_text())
    base = own.pop("base")
    inherited = load(str(Path(name).parent / base)).model_dump()

    def repeated(mine, theirs, prefix=""):
        for key, value in mine.items():
            if isinstance(value, dict):
                yield from repeated(value, theirs[key], f"{prefix}{key}.")
            elif theirs.get(key) == value:
                yield prefix + key

    # The batch of a rollout depends on the group size beside it, so both may stand together.
    assert set(repeated(own, inherited)) <= {"rollout.batch_prompts"}


def test_base_leads_through_two_files():
    config = load("janus_pro_7b/refined_oe.yaml")  # -> 1b/refined_oe -> 1b/unified
    assert config.mesh.fsdp == -1
    assert config.data.path == "mm-vl/mcot_r1_vqa_66k"
    assert config.optimizer.max_grad_norm == 1.0 and config.log.images_every == 50
    assert config.export.layout == "transformers"


@pytest.mark.parametrize("stage", [*STAGES, "released"])
def test_7b_differs_from_1b_in_model_mesh_and_adapters_alone(stage):
    """The paper tunes adapters on 7B; the released script knows none."""
    small, large = (load(f"janus_pro_{size}/{stage}.yaml") for size in ("1b", "7b"))
    adapters = set() if stage == "released" else {"lora.rank"}
    expected = {"output_dir", "model.path", "mesh.data", "mesh.fsdp"} | adapters
    assert differing(small, large) == expected
    config_files.load(CONFIGS / f"janus_pro_7b/{stage}.yaml", ["lora.rank=0"])
    if adapters:
        adapted = fit.add_parts(large, FAMILY, network.PRESETS["janus-pro-7b"])
        assert len(FAMILY.adapters.options_of(adapted).targets) == 7
    assert large.lora.targets is None and large.export.lora == "merged"
    assert (large.mesh.data, large.mesh.fsdp, large.mesh.tensor) == (1, -1, 1)


# ---- the paper's values


@pytest.mark.parametrize("size", ["1b", "7b"])
@pytest.mark.parametrize("stage", STAGES)
def test_values_are_those_of_the_papers_table(size, stage):
    config = load(f"janus_pro_{size}/{stage}.yaml")
    found = (
        config.rollout.group_size,
        config.algorithm.kl_coef,
        config.data.max_prompt_length,
        config.rollout.max_new_tokens,
        config.train.prompts_per_step,
        config.optimizer.learning_rate,
    )
    assert found == TABLE[stage]
    assert config.train.epochs == 1.0 and config.train.max_steps is None
    assert (config.rollout.cfg_scale, config.rollout.temperature) == (5.0, 1.0)
    assert config.rollout.top_k == 0 and config.rollout.top_p == 1.0
    assert (config.algorithm.tasks, [r.name for r in config.rewards]) == REWARDS[stage]
    assert config.algorithm.advantages == "unified_reward" and config.algorithm.mm2t_weight == 0.8
    assert (config.optimizer.name, config.optimizer.schedule) == ("adamw", "linear")
    assert config.optimizer.max_grad_norm == 1.0 and config.optimizer.warmup_steps == 0
    assert config.compat == Compat()
    assert config.train.trainable is None  # what the model's recipe trains
    assert FAMILY.trainable == ("language_model/.*", "lm_head/.*")


@pytest.mark.parametrize("folder", ["janus_pro_1b", "mini"])
def test_paradigms_differ_in_the_tasks_alone(folder):
    unified = load(f"{folder}/unified.yaml")
    for task in ("t2i", "mm2t"):
        alone = load(f"{folder}/{task}.yaml")
        expected = {"output_dir", "rewards", "algorithm.tasks"}
        # Options that the other task alone reads are left at their defaults.
        expected |= {"algorithm.mm2t_loss_weight"} if (folder, task) == ("mini", "t2i") else set()
        expected |= {"algorithm.image_logprobs"} if (folder, task) == ("mini", "mm2t") else set()
        assert differing(unified, alone) == expected
        assert alone.algorithm.tasks == task
        assert all(reward in unified.rewards for reward in alone.rewards)
    turns = load(f"{folder}/alternating.yaml")
    length = "train.epochs" if folder == "janus_pro_1b" else "train.max_steps"
    assert differing(unified, turns) == {"output_dir", "algorithm.alternate_every", length}
    # Each task has as many samples as in unified training.
    assert flat(turns)[length] == 2 * flat(unified)[length]


@pytest.mark.parametrize("task", ["t2i", "mm2t"])
def test_stage_two_of_the_mini_is_that_of_the_study(task):
    refined = load(f"mini/refined_{task}.yaml")
    study = yaml.safe_load((CONFIGS / "studies/table3.yaml").read_text())
    options = study["variants"][f"refined_{task}_after_unified"]
    assert {key: flat(refined)[key] for key in options if key != "after"} == {
        key: value for key, value in options.items() if key != "after"
    }
    assert refined.model.path == f"{load('mini/unified.yaml').output_dir}/export"


@pytest.mark.parametrize("size", ["1b", "7b"])
def test_stage_two_starts_from_what_stage_one_exports(size):
    first = load(f"janus_pro_{size}/unified.yaml")
    assert first.model.path == f"deepseek-community/Janus-Pro-{size.upper()}"
    assert first.export.layout != "none"
    for stage in STAGES[1:]:
        config = load(f"janus_pro_{size}/{stage}.yaml")
        assert config.model.path == f"{first.output_dir}/export"


def test_data_sets_are_the_published_ones():
    sets = [load(f"janus_pro_1b/{stage}.yaml").data.path for stage in STAGES]
    assert sets == [
        "mm-vl/x2x_rft_22k",
        "mm-vl/x2x_rft_16k",
        "mm-vl/mcot_r1_mcq_66k",
        "mm-vl/mcot_r1_vqa_66k",
    ]


def test_answering_stages_need_no_column_of_types():
    for stage, kind in (("refined_mc", "MC"), ("refined_oe", "OE")):
        config = load(f"janus_pro_1b/{stage}.yaml")
        (reward, _) = registry.bind_rewards(config.rewards, config.compat)
        assert not registry.find_missing_columns([reward], ["qa_problem", "qa_solution"])
        assert reward.function.keywords == {"default_type": kind}
    plain = registry.bind_reward("qa_accuracy", {})
    (problem,) = registry.find_missing_columns([plain], ["qa_problem", "qa_solution"])
    assert "column qa_type is missing" in problem and "its option default_type" in problem


def test_released_is_unified_with_the_scripts_values_and_every_switch():
    unified, released = (load(f"janus_pro_1b/{name}.yaml") for name in ("unified", "released"))
    assert all(flag for flag in released.compat.model_dump().values())
    assert differing(unified, released) == {
        "output_dir", "seed", "eval.suite", "eval.every", "rollout.max_new_tokens",
        "train.prompts_per_step",
        *(f"compat.{name}" for name in Compat.model_fields),
    }  # fmt: skip
    assert (released.rollout.max_new_tokens, released.train.prompts_per_step) == (576, 32)
    assert (released.seed, released.optimizer.learning_rate) == (42, 4e-6)


@pytest.mark.parametrize(
    ("folder", "model", "scale"),
    [
        ("janus_1_3b", "deepseek-ai/Janus-1.3B", 5.0),
        ("show_o_512", "models/show-o-512x512", 6.0),
    ],
)
def test_training_on_own_images_differs_in_the_stage_alone(folder, model, scale):
    """The published rate and Janus' group and prompts a step; beta for means over tokens."""
    first, supervised, through = (load(f"{folder}/{name}.yaml") for name in SELF)
    assert (first.optimizer.learning_rate, first.rollout.group_size) == (1e-5, 8)
    assert (first.train.prompts_per_step, first.train.max_steps) == (8, 500)
    assert (first.optimizer.schedule, first.optimizer.warmup_steps) == ("constant", 20)
    assert (first.rollout.cfg_scale, first.rollout.max_new_tokens) == (scale, 32)
    assert (first.algorithm.tasks, first.algorithm.kl_coef) == ("self_qa", 0.02)
    assert first.model.path == model
    unread = {"algorithm.tasks", "algorithm.kl_coef"}
    assert differing(first, supervised) == {"output_dir", "stage"} | unread
    assert differing(supervised, through) == {"output_dir", "stage"}
    assert (supervised.stage, through.stage) == ("self_sft", "self_sft_through")


@pytest.mark.parametrize("name", PAPER)
def test_batches_split_over_up_to_eight_devices(name):
    for config in load_runs(name):
        sizes = (
            config.train.prompts_per_step,
            config.train.micro_batch or config.train.prompts_per_step,
            config.rollout.batch_prompts or config.train.prompts_per_step,
            config.eval.batch_prompts,
        )
        assert all(size % devices == 0 for size in sizes for devices in DEVICES)


@pytest.mark.parametrize("name", JANUS)
def test_prompt_and_completion_fit_the_models_positions(name):
    for config in load_runs(name):
        model = network.PRESETS["janus-pro-7b" if "7b" in name else "janus-pro-1b"]
        longest = max(config.rollout.max_new_tokens, model.num_image_tokens)
        assert config.data.max_prompt_length + longest <= model.llama.max_position_embeddings


@pytest.mark.parametrize("name", SHOW_O)
def test_a_show_o_config_fits_its_model(name):
    """Positions, adapters, trained parts, the layout of the export; the mesh apart."""
    config, family = load(name), FAMILIES["show_o"]
    preset = "show-o-512x512" if "512" in name else "show-o"
    assert config.model.path == f"models/{preset}"
    assert find_sizes(config.model.path, None) == (family, family.presets[preset])
    sizes = fit.add_parts(config, family, family.presets[preset])
    assert fit.choose_layout(config, family).export.layout == "original"
    assert not fit.find_model_problems(config, family, sizes, None)
    # Show-o's own weights of guidance do not count the conditional part; see `compute_image_logits`
    if STAGE_TABLE[config.stage].samples:
        assert config.rollout.cfg_scale - 1 == (5.0 if "512" in name else 1.75)
        assert config.unmasking.steps == 16


@pytest.mark.parametrize("name", JANUS_FLOW)
def test_a_janus_flow_config_fits_its_model(name):
    """Positions, trained parts, the layout of the export, and JanusFlow's own guidance."""
    config, family = load(name), FAMILIES["janus_flow"]
    sizes, stage = family.presets["janusflow-1.3b"], STAGE_TABLE[config.stage]
    assert find_sizes(config.model.path, None) == (family, sizes)
    assert fit.choose_layout(config, family).export.layout == "original"
    complete = fit.add_parts(config, family, sizes)
    assert not fit.find_model_problems(config, family, complete, None)
    assert not find_denoising_problems(config, stage, family, sizes)
    assert not resolve.find_missing_abilities(config, stage, family, sizes)
    if stage.samples:
        assert config.rollout.cfg_scale == 2.0 and config.algorithm.kl_coef == 0.004
        assert (config.denoising.steps, config.denoising.window) == (10, 2)
        assert config.denoising.window_starts == 5


def test_a_question_longer_than_the_room_beside_an_image_is_no_problem_at_512_pixels():
    """Prompts of images are cut to 129 tokens; those of questions have 1,024 codes."""
    family = FAMILIES["show_o"]
    limits = family.limits(family.presets["show-o-512x512"])
    config = load("show_o_512/self_qa.yaml")
    assert config.data.max_prompt_length + limits.image_tokens > limits.positions
    assert limits.images_always_fit and not fit.find_length_problems(config, limits)
    long = config_files.load(CONFIGS / "show_o_512/self_qa.yaml", ["rollout.max_new_tokens=1024"])
    (problem,) = fit.find_length_problems(long, limits)
    assert "is 2176 tokens; the model has positions for 2048" in problem


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_key_on_top_of_any_config_is_refused(name):
    with pytest.raises(InputError, match=r"did you mean optimizer\.learning_rate\?"):
        load_stages(CONFIGS / name, ["optimizer.learning_rat=1"])


# ---- docs/reference/configuration.md

LISTS = {"rewards": Reward, "eval.suites": EvalSuite}
"""Lists of blocks, by the key of the list."""
BLOCK = re.compile(r"(<!-- options: ([\w.]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def sections() -> dict[str, type[Section]]:
    """Every block of the config by its key; `run` is the top level, `rewards` one of the list."""
    found: dict[str, type[Section]] = {"run": Config}

    def visit(section, prefix):
        for name, field in section.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, Section):
                found[prefix + name] = kind
                visit(kind, f"{prefix}{name}.")
            if (item := LISTS.get(prefix + name)) is not None:
                found[prefix + name] = item
        if (named := options.named_block(section)) is not None:
            found[f"{prefix}NAME"] = named

    visit(Config, "")
    return found


def default_text(field) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
    return f"`{text.removesuffix('...').strip()}`"


def options_table(key: str) -> str:
    """The options of one block as a Markdown table."""
    prefix = "" if key == "run" else f"{key}[]." if key in LISTS else f"{key}."
    lines = ["| option | default | values | meaning |", "|---|---|---|---|"]
    for name, field in sections()[key].model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            continue
        values = " ".join([options.describe_type(kind), *options.describe_limits(field.metadata)])
        meaning = (field.description or "").replace("|", "\\|")
        lines.append(f"| `{prefix}{name}` | {default_text(field)} | {values} | {meaning} |")
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """The document with its option tables as the code has them."""
    return BLOCK.sub(lambda m: f"{m[1]}{options_table(m[2])}\n{m[3]}", text)


def test_configuration_doc_lists_every_block():
    documented = [m[2] for m in BLOCK.finditer((DOCS / "reference/configuration.md").read_text())]
    assert sorted(documented) == sorted(sections())


def test_configuration_doc_is_up_to_date():
    text = (DOCS / "reference/configuration.md").read_text()
    assert text == with_tables(text), "run `python -m tests.config.test_configs`"


# ---- the other documents


def test_rewards_doc_covers_the_registry():
    text = (DOCS / "reference/rewards.md").read_text()
    for name in registry.REGISTRY:
        assert f"`{name}`" in text, name
        (row,) = re.findall(rf"^\| `{name}` \| (?:images|texts) \|.*$", text, re.MULTILINE)
        for option, accepted in registry.list_options(name).items():
            value = yaml.safe_dump(accepted.default).removesuffix("...\n").strip()
            assert f"`{option}={value}`" in row, (name, option)


def test_rewards_doc_lists_the_networks_and_their_sizes():
    text = (DOCS / "reference/rewards.md").read_text()
    for name, expected in networks.NETWORKS.items():
        size = f"{expected.parameters:,}"
        row = rf"^\| `{name}` \| .* \| `{re.escape(expected.place)}` \| {size} \|$"
        assert re.search(row, text, re.MULTILINE), name


def test_released_code_doc_covers_every_quirk_and_switch():
    text = (DOCS / "explained/released_code.md").read_text()
    quirks = re.findall(r"^\| Q(\d+) \|", text, re.MULTILINE)
    assert quirks == [str(number) for number in range(1, 40)]
    for name in Compat.model_fields:
        assert f"`compat.{name}`" in text, name


def documents() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", documents(), ids=page_id)
def test_links_and_paths_in_a_document_exist(path):
    text = path.read_text()
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        file = path.parent / target if target else path
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"
    for name in re.findall(r"`((?:corl_jax|tools|tests|configs|docs)/[\w/.]+\.\w+)`", text):
        assert (ROOT / name).exists(), name
    # Pages about the code leave out the name of the package.
    for name in re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`", text):
        assert any((ROOT / folder / name).exists() for folder in ("", "corl_jax")), name
    for module in re.findall(r"python -m ((?:corl_jax|tools|tests)[\w.]*)", text):
        file = ROOT / module.replace(".", "/")
        assert file.with_suffix(".py").is_file() or (file / "__main__.py").is_file(), module
    for command in re.findall(r"^(?:    |\$ )?corl-jax (\w[\w-]*)", text, re.MULTILINE):
        assert command in COMMANDS, command
    for config in re.findall(r"corl-jax (?:train|plan) (\w+/[\w/]+)(?=\s|`)", text):
        assert config in list_configs(), config
    for study in re.findall(r"corl-jax study (\w+/[\w/]+)(?=\s|`)", text):
        assert study in list_studies(), study
    assert_dotted_names_exist(re.findall(r"`([\w.]+)[`=(]", text))


@pytest.mark.parametrize("name", [*list_configs(), *list_studies()])
def test_a_config_begins_with_a_whole_sentence(name):
    """The command `configs` shows the first line alone."""
    assert describe_config(name).endswith("."), describe_config(name)


@pytest.mark.parametrize("name", FILES)
def test_pages_named_in_a_config_exist(name):
    for page in re.findall(r"docs/[\w/.]+\.md", (CONFIGS / name).read_text()):
        assert (ROOT / page).is_file(), page


def test_modules_named_in_docstrings_and_comments_exist():
    for path in sorted((ROOT / "corl_jax").rglob("*.py")):
        text = path.read_text()
        nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, DOCUMENTED))
        prose = [ast.get_docstring(node) or "" for node in nodes]
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        prose += [token.string for token in tokens if token.type == tokenize.COMMENT]
        assert_dotted_names_exist(re.findall(r"(?<![\w./-])\w+(?:\.\w+)+", "\n".join(prose)))


def assert_dotted_names_exist(names: list[str]) -> None:
    """Names such as `train.stages.STAGES`: something in the package, an option, or a file."""
    children = list((ROOT / "corl_jax").iterdir())
    tops = {
        path.stem for path in children if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    for name in names:
        inner = name.removeprefix("corl_jax.")
        if inner.partition(".")[0] not in tops or name.endswith(FILE_ENDINGS):
            continue
        if inner.removeprefix("config.") not in known_options():
            pkgutil.resolve_name(f"corl_jax.{inner}")  # raises what names the culprit


def test_the_index_lists_every_page_once():
    text = (DOCS / "index.md").read_text()
    listed = re.findall(r"^- \[.+?\]\((.+?)\): .+", text, re.MULTILINE)
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert sorted(listed) == sorted(pages - {"index.md"})


@pytest.mark.parametrize("path", documents(), ids=page_id)
def test_options_named_in_a_document_exist(path):
    known = known_options()
    blocks = "|".join(sorted({key.split(".")[0] for key in sections()} - {"run", "rewards"}))
    for name in re.findall(rf"`((?:{blocks})\.[a-z_0-9.]+)(?:=[^`]*)?`", path.read_text()):
        module = (ROOT / "corl_jax" / name.replace(".", "/", 1)).with_suffix(".py").exists()
        assert name in known or module or name.endswith(FILE_ENDINGS), name


@functools.cache
def known_options() -> set[str]:
    known = {f"{key}.{name}" for key, kind in sections().items() for name in kind.model_fields}
    known |= {f"data.columns.{name}" for name in COLUMNS}
    known |= set(Config.model_fields)
    return known | {
        f"networks.{name}.{option}" for name in networks.NETWORKS for option in ("path", "dtype")
    }


if __name__ == "__main__":
    document = DOCS / "reference/configuration.md"
    document.write_text(with_tables(document.read_text()))
