"""A new reward network: a linear layer that rates the mean color of an image.

Trains with it: python -m docs.examples.color_network --config CONFIG.yaml
docs/how_to/add_a_reward_network.md explains each part.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from corl_jax.devices.batches import PendingRows, run_in_pieces
from corl_jax.errors import Problems
from corl_jax.models import modules
from corl_jax.models.layers import make_linear
from corl_jax.rewards.networks import NETWORKS, NetworkSource
from corl_jax.rewards.registry import REGISTRY, RewardRow
from corl_jax.rewards.samples import Context, Samples
from corl_jax.types import Params
from corl_jax.weights.kinds import WHOLE, NetworkKind
from corl_jax.weights.layouts import KINDS
from corl_jax.weights.table import Shape, Table
from corl_jax.weights.table_rows import dense

# ---- 1. the network: corl_jax/models/color.py


@dataclasses.dataclass(frozen=True)
class ColorConfig:
    """Sizes of the network; the defaults are the published ones."""

    channels: int = 3


class ColorHead(nnx.Module):
    """Images [N, S, S, channels] in [0, 1] -> ratings [N]."""

    def __init__(self, config: ColorConfig, *, rngs: nnx.Rngs):
        self.layer = make_linear(config.channels, 1, bias=True, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.layer(images.mean(axis=(1, 2)))[..., 0]


# ---- 2. its files: corl_jax/weights/layouts/color.py


def parse(
    folder: Path, layout: str, shapes: Mapping[str, Shape], problems: Problems
) -> ColorConfig:
    """Returns the sizes, which only the shapes of the tensors tell."""
    shape = shapes.get("fc.weight", ())
    return ColorConfig(channels=shape[1] if len(shape) == 2 else ColorConfig().channels)


KIND = NetworkKind(
    name="color",
    module=ColorHead,
    config=ColorConfig,
    tables={"published": Table(name="published", rows=tuple(dense("fc", "layer")))},
    parse=parse,
    check=lambda config, where: (
        []
        if config.channels == 3
        else [f"{where}.channels: found {config.channels}; expected 3, red, green and blue"]
    ),
    rules=((r"layer/(kernel|bias)", WHOLE),),
)

# ---- 3. where its weights usually are: a row of corl_jax/rewards/networks.py

SOURCE = NetworkSource(
    kind="color", parameters=4, place="./weights/color", files="color.safetensors"
)

# ---- 4. the reward: corl_jax/rewards/color.py, and a row of corl_jax/rewards/registry.py


def score_color(samples: Samples, context: Context) -> PendingRows:
    """The rating of each image [N] float32."""
    images = samples.require_images()

    def take(index: np.ndarray) -> tuple[np.ndarray]:
        return (images[index],)

    with context.network("color") as network:
        program = functools.partial(rate_colors, network.config, network.params)
        (ratings,) = run_in_pieces(program, take, len(images), 64, network.params)
    return ratings


@functools.partial(jax.jit, static_argnames=("config",))
def rate_colors(config: ColorConfig, params: Params, images: jax.Array) -> jax.Array:
    """Returns the ratings [N] of images [N, S, S, 3] uint8."""
    return modules.bind(ColorHead, config, params)(images.astype(jnp.float32) / 255)


ROW = RewardRow(score_color, "images", networks=("color",))

if __name__ == "__main__":
    KINDS["color"] = KIND
    NETWORKS["color"] = SOURCE
    REGISTRY["color"] = ROW
    from corl_jax.train.__main__ import main

    main()
