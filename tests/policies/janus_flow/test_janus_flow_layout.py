"""JanusFlow on a mesh, in bfloat16 and with adapters."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.devices.mesh import batch_sharding, make_mesh, param_shardings
from corl_jax.models.lora import Lora
from corl_jax.params import leaf_paths, partition
from corl_jax.policies.family import LogprobOptions
from corl_jax.policies.janus.tokens import SpecialTokens
from corl_jax.policies.janus_flow import layout, network
from corl_jax.policies.janus_flow.logprobs import make_velocity
from corl_jax.policies.janus_flow.sampling import make_cached_velocity
from corl_jax.types import EncodedPrompts
from tests.parity import torch_janus_flow
from tests.support.tolerances import NETWORK

SPECIAL = SpecialTokens(bos=1, eos=2, pad=0, boi=91, eoi=92, image=90)
PROMPTS, GROUP = 8, 2


@pytest.fixture(scope="module")
def config():
    return torch_janus_flow.jax_config(torch_janus_flow.tiny_flow())


@pytest.fixture(scope="module")
def params():
    return torch_janus_flow.flow_params(torch_janus_flow.tiny_flow())


def make_batch(config) -> tuple[EncodedPrompts, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 10, PROMPTS)
    mask = np.arange(10) >= 10 - lengths[:, None]
    ids = np.where(mask, rng.integers(3, 80, (PROMPTS, 10)), 0).astype(np.int32)
    rows = PROMPTS * GROUP
    latents = rng.normal(size=(rows, *config.latent_shape)).astype(np.float32)
    times = rng.uniform(size=rows).astype(np.float32)
    return EncodedPrompts(ids, mask), jnp.asarray(latents), jnp.asarray(times)


def test_eight_devices_compute_what_one_computes(config, params):
    """Velocities with guidance, and the gradient of everything that is trained."""
    mesh = make_mesh(2, 2, 2)

    def loss(trained, params, prompts, latents, times):
        model = network.bind(config, params | trained)
        velocity = make_velocity(model, prompts, LogprobOptions(SPECIAL, cfg_scale=2.0))
        values = velocity(latents, times)
        return jnp.square(values).mean(), values

    def arguments(params):
        trained, _ = partition(params, layout.TRAINABLE)
        return trained, params

    step, batch = jax.value_and_grad(loss, has_aux=True), make_batch(config)
    (expected, expected_values), expected_gradients = jax.jit(step)(*arguments(params), *batch)

    shardings = param_shardings(params, mesh, layout.RULES)
    placed = jax.device_put(params, shardings)
    kernel = placed["generation_decoder"]["layers"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    spread = jax.device_put(batch, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        sharded = jax.jit(step, out_shardings=(None, arguments(shardings)[0]))
        (found, values), gradients = sharded(*arguments(placed), *spread)

    np.testing.assert_allclose(found, expected, rtol=NETWORK)
    np.testing.assert_allclose(values, expected_values, atol=NETWORK)
    scale = max(np.abs(x).max() for x in jax.tree.leaves(expected_gradients))
    for (path, leaf), other in zip(
        leaf_paths(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=NETWORK * scale, err_msg=path)


def test_bfloat16_stays_near_float32(config, params):
    prompts, latents, times = make_batch(config)

    @jax.jit
    def compute(params):
        model = network.bind(config, params)
        prefix = model.make_prefix(prompts, SPECIAL)
        velocity = make_cached_velocity(model, prefix, SPECIAL, None, "xla")
        skip, condition = model.generation_encoder(latents, times)
        return velocity(latents, times), skip, condition

    exact, rounded = compute(params), compute(network.cast(params, jnp.bfloat16))
    # Latents and velocities are float32 in any compute dtype; the network inside is not.
    assert [x.dtype for x in rounded] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
    for found, expected in zip(rounded, exact, strict=True):
        difference = np.abs(np.asarray(found, np.float32) - expected).mean()
        assert difference < 0.05 * np.abs(expected).mean()


def test_no_rule_is_shadowed_or_unused():
    """Each path belongs to the first rule that matches; each rule is first for some path."""
    lora = Lora(2, 2.0, layout.ADAPTER_TARGETS)
    config = network.add_adapters(network.PRESETS["janusflow-1.3b"], lora)
    first = {
        next(rule for rule, _ in layout.RULES if re.fullmatch(rule, path))
        for path, _ in leaf_paths(network.abstract(config))
    }
    assert {rule for rule, _ in layout.RULES} == first


def test_adapters_are_the_paths_that_the_table_names():
    lora = Lora(2, 2.0, layout.ADAPTER_TARGETS)
    sizes = network.PRESETS["janusflow-1.3b"]
    config = network.add_adapters(sizes, lora)
    base = {path for path, _ in leaf_paths(network.abstract(sizes))}
    added = {path for path, _ in leaf_paths(network.abstract(config))} - base
    assert len(added) == 2 * len(layout.ADAPTER_TARGETS)
    assert all(re.fullmatch(layout.ADAPTER_PATHS, path) for path in added)
    assert network.remove_adapters(config) == sizes
