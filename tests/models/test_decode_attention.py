"""A decode step against the full forward, its attention against the softmax over all keys."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.models import attention
from corl_jax.models.attention import attend_to_prefix, choose_decode_kernel, merge_parts
from corl_jax.models.layers import attend
from corl_jax.policies import decoding
from corl_jax.policies.choices import sample_keys
from corl_jax.policies.decode_attention import Step, attend_step
from corl_jax.policies.decoding import read_prompts
from corl_jax.policies.janus import network, sampling, thinking
from corl_jax.policies.janus.tokens import SpecialTokens
from corl_jax.types import EncodedPrompts
from tests.support.tolerances import NETWORK

pytestmark = pytest.mark.usefixtures("exact_products")

GROUP = 3
PADDING = (2, 0, 5)
PROMPT, STEPS = 7, 6


def normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(2 * rng.standard_normal(shape), jnp.float32)


# ---- attention in parts


@pytest.mark.parametrize("heads", [6, 2])
def test_two_parts_merge_to_attention_to_all_keys(heads):
    """Keys of both parts behind the lengths are huge, so that one of them seen would show."""
    rng, rows, size = np.random.default_rng(heads), 4, 8
    lengths = [np.array([5, 1, 3, 4]), np.array([2, 6, 1, 6])]
    query = normal(rng, rows, 2, heads, size)
    parts = [(normal(rng, rows, s, 2, size), normal(rng, rows, s, 2, size)) for s in (5, 6)]
    seen = [np.arange(part[0].shape[1]) < n[:, None] for part, n in zip(parts, lengths)]
    spoilt = [
        [jnp.where(kept[..., None, None], x, 1e4) for x in part] for part, kept in zip(parts, seen)
    ]
    keys, values = (jnp.concatenate(both, axis=1) for both in zip(*parts))
    expected = attend(query, keys, values, jnp.asarray(np.concatenate(seen, 1))[:, None])
    found = merge_parts(
        *(
            attend_to_prefix(query, *part, jnp.asarray(n, jnp.int32), "xla")
            for part, n in zip(spoilt, lengths)
        )
    )
    np.testing.assert_allclose(found, expected, rtol=NETWORK, atol=NETWORK)


def test_denominators_are_those_of_the_softmax():
    """Hand-computed: two keys with scores log 1 and log 3, a third that is not seen."""
    key = jnp.log(jnp.array([1.0, 3.0, 100.0]))[None, :, None, None] * jnp.ones((1, 3, 1, 4))
    value = jnp.array([[10.0] * 4, [20.0] * 4, [1e6] * 4])[None, :, None]
    query = jnp.full((1, 1, 1, 4), 0.5)  # 4 * 0.5 / sqrt(4) = 1
    average, denominator = attend_to_prefix(query, key, value, jnp.array([2]), "xla")
    np.testing.assert_allclose(average, np.full((1, 1, 1, 4), 17.5), rtol=1e-6)
    np.testing.assert_allclose(denominator, np.log([[[4.0]]]), rtol=1e-6)


def test_a_part_that_does_not_count_is_lost():
    """Denominators far apart: one part is all, whichever it is, and nothing overflows."""
    parts = [
        (jnp.full((1, 1, 1, 2), x), jnp.full((1, 1, 1), s))
        for x, s in ((3.0, 900.0), (5.0, -900.0))
    ]
    np.testing.assert_array_equal(merge_parts(*parts), np.full((1, 1, 1, 2), 3.0))
    np.testing.assert_array_equal(merge_parts(*parts[::-1]), np.full((1, 1, 1, 2), 3.0))


def test_bfloat16_is_merged_in_float32():
    rng = np.random.default_rng(2)
    query, key, value = (normal(rng, 2, n, 4, 8).astype(jnp.bfloat16) for n in (1, 9, 9))
    split = [(key[:, :4], value[:, :4], 4), (key[:, 4:], value[:, 4:], 5)]
    parts = [attend_to_prefix(query, k, v, jnp.full(2, n, jnp.int32), "xla") for k, v, n in split]
    found = merge_parts(*parts)
    assert found.dtype == jnp.bfloat16 and parts[0][1].dtype == jnp.float32
    exact = attend(*(x.astype(jnp.float32) for x in (query, key, value)))
    np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=0.03)


# ---- decode steps


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("tiny", ["grouped heads", "one key a head"])
def test_prompts_once_and_cached_decode_equal_the_full_forward(
    tiny, copied, tiny_config, tiny_params, monkeypatch
):
    """Left-padded prompts, three continuations of each, read token by token."""
    monkeypatch.setattr(decoding, "copies_prompts", lambda *_: copied)
    rng = np.random.default_rng(0)
    if tiny == "one key a head":
        tiny_config, tiny_params = one_key_a_head(tiny_config, tiny_params)
    prompts = rng.integers(0, 96, (len(PADDING), PROMPT))
    mask = np.arange(PROMPT) >= np.asarray(PADDING)[:, None]
    tokens = rng.integers(0, 96, (len(PADDING) * GROUP, STEPS))

    @jax.jit
    def full(params):
        model = network.bind(tiny_config, params)
        ids = np.concatenate([np.repeat(prompts, GROUP, axis=0), tokens], axis=1)
        seen = np.concatenate([np.repeat(mask, GROUP, axis=0), np.ones(tokens.shape, bool)], axis=1)
        return model.language_model(model.embed_text(ids), jnp.asarray(seen))[:, PROMPT - 1 :]

    @jax.jit
    def cached(params):
        model = network.bind(tiny_config, params)
        embeds = model.embed_text(prompts)
        decoder, last = read_prompts(model.language_model, embeds, jnp.asarray(mask), "xla")
        # What the buffers hold before it is written must not show.
        lengths = np.repeat(mask.sum(axis=1), GROUP) if copied else 0
        caches = jax.tree.map(
            lambda x: jnp.where(
                (np.arange(x.shape[1]) < np.reshape(lengths, (-1, 1)))[..., None, None], x, 1e3
            ),
            decoder.new_caches(len(tokens), STEPS),
        )
        outputs = [jnp.repeat(last, GROUP, axis=0)]
        for index in range(STEPS):
            read = model.embed_text(tokens[:, index])
            hidden, caches = decoder(read, jnp.int32(index), caches)
            outputs.append(hidden)
        return jnp.stack(outputs, axis=1)

    np.testing.assert_allclose(cached(tiny_params), full(tiny_params), atol=NETWORK)


def one_key_a_head(config, params):
    """The network with as many key heads as heads, as all Janus checkpoints have."""
    llama = dataclasses.replace(config.llama, num_kv_heads=config.llama.num_heads)
    blocks = params["language_model"]["layers"]
    attn = {
        **blocks["attn"],
        "k_proj": blocks["attn"]["q_proj"],
        "v_proj": blocks["attn"]["q_proj"],
    }
    language_model = {**params["language_model"], "layers": {**blocks, "attn": attn}}
    config = dataclasses.replace(config, llama=llama)
    return config, {**params, "language_model": language_model}


@pytest.mark.parametrize("copied", [False, True])
def test_rows_that_have_ended_read_one_key(copied):
    """Values behind the first key of ended rows and prompts are huge: one of them would show."""
    rng, done = np.random.default_rng(5), np.array([True, False, False, True, True, True])
    rows, heads, size, places = len(done), 2, 4, 8
    lengths = jnp.asarray([3, 5])  # of two prompts with three rows each; all of the second ended
    positions = jnp.repeat(lengths, 3) + 2
    query, key, value = (normal(rng, rows, heads, size) for _ in range(3))
    cache = [normal(rng, rows, places, heads, size) for _ in range(2)]
    prompt = [normal(rng, 2, 5, heads, size) for _ in range(2)]

    def attend_with(done, cache, prompt):
        step = Step(jnp.int32(2), positions, (query, query), lengths, "xla", done=done)
        given = None if copied else tuple(prompt)
        return attend_step(query, (key, value), given, tuple(cache), step)[0]

    def spoil(x: jax.Array, ended: np.ndarray) -> jax.Array:
        return x.at[np.flatnonzero(ended), 1:].set(1e4)

    found = attend_with(
        jnp.asarray(done),
        [cache[0], spoil(cache[1], done)],
        [prompt[0], spoil(prompt[1], np.array([False, True]))],
    )
    whole = attend_with(None, cache, prompt)
    np.testing.assert_array_equal(found[~done], whole[~done])
    assert np.abs(found).max() < 100 and not np.allclose(found[done], whole[done])


def test_caches_keep_the_compute_dtype(tiny_config, tiny_params):
    def caches(params):
        model = network.bind(tiny_config, network.cast(params, jnp.bfloat16))
        embeds = model.embed_text(jnp.zeros((3, PROMPT), jnp.int32))
        decoder, last = read_prompts(
            model.language_model, embeds, jnp.ones((3, PROMPT), bool), "xla"
        )
        return decoder.prompts, decoder.new_caches(12, STEPS), last

    prompts, buffers, last = jax.eval_shape(caches, tiny_params)
    assert last.dtype == jnp.bfloat16
    for found, shape in ((prompts, (3, PROMPT, 2, 8)), (buffers, (12, STEPS, 2, 8))):
        assert len(found) == tiny_config.llama.num_layers
        for x in jax.tree.leaves(found):
            assert (x.dtype, x.shape) == (jnp.bfloat16, shape)


# ---- cuDNN, as far as it goes without a GPU


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(
    ("program", "window"), [("image_program", 1), ("image_program", 3), ("text_program", 1)]
)
def test_samplers_lower_to_cudnn_for_nvidia(monkeypatch, tiny_config, program, window, copied):
    """A fused call a layer with a short prompt, one more for a long one, of the expected shapes."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    shape, special = jax.ShapeDtypeStruct, SpecialTokens(1, 2, 0, 91, 92, 90)
    rows, length = 4, 8
    monkeypatch.setattr(decoding, "SHORT_PROMPT", length - (not copied))
    jax.clear_caches()  # the limit is no argument of the traced function
    prompts = EncodedPrompts(shape((rows, length), jnp.int32), shape((rows, length), bool))
    keys = jax.eval_shape(lambda: sample_keys(0, np.arange(rows), GROUP))
    options = {"special": special, "greedy": False, "dtype": jnp.bfloat16, "attention": "cudnn"}
    if program == "image_program":
        options |= {"guided": True, "image_logprobs": "guided", "window": window}
        scalars, width = 2, 2
    else:
        options, scalars, width = {**options, "max_new_tokens": 9, "top_k": 0, "top_p": 1.0}, 1, 1
    traced = getattr(sampling, program).default.trace(
        tiny_config, network.abstract(tiny_config), prompts, keys,
        *[shape((), jnp.float32)] * scalars, **options,
    )  # fmt: skip
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "__cudnn$fmhaSoftmax" in line]
    steps = tiny_config.num_image_tokens + window - 1 if width == 2 else 9
    own = f"{width * rows * GROUP}x{steps + length * copied}x2x8xbf16"
    assert sum(line.count(f"tensor<{own}>") == 2 for line in calls) == tiny_config.llama.num_layers
    assert len(calls) == tiny_config.llama.num_layers * (1 if copied else 2)


@pytest.mark.parametrize("copied", [False, True])
def test_plans_and_their_images_lower_to_cudnn_for_nvidia(monkeypatch, tiny_config, copied):
    """In the loop of the plans, for the token that begins the images, and in the images' loop."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(decoding, "copies_prompts", lambda *_: copied)
    jax.clear_caches()  # the choice is no argument of the traced function
    shape, rows, length, longest = jax.ShapeDtypeStruct, 4, 8, 9
    traced = thinking._think_program.default.trace(
        tiny_config, network.abstract(tiny_config),
        EncodedPrompts(shape((rows, length), jnp.int32), shape((rows, length), bool)),
        jax.eval_shape(lambda: sample_keys(0, np.arange(rows), GROUP)),
        shape((), jnp.float32), shape((), jnp.float32),
        special=SpecialTokens(1, 2, 0, 91, 92, 90), max_new_tokens=longest, top_k=0, top_p=1.0,
        guided=True, image_logprobs="guided", greedy=False, dtype=jnp.bfloat16, attention="cudnn",
    )  # fmt: skip
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "__cudnn$fmhaSoftmax" in line]
    layers, before = tiny_config.llama.num_layers, length * copied
    assert len(calls) == 3 * layers * (1 if copied else 2)
    # A first token and at least as many steps as a plan has tokens; then BOI and all codes.
    for size, count in (
        (f"{rows * GROUP}x{before + 1 + longest}x", 1),
        (f"{2 * rows * GROUP}x{before + longest + tiny_config.num_image_tokens}x", 2),
    ):
        assert sum(f"tensor<{size}2x8xbf16>" in line for line in calls) == count * layers


@pytest.mark.parametrize(
    ("flags", "queries"),
    [
        ("", 1), ("--xla_gpu_deterministic_ops", 2), ("--xla_gpu_deterministic_ops=True --x=1", 2),
        ("--xla_gpu_deterministic_ops=true --xla_gpu_deterministic_ops=false", 1),
        ("--xla_gpu_deterministic_ops_too=true", 1),
    ],
)  # fmt: skip
def test_one_query_is_not_alone_where_bits_have_to_be_the_same(monkeypatch, flags, queries):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    def of_first(query, key, value, *, q_seqlen, kv_seqlen, **_):
        assert query.shape == (3, queries, 4, 8)
        assert q_seqlen.tolist() == [1] * 3
        averages, denominators = attention._attend_to_prefix_xla(query, key, value, kv_seqlen)
        return averages.at[:, 1:].set(jnp.nan), denominators.swapaxes(1, 2).at[..., 1:].set(jnp.nan)

    monkeypatch.setattr(cudnn, "dot_product_attention", of_first)
    jax.devices()  # XLA reads its flags now, and not those of below
    monkeypatch.setenv("XLA_FLAGS", flags)
    draw = np.random.default_rng(0).normal
    query, key, value = (jnp.float32(draw(size=(3, n, 4, 8))) for n in (1, 5, 5))
    lengths = jnp.array([1, 3, 5])
    found, expected = (attend_to_prefix(query, key, value, lengths, x) for x in ("cudnn", "xla"))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=NETWORK)


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [("bfloat16", 128), ("float32", 128), ("float16", 12), ("float16", 256)]
)
def test_cudnn_needs_an_nvidia_gpu_half_precision_and_its_head_sizes(monkeypatch, dtype, head_dim):
    assert choose_decode_kernel(dtype, head_dim) == "xla", "these tests run on a CPU"
    client = SimpleNamespace(platform_version="cuda 13000")
    gpu = SimpleNamespace(platform="gpu", client=client, compute_capability="9.0")
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    assert choose_decode_kernel(dtype, head_dim) == (
        "cudnn" if (dtype, head_dim) == ("bfloat16", 128) else "xla"
    )
    gpu.compute_capability = "7.5"
    assert choose_decode_kernel(dtype, head_dim) == "xla"
    gpu.compute_capability, client.platform_version = "gfx942", "rocm 70000"
    assert choose_decode_kernel(dtype, head_dim) == "xla"
