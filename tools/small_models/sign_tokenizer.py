"""Makes a start for MAGVIT-v2's tokenizer of signs from a trained tokenizer with a codebook.

Both have the same convolutions, and MAGVIT-v2 has no attention beside its middle. The channels of a
latent are rotated so that their signs lose little of it (ITQ), by layers of one pixel that both
halves have. So the new tokenizer knows shapes and colours from its first step on, and learns in
minutes on a CPU to say them in signs.

Source: Gong et al. 2013, "Iterative Quantization" (ITQ), for the rotation.
"""

from __future__ import annotations

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np

from corl_jax.data.drawn_world import generator
from corl_jax.errors import InputError
from corl_jax.models import modules
from corl_jax.models.magvit import Magvit, MagvitConfig
from corl_jax.params import flatten, unflatten
from corl_jax.policies import Model
from corl_jax.policies.janus import network
from corl_jax.policies.janus.network import JanusConfig
from corl_jax.types import Params

IMAGES = 256  # whose latents the rotation is made for
STARTS, ROUNDS = 20, 50  # random rotations, of which the best one is taken; steps of each

Flat = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rotation:
    """How unit latents [N, C] become numbers near -1 and 1: (latents - mean) @ matrix / size."""

    mean: np.ndarray  # [C]
    matrix: np.ndarray  # [C, C], orthogonal
    size: float


def make_start(janus: Model, sizes: MagvitConfig, seed: int, world: str) -> Params:
    """Returns parameters of a MAGVIT-v2 that begins as the image tokenizer of a Janus.

    Raises: InputError for a tokenizer of other sizes.
    """
    config: JanusConfig = janus.sizes
    if sizes != (expected := describe_twin(config)):
        raise InputError(f"{janus.folder}: its image tokenizer fits {expected}, found {sizes}")
    side = janus.family.limits(config).image_side
    images = [
        generator.make_row(seed, index, side, "train", encode=False, world=world)["real_image"]
        for index in range(IMAGES)
    ]
    pixels = jnp.asarray(np.stack(images), jnp.float32) / 127.5 - 1.0
    vq = network.bind(config, network.cast(janus.params, jnp.float32)).vqmodel
    raw = np.asarray(jax.jit(lambda x: vq.quant_conv(vq.encoder(x)))(pixels))
    lengths = np.linalg.norm(raw, axis=-1, keepdims=True)
    rotation = find_rotation((raw / lengths).reshape(-1, raw.shape[-1]), seed)
    old = {
        path: np.asarray(leaf, np.float32)
        for path, leaf in flatten(janus.params["vqmodel"]).items()
    }
    return unflatten(convert(old, sizes, rotation, float(lengths.mean())))


def describe_twin(janus: JanusConfig) -> MagvitConfig:
    """Returns the sizes of the MAGVIT-v2 with the same convolutions: a bit for each channel."""
    vq, channels = janus.vq, tuple(janus.vq.level_channels)
    return MagvitConfig(
        z_channels=vq.embed_dim,
        base_channels=vq.base_channels,
        encoder_channels=channels,
        encoder_blocks=(vq.num_res_blocks,) * len(channels),
        decoder_channels=channels,
        decoder_blocks=(vq.num_res_blocks + 1,) * len(channels),
    )


def find_rotation(latents: np.ndarray, seed: int) -> Rotation:
    """Finds the rotation of latents [N, C] whose signs are the nearest to them."""
    rng = np.random.default_rng(seed)
    mean, best = latents.mean(axis=0), (np.inf, np.eye(latents.shape[1]), 1.0)
    centred = latents - mean
    for _ in range(STARTS):
        matrix = np.linalg.qr(rng.normal(size=best[1].shape))[0]
        for _ in range(ROUNDS):
            # The rotation that brings latents the nearest to their signs (Procrustes).
            left, _, right = np.linalg.svd(centred.T @ np.sign(centred @ matrix))
            matrix = left @ right
        rotated = centred @ matrix
        size = float(np.abs(rotated).mean())
        error = float(((size * np.sign(rotated) - rotated) ** 2).mean())
        best = min(best, (error, matrix, size), key=operator.itemgetter(0))
    return Rotation(mean, best[1], best[2])


def convert(old: Flat, sizes: MagvitConfig, rotation: Rotation, length: float) -> Flat:
    """Converts the parameters of a VQ tokenizer; `length` is the mean one of its raw latents."""
    shapes = flatten(modules.make_abstract(Magvit, sizes, jnp.float32))
    last = len(sizes.decoder_channels) - 1
    new = {path: old[name] for path in shapes if (name := _name_old(path, last)) in old}
    # Around the signs there are two layers more here, and one there in another place:
    # conv_out, quant_conv, unit length | codes, post_quant_conv, conv_in
    narrow, widen = (old[f"{name}/kernel"][0, 0] for name in ("quant_conv", "post_quant_conv"))
    out, into = old["encoder/conv_out/kernel"], old["decoder/conv_in/kernel"]
    mean, matrix, size = rotation.mean, rotation.matrix, rotation.size
    return new | {
        "encoder/conv_out/kernel": np.einsum("hwio,oc->hwic", out, narrow),
        "encoder/conv_out/bias": old["encoder/conv_out/bias"] @ narrow + old["quant_conv/bias"],
        # A layer cannot divide each latent by its length, so all are divided by the mean.
        "encoder/quant_conv/kernel": _make_pixel_layer(matrix / (length * size)),
        "encoder/quant_conv/bias": (-mean @ matrix / size).astype(np.float32),
        "decoder/post_quant_conv/kernel": _make_pixel_layer(matrix.T * size),
        "decoder/post_quant_conv/bias": mean.astype(np.float32),
        "decoder/conv_in/kernel": np.einsum("ci,hwio->hwco", widen, into),
        "decoder/conv_in/bias": old["decoder/conv_in/bias"]
        + np.einsum("i,hwio->o", old["post_quant_conv/bias"], into),
    }


def _make_pixel_layer(matrix: np.ndarray) -> np.ndarray:
    return matrix.astype(np.float32)[None, None]


def _name_old(path: str, last: int) -> str:
    """Returns a parameter's name in the VQ tokenizer, which counts a decoder's levels upwards."""
    half, level, *rest = path.split("/")
    if (half, level) != ("decoder", "up"):
        return path
    return "/".join([half, level, str(last - int(rest[0])), *rest[1:]])
