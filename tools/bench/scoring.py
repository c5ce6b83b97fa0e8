"""Measures the project's reward functions, with networks on the device and offloaded."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from corl_jax import tasks
from corl_jax.config import files as config_files
from corl_jax.devices.mesh import network_shardings
from corl_jax.models import modules
from corl_jax.rewards import captions, registry, similarity
from corl_jax.rewards.image import lpips_distance
from corl_jax.rewards.networks import NETWORKS
from corl_jax.rewards.registry import BoundReward
from corl_jax.rewards.samples import Context, FrozenNetwork, Network, Samples
from corl_jax.weights.layouts import KINDS
from tools.bench import inputs
from tools.bench.setting import COMPUTE, Setting
from tools.bench.timing import Record, measure
from tools.bench.vocabularies import write_network
from tools.bench.weights import draw_params, prevent_end, prevent_separator

UNIFIED = Path(__file__).parents[2] / "configs" / "janus_pro_1b" / "unified.yaml"
"""The config whose rewards are those of the paper's first stage."""
ANSWER_REWARDS = ("format", "format_tag", "qa_accuracy", "oc_accuracy")
CYCLE = "t2i_bid_cycle_reward"


def measure_rewards(setting: Setting) -> Iterator[Record]:
    """Measures the first stage's rewards together, then each reward, then those of answers."""
    # Otherwise random captions could end early, and the time would be that of fewer tokens.
    policy = prevent_end(setting.make_policy(jnp.float32), setting.processor.special.eos)
    scored = _make_image_samples(setting)
    for label, rewards in _list_stage_one(setting):
        yield from _measure_stage_one(setting, policy, scored, label, rewards)
    for label, reward in _list_image_rewards(setting):
        yield from _measure_reward(setting, policy, scored, label, reward)
    yield from _measure_answer_rewards(setting)


def _list_stage_one(setting: Setting) -> Iterator[tuple[str, list[BoundReward]]]:
    """Yields the config's rewards, and the same with captions by the policy."""
    config = config_files.load(UNIFIED)
    bound = registry.bind_rewards(config.rewards, config.compat)
    by_policy = _bind_policy_cycle(setting)
    yield "stage 1", bound
    yield "stage 1 (policy)", [by_policy if x.name == CYCLE else x for x in bound]


def _bind_policy_cycle(setting: Setting) -> BoundReward:
    options = {
        "caption": "policy", "text_term": "jaccard", "image_term": "rmse",
        "max_new_tokens": setting.size.policy_caption,
    }  # fmt: skip
    return registry.bind_reward(CYCLE, options)


def _list_image_rewards(setting: Setting) -> Iterator[tuple[str, BoundReward]]:
    blip = {
        "caption": "blip", "text_term": "bertscore", "image_term": "lpips",
        "max_new_tokens": setting.size.caption,
    }  # fmt: skip
    yield f"{CYCLE} (blip)", registry.bind_reward(CYCLE, blip)
    yield f"{CYCLE} (policy)", _bind_policy_cycle(setting)
    for name in (
        "t2i_ti_sim", "t2i_clip_reward", "pickscore", "hpsv2", "aesthetic", "t2i_pixel_mse",
    ):  # fmt: skip
        yield name, registry.bind_reward(name, {})


def _measure_reward(
    setting: Setting, policy: Any, scored: Samples, label: str, reward: BoundReward
) -> Iterator[Record]:
    networks = Networks(setting, reward.networks)
    for placement in networks.yield_placements():
        context = _make_context(setting, policy, placement)
        call = functools.partial(registry.score, [reward], scored, context)
        timing = measure(call, setting.repeats)
        finite = float(np.isfinite(call()[reward.name]).mean())
        figures = {
            "images": len(scored),
            "finite": finite,
            **_count_moved(placement, setting.repeats + 2),
        }
        yield Record("rewards", f"{label}{_describe_placement(placement)}", timing, figures)


def _measure_stage_one(
    setting: Setting, policy: Any, scored: Samples, label: str, rewards: list[BoundReward]
) -> Iterator[Record]:
    """Measures rewards together, as a step scores them, on the images and as many answers.

    The seconds of a reward contain those of the devices' work that was started before it.
    """
    resolved = registry.group_by_task(rewards, tasks.UNIFIED)
    answered = _make_answer_samples(setting, len(scored))
    names = dict.fromkeys(name for reward in resolved["t2i"] for name in reward.networks)
    networks = Networks(setting, tuple(names))
    for placement in networks.yield_placements():
        context = _make_context(setting, policy, placement)

        # A default argument keeps the context of this round of the loop.
        def call(context: Context = context) -> dict[str, dict[str, float]]:
            costs = registry.score_and_measure(resolved["t2i"], scored, context)[1]
            return costs | registry.score_and_measure(resolved["mm2t"], answered, context)[1]

        timing = measure(call, setting.repeats)
        figures = {f"{name}_s": cost["seconds"] for name, cost in call().items()}
        figures |= _count_moved(placement, setting.repeats + 2)
        yield Record("rewards", f"{label}{_describe_placement(placement)}", timing, figures)
        if not any(frozen.offloaded for frozen in placement.values()):
            yield from _measure_cycle_terms(setting, scored, placement)


def _measure_cycle_terms(
    setting: Setting, scored: Samples, placement: Mapping[str, FrozenNetwork]
) -> Iterator[Record]:
    """Measures the parts of the cycle reward, as far as their networks are there."""
    images, real = scored.require_images(), scored.column("real_image")
    texts = prompts = scored.column("prompt")
    with contextlib.ExitStack() as stack:
        networks = {name: stack.enter_context(frozen.use()) for name, frozen in placement.items()}
        if "blip" in networks:
            tokens = {"max_new_tokens": setting.size.caption}

            def describe() -> list[str]:
                return captions.caption_images(networks["blip"], images, **tokens)()

            timing, texts = measure(describe, setting.repeats), describe()
            caption_tokens = captions.generate_caption_tokens(networks["blip"], images, **tokens)
            ended = np.asarray(caption_tokens) == networks["blip"].config.text.sep_token_id
            figures = {"different": len(set(texts)), "cut": float(1 - ended.any(axis=1).mean())}
            yield Record("rewards", "  captions by blip", timing, figures)
        if "bert" in networks:
            compare = functools.partial(similarity.bert_score, networks["bert"], texts, prompts)
            yield Record("rewards", "  bertscore", measure(compare, setting.repeats), {})
        if "lpips" in networks:

            def compute_distances() -> np.ndarray:
                return np.asarray(lpips_distance(networks["lpips"], images, real))

            yield Record("rewards", "  lpips", measure(compute_distances, setting.repeats), {})


def _measure_answer_rewards(setting: Setting) -> Iterator[Record]:
    """Measures rewards of answers, which run on the host alone."""
    answered = _make_answer_samples(setting, setting.size.answers)
    context = Context(None, None, None, None, None, 0, 0)
    for name in ANSWER_REWARDS:
        reward = registry.bind_reward(name, {})
        call = functools.partial(registry.score, [reward], answered, context)
        timing = measure(call, setting.repeats)
        figures = {"answers": len(answered), "ms": 1e3 * timing.median}
        yield Record("rewards", name, timing, figures)


# ---- networks


class Counted(FrozenNetwork):
    """A frozen network that counts the bytes of its parameters at each use."""

    def __init__(self, network: Network, sharding: Any, offload: bool):
        super().__init__(network, sharding, offload=offload)
        self.offloaded, self.moved = offload, 0

    @contextlib.contextmanager
    def use(self) -> Iterator[Any]:
        """Yields the network, as FrozenNetwork does."""
        with super().use() as network:
            self.moved += sum(leaf.nbytes for leaf in jax.tree.leaves(network.params))
            yield network


class Networks:
    """Random reward networks by name, with tokenizers."""

    def __init__(self, setting: Setting, names: tuple[str, ...]):
        self._setting, self._names = setting, names

    def yield_placements(self) -> Iterator[dict[str, Counted]]:
        """Yields the networks on the device, then offloaded if that is to be measured."""
        yield {name: self.make_network(name, False) for name in self._names}
        if self._names and self._setting.offload:
            yield {name: self.make_network(name, True) for name in self._names}

    def make_network(self, name: str, offload: bool) -> Counted:
        """Returns a random network, on the device or in host memory."""
        kind, config = NETWORKS[name].kind, self._setting.size.networks[name]
        folder = self._setting.folder / name
        if not folder.is_dir():
            write_network(folder, kind, config)
        abstract = modules.make_abstract(KINDS[kind].module, config)
        params = draw_params(abstract, 1)
        if kind == "blip":
            params = prevent_separator(params, config)
        network = Network(config, params, folder, jnp.float32)
        shardings = network_shardings(params, self._setting.mesh, KINDS[kind].rules)
        return Counted(network, shardings, offload)


def _make_context(setting: Setting, policy: Any, placement: Mapping[str, FrozenNetwork]) -> Context:
    family, sizes = setting.size.family, setting.size.policy
    return Context(family, sizes, policy, setting.processor, COMPUTE, 0, 0, placement)


def _describe_placement(placement: Mapping[str, Counted]) -> str:
    return ", offloaded" if any(frozen.offloaded for frozen in placement.values()) else ""


def _count_moved(placement: Mapping[str, Counted], calls: int) -> dict[str, float]:
    """Returns the GB of offloaded networks that a call moves to the device."""
    # `calls`: the first one, --repeats more, and one for the figures.
    moved = sum(frozen.moved for frozen in placement.values() if frozen.offloaded)
    return {"moved_gb": moved / calls / 1e9} if moved else {}


# ---- samples


def _make_image_samples(setting: Setting) -> Samples:
    side = setting.size.limits.input_image_side
    columns = inputs.make_rows(setting.prompts, setting.group)
    return Samples(columns, images=inputs.make_images(setting.completions, side))


def _make_answer_samples(setting: Setting, count: int) -> Samples:
    columns = inputs.make_rows(-(-count // setting.group), setting.group)
    columns = {name: values[:count] for name, values in columns.items()}
    return Samples(columns, texts=inputs.make_answers(count, setting.size.new_tokens // 4))
