"""The block `algorithm`: what a recipe completes, refuses and ignores, and runs of several rows."""

from __future__ import annotations

import dataclasses

import pytest

from corl_jax import policies
from corl_jax.algorithms.losses import LossConstants
from corl_jax.algorithms.recipes import RECIPES
from corl_jax.config import files as config_files
from corl_jax.config.denoising import Denoising
from corl_jax.config.origins import Origin
from corl_jax.config.readers import find_unused_options
from corl_jax.config.schema import Config
from corl_jax.train import __main__ as command
from corl_jax.train import build, resolve
from corl_jax.train.fit import find_drawing_problems, find_window_problems
from corl_jax.train.recipe_options import (
    complete_algorithm,
    find_algorithm_problems,
    find_denoising_problems,
    find_ignored_options,
    find_unread_options,
)
from corl_jax.train.stages import STAGES
from docs.examples.bag_family import FAMILY
from tests.support import bag_runs, tiny_runs

SINGLE = [name for name, recipe in RECIPES.items() if recipe.min_group_size == 1]
GROUPED = [name for name in RECIPES if name not in SINGLE]


def make_config(name="grpo", group_size=8, prompts_per_step=4, **algorithm) -> Config:
    return Config.model_validate(
        {
            "output_dir": "x", "model": {"path": "x"}, "data": {"path": "x"},
            "rewards": [{"name": "format"}],
            "rollout": {"group_size": group_size}, "train": {"prompts_per_step": prompts_per_step},
            "algorithm": {"name": name} | algorithm,
        }
    )  # fmt: skip


# ---- windows of image codes


@pytest.mark.parametrize(
    ("family", "window", "problem"),
    [
        ("janus", 1, None), ("show_o", 1, None), ("janus", 576, None),
        ("janus", 577, "found 577, but an image has 576 codes; expected at most as many; lower it"),
        *(
            (name, 2, f"found 2, but a {name} does not draw the codes of an image in windows; set "
             "it to 1")
            for name in ("show_o", "janus_flow")
        ),
    ],
)  # fmt: skip
def test_windows_need_codes_in_order_and_no_more_than_an_image_has(family, window, problem):
    config, family = make_config(), policies.FAMILIES[family]
    config = config.model_copy(
        update={"rollout": config.rollout.model_copy(update={"image_window": window})}
    )
    limits = family.limits(next(iter(family.presets.values())))
    expected = [f"rollout.image_window: {problem}"] if problem else []
    assert find_window_problems(config, family, limits) == expected


# ---- steps of unmasking


@pytest.mark.parametrize(
    ("model", "options", "steps"),
    [
        ("show-o", {"scored_steps": 17}, 16), ("show-o-512x512", {"scored_steps": 51}, 50),
        ("show-o", {"scored_steps": 9, "steps": 8}, 8),
        ("show-o", {"scored_steps": 16}, None), ("show-o-512x512", {"scored_steps": 17}, None),
        ("show-o", {"scored_steps": 17, "logprobs": "one_shot"}, None),
        ("janus-pro-1b", {"scored_steps": 17}, None),
    ],
)  # fmt: skip
def test_more_scored_steps_than_an_image_has_are_refused_where_they_are_read(
    model, options, steps
):  # fmt: skip
    unmasking = {"logprobs": "trajectory"} | options
    config = Config.model_validate(make_config().model_dump() | {"unmasking": unmasking})
    family = next(x for x in policies.FAMILIES.values() if model in x.presets)
    problems = find_drawing_problems(config, family, family.limits(family.presets[model]))
    expected = f"but an image is drawn in {steps} steps; expected at most as many"
    assert len(problems) == (steps is not None)
    assert all(expected in line for line in problems)
    unread = [*find_unused_options(config), *find_unread_options(config, family)]
    assert any("unmasking.scored_steps" in line for line in unread) == (
        model == "janus-pro-1b" or "logprobs" in options
    )


# ---- denoising


def find_problems(config: Config, stage: str = "rl") -> list[str]:
    family = policies.FAMILIES["janus_flow"]
    return find_denoising_problems(config, STAGES[stage], family, family.presets["janusflow-1.3b"])


@pytest.mark.parametrize("stage", ["rl", "sft"])
def test_a_schedule_without_a_shift_is_refused_before_an_evaluation_needs_it(stage):
    config = make_config().model_copy(update={"denoising": Denoising(shift=3.0)})
    assert find_problems(config, stage) == [
        "denoising: schedule 'uniform' has no shift, found 3.0: leave shift at null"
    ]
    janus = policies.FAMILIES["janus"]
    sizes = next(iter(janus.presets.values()))
    (found,) = find_denoising_problems(config, STAGES[stage], janus, sizes)
    assert found.startswith("model.path: found a janus, which does not make images by denoising, ")
    assert "the config has denoising.shift; give a model that does" in found
    config = config.model_copy(update={"denoising": Denoising(schedule="linspace", shift=3.0)})
    assert not find_problems(config, stage)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"window": 4, "window_starts": 8}, "the largest start can be 6"),
        ({"dynamics": "cps", "window": 10}, "only steps 0 to 8 of 10 have noise"),
        ({"dynamics": "cps", "steps": 1}, "no step with noise"),
        ({"dynamics": "cps", "noise_level": 1.5}, "at most 1.0"),
        ({"dynamics": "cps", "noise_level": 1.5}, "has no noise; correct denoising.noise_level"),
    ],
)
def test_a_window_without_noise_is_refused_where_it_is_trained(changes, problem):
    config = make_config().model_copy(update={"denoising": Denoising(**changes)})
    (found,) = find_problems(config)
    assert found.startswith("denoising: ") and problem in found
    assert not find_problems(config, "sft")


def test_the_stds_of_a_dynamic_schedule_are_those_of_the_models_images():
    """The last of 23 steps has std 0.053 with 576 tokens, and would have 0.049 with one."""
    options = {"schedule": "dynamic", "latent_dtype": "bfloat16"}
    config = make_config().model_copy(update={"denoising": Denoising(**options, steps=23)})
    assert not find_problems(config)
    config = make_config().model_copy(update={"denoising": Denoising(**options, steps=30)})
    (found,) = find_problems(config)
    assert "step 29 of 30 has std 0.041, below 0.05" in found


def test_a_greedy_baseline_and_a_penalty_in_the_reward_are_refused_for_latents():
    (found,) = find_problems(make_config("remax", kl_coef=0.0))
    assert "algorithm.name: found remax" in found and "choose one of grpo" in found
    (found,) = find_problems(make_config(kl_coef=0.1, kl_in="reward"))
    assert "algorithm.kl_in: found reward" in found
    assert not find_problems(make_config("remax", tasks="mm2t"))


def test_options_of_tokens_are_unread_where_all_completions_are_latents():
    block = {"clip_low": 0.1, "kl_estimator": "k2", "image_logprobs": "guided"}
    options = make_config(tasks="t2i", **block).model_dump()
    options["rollout"]["temperature"], options["guards"]["duplicates"] = 0.5, 0.1
    options["guards"]["entropy"] = 0.2

    def list_keys(family: str, **changes: object) -> list[str]:
        config = Config.model_validate(options | changes)
        warnings = find_unread_options(config, policies.FAMILIES[family])
        return sorted(warning.partition(":")[0] for warning in warnings)

    of_images = ["algorithm.image_logprobs", "guards.duplicates"]
    of_texts = ["algorithm.clip_low", "algorithm.kl_estimator", "guards.entropy"]
    assert list_keys("janus_flow") == sorted([*of_images, *of_texts, "rollout.temperature"])
    # The questions of an evaluation are answered at the temperature.
    assert list_keys("janus_flow", eval={"suites": [{"suite": "tsv", "path": "x"}]}) == sorted(
        [*of_images, *of_texts]
    )
    both = options["algorithm"] | {"tasks": "unified"}
    assert list_keys("janus_flow", algorithm=both) == of_images
    assert not list_keys("janus")


def test_a_default_that_is_given_and_not_read_is_warned_of():
    """Steps of denoising are scored with the sampler's guidance whatever the option says."""
    config = make_config(tasks="t2i")
    given = Origin("x", [], {"algorithm.image_logprobs": "conditional"}, {})
    (line,) = find_unread_options(config, policies.FAMILIES["janus_flow"], given)
    assert line == (
        "algorithm.image_logprobs: 'conditional' has no effect; a janus_flow makes images by "
        "denoising"
    )
    assert not find_unread_options(config, policies.FAMILIES["janus"], given)
    set_back = dataclasses.replace(given, replaced={"algorithm.image_logprobs": "guided"})
    assert not find_unread_options(config, policies.FAMILIES["janus_flow"], set_back)
    assert not find_unread_options(config, policies.FAMILIES["janus_flow"])


# ---- completed


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_completes_the_options_that_are_null(name):
    recipe, completed = RECIPES[name], complete_algorithm(make_config(name).algorithm)
    assert (completed.scale, completed.reduction) == (recipe.scales[0], recipe.reductions[0])
    assert completed.kl_in == recipe.kl_in and completed.kl_estimator == recipe.kl_estimator
    assert build.make_loss_constants(completed) == LossConstants(
        kl_coef=0.0, clip_low=recipe.clip_low, clip_high=recipe.clip_high,
        reduction=recipe.reductions[0], kl_estimator=recipe.kl_estimator,
    )  # fmt: skip
    assert not find_algorithm_problems(make_config(name))
    assert not find_ignored_options(make_config(name))
    assert not find_unused_options(make_config(name))


@pytest.mark.parametrize("name", RECIPES)
def test_options_of_the_config_come_first(name):
    recipe = RECIPES[name]
    chosen = {
        "scale": recipe.scales[-1], "reduction": recipe.reductions[-1], "clip_low": 0.0,
        "clip_high": 0.7, "kl_in": "loss", "kl_estimator": "k2", "redraws": 0, "kl_coef": 0.1,
    }  # fmt: skip
    completed = complete_algorithm(make_config(name, **chosen).algorithm)
    assert {key: getattr(completed, key) for key in chosen} == chosen
    assert build.make_loss_constants(completed).kl_coef == 0.1
    in_reward = completed.model_copy(update={"kl_in": "reward"})
    assert build.make_loss_constants(in_reward).kl_coef == 0.0


# ---- refused


@pytest.mark.parametrize("name", GROUPED)
def test_one_completion_per_prompt_is_refused_where_completions_are_compared(name):
    (line,) = find_algorithm_problems(make_config(name, group_size=1))
    assert line.startswith(f"rollout.group_size: found 1, but algorithm.name {name} compares")
    assert "expected at least 2" in line and "choose algorithm.name remax, reinforce_pp" in line


@pytest.mark.parametrize(
    ("family", "options", "names"),
    [
        ("janus", {}, "remax, reinforce_pp"),
        # No greedy image is drawn, and no penalty is in the reward of denoising steps.
        ("janus_flow", {"kl_coef": 0.0}, "reinforce_pp"),
        ("janus_flow", {"kl_coef": 0.1}, None),
        ("janus_flow", {"tasks": "mm2t", "kl_coef": 0.1}, "remax, reinforce_pp"),
        ("janus", {"num_iterations": 2}, "reinforce_pp"),
    ],
)
def test_advised_algorithms_work_with_the_model_and_the_other_options(family, options, names):
    config, family = make_config(group_size=1, **options), policies.FAMILIES[family]
    (line,) = find_algorithm_problems(config, family)
    advice = f"; raise it, or choose algorithm.name {names}" if names else "; raise it"
    assert line.endswith(f"expected at least 2{advice}")
    sizes = next(iter(family.presets.values()))
    for name in names.split(", ") if names else ():
        config = make_config(name, 1, **options)
        assert not find_algorithm_problems(config, family)
        assert not find_denoising_problems(config, STAGES["rl"], family, sizes)


@pytest.mark.parametrize(
    ("options", "advice"),
    [({"kl_coef": 0.0}, "choose reinforce_pp"), ({"kl_coef": 0.1}, "group_size of at least 2")],
)
def test_one_latent_image_per_prompt_and_a_greedy_baseline(options, advice):
    (found,) = find_problems(make_config("remax", 1, **options))
    assert found.endswith(advice)


@pytest.mark.parametrize("name", SINGLE)
def test_one_completion_per_prompt_is_enough_for_others(name):
    assert not find_algorithm_problems(make_config(name, group_size=1))


def test_one_completion_per_step_has_nothing_to_compare_with():
    (line,) = find_algorithm_problems(make_config("reinforce_pp", 1, prompts_per_step=1))
    assert line.startswith("train.prompts_per_step: found 1") and "expected at least 2" in line
    assert not find_algorithm_problems(make_config("reinforce_pp", 2, prompts_per_step=1))
    assert not find_algorithm_problems(make_config("remax", 1, prompts_per_step=1))


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        (
            "grpo", {"dual_clip": 1.2},
            "algorithm.dual_clip: found 1.2; expected more than 1 + algorithm.clip_high, which is "
            "1.2; raise it, or lower algorithm.clip_high",
        ),
        (
            "dapo", {"dual_clip": 1.25, "clip_high": None},
            "algorithm.dual_clip: found 1.25; expected more than 1 + algorithm.clip_high, which is "
            "1.28; raise it, or lower algorithm.clip_high",
        ),
        (
            "rloo", {"scale": "group"},
            "algorithm.scale: found group, which algorithm.name rloo does not have; expected one "
            "of none, batch",
        ),
        (
            "reinforce_pp", {"scale": "group"},
            "algorithm.scale: found group, which algorithm.name reinforce_pp does not have; "
            "expected one of batch, none",
        ),
        (
            "rloo", {"reduction": "token_mean"},
            "algorithm.reduction: found token_mean, which algorithm.name rloo does not have; "
            "expected sequence_mean",
        ),
        (
            "remax", {"num_iterations": 2},
            "algorithm.num_iterations: found 2, but the loss of algorithm.name remax has no ratio "
            "that corrects for a policy that has moved; expected 1",
        ),
    ],
)  # fmt: skip
def test_options_that_a_recipe_cannot_work_with(name, options, line):
    assert find_algorithm_problems(make_config(name, **options)) == [line]


def test_redraws_of_single_completions_are_refused():
    (line,) = find_algorithm_problems(make_config("reinforce_pp", 1, redraws=2))
    assert line.startswith("algorithm.redraws: found 2") and "set it to 0" in line
    # The default of a recipe is no value of the config, so it is not named.
    (line,) = find_algorithm_problems(make_config("dapo", 1))
    assert line.startswith("rollout.group_size")
    # One completion and the greedy one may have different rewards.
    assert not find_algorithm_problems(make_config("remax", 1, redraws=2))


def test_a_dual_clip_that_fits_is_accepted():
    for name in RECIPES:
        assert not find_algorithm_problems(make_config(name, dual_clip=6.0))
    assert not find_algorithm_problems(make_config("grpo", dual_clip=1.2, clip_high=0.1))
    # Without effect it is no contradiction, but a warning.
    assert not find_algorithm_problems(make_config("remax", dual_clip=1.0))


# ---- without effect


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cispo", {"clip_low": 0.1}), ("cispo", {"dual_clip": 1.5}), ("remax", {"clip_low": 0.3}),
        ("remax", {"clip_high": 0.3}), ("remax", {"dual_clip": 3.0}),
    ],
)  # fmt: skip
def test_options_that_a_recipe_does_not_read_are_warned_of(name, options):
    (line,) = find_ignored_options(make_config(name, num_iterations=1, **options))
    ((key, value),) = options.items()
    assert line == (
        f"algorithm.{key}: {value!r} has no effect; algorithm.name {name} does not read it"
    )


@pytest.mark.parametrize(
    ("name", "place", "estimator"),
    [("grpo", "reward", "k1"), ("remax", "reward", "k1"), ("rloo", "loss", "k3"),
     ("rloo", "reward", "k1"), ("remax", "loss", "k2"), ("grpo", "loss", "k3")],
)  # fmt: skip
def test_a_penalty_that_is_moved_gets_the_estimator_of_its_place(name, place, estimator):
    config = make_config(name, kl_in=place, kl_coef=0.1)
    assert complete_algorithm(config.algorithm).kl_estimator == estimator
    assert not find_ignored_options(config)
    chosen = make_config(name, kl_in=place, kl_coef=0.1, kl_estimator="k2").algorithm
    assert complete_algorithm(chosen).kl_estimator == "k2"


def test_k1_in_the_loss_is_warned_of_where_there_is_a_penalty():
    options = {"kl_estimator": "k1", "kl_in": "loss"}
    (line,) = find_ignored_options(make_config(kl_coef=0.1, **options))
    assert line.startswith("algorithm.kl_estimator: k1 in the loss has a gradient whose mean is 0")
    assert not find_ignored_options(make_config("rloo", kl_coef=0.1))
    assert not find_ignored_options(make_config(**options))


@pytest.mark.parametrize(
    ("options", "reader"),
    [
        ({"dual_clip": 3.0}, "algorithm.num_iterations above 1"),
        ({"clip_high": 0.3}, "algorithm.num_iterations above 1"),
        ({"kl_in": "reward"}, "algorithm.kl_coef above 0"),
        ({"kl_estimator": "k2"}, "algorithm.kl_coef above 0"),
        ({"reference_every": 5}, "algorithm.kl_coef above 0"),
        ({"kl_coef": 0.1, "reference_decay": 0.5}, "algorithm.reference_every above 0"),
        ({"tasks": "mm2t", "image_token_share": 0.5}, "a task that makes images"),
        ({"tasks": "mm2t", "image_token_weights": "entropy"}, "a task that makes images"),
        ({"tasks": "t2i", "alternate_every": 5}, "algorithm.tasks unified"),
        ({"alternate_every": 5, "mm2t_weight": 0.5}, "algorithm.alternate_every 0"),
    ],
)
def test_options_without_a_reader_are_warned_of(options, reader):
    key, value = list(options.items())[-1]
    assert find_unused_options(make_config(**options)) == [
        f"algorithm.{key}: {value!r} has no effect; only {reader} reads it"
    ]


# ---- the command


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return bag_runs.write_files(tmp_path_factory.mktemp("bag"))


@pytest.fixture
def run_bag(files, tmp_path, monkeypatch, one_device):
    """Trains a very small family with overrides; returns its run directory."""
    monkeypatch.setitem(policies.FAMILIES, FAMILY.name, FAMILY)

    def run(*overrides, **changes):
        output = tmp_path / "run"
        tree = bag_runs.options(files, output, **changes)
        path = tiny_runs.write_config(tmp_path / "config.yaml", tree)
        command.main(["--config", str(path), *overrides])
        return output

    return run


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("tasks", ["unified", "t2i", "mm2t"])
def test_every_recipe_resolves_for_every_task(files, tmp_path, monkeypatch, name, tasks):
    monkeypatch.setitem(policies.FAMILIES, FAMILY.name, FAMILY)
    rewards = {"t2i": [{"use": f"{files[2]}:red"}], "mm2t": [{"name": "qa_accuracy"}]}
    rewards["unified"] = rewards["t2i"] + rewards["mm2t"]
    tree = bag_runs.options(
        files, tmp_path / "run", algorithm={"name": name, "tasks": tasks}, rewards=rewards[tasks]
    )
    path = tiny_runs.write_config(tmp_path / "config.yaml", tree)
    plan = resolve.resolve_run(config_files.load(path))
    assert plan.algorithm.reduction == RECIPES[name].reductions[0]
    assert build.make_advantage_options(plan).scale == RECIPES[name].scales[0]
    options = build.make_update_options(plan)
    assert options.loss is RECIPES[name].loss and not options.selections


def test_the_command_refuses_all_wrong_choices_together(run_bag, capsys):
    with pytest.raises(SystemExit) as error:
        run_bag(
            "algorithm.name=rloo", "algorithm.reduction=constant", "algorithm.scale=group",
            "algorithm.redraws=1", "rollout.group_size=1",
        )  # fmt: skip
    assert error.value.code == 2
    lines = capsys.readouterr().err
    for key in ("algorithm.reduction", "algorithm.scale", "algorithm.redraws"):
        assert f"error: {key}: found" in lines


def test_the_command_checks_and_warns(run_bag, capsys):
    run_bag("algorithm.name=cispo", "algorithm.clip_low=0.1", "--check")
    lines = capsys.readouterr()
    assert "algorithm.clip_low: 0.1 has no effect; algorithm.name cispo" in lines.out + lines.err


@pytest.mark.parametrize(
    "overrides",
    [
        ("algorithm.name=dr_grpo",),
        ("algorithm.name=rloo", "algorithm.scale=batch"),
        ("algorithm.name=cispo", "algorithm.num_iterations=2", "algorithm.importance_cap=2.0"),
        (
            "algorithm.name=gspo", "algorithm.num_iterations=2", "algorithm.image_token_share=0.5",
            "algorithm.image_token_weights=entropy", "algorithm.dual_clip=3.0",
        ),
    ],
    ids=lambda overrides: overrides[0].partition("=")[2],
)  # fmt: skip
def test_a_run_learns(run_bag, overrides):
    output = run_bag(*overrides, log={"images_every": 0, "samples_every": 0})
    lines = tiny_runs.metric_lines(output)
    for name in ("eval/mm2t/qa_accuracy", "eval/t2i/red"):
        scores = [line[name] for line in lines if name in line]
        assert scores[-1] > scores[0] + 0.1, (name, scores)
    steps = [line for line in lines if "loss" in line]
    assert steps[0]["grad_norm"] > 0 and not any(line["update/skipped"] for line in steps)
    # Where all groups have equal rewards nothing moves.
    solved = [line for line in steps if line["reward_std"] == 0]
    assert not any(line["grad_norm"] for line in solved)


def test_a_run_with_one_completion_per_prompt_learns(run_bag):
    output = run_bag(
        "algorithm.name=reinforce_pp", "rollout.group_size=1",
        "log.images_every=0", "log.samples_every=0",
    )  # fmt: skip
    lines = tiny_runs.metric_lines(output)
    scores = [line["eval/t2i/red"] for line in lines if "eval/t2i/red" in line]
    assert scores[-1] > scores[0]
