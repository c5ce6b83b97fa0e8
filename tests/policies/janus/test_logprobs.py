"""Completions that share their prompt's keys and values, against reading the prompt with each."""

from __future__ import annotations

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.devices.mesh import make_mesh
from corl_jax.models import attention
from corl_jax.models.attention import attend_causally
from corl_jax.policies.causal_answers import score_text
from corl_jax.policies.chunked_logprobs import chunked_logprobs
from corl_jax.policies.family import LogprobOptions
from corl_jax.policies.janus import network
from corl_jax.policies.janus.logprobs import image_logprobs
from tests.support.tiny_runs import SPECIAL, both_tasks, random_params
from tests.support.tolerances import LOGPROBS, NETWORK

PROMPTS, GROUP = 3, 4
TASK_LOGPROBS = {"t2i": image_logprobs, "mm2t": score_text}

pytestmark = pytest.mark.usefixtures("exact_products")


@pytest.fixture(scope="module")
def config(tiny_config):
    llama = dataclasses.replace(tiny_config.llama, num_layers=2)
    return dataclasses.replace(tiny_config, llama=llama)


@pytest.fixture(scope="module")
def params(config):
    return random_params(config)


def hidden_states(model, remat: str, *, shared: bool) -> jax.Array:
    """[N, 1 + T, D]: of the last prompt token and of the completion, for ragged prompts."""
    rng = np.random.default_rng(0)
    width = model.language_model.config.hidden_size
    prompts = rng.standard_normal((PROMPTS, 5, width)).astype(np.float32)
    completions = rng.standard_normal((PROMPTS * GROUP, 6, width)).astype(np.float32)
    mask = np.arange(5) >= np.array([0, 2, 4])[:, None]
    if shared:
        read, states = model.language_model.after_prompts(
            prompts, jnp.asarray(mask), completions, remat=remat
        )
        return jnp.concatenate([jnp.repeat(read[:, -1:], GROUP, axis=0), states], axis=1)
    embeds = np.concatenate([np.repeat(prompts, GROUP, axis=0), completions], axis=1)
    seen = np.pad(np.repeat(mask, GROUP, axis=0), [(0, 0), (0, 6)], constant_values=True)
    return model.language_model(embeds, jnp.asarray(seen), remat=remat)[:, -7:]


def states_and_gradients(config, params, remat: str, *, shared: bool):
    weights = np.random.default_rng(1).standard_normal((PROMPTS * GROUP, 7, 1))

    @jax.jit
    def program(part):
        def loss(part):
            model = network.bind(config, params | {"language_model": part})
            hidden = hidden_states(model, remat, shared=shared)
            return (jnp.sin(hidden) * weights).sum(), hidden

        (_, hidden), grads = jax.value_and_grad(loss, has_aux=True)(part)
        return hidden, grads

    return program(params["language_model"])


@pytest.fixture(scope="module")
def unshared(config, params):
    return states_and_gradients(config, params, "none", shared=False)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_shared_prompt_gives_the_same_states_and_gradients(config, params, unshared, remat):
    hidden, grads = states_and_gradients(config, params, remat, shared=True)
    wanted, expected = unshared
    np.testing.assert_allclose(hidden, wanted, atol=NETWORK)

    def compare(a: jax.Array, b: jax.Array) -> None:
        # At least 1: nothing looks tokens up here, so that their table has no gradient.
        np.testing.assert_allclose(a, b, rtol=0, atol=NETWORK * max(np.abs(b).max(), 1.0))

    jax.tree.map(compare, grads, expected)


@pytest.mark.parametrize("task", ["t2i", "mm2t"])
def test_no_prompt_is_read_once_per_completion(config, params, task):
    """Of the completions, no array of the gradient's program has the prompt's length in front."""
    batch = both_tasks(config, PROMPTS, GROUP)[task]
    scoring = LogprobOptions(SPECIAL, remat="none", image_logprobs="guided")

    def loss(params):
        model = network.bind(config, params)
        return TASK_LOGPROBS[task](model, batch.prompts, batch.segments[0].values, scoring)[0].sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(params))
    length, inner = batch.prompts.input_ids.shape[1], config.llama.intermediate_size
    read = batch.segments[0].values.shape[1] - 1
    assert f"f32[{PROMPTS},{length},{inner}]" in text
    assert f"f32[{PROMPTS * GROUP},{read},{inner}]" in text
    assert f"f32[{PROMPTS * GROUP},{length + read},{inner}]" not in text
    assert f"f32[{PROMPTS * GROUP},{length},{inner}]" not in text


def test_a_completion_of_one_token_is_scored_by_the_prompt_alone(config, params):
    batch = both_tasks(config, PROMPTS, GROUP)["mm2t"]
    model, prompts = network.bind(config, params), batch.prompts
    tokens = batch.segments[0].values[:, :1]
    found, _ = TASK_LOGPROBS["mm2t"](model, prompts, tokens, LogprobOptions(SPECIAL, remat="none"))
    features = model.image_features(prompts.pixel_values)
    embeds = model.prompt_embeds(prompts.input_ids, SPECIAL.image, features)
    hidden = model.language_model(embeds, jnp.asarray(prompts.attention_mask))[:, -1:]
    logits = jnp.repeat(model.text_logits(hidden), GROUP, axis=0)
    wanted, _ = chunked_logprobs(lambda x: x, logits, tokens, 1.0, 1000)
    np.testing.assert_allclose(found, wanted, atol=LOGPROBS)


# ---- cuDNN, as far as it goes without a GPU


def ragged(config, length: int, attention: str):
    """Loss of completions of `length` tokens after padded prompts of six."""
    rng = np.random.default_rng(0)
    prompts = rng.standard_normal((PROMPTS, 6, config.llama.hidden_size)).astype(np.float32)
    shape = (PROMPTS * GROUP, length, config.llama.hidden_size)
    completions, weights = rng.standard_normal((2, *shape)).astype(np.float32)
    mask = np.arange(6) >= np.array([0, 2, 4])[:, None]

    def loss(part, dtype=jnp.float32):
        model = network.bind(config, network.cast(part, dtype))
        read, states = model.language_model.after_prompts(
            jnp.asarray(prompts, dtype), jnp.asarray(mask), jnp.asarray(completions, dtype),
            remat="full", attention=attention,
        )  # fmt: skip
        assert states.shape == shape
        return (jnp.sin(states) * weights).sum() + read[:, -1].sum()

    return loss


@pytest.mark.parametrize("length", [5, 6])
def test_cudnn_gets_even_lengths_and_nothing_else_changes(config, params, monkeypatch, length):
    real, seen = jax.nn.dot_product_attention, []

    def attend(query, key, value, *, mask, implementation):
        seen.append((implementation, query.shape[1] % 2, key.shape[1] % 2))
        return real(query, key, value, mask=mask)

    expected = jax.jit(jax.value_and_grad(ragged(config, length, "xla")))(params)
    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    found = jax.jit(jax.value_and_grad(ragged(config, length, "cudnn")))(params)
    assert set(seen) == {("cudnn", 0, 0)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)


def test_the_update_lowers_to_cudnn_for_nvidia(config, params, monkeypatch):
    """Fused forward passes of prompts and completions, and their gradients."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    loss = ragged(config, 5, "cudnn")
    traced = jax.jit(jax.grad(lambda part: loss(part, jnp.bfloat16))).trace(params)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for call in ("__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"):
        assert text.count(f"{call}(") == 2 * (1 + ("Backward" not in call)), call


# ---- splash attention, interpreted


@pytest.mark.parametrize(("devices", "front"), [(1, 0), (1, 130), (8, 0)])
def test_splash_attention_is_attention(monkeypatch, devices, front):
    """Values and gradients of what counts; lengths that its blocks do not divide, padding."""
    monkeypatch.setattr(attention, "INTERPRET_SPLASH", True)
    rng = np.random.default_rng(0)
    batch, length, total, heads, size = 4, 70, 133, 2, 16
    query = rng.standard_normal((batch, length, heads, size)).astype(np.float32)
    key, value = rng.standard_normal((2, batch, total, heads, size)).astype(np.float32)
    kept = np.arange(total) >= np.array([0, 5, 60, 100])[:, None]
    own = kept[:, total - length :, None, None]

    def loss(arrays, implementation):
        out = attend_causally(*arrays, jnp.asarray(kept), implementation, front)
        return (jnp.sin(out) * own).sum(), out * own

    def found(implementation):
        program = jax.value_and_grad(lambda x: loss(x, implementation), has_aux=True)
        return jax.jit(program)((query, key, value))

    expected = found("xla")
    mesh = make_mesh(-1, 1 + (devices > 1), 1 + (devices > 1), jax.devices()[:devices])
    with jax.set_mesh(mesh) if devices > 1 else contextlib.nullcontext():
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=NETWORK), found("splash"), expected
        )
