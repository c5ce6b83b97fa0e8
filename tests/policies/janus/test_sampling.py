"""Sampling against the full forward pass, against itself in other company, and its costs."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.devices import compiling
from corl_jax.devices.mesh import batch_sharding, make_mesh, param_shardings
from corl_jax.policies import choices, completions, decode_attention, decoding
from corl_jax.policies.choices import (
    STRIDE,
    Choice,
    completion_mask,
    keep_top_p,
    sample_keys,
    token_logprobs,
)
from corl_jax.policies.family import SamplingOptions
from corl_jax.policies.image_chunks import choose_chunks
from corl_jax.policies.janus import images as janus_images
from corl_jax.policies.janus import network, own_images, sampling, thinking
from corl_jax.policies.janus.images import count_decoded, decode_images
from corl_jax.policies.janus.layout import RULES
from corl_jax.policies.janus.tokens import SpecialTokens
from corl_jax.types import EncodedPrompts, Rollout
from tests.support import draws
from tests.support.tiny_models import two_layers
from tests.support.tolerances import LOGPROBS

pytestmark = pytest.mark.usefixtures("exact_products")

SPECIAL = SpecialTokens(bos=1, eos=2, pad=0, boi=91, eoi=92, image=90)
PADDING = (0, 3, 1, 4)  # left padding of each prompt
GROUP = 2
NEW_TOKENS = 10
TEMPERATURE = 0.8
STRICT = {"special": SPECIAL, "dtype": jnp.float32}
IMAGE_OPTIONS = {
    "guided": True, "image_logprobs": "conditional", "greedy": False, "attention": "xla",
}  # fmt: skip
TEXT_OPTIONS = {
    "max_new_tokens": 256, "top_k": 0, "top_p": 1.0, "greedy": False, "attention": "xla",
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tiny_config):
    return two_layers(tiny_config)


@pytest.fixture(scope="module")
def params(tiny_params):
    language_model = {
        **tiny_params["language_model"],
        "layers": jax.tree.map(lambda x: x[:2], tiny_params["language_model"]["layers"]),
    }
    return {**tiny_params, "language_model": language_model}


def drawing_prompts(rows: int = 4, length: int = 8) -> EncodedPrompts:
    """[BOS, text, BOI], left-padded by PADDING."""
    rng = np.random.default_rng(3)
    ids = rng.integers(3, 90, (rows, length)).astype(np.int32)
    mask = np.arange(length) >= np.asarray(PADDING[:rows])[:, None]
    ids[~mask] = SPECIAL.pad
    ids[np.arange(rows), np.asarray(PADDING[:rows])] = SPECIAL.bos
    ids[:, -1] = SPECIAL.boi
    return EncodedPrompts(ids, mask)


def question_prompts(config) -> EncodedPrompts:
    """[BOS, BOI, image, EOI, question], left-padded by PADDING, each with its picture."""
    rng = np.random.default_rng(4)
    side, slots = config.siglip.image_size, config.num_image_tokens
    length = slots + 9
    ids = rng.integers(3, 90, (4, length)).astype(np.int32)
    mask = np.arange(length) >= np.asarray(PADDING)[:, None]
    for row, pad in enumerate(PADDING):
        picture = [SPECIAL.bos, SPECIAL.boi, *[SPECIAL.image] * slots, SPECIAL.eoi]
        ids[row, :pad] = SPECIAL.pad
        ids[row, pad : pad + len(picture)] = picture
    return EncodedPrompts(ids, mask, rng.standard_normal((4, side, side, 3)).astype(np.float32))


def keys_of(index, group_size: int = GROUP) -> jax.Array:
    return sample_keys(5, np.asarray(index), group_size)


def rows_of(prompts: EncodedPrompts, rows) -> EncodedPrompts:
    return jax.tree.map(lambda x: x[np.asarray(rows)], prompts)


def unpadded(prompts: EncodedPrompts, row: int) -> EncodedPrompts:
    """One prompt alone, its padding cut off."""
    one = rows_of(prompts, [row])
    pad = PADDING[row]
    return dataclasses.replace(
        one, input_ids=one.input_ids[:, pad:], attention_mask=one.attention_mask[:, pad:]
    )


def draw_images(config, params, prompts, keys, **options):
    options = {"cfg_scale": 3.0, "temperature": TEMPERATURE, **STRICT, **options}
    return sampling.sample_images(config, params, prompts, keys, **options)


def answer(config, params, prompts, keys, **options):
    options = {"max_new_tokens": NEW_TOKENS, "temperature": TEMPERATURE, **STRICT, **options}
    return sampling.sample_text(config, params, prompts, keys, **options)


@pytest.fixture(scope="module")
def images(config, params):
    """A rollout that most tests compare with: two guided drawings of each of four prompts."""
    with jax.default_matmul_precision("highest"):
        return draw_images(config, params, drawing_prompts(), keys_of(range(4)))


@pytest.fixture(scope="module")
def texts(config, params):
    with jax.default_matmul_precision("highest"):
        return answer(config, params, question_prompts(config), keys_of(range(4)))


def full_logits(config, params, prompts, tokens) -> jax.Array:
    return draws.full_logits(config, params, prompts, tokens, SPECIAL.image)


def picked(logits: jax.Array, tokens) -> np.ndarray:
    logprobs = jax.nn.log_softmax(logits / TEMPERATURE, axis=-1)
    return np.asarray(jnp.take_along_axis(logprobs, jnp.asarray(tokens)[..., None], -1)[..., 0])


def blanked(prompts: EncodedPrompts) -> EncodedPrompts:
    """The guidance rows, written out by hand: BOS, pads, BOI."""
    ids = np.full_like(prompts.input_ids, SPECIAL.pad)
    ids[np.arange(len(ids)), np.asarray(PADDING)] = SPECIAL.bos
    ids[:, -1] = SPECIAL.boi
    return dataclasses.replace(prompts, input_ids=ids)


def mixed_logits(config, params, images) -> jax.Array:
    """Those that guided drawings were drawn from."""
    conditional = full_logits(config, params, drawing_prompts(), images.values)
    other = full_logits(config, params, blanked(drawing_prompts()), images.values)
    return other + 3.0 * (conditional - other)


def test_no_draw_is_near_a_tie(config, params, images, texts):
    """So that the tests below may ask other programs for the same tokens, on any machine."""
    logits = full_logits(config, params, question_prompts(config), texts.values)
    for rollout, scores in ((images, mixed_logits(config, params, images)), (texts, logits)):
        margins = draws.margins(scores, rollout, keys_of(range(4)), TEMPERATURE)
        assert margins.min() > draws.SAFE, "choose another seed"


def test_the_last_completion_may_be_greedy(config, params, images, texts):
    """The others are those that are sampled without it."""
    keys = keys_of(range(4), GROUP + 1)
    for draw, prompts, sampled in (
        (draw_images, drawing_prompts(), images), (answer, question_prompts(config), texts),
    ):  # fmt: skip
        mixed = draw(config, params, prompts, keys, greedy_last=True)
        best = draw(config, params, prompts, keys_of(range(4), 1), greedy=True)
        groups = np.asarray(mixed.values).reshape(4, GROUP + 1, -1)
        np.testing.assert_array_equal(
            groups[:, :GROUP].reshape(sampled.values.shape), sampled.values
        )
        np.testing.assert_array_equal(groups[:, GROUP], best.values)


# ---- the recorded log-probs


def test_image_logprobs_are_those_of_the_full_forward(config, params, images):
    logits = full_logits(config, params, drawing_prompts(), images.values)
    assert logits.std() > 0.3
    np.testing.assert_allclose(images.logprobs, picked(logits, images.values), atol=LOGPROBS)
    assert images.mask.all() and Rollout(drawing_prompts(), (images,)).group_size == GROUP


def test_guided_logprobs_are_of_the_mixed_distribution(config, params, images):
    prompts, keys = drawing_prompts(), keys_of(range(4))
    guided = draw_images(config, params, prompts, keys, image_logprobs="guided")
    np.testing.assert_array_equal(guided.values, images.values)
    mixed = mixed_logits(config, params, images)
    # Guidance multiplies what rounding does to logits.
    np.testing.assert_allclose(guided.logprobs, picked(mixed, images.values), atol=5 * LOGPROBS)
    assert np.abs(np.asarray(guided.logprobs) - np.asarray(images.logprobs)).max() > 0.1


def test_text_logprobs_are_those_of_the_full_forward(config, params, texts):
    logits = full_logits(config, params, question_prompts(config), texts.values)
    expected = np.where(texts.mask, picked(logits, texts.values), 0)
    np.testing.assert_allclose(texts.logprobs, expected, atol=LOGPROBS)
    assert texts.mask.sum() > texts.mask.size / 2


def test_top_k_and_top_p_change_draws_but_not_what_is_recorded(config, params, texts):
    """Of one token to choose from the best is drawn, and recorded as one of the whole softmax."""
    found = answer(config, params, question_prompts(config), keys_of(range(4)), top_k=1, top_p=0.9)
    logits = full_logits(config, params, question_prompts(config), found.values)
    kept = np.asarray(found.mask)
    np.testing.assert_array_equal(found.values[kept], logits.argmax(-1)[kept])
    logprobs = np.asarray(found.logprobs)[kept]
    np.testing.assert_allclose(logprobs, picked(logits, found.values)[kept], atol=LOGPROBS)
    assert logprobs.max() < -1e-3


# ---- guidance


def test_guidance_rows_keep_bos_and_boi_only():
    prompts = drawing_prompts()
    found = sampling.unconditional_ids(jnp.asarray(prompts.input_ids), SPECIAL)
    np.testing.assert_array_equal(found, blanked(prompts).input_ids)


def test_scale_one_is_no_guidance(config, params):
    prompts, keys = drawing_prompts(), keys_of(range(4))
    plain = draw_images(config, params, prompts, keys, cfg_scale=1.0)
    one = jnp.float32(1)
    tokens, logprobs = sampling.image_program.default(
        config, params, prompts, keys, one, jnp.float32(TEMPERATURE),
        **STRICT, **IMAGE_OPTIONS,
    )  # fmt: skip
    np.testing.assert_array_equal(plain.values, tokens)
    np.testing.assert_allclose(plain.logprobs, logprobs, atol=LOGPROBS)


def test_rows_of_a_guided_prompt_lie_side_by_side():
    rows = sampling.Rows(group_size=2, guided=True)
    prompts = rows.interleave_prompts(jnp.array([10, 20]), jnp.array([11, 21]))
    np.testing.assert_array_equal(prompts, [10, 11, 20, 21])
    samples = rows.fan_out(prompts)
    np.testing.assert_array_equal(samples, [10, 10, 11, 11, 20, 20, 21, 21])
    conditional, unconditional = rows.split(samples)
    np.testing.assert_array_equal(conditional, [10, 10, 20, 20])
    np.testing.assert_array_equal(unconditional, [11, 11, 21, 21])
    drawn = jnp.array([1, 2, 3, 4])
    read = rows.repeat_samples(drawn)
    np.testing.assert_array_equal(read, [1, 2, 1, 2, 3, 4, 3, 4])
    for half in rows.split(read):
        np.testing.assert_array_equal(half, drawn)


# ---- a sample depends on its key and its prompt only


def test_an_image_alone_is_the_one_in_the_padded_batch(config, params, images):
    alone = draw_images(config, params, unpadded(drawing_prompts(), 3), keys_of([3]))
    np.testing.assert_array_equal(alone.values, images.values[-GROUP:])
    np.testing.assert_allclose(alone.logprobs, images.logprobs[-GROUP:], atol=LOGPROBS)
    assert len(np.unique(images.values, axis=0)) == 4 * GROUP, "samples must differ"


def test_an_answer_alone_is_the_one_in_the_padded_batch(config, params, texts):
    alone = answer(config, params, unpadded(question_prompts(config), 3), keys_of([3]))
    np.testing.assert_array_equal(alone.values, texts.values[-GROUP:])
    np.testing.assert_array_equal(alone.mask, texts.mask[-GROUP:])
    np.testing.assert_allclose(alone.logprobs, texts.logprobs[-GROUP:], atol=LOGPROBS)


def test_order_of_the_batch_does_not_matter(config, params, images, texts):
    order = [2, 0, 3, 1]
    samples = [GROUP * row + g for row in order for g in range(GROUP)]
    moved = draw_images(config, params, rows_of(drawing_prompts(), order), keys_of(order))
    np.testing.assert_array_equal(moved.values, np.asarray(images.values)[samples])
    moved = answer(config, params, rows_of(question_prompts(config), order), keys_of(order))
    np.testing.assert_array_equal(moved.values, np.asarray(texts.values)[samples])


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 - 1])
def test_keys_of_single_rows_are_those_of_their_prompts(seed):
    expected = sample_keys(seed, [3, 2**32 - 1], 2, stream=1, first=5)
    prompts, numbers = [3, 3, 2**32 - 1, 2**32 - 1], [5, 6, 5, 6]
    columns = ([seed] * 4, prompts, numbers)
    keys = choices.row_keys(*(np.array(x, np.uint32) for x in columns), stream=1)
    np.testing.assert_array_equal(jax.random.key_data(keys), jax.random.key_data(expected))


def test_keys_come_from_seed_prompt_and_sample():
    data = jax.random.key_data(sample_keys(0, np.array([4, 9]), 3))
    assert len(np.unique(data, axis=0)) == 6
    alone = jax.random.key_data(sample_keys(0, np.array([9], np.int64), 5))
    np.testing.assert_array_equal(alone[:3], data[3:])
    for other in (sample_keys(1, [4, 9], 3), sample_keys(0, [4, 9], 3, stream=1)):
        assert not (jax.random.key_data(other) == data).all(-1).any()


def test_keys_must_be_a_multiple_of_the_prompts(config, params):
    with pytest.raises(ValueError, match="3 keys for 4 prompts"):
        draw_images(config, params, drawing_prompts(), keys_of(range(4))[:3])


def on_mesh(mesh, params, prompts):
    """Parameters, prompts and keys laid out over the devices."""
    spread = batch_sharding(mesh)
    return (
        jax.device_put(params, param_shardings(params, mesh, RULES)),
        jax.device_put(prompts, spread),
        jax.device_put(keys_of(range(4)), spread),
    )


@pytest.fixture(params=["shared prompts", "copied prompts"])
def copied(request, monkeypatch):
    """Both ways to keep prompts; which one a program uses is no argument of it."""
    copied = request.param == "copied prompts"
    monkeypatch.setattr(decoding, "copies_prompts", lambda *_: copied)
    jax.clear_caches()
    yield copied
    jax.clear_caches()


def test_copied_prompts_change_nothing(config, params, images, texts, copied):
    rollouts = (
        draw_images(config, params, drawing_prompts(), keys_of(range(4))),
        answer(config, params, question_prompts(config), keys_of(range(4))),
    )
    for found, expected in zip(rollouts, (images, texts), strict=True):
        np.testing.assert_array_equal(found.values, expected.values)
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=LOGPROBS)


def test_data_parallel_decoding_needs_no_communication(config, params, images, copied):
    mesh = make_mesh(data=4, devices=jax.devices()[:4])
    scale, temperature = jnp.float32(3), jnp.float32(TEMPERATURE)
    with jax.set_mesh(mesh):
        arguments = *on_mesh(mesh, params, drawing_prompts()), scale, temperature
        program = sampling.image_program.default.lower(
            config, *arguments, **STRICT, **IMAGE_OPTIONS
        ).compile()
        tokens, _ = program(*arguments)
    np.testing.assert_array_equal(tokens, images.values)
    collectives = r"all-(gather|reduce|to-all)|collective-permute|reduce-scatter"
    assert not re.search(rf" ({collectives})(-start)?\(", program.as_text())


# ---- the end of a text


@pytest.fixture
def decode_steps(monkeypatch):
    """The steps that a sampler's loop makes, in programs that are compiled in the test."""
    steps, advance = [], completions.advance

    def counted(state, *args):
        jax.debug.callback(lambda step: steps.append(int(step)), state.step)
        return advance(state, *args)

    monkeypatch.setattr(completions, "advance", counted)
    jax.clear_caches()
    yield steps
    jax.clear_caches()


def test_texts_end_at_eos_and_the_loop_with_the_last_of_them(config, params, decode_steps):
    length, column = 192, params["lm_head"]["kernel"][:, SPECIAL.eos]
    head = 0.3 * params["lm_head"]["kernel"]

    rare = {**params, "lm_head": {"kernel": head.at[:, SPECIAL.eos].set(0 * column)}}
    arguments = question_prompts(config), keys_of(range(4))
    rollout = jax.block_until_ready(answer(config, rare, *arguments, max_new_tokens=length))
    jax.effects_barrier()
    lengths = np.asarray(rollout.mask).sum(-1)
    # The first token needs no step; then the loop is left at the end of a stride.
    assert 0 <= len(decode_steps) - (lengths.max() - 1) < STRIDE
    assert len(set(lengths)) > 4 and lengths.max() > length / 2, lengths
    arrays = map(np.asarray, (rollout.values, rollout.mask, rollout.logprobs, lengths))
    for row, kept, logprobs, end in zip(*arrays, strict=True):
        np.testing.assert_array_equal(kept, np.arange(length) < end)
        assert (row[: end - 1] != SPECIAL.eos).all() and (row[end:] == SPECIAL.eos).all()
        assert end == length or row[end - 1] == SPECIAL.eos
        assert (logprobs[kept] < 0).all() and (logprobs[~kept] == 0).all()

    # Every text token carries a large constant, which the head reads as the end.
    table = params["language_model"]["embed_tokens"]["embedding"] + 100
    certain = {
        **params,
        "language_model": {**params["language_model"], "embed_tokens": {"embedding": table}},
        "lm_head": {"kernel": head.at[:, SPECIAL.eos].set(0 * column + 10)},
    }
    decode_steps.clear()
    rollout = jax.block_until_ready(answer(config, certain, *arguments, max_new_tokens=length))
    jax.effects_barrier()
    assert np.asarray(rollout.mask).sum(-1).tolist() == [1] * 4 * GROUP
    assert not decode_steps, "all texts have ended with their first token"


def test_answers_are_the_same_if_rows_that_have_ended_read_all_their_keys(
    config, params, monkeypatch
):
    """To the bit: the attention of a row does not depend on how much the others read."""
    head = params["lm_head"]["kernel"].at[:, SPECIAL.eos].multiply(12.0)
    arguments = {**params, "lm_head": {"kernel": head}}, question_prompts(config), keys_of(range(4))
    found = answer(config, *arguments, max_new_tokens=24)
    jax.clear_caches()
    monkeypatch.setattr(decode_attention.Step, "limit_rows", lambda _, counts: counts)
    monkeypatch.setattr(decode_attention.Step, "limit_prompts", lambda step: step.lengths)
    expected = answer(config, *arguments, max_new_tokens=24)
    jax.clear_caches()
    lengths = np.asarray(expected.mask).sum(-1)
    assert lengths.min() < 10 and lengths.max() > 20, lengths
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_mask_runs_to_the_first_end_and_no_further_than_was_drawn():
    tokens = jnp.array([[5, 2, 2, 2], [2, 5, 5, 2], [5, 6, 7, 8]])
    mask = completion_mask(tokens, 3, eos=2)
    np.testing.assert_array_equal(mask, [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]])


# ---- drawing one token


@pytest.mark.parametrize("block", [512, 2, 3])
def test_draws_follow_the_distribution(monkeypatch, block):
    """Of four tokens at once, of two and two, and of three and one."""
    monkeypatch.setattr(choices, "BLOCK", block)
    logits = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.1]))
    rows = jnp.broadcast_to(logits, (20000, 4))
    keys = jax.random.split(jax.random.key(0), 20000)

    def frequencies(**options):
        choice = Choice(1.0, False, **options)
        drawn = jax.jit(choice.draw)(keys, jnp.int32(3), rows)
        return np.bincount(np.asarray(drawn), minlength=4) / 20000

    np.testing.assert_allclose(frequencies(), [0.5, 0.25, 0.15, 0.1], atol=0.015)
    np.testing.assert_allclose(frequencies(top_k=2), [2 / 3, 1 / 3, 0, 0], atol=0.015)
    np.testing.assert_allclose(frequencies(top_p=0.8), [5 / 9, 2.5 / 9, 1.5 / 9, 0], atol=0.015)


def test_logprobs_by_blocks_are_those_of_the_softmax(monkeypatch):
    monkeypatch.setattr(choices, "BLOCK", 5)
    logits = jnp.asarray(np.random.default_rng(1).normal(0, 30, (6, 13)), jnp.float32)
    tokens = jnp.array([0, 4, 5, 9, 10, 12])
    expected = jax.nn.log_softmax(logits)[jnp.arange(6), tokens]
    found = token_logprobs(logits, tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_nucleus_is_never_empty():
    logits = jnp.array([[0.0, 3.0, 1.0]])
    for top_p in (0.0, 1e-9):
        kept = keep_top_p(logits, top_p)
        np.testing.assert_array_equal(kept, [[-np.inf, 3.0, -np.inf]])


# ---- codes to pictures


def test_pictures_are_truncated_decodings(config, params, monkeypatch):
    """Five pictures in chunks of two."""
    monkeypatch.setattr(janus_images, "count_decoded", lambda config: 2)
    codes = np.random.default_rng(0).integers(0, config.vq.num_embeddings, (5, 16))
    pixels = np.asarray(
        jax.jit(lambda params: network.bind(config, params).vqmodel.decode(codes))(params)
    )
    values = np.clip((pixels + 1) / 2 * 255, 0, 255)
    found = np.asarray(decode_images(config, params, codes))
    assert found.dtype == np.uint8 and found.shape == pixels.shape
    sure = np.abs(values - values.round()) > 1e-2  # elsewhere rounding decides the last unit
    np.testing.assert_array_equal(found[sure], values.astype(np.uint8)[sure])
    assert (values % 1 > 0.6).any(), "truncation must differ from rounding"


def test_pictures_in_half_precision_are_nearly_the_same(config, params):
    codes = np.random.default_rng(0).integers(0, config.vq.num_embeddings, (3, 16))
    exact, half = (
        np.asarray(decode_images(config, params, codes, dtype=dtype), np.int32)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    apart = np.abs(exact - half)
    assert 0 < apart.mean() < 3 and apart.max() < 32
    assert exact.std() > 10, "all alike says nothing"


@pytest.mark.parametrize(("images", "chunks"), [(1, (1, 1)), (8, (1, 8)), (9, (2, 5))])
def test_chunks_are_even(images, chunks):
    assert choose_chunks(images, 8) == chunks
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        count, size = choose_chunks(images, 8)
    assert size % 4 == 0 and count * size >= images


def test_chunks_of_small_images_are_larger_but_on_cpus(config, monkeypatch):
    released, small = network.PRESETS["janus-pro-1b"], config
    assert count_decoded(released) == count_decoded(small) == 8
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert count_decoded(released) == 8
    assert count_decoded(small) > 1000


# ---- costs


def test_samplers_on_nvidia_are_compiled_with_options_of_their_own(
    config, params, images, monkeypatch
):
    """The options are of GPUs: here they compile and change nothing."""
    monkeypatch.setattr(compiling, "MANY_ROWS", 2 * 4 * GROUP)
    image, text = sampling.image_program, sampling.text_program
    keys = keys_of(range(4))
    assert image.choose_build(10**6, keys) is image.default  # no NVIDIA GPU
    monkeypatch.setattr(compiling, "is_nvidia", lambda: True)
    assert text.choose_build(8 * GROUP, keys) is text.for_many_rows
    assert text.choose_build(8 * GROUP - 1, keys) is text.for_few_rows
    with jax.set_mesh(make_mesh(data=2, devices=jax.devices()[:2])):  # rows are a device's
        assert text.choose_build(8 * GROUP, keys) is text.for_few_rows
        assert text.choose_build(16 * GROUP, keys) is text.for_many_rows

    for build, rows in (("for_many_rows", 2 * 4 * GROUP), ("for_few_rows", 10**6)):
        monkeypatch.setattr(compiling, "MANY_ROWS", rows)
        before = getattr(image, build)._cache_size()
        drawn = draw_images(config, params, drawing_prompts(), keys)
        assert getattr(image, build)._cache_size() == before + 1
        np.testing.assert_array_equal(drawn.values, images.values)
    one = jax.jit(lambda params: draw_images(config, params, drawing_prompts(), keys).values)
    np.testing.assert_array_equal(one(params), images.values)  # a part of another program


def test_unknown_options_of_xla_are_left_out(caplog):
    known, unknown = compiling.WITHOUT_TRITON, ("xla_gpu_of_tomorrow", True)
    for _ in range(2):
        found = compiling.list_accepted_options(known, unknown, compiling.CONCURRENT)
        assert found == dict([known, compiling.CONCURRENT])
    assert "xla_gpu_of_tomorrow=True" in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize(
    "module, name, results",
    [(sampling, "image_program", 2), (own_images, "_own_image_program", 5),
     (thinking, "_think_program", 5)],
    ids=["images", "questions about them", "images behind plans"],
)  # fmt: skip
def test_a_build_is_chosen_by_the_tokens_of_a_pass(
    config, params, monkeypatch, window, module, name, results
):
    """Two rows of each image, with guidance and without the prompt, and a window of each."""
    seen, nothing = [], [jnp.zeros((4 * GROUP, 3))] * results
    program = SimpleNamespace(
        choose_build=lambda rows, *arguments: seen.append(rows) or (lambda *_, **__: nothing)
    )
    monkeypatch.setattr(module, name, program)
    sample = {
        sampling: sampling.sample_codes, own_images: own_images.sample_own_answers,
        thinking: thinking.sample_thinking,
    }[module]  # fmt: skip
    options = SamplingOptions(special=SPECIAL, cfg_scale=5.0, image_window=window)
    sample(config, params, drawing_prompts(), keys_of(range(4)), options)
    assert seen == [4 * GROUP * 2 * window]


def test_a_sampler_forgets_all_of_its_builds():
    program = compiling.SamplerProgram(lambda x: x + 1, static_argnames=())
    builds = [getattr(program, name) for name in compiling.BUILDS]
    assert [int(build(1)) for build in builds] == [2, 2, 2]
    assert [build._cache_size() for build in builds] == [1, 1, 1]
    program.clear_cache()
    assert [build._cache_size() for build in builds] == [0, 0, 0]


def test_one_program_a_bucket(config, params, images, texts):
    """Other prompts, seeds, scales and temperatures of the same padded shape compile nothing."""
    programs = sampling.image_program.default, sampling.text_program.default
    draw_images(config, params, drawing_prompts(), keys_of(range(4)))
    answer(config, params, question_prompts(config), keys_of(range(4)))
    before = [program._cache_size() for program in programs]
    keys = sample_keys(77, np.arange(4) + 9, GROUP)
    shifted = rows_of(drawing_prompts(), [3, 3, 0, 0])
    for scale, temperature in ((2.0, 1.0), (7.5, 0.5)):
        draw_images(config, params, shifted, keys, cfg_scale=scale, temperature=temperature)
        answer(
            config, params, rows_of(question_prompts(config), [1, 1, 2, 0]), keys, temperature=scale
        )
    assert [program._cache_size() for program in programs] == before


@pytest.fixture(scope="module")
def wide_config(tiny_config):
    """Small weights, long images and many key heads: the cache is nearly all of the memory."""
    return dataclasses.replace(
        tiny_config,
        llama=dataclasses.replace(
            tiny_config.llama, hidden_size=16, num_layers=4, num_heads=4, num_kv_heads=4
        ),
        siglip=dataclasses.replace(tiny_config.siglip, image_size=64),
        image_token_embed=16,
    )


def lowered(config, program: str, rows: int, length: int, group: int, **options):
    shape = jax.ShapeDtypeStruct
    prompts = EncodedPrompts(shape((rows, length), jnp.int32), shape((rows, length), bool))
    keys = jax.eval_shape(lambda: keys_of(range(rows), group))
    scalars = [shape((), jnp.float32)] * (2 if program == "image_program" else 1)
    return getattr(sampling, program).default.lower(
        config, network.abstract(config), prompts, keys, *scalars, **STRICT, **options
    )


@pytest.mark.parametrize(
    ("program", "window"), [("image_program", 1), ("image_program", 4), ("text_program", 1)]
)
def test_memory_is_one_cache_and_little_more(wide_config, program, window, copied):
    """Extended in place: no second copy of the cache beside the one that the loop carries."""
    rows, length, group = 4, 16, 16
    options = IMAGE_OPTIONS | {"window": window} if program == "image_program" else TEXT_OPTIONS
    compiled = lowered(wide_config, program, rows, length, group, **options).compile()
    llama, rows = wide_config.llama, rows * (1 + (program == "image_program"))
    token = 2 * 4 * llama.num_kv_heads * llama.head_dim  # bytes of keys and values a layer
    layer = token * rows * group * (256 + window - 1 + copied * length)
    found = compiled.memory_analysis().temp_size_in_bytes
    print(f"{program}: {found / 2**20:.1f} MiB, caches {llama.num_layers * layer / 2**20:.1f} MiB")
    # One layer's keys and values are transposed for the CPU's matrix products. Prompts' keys
    # and values: as they come from the prefill, and a layer each. A window has more scores.
    assert (
        found
        < (llama.num_layers + 1.1) * layer
        + 2 * llama.num_layers * token * rows * length
        + window * 2**20
    )
