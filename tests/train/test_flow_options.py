"""Options of denoising steps and of advantages, from the config to the loss and its gradient.

The numbers are those of the released codes, in float64; the network is a table of velocities.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.algorithms.advantages import RewardInputs
from corl_jax.algorithms.recipes import RECIPES
from corl_jax.config.schema import Config
from corl_jax.policies import FAMILIES
from corl_jax.policies.denoising import draw_latents, measure_kl, score_latents
from corl_jax.policies.family import TurnProgram
from corl_jax.tasks import CODES
from corl_jax.train import build, resolve, step
from corl_jax.train.recipe_options import (
    find_denoising_problems,
    find_ignored_options,
    find_unread_options,
)
from corl_jax.train.stages import STAGES
from corl_jax.types import EncodedPrompts
from tests.support import tiny_flow

PROMPTS, GROUP, SHAPE = 2, 4, (3, 2)
ROWS, WINDOW = PROMPTS * GROUP, 2
REWARDS = [0.1, 0.9, 0.4, 0.7, 2, -1, 0.5, 0.25]
ADVANTAGES = {
    "ddof 1": [-1.213938875, 1.071122536, -0.3570408455, 0.4998571837,
               1.269079622, -1.167553252, 0.05076318488, -0.1522895546],
    "ddof 0": [-1.401673936, 1.23677112, -0.4122570399, 0.5771598558,
               1.46538851, -1.348157429, 0.05861554041, -0.1758466212],
    "batch": [-0.5413384904, 0.4776516092, -0.1592172031, 0.2229040843,
              1.990215038, -1.830997835, 0.07960860153, -0.2388258046],
    "centred": [-0.425, 0.375, -0.125, 0.175, 1.5625, -1.4375, 0.0625, -0.1875],
    "rloo": [-0.5666666667, 0.5, -0.1666666667, 0.2333333333,
             2.083333333, -1.916666667, 0.08333333333, -0.25],
}  # fmt: skip


def make_outline(denoising=None, **algorithm):
    config = Config.model_validate({
        "output_dir": "x", "model": {"path": "x", "dtype": "float32", "remat": "none"},
        "data": {"path": "x", "max_prompt_length": 64}, "rewards": [{"name": "t2i_pixel_mse"}],
        "rollout": {"group_size": GROUP, "cfg_scale": 1.0, "max_new_tokens": 8},
        "train": {"prompts_per_step": PROMPTS, "max_steps": 1},
        "mesh": {"data": 1}, "algorithm": {"tasks": "t2i", "num_iterations": 2} | algorithm,
        "denoising": {"steps": 4, "schedule": "linspace", "window": WINDOW, "window_starts": 2}
        | (denoising or {}),
    })  # fmt: skip
    family = dataclasses.replace(
        FAMILIES["janus_flow"],
        turns={((CODES,),): TurnProgram(lambda *_: (), score_table, measure_kl=measure_kl)},
    )
    return resolve.outline_run(
        config, family, tiny_flow.CONFIG, tiny_flow.SPECIAL, jax.devices()[:1]
    )


def score_table(sizes, params, prompts, segments, options):
    """Scores steps with a velocity for each, `v` [N * T, ...]."""
    return (score_latents(lambda x, t: params["v"][: len(x)], segments[0], options.denoising),)


def compare(outline, rewards=REWARDS) -> np.ndarray:
    """The advantages [N] of the config's algorithm."""
    plan = SimpleNamespace(
        algorithm=outline.algorithm, config=outline.config,
        rewards={"t2i": [SimpleNamespace(weight=1.0)]},
    )  # fmt: skip
    inputs = RewardInputs({"t2i": jnp.array([rewards], jnp.float32)})
    recipe = RECIPES[outline.config.algorithm.name]
    return np.asarray(recipe.advantages(inputs, build.make_advantage_options(plan))[0]["t2i"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ({}, "ddof 1"), ({"ddof": 0}, "ddof 0"), ({"ddof": 0, "scale": "batch"}, "batch"),
        ({"name": "dr_grpo"}, "centred"), ({"name": "rloo"}, "rloo"),
    ],
)  # fmt: skip
def test_advantages_have_the_published_numbers(algorithm, expected):
    found = compare(make_outline(**algorithm))
    np.testing.assert_allclose(found, ADVANTAGES[expected], rtol=2e-6)


@pytest.mark.parametrize("name", ["rloo", "remax", "reinforce_pp", "gdpo"])
def test_the_divisor_of_a_std_that_is_not_read_is_warned_of(name):
    config = make_outline().config
    algorithm = config.algorithm.model_copy(update={"name": name, "ddof": 0})
    (line,) = find_ignored_options(config.model_copy(update={"algorithm": algorithm}))
    assert line == f"algorithm.ddof: 0 has no effect; algorithm.name {name} does not read it"
    (line,) = find_ignored_options(make_outline(name="dr_grpo", ddof=0).config)
    assert line.startswith("algorithm.ddof: 0 has no effect; only algorithm.scale group or batch")
    assert not find_ignored_options(make_outline(ddof=0, scale="batch").config)


@pytest.mark.parametrize(
    ("denoising", "message"),
    [
        ({"schedule": "linspace", "shift": 1e-300}, "times that float32 cannot tell apart"),
        ({"shift": 1e4, "eval_steps": 9000, "schedule": "linspace"}, "9000 steps of the"),
        ({"noise_level": 1e30}, "too large for float32"),
        (
            {"noise_level": 1e-30},
            "raise the noise level, or end the window before that step; correct "
            "denoising.noise_level, denoising.window, denoising.window_starts or denoising.steps",
        ),
    ],
)
def test_numbers_beyond_float32_are_refused(denoising, message):
    config = make_outline().config
    config = config.model_copy(update={"denoising": config.denoising.model_copy(update=denoising)})
    family = FAMILIES["janus_flow"]
    sizes = family.presets["janusflow-1.3b"]
    (problem,) = find_denoising_problems(config, STAGES["rl"], family, sizes)
    assert message in problem


def test_a_fatal_alarm_that_the_family_never_raises_is_warned_of():
    config = make_outline().config
    guards = config.guards.model_copy(update={"fatal": ["duplicates"]})
    lines = find_unread_options(
        config.model_copy(update={"guards": guards}), FAMILIES["janus_flow"]
    )
    assert lines == [
        "guards.fatal: 'duplicates' has no effect; a janus_flow makes images by denoising"
    ]


@pytest.mark.parametrize("scale", [1.0, 2.0, 3.5])
def test_sampling_evaluations_and_replay_read_one_guidance(scale):
    outline = make_outline(image_logprobs="guided")
    rollout = outline.config.rollout.model_copy(update={"cfg_scale": scale})
    config = outline.config.model_copy(update={"rollout": rollout})
    outline = dataclasses.replace(outline, config=config)
    for evaluates in (False, True):
        options = build.make_sampling_options(outline, evaluates=evaluates)
        assert options.cfg_scale == build.make_update_options(outline).logprobs.cfg_scale == scale


# ---- the loss of an update, by hand


def rollout(outline):
    """Segments of a sampler whose velocity is half of the latents, and the old velocities."""
    keys = jax.random.split(jax.random.key(1), ROWS)
    denoising = build.choose_denoising(outline)
    segment = draw_latents(lambda x, t: 0.5 * x, keys, GROUP, SHAPE, denoising)
    steps = np.asarray(segment.replay["steps"])
    before = np.asarray(segment.values)[np.arange(ROWS)[:, None], steps]
    return segment, steps, 0.5 * before


def update(outline, velocities, segment, advantages):
    """(loss, metrics, gradient [N * T, ...]) of the velocities, after older ones were scored."""
    ids = jnp.ones((PROMPTS, 3), jnp.int32)
    task = step.TaskBatch(
        EncodedPrompts(ids, ids > 0), (segment,), jnp.asarray(advantages, jnp.float32)
    )
    options = build.make_update_options(outline)
    old = step.make_logprob_step(outline.family, outline.sizes, options)
    params = {"v": jnp.asarray(0.5 * before_of(segment), jnp.float32)}
    task = dataclasses.replace(task, old_logprobs=old(params, {}, {"t2i": task})["t2i"])
    grads, metrics = step.gradients(
        outline.family, outline.sizes, options, {"v": jnp.asarray(velocities)}, {}, {"t2i": task}
    )
    return metrics, np.asarray(grads["v"]).reshape(ROWS, WINDOW, *SHAPE)


def before_of(segment):
    steps = np.asarray(segment.replay["steps"])
    before = np.asarray(segment.values)[np.arange(ROWS)[:, None], steps]
    return before.reshape(-1, *SHAPE)


SIGMAS = np.array([1, 0.9, 0.75, 0.5, 0.0])
STD = np.array([0.7, 0.7 * (0.9 / 0.1 * 0.15) ** 0.5, 0.6062177826, 0.7 * 0.5**0.5])
"""0.7 sqrt(t / (1 - t)) sqrt(-dt); the first is 0.7 exactly."""
DRIFT = np.array([1, 1.245, 1.245, 1.245]) * np.diff(SIGMAS)


@pytest.mark.parametrize("guard", ["none", "ratio", "ratio_per_dt"])
def test_the_loss_of_an_update_by_hand(guard):
    """mean of max(-A rho, -A clip(rho)), with the guard of exp(b mean(z dv)), over -dt."""
    outline = make_outline({"guard": guard, "clip_range": 1e-3}, ddof=0, advantage_clip=1.3)
    segment, steps, old = rollout(outline)
    advantages = compare(outline)
    change = 5e-3 * np.random.default_rng(3).normal(size=old.shape)
    metrics, gradient = update(
        outline, (old + change).reshape(-1, *SHAPE).astype(np.float32), segment, advantages
    )
    latents = np.asarray(segment.values, np.float64)
    rows = np.arange(ROWS)[:, None]
    t, dt, std, drift = (x[steps] for x in (SIGMAS[:-1], np.diff(SIGMAS), STD, DRIFT))
    half = 0.49 * np.where(steps == 0, t / 0.1, t / np.maximum(1 - t, 1e-9)) / (2 * t)
    wide = (..., None, None)
    mean = latents[rows, steps] * (1 + half * dt)[wide] + old * drift[wide]
    noise = (latents[rows, steps + 1] - mean) / std[wide]
    product = np.sign(drift) * (abs(drift) / std) * (noise * change).mean(axis=(2, 3))
    square = (drift / std) ** 2 / 2 * (change**2).mean(axis=(2, 3))
    guarded = guard != "none"
    log_ratio = std * product if guarded else product - square
    ratio, weight = np.exp(log_ratio), -1 / dt if guard == "ratio_per_dt" else 1.0
    a = np.clip(ADVANTAGES["ddof 0"], -1.3, 1.3)[:, None]
    clipped = np.clip(ratio, 1 - 1e-3, 1 + 1e-3)
    expected = (weight * np.maximum(-a * ratio, -a * clipped)).mean()
    assert float(metrics["loss"]) == pytest.approx(expected, abs=2e-6)
    # Without the clip each step would teach -A b z / D, over its std if there is no guard.
    is_active = (-a * ratio) >= (-a * clipped)
    assert 0 < is_active.sum() < is_active.size
    slope = drift if guarded else drift / std
    per_step = np.where(is_active, -a * ratio * weight * slope, 0) / (ROWS * WINDOW * 6)
    moved = noise if guarded else noise - (drift / std)[wide] * change
    np.testing.assert_allclose(gradient, per_step[wide] * moved, rtol=2e-3, atol=2e-6)


def test_groups_with_equal_rewards_may_be_left_out():
    """The other group's loss is then the mean, and the equal one has no penalty either."""
    rewards = [*REWARDS[:4], *[0.5] * 4]
    found = {}
    for masked in (False, True):
        outline = make_outline({"clip_range": 1.0}, mask_indifferent=masked)
        segment, _, old = rollout(outline)
        change = 5e-3 * np.random.default_rng(3).normal(size=old.shape)
        velocities = (old + change).reshape(-1, *SHAPE).astype(np.float32)
        found[masked] = update(outline, velocities, segment, compare(outline, rewards))
    assert float(found[True][0]["loss"]) == pytest.approx(2 * float(found[False][0]["loss"]))
    np.testing.assert_allclose(found[True][1], 2 * found[False][1], rtol=1e-5, atol=1e-9)
    assert not found[True][1][GROUP:].any()


def test_a_batch_without_a_difference_teaches_nothing():
    outline = make_outline(mask_indifferent=True)
    segment, _, old = rollout(outline)
    metrics, gradient = update(
        outline, old.reshape(-1, *SHAPE), segment, compare(outline, [0.5] * ROWS)
    )
    assert float(metrics["loss"]) == 0 and not gradient.any()
    first = step.pick_first(metrics, {"t2i": segment.kind})
    assert float(first["t2i/ratio_first"].value) == 0
