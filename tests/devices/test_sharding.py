"""The layout tables, and what is said of a mesh that does not divide a model.

`python -m tests.devices.test_sharding` rewrites the tables in tests/devices/sharding_tables.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from corl_jax.devices import mesh as device_mesh
from corl_jax.errors import InputError
from corl_jax.models import modules
from corl_jax.models.blip import BlipConfig, BlipTextConfig
from corl_jax.models.clip import ClipConfig, TowerConfig
from corl_jax.models.lora import Lora
from corl_jax.params import leaf_paths, partition
from corl_jax.policies.janus import network
from corl_jax.policies.janus.family import FAMILY
from corl_jax.policies.janus.layout import ADAPTER_PATHS, ADAPTER_TARGETS, RULES
from corl_jax.policies.janus.network import PRESETS
from corl_jax.policies.llama_adapters import add_adapters
from corl_jax.train.fit import find_mesh_problems
from corl_jax.weights.layouts import KINDS

TABLES = Path(__file__).parent / "sharding_tables"
MESHES = {"data 8": (8, 1, 1), "fsdp 8": (1, 8, 1), "tensor 4": (1, 1, 4), "2 x 2 x 2": (2, 2, 2)}
WHOLE = ("vgg", "aesthetic", "mask2former", "sd_vae")
"""Networks so small that each device has all of most of their matrices."""
CLIP_L14 = ClipConfig(
    vision=TowerConfig(1024, 4096, 24, 16), text=TowerConfig(768, 3072, 12, 12),
    image_size=224, patch_size=14, projection_dim=768,
)  # fmt: skip


def mesh_of(axes: tuple[int, ...]) -> AbstractMesh:
    return AbstractMesh(axes, device_mesh.AXES)


def kind_of(name: str) -> Any:
    """The kind of a network of `networks`: sd_vae is a kind, clip_l14 is of the kind clip."""
    return KINDS[name if name in KINDS else name.split("_")[0]]


def networks() -> dict[str, Any]:
    """The published reward networks as shapes."""
    untied = BlipConfig(text=BlipTextConfig(tie_word_embeddings=False))
    configs = {name: kind.config() for name, kind in KINDS.items()}
    configs |= {"clip_l14": CLIP_L14, "blip_untied": untied}
    return {
        name: modules.make_abstract(
            KINDS[name if name in KINDS else name.split("_")[0]].module, config
        )
        for name, config in configs.items()
    }


def table(params: Any, rules: device_mesh.Rules, spec_of: Callable) -> str:
    """A line a parameter: path, shape, dtype, layout, bytes a device on each mesh; and the sums."""
    lines, sums = [], dict.fromkeys(MESHES, 0)
    for path, leaf in leaf_paths(params):
        held = []
        for name, axes in MESHES.items():
            mesh = mesh_of(axes)
            place = NamedSharding(mesh, spec_of(path, leaf.shape, mesh, rules))
            count = math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            held.append(f"{count:>13,}")
            sums[name] += count
        layout = ", ".join(axis or "-" for axis in device_mesh.find_rule(path, rules)) or "whole"
        shape = ", ".join(map(str, leaf.shape)) or "scalar"
        lines.append(f"{path:62} {shape:18} {leaf.dtype.name:8} {layout:18} {' '.join(held)}")
    heads = " ".join(f"{name:>13}" for name in MESHES)
    title = f"{'bytes a device':62} {'shape':18} {'dtype':8} {'layout':18} {heads}"
    total = f"{'all':108} {' '.join(f'{count:>13,}' for count in sums.values())}"
    return "\n".join([title, *lines, total, ""])


def tables() -> dict[str, str]:
    """File name -> text. Trained and frozen parameters lie alike, in float32."""
    out = {}
    for size in ("1b", "7b"):
        params = network.abstract(PRESETS[f"janus-pro-{size}"])
        out[f"janus_pro_{size}.txt"] = table(params, RULES, device_mesh.param_spec)
    lora = Lora(16, 32.0, ADAPTER_TARGETS)
    adapted = add_adapters(PRESETS["janus-pro-7b"], lora)
    adapters, _ = partition(network.abstract(adapted), [ADAPTER_PATHS])
    text = table(adapters, RULES, device_mesh.param_spec)
    out["janus_pro_7b_lora.txt"] = text
    for name, params in networks().items():
        rules = kind_of(name).rules
        text = table(params, rules, device_mesh.network_spec)
        out[f"network_{name}.txt"] = text
    return out


def test_resolved_layouts_are_those_on_file():
    found = {path.name: path.read_text() for path in TABLES.glob("*.txt")}
    assert found == tables(), (
        "a layout changed; `python -m tests.devices.test_sharding`, and look at it"
    )


@pytest.mark.parametrize("name", [n for n in KINDS if n not in WHOLE])
def test_large_matrices_of_reward_networks_are_split(name, mesh):
    for path, leaf in leaf_paths(networks()[name]):
        if leaf.ndim >= 2 and math.prod(leaf.shape) > 1e6:
            spec = device_mesh.network_spec(path, leaf.shape, mesh, KINDS[name].rules)
            assert {"fsdp", "tensor"} <= {axis for axis in spec if axis}, path


@pytest.mark.parametrize("name", KINDS)
def test_no_rule_of_the_networks_is_shadowed_or_unused(name):
    rules = [pattern for pattern, _ in KINDS[name].rules]
    paths = [path for path, _ in leaf_paths(networks()[name])]
    first = {next(rule for rule in rules if re.fullmatch(rule, path)) for path in paths}
    assert first == set(rules)


def test_a_reward_network_does_not_limit_the_mesh():
    """BERT's vocabulary, 30522, has few divisors; its twelve heads are no matter."""
    shape = (30522, 768)
    path = "embeddings/word_embeddings/embedding"

    def spec_of(path, shape, axes):
        return device_mesh.network_spec(path, shape, mesh_of(axes), KINDS["bert"].rules)

    assert spec_of(path, shape, (1, 4, 8)) == PartitionSpec(None, "fsdp")
    assert spec_of(path, shape, (1, 5, 7)) == PartitionSpec(None, None)
    message = "tower/kernel: no sharding rule matches it; add one to the rules of its network"
    with pytest.raises(InputError, match=message):
        spec_of("tower/kernel", (4, 4), (1, 1, 1))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_the_policy_is_divided_evenly(name, axes):
    assert find_mesh_problems(FAMILY, PRESETS[name], mesh_of(axes)) == []


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ((1, 1, 3), [r"mesh\.tensor: 3 does not divide 16 \(heads of language_model\), .*: 1$"]),
        ((1, 1, 32), [r"mesh\.tensor: 32 does not divide 16 \(heads of .*; nearest: 16$"]),
        ((4, 1, 6), [r"mesh\.tensor: 6 does not .* sizes more; nearest: 4 or 8$"]),
        ((2, 6, 2), [r"mesh\.fsdp: 6 does not divide 1024 \(axis 0 of aligner.*: 4 or 8$"]),
        ((1, 3, 24), [r"mesh\.fsdp: 3 ", r"mesh\.tensor: 24 .*; nearest: 8$"]),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused_with_the_nearest(axes, expected):
    problems = find_mesh_problems(FAMILY, PRESETS["janus-pro-1b"], mesh_of(axes))
    assert len(problems) == len(expected)
    for problem, pattern in zip(problems, expected, strict=True):
        assert re.match(pattern, problem), problem


def test_a_parameter_that_is_not_divided_is_refused():
    with pytest.raises(InputError, match=r"tensor: 2 does not divide 97 \(axis 1 of lm_h"):
        device_mesh.param_spec("lm_head/kernel", (32, 97), mesh_of((2, 2, 2)), RULES)


def test_activations_of_odd_sizes_stay_whole(mesh):
    """Heads of a reward network; the numbers are the same."""
    with jax.set_mesh(mesh):
        x = jax.jit(lambda x: device_mesh.constrain(x, "batch", "length", "heads", None) * 2)(
            jnp.ones((4, 5, 3, 2))
        )
    assert x.sharding.is_equivalent_to(device_mesh.batch_sharding(mesh), 4)


if __name__ == "__main__":
    TABLES.mkdir(exist_ok=True)
    for file, text in tables().items():
        (TABLES / file).write_text(text)
