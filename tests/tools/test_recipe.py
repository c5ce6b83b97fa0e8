"""Whole steps of published recipes: PyTorch does the same work, and figures fit together."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from corl_jax.algorithms.estimators import compute_group_advantages
from corl_jax.errors import BAD_INPUT_EXIT_CODE
from corl_jax.models import modules
from corl_jax.models.lora import Lora, LoraLinear
from corl_jax.rewards.networks import NETWORKS
from corl_jax.weights.layouts import KINDS
from tools.bench import __main__ as command
from tools.bench import recipe
from tools.bench.peer import model as peer_model
from tools.bench.peer import recipe as peer_recipe
from tools.bench.peer.adapters import TARGETS, AdaptedLinear
from tools.bench.peer.model import Peer
from tools.bench.sizes import SIZES

SIZE = SIZES["tiny"]
PROMPTS, GROUP = 4, 2


def make_peer(tmp_path, rank: int | None = None, plan: int = 0) -> Peer:
    torch.manual_seed(0)
    special = SIZE.measured.write_processor(tmp_path / "policy", SIZE.policy).special
    network = peer_model.build(SIZE, special, "cpu")
    return Peer(
        SIZE, special, PROMPTS, GROUP, 1, "cpu", network, micro_batch=2, batch_prompts=2, rank=rank,
        plan=plan,
    )  # fmt: skip


def copy_parameters(network) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in network.named_parameters()}


# ---- figures


def test_figures_by_hand():
    """Medians of 3, 1 and 6 s; the whole step is that in the middle, not the sum of medians."""
    steps = [
        {"rollout": 10.0, "reward": 1.0, "update": 5.0},
        {"rollout": 12.0, "reward": 0.5, "update": 6.0},
        {"rollout": 14.0, "reward": 2.0, "update": 4.0},
    ]
    figures = recipe.describe_steps(steps, completions=37, devices=2)
    assert [figures[f"{name}_s"] for name in recipe.PHASES] == [12, 1, 5]
    assert figures["images_per_s"] == 2 and figures["s_per_image"] == 0.5
    assert figures["gpu_hours_per_1000_steps"] == pytest.approx(1000 * 18.5 * 2 / 3600)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--prompts", "8", "--batch-prompts", "3"], "--batch-prompts: found 3, which does not"),
        (
            ["--parts", "image,recipe", "--lora", "4", "--peer", "transformers"],
            "--peer: of image PyTorch has no adapters; leave out --lora, or give --parts recipe",
        ),
        (["--size", "show-o-tiny", "--parts", "recipe"], "found recipe, which no show_o has"),
    ],
)
def test_arguments_that_cannot_be(arguments, said, capsys):
    with pytest.raises(SystemExit) as error:
        command.main(["--size", "tiny", *arguments])
    assert error.value.code == BAD_INPUT_EXIT_CODE
    assert said in capsys.readouterr().err


# ---- the same work in PyTorch


@pytest.mark.parametrize("name", ["clip", "pickscore", "hpsv2"])
def test_reward_networks_have_the_same_parameters(name):
    """At the published size; made without their memory."""
    config = SIZES["7b"].networks[name]
    with torch.device("meta"):
        theirs = peer_recipe.CLIPModel(peer_recipe.write_clip_config(config))
    ours = modules.make_abstract(KINDS[NETWORKS[name].kind].module, config)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(ours))
    assert sum(value.numel() for value in theirs.parameters()) == count == NETWORKS[name].parameters


def test_adapters_compute_the_same():
    rng = np.random.default_rng(0)
    x, base, down, up = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((5, 6), (6, 7), (6, 3), (3, 7))
    )
    ours = LoraLinear(6, 7, Lora(3, 12.0, TARGETS), bias=False, rngs=nnx.Rngs(0))
    ours.kernel[...], ours.lora_a[...], ours.lora_b[...] = map(jnp.asarray, (base, down, up))
    linear = torch.nn.Linear(6, 7, bias=False)
    linear.weight.data = torch.from_numpy(base.T.copy())
    theirs = AdaptedLinear(linear, 3, 4.0)
    theirs.down.data = torch.from_numpy(down.T.copy())
    theirs.up.data = torch.from_numpy(up.T.copy())
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.from_numpy(x)), ours(x), rtol=1e-5, atol=1e-5)


def test_advantages_are_those_of_the_project(tmp_path):
    scores = torch.tensor([1.0, 2.0, 0.5, 0.5, -1.0, 3.0, 7.0, 8.0])
    run = dataclasses.replace(
        peer_recipe.start(make_peer(tmp_path, rank=2), tmp_path), scorers=[lambda images: scores]
    )
    codes = np.zeros((PROMPTS * GROUP, SIZE.limits.image_tokens), np.int32)
    expected = compute_group_advantages(jnp.asarray(scores.numpy()), GROUP, 1e-4, "group")
    np.testing.assert_allclose(peer_recipe.score_codes(run, codes), expected, rtol=1e-5)


def test_a_step_of_all_parameters_trains_the_language_model_alone(tmp_path):
    peer = make_peer(tmp_path)
    run = peer_recipe.start(peer, tmp_path)
    assert len(run.scorers) == 3 and run.reference is not None
    before, reference = copy_parameters(peer.model), copy_parameters(run.reference[0])
    drawn = peer_recipe.draw(run, 3)
    assert drawn.codes.shape == (PROMPTS * GROUP, SIZE.limits.image_tokens)
    assert drawn.plans is None
    advantages = peer_recipe.score_codes(run, drawn.codes)
    assert (advantages.view(PROMPTS, GROUP).sum(1).abs() < 1e-3).all()
    peer_recipe.update_policy(run, drawn, advantages)
    moved = {name for name, value in peer.model.named_parameters() if not value.equal(before[name])}
    assert moved and all(name.startswith("model.language_model.") for name in moved)
    assert {name.split(".")[-2] for name in moved} >= set(TARGETS)
    after = copy_parameters(run.reference[0])
    assert all(value.equal(after[name]) for name, value in reference.items())
    assert {value.dtype for value in run.trained} == {torch.bfloat16}


def test_plans_are_sampled_and_scored_in_front_of_their_images(tmp_path):
    """Images of the same codes behind other plans have other log-probs, plans do not see them."""
    peer = make_peer(tmp_path, plan=5)
    run = peer_recipe.start(peer, tmp_path)
    drawn = peer_recipe.draw(run, 3)
    assert drawn.plans is not None and drawn.plans.shape == (PROMPTS * GROUP, 5)
    context = peer_recipe.add_plans(peer, drawn.prompts, drawn.plans)
    assert context.input_ids.shape[1] == SIZE.image_prompt + 5
    assert (context.input_ids[:, -1] == peer.special.boi).all()
    assert not (drawn.prompts.input_ids == peer.special.boi).any()
    with torch.no_grad():
        texts, images = peer_recipe.compute_logprobs(peer, drawn)
        other = dataclasses.replace(drawn, plans=(drawn.plans + 1) % 100)
        _, behind_others = peer_recipe.compute_logprobs(peer, other)
        other = dataclasses.replace(drawn, codes=(drawn.codes + 1) % 100)
        same_texts, _ = peer_recipe.compute_logprobs(peer, other)
    assert texts.shape == (PROMPTS * GROUP, 5) and images.shape == drawn.codes.shape
    assert not torch.allclose(images, behind_others, atol=1e-3)
    torch.testing.assert_close(texts, same_texts, atol=1e-3, rtol=0)
    before = copy_parameters(peer.model)
    peer_recipe.update_policy(run, drawn, torch.arange(8.0) - 3.5)
    assert not peer.model.lm_head.weight.equal(before["lm_head.weight"])


def test_a_step_of_adapters_trains_them_alone(tmp_path):
    peer = make_peer(tmp_path, rank=2)
    run = peer_recipe.start(peer, tmp_path)
    assert len(run.scorers) == 1 and run.reference is None
    layers = SIZE.policy.llama.num_layers
    assert len(run.trained) == 2 * len(TARGETS) * layers
    assert {value.dtype for value in run.trained} == {torch.float32}
    before = copy_parameters(peer.model)
    phases = peer_recipe.take_step(run, 3)
    assert phases.keys() == set(recipe.PHASES) and min(phases.values()) > 0
    moved = {name for name, value in peer.model.named_parameters() if not value.equal(before[name])}
    # The matrices A move from the second step on: B is 0 before.
    assert len(moved) == len(TARGETS) * layers and all(name.endswith(".up") for name in moved)


def test_micro_batches_change_no_gradient(tmp_path, monkeypatch):
    """Of one step on the same images, up to rounding in bfloat16."""
    peer = make_peer(tmp_path)
    run = peer_recipe.start(peer, tmp_path)
    drawn = peer_recipe.draw(run, 3)
    advantages = torch.arange(8.0) - 3.5
    gradients = []
    monkeypatch.setattr(run.optimizer, "step", lambda: None)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, limit: None)
    monkeypatch.setattr(
        run.optimizer,
        "zero_grad",
        lambda set_to_none: gradients.append(torch.cat([take_gradient(x) for x in run.trained])),
    )

    def take_gradient(parameter) -> torch.Tensor:
        gradient, parameter.grad = parameter.grad, None
        return torch.zeros(parameter.numel()) if gradient is None else gradient.float().flatten()

    for micro_batch in (2, 4):
        part = dataclasses.replace(run, peer=dataclasses.replace(peer, micro_batch=micro_batch))
        peer_recipe.update_policy(part, drawn, advantages)
    small, large = gradients
    assert (small - large).norm() < 0.02 * large.norm()


@pytest.mark.slow
@pytest.mark.parametrize("lora, plan", [(None, 0), (None, 4), (2, 0)])
def test_steps_are_measured_here_and_in_pytorch(lora, plan, tmp_path, capfd):
    out = tmp_path / "recipe.jsonl"
    adapters = ["--lora", str(lora)] if lora else ["--plan", str(plan)]
    command.main(
        ["--size", "tiny", "--prompts", "4", "--group", "2", "--repeats", "1", "--micro-batch", "2",
         "--batch-prompts", "2", "--parts", "recipe", "--peer", "transformers", *adapters,
         "--out", str(out)]
    )  # fmt: skip
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    found = {line["name"]: line for line in lines if line.get("part") == recipe.PART}
    ours, theirs, setting = (found[name] for name in (recipe.NAME, "eager loop", "setting"))
    assert ours["programs"] == 1
    assert ours["times_eager_loop"] == pytest.approx(theirs["median_s"] / ours["median_s"])
    for line in (ours, theirs):
        assert sum(line[f"{name}_s"] for name in recipe.PHASES) <= line["median_s"] * 1.001
        assert line["s_per_image"] * line["images_per_s"] == pytest.approx(1)
    assert setting["recipe"] == ("UniRL" if lora else "T2I-R1") and setting["plan"] == plan
    assert setting["parameters_and_moments"] == ("float32" if lora else "bfloat16")
    said = capfd.readouterr().err
    assert "PyTorch, step 1:" in said and "here, step 2:" in said
