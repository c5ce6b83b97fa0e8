"""Plans and the images after them: against the full forward pass, and in other company."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.devices.mesh import batch_sharding, make_mesh, param_shardings
from corl_jax.policies import decoding
from corl_jax.policies.choices import sample_keys
from corl_jax.policies.family import LogprobOptions, SamplingOptions
from corl_jax.policies.janus import network, thinking
from corl_jax.policies.janus.layout import RULES
from corl_jax.types import EncodedPrompts
from tests.support.tiny_models import LAYOUTS, divisible, layout_name, two_layers
from tests.support.tiny_runs import SPECIAL, place_params, random_params
from tests.support.tolerances import LOGPROBS

pytestmark = pytest.mark.usefixtures("exact_products")

PADDING = (0, 3, 1, 4)  # left padding of each prompt
GROUP = 2
NEW_TOKENS = 12
TEMPERATURE = 0.8
CFG_SCALE = 3.0
OPTIONS = SamplingOptions(
    SPECIAL, temperature=TEMPERATURE, max_new_tokens=NEW_TOKENS, cfg_scale=CFG_SCALE,
    dtype=jnp.float32, attention="xla",
)  # fmt: skip
SCORING = LogprobOptions(
    SPECIAL, temperature=TEMPERATURE, cfg_scale=CFG_SCALE, remat="none", chunk=10_000
)


@pytest.fixture(scope="module")
def config(tiny_config):
    return divisible(two_layers(tiny_config))


@pytest.fixture(scope="module")
def params(config):
    """Random ones, whose texts end at very different lengths, and some not at all."""
    params = random_params(config)
    kernel = params["lm_head"]["kernel"]
    kernel[:, SPECIAL.eos] *= 6
    return params


@pytest.fixture(scope="module")
def prompts() -> EncodedPrompts:
    """[BOS, text], left-padded by PADDING."""
    length = 8
    ids = np.random.default_rng(3).integers(3, 90, (len(PADDING), length)).astype(np.int32)
    mask = np.arange(length) >= np.asarray(PADDING)[:, None]
    ids[~mask] = SPECIAL.pad
    ids[np.arange(len(PADDING)), np.asarray(PADDING)] = SPECIAL.bos
    return EncodedPrompts(ids, mask)


def keys_of(index, group_size: int = GROUP) -> jax.Array:
    return sample_keys(5, np.asarray(index), group_size)


def rows_of(prompts: EncodedPrompts, rows) -> EncodedPrompts:
    return jax.tree.map(lambda x: x[np.asarray(rows)], prompts)


def unpadded(prompts: EncodedPrompts, row: int) -> EncodedPrompts:
    pad = PADDING[row]
    return EncodedPrompts(
        prompts.input_ids[row : row + 1, pad:], prompts.attention_mask[row : row + 1, pad:]
    )


def sample(config, params, prompts, keys, **changes):
    options = dataclasses.replace(OPTIONS, **changes)
    return thinking.sample_thinking(config, params, prompts, keys, options)


@functools.partial(jax.jit, static_argnames=("config", "options"))
def score(config, params, prompts, segments, options):
    return thinking.score_thinking(config, params, prompts, segments, options)


@pytest.fixture(scope="module")
def drawn(config, params, prompts):
    """(plans, codes) that most tests compare with: two of each of four prompts."""
    with jax.default_matmul_precision("highest"):
        return sample(config, params, prompts, keys_of(range(len(PADDING))))


def assert_same_samples(found, expected) -> None:
    """Equal tokens, also where one of the two has room for longer plans."""
    (text, codes), (other, other_codes) = found, expected
    length = min(text.values.shape[1], other.values.shape[1])
    for name in ("values", "mask"):
        a, b = (np.asarray(getattr(x, name)) for x in (text, other))
        np.testing.assert_array_equal(a[:, :length], b[:, :length])
        assert not any(np.asarray(x.mask)[:, length:].any() for x in (text, other))
    np.testing.assert_array_equal(codes.values, other_codes.values)
    a, b = (np.asarray(x.logprobs)[:, :length] for x in (text, other))
    np.testing.assert_allclose(a, b, atol=LOGPROBS)
    np.testing.assert_allclose(codes.logprobs, other_codes.logprobs, atol=LOGPROBS)


def take(drawn, rows):
    return jax.tree.map(lambda x: np.asarray(x)[np.asarray(rows)], drawn)


# ---- the whole context, written out by hand


def contexts(drawn, prompts, row: int, *, blank: bool) -> tuple[list[int], list[int]]:
    """(ids of prompt, plan and BOI; codes) of a sample, without any padding of a batch."""
    text, codes = drawn
    number = row // GROUP
    ids = prompts.input_ids[number, PADDING[number] :].tolist()
    plan = np.asarray(text.values)[row][np.asarray(text.mask)[row]].tolist()
    plan = plan[:-1] if plan[-1] == SPECIAL.eos else plan
    ids = [*ids, *plan, SPECIAL.boi]
    if blank:
        # Of a plan every word, whatever its id: random weights may write BOS or BOI as well.
        ids = [SPECIAL.bos, *[SPECIAL.pad] * (len(ids) - 2), SPECIAL.boi]
    return ids, np.asarray(codes.values)[row].tolist()


def full_code_logits(config, params, ids: list[int], codes: list[int]) -> np.ndarray:
    """Logits [K, .] of the codes after a context, by one pass over all of it."""
    model = network.bind(config, params)
    embeds = jnp.concatenate([
        model.embed_text(jnp.asarray([ids])), model.embed_image_tokens(jnp.asarray([codes[:-1]]))
    ], axis=1)  # fmt: skip
    hidden = model.language_model(embeds, jnp.ones(embeds.shape[:2], bool))
    return np.asarray(model.image_logits(hidden[0, len(ids) - 1 :]))


def log_softmax_at(logits: np.ndarray, tokens) -> np.ndarray:
    logprobs = jax.nn.log_softmax(jnp.asarray(logits) / TEMPERATURE, axis=-1)
    return np.asarray(jnp.take_along_axis(logprobs, jnp.asarray(tokens)[:, None], -1)[:, 0])


@pytest.mark.parametrize("image_logprobs", ["conditional", "guided"])
def test_recorded_logprobs_are_those_of_the_written_out_context(
    config, params, prompts, drawn, image_logprobs
):
    """Of the shortest and the longest plan, and of one that was cut."""
    if image_logprobs == "guided":
        keys = keys_of(range(len(PADDING)))
        drawn = sample(config, params, prompts, keys, image_logprobs="guided")
    lengths = np.asarray(drawn[0].mask).sum(-1)
    for row in (lengths.argmin(), lengths.argmax()):
        ids, codes = contexts(drawn, prompts, row, blank=False)
        logits = full_code_logits(config, params, ids, codes)
        if image_logprobs == "guided":
            blank, _ = contexts(drawn, prompts, row, blank=True)
            other = full_code_logits(config, params, blank, codes)
            logits = other + CFG_SCALE * (logits - other)
        found = np.asarray(drawn[1].logprobs)[row]
        # Guidance multiplies what rounding does to logits.
        np.testing.assert_allclose(found, log_softmax_at(logits, codes), atol=5 * LOGPROBS)


def test_plans_are_of_many_lengths_and_images_differ(drawn):
    text, codes = drawn
    lengths, ended = np.asarray(text.mask).sum(-1), (np.asarray(text.values) == SPECIAL.eos).any(-1)
    assert len(set(lengths.tolist())) >= 4 and lengths.min() <= 3, lengths
    assert ended.any() and not ended.all(), "plans that end, and plans that are cut"
    assert len(np.unique(codes.values, axis=0)) == len(codes.values)
    assert (np.asarray(text.values)[~np.asarray(text.mask)] == SPECIAL.eos).all()


# ---- a sample depends on its key and its prompt only


def test_a_longer_limit_changes_no_plan_that_has_ended(config, params, prompts, drawn):
    keys = keys_of(range(len(PADDING)))
    longer = sample(config, params, prompts, keys, max_new_tokens=NEW_TOKENS + 9)
    ended = np.flatnonzero((np.asarray(drawn[0].values) == SPECIAL.eos).any(-1))
    assert_same_samples(take(longer, ended), take(drawn, ended))


def test_a_sample_alone_is_the_one_in_the_padded_batch(config, params, prompts, drawn):
    for row in (1, 3):
        alone = sample(config, params, unpadded(prompts, row), keys_of([row]))
        assert_same_samples(alone, take(drawn, [GROUP * row, GROUP * row + 1]))


def test_order_and_group_size_do_not_matter(config, params, prompts, drawn):
    order = [2, 0, 3, 1]
    moved = sample(config, params, rows_of(prompts, order), keys_of(order))
    assert_same_samples(moved, take(drawn, [GROUP * row + g for row in order for g in (0, 1)]))
    single = sample(config, params, prompts, keys_of(range(len(PADDING)), 1))
    assert_same_samples(single, take(drawn, range(0, GROUP * len(PADDING), GROUP)))


def test_guidance_changes_images_and_no_plan(config, params, prompts, drawn):
    plain = sample(config, params, prompts, keys_of(range(len(PADDING))), cfg_scale=1.0)
    np.testing.assert_array_equal(plain[0].values, drawn[0].values)
    assert (np.asarray(plain[1].values) != np.asarray(drawn[1].values)).any()


def test_copied_prompts_change_nothing(config, params, prompts, drawn, monkeypatch):
    monkeypatch.setattr(decoding, "copies_prompts", lambda *_: True)
    jax.clear_caches()
    found = sample(config, params, prompts, keys_of(range(len(PADDING))))
    jax.clear_caches()
    assert_same_samples(found, drawn)


def test_one_token_of_a_plan_is_enough(config, params, prompts):
    short = sample(config, params, prompts, keys_of(range(len(PADDING))), max_new_tokens=1)
    found = score(config, params, prompts, short, SCORING)
    for segment, (logprobs, _) in zip(short, found, strict=True):
        np.testing.assert_allclose(logprobs, segment.logprobs, atol=LOGPROBS)


# ---- scoring


@pytest.mark.parametrize("image_logprobs", ["conditional", "guided"])
def test_the_trainer_computes_what_was_recorded(config, params, prompts, image_logprobs):
    keys = keys_of(range(len(PADDING)), 3)
    segments = sample(config, params, prompts, keys, image_logprobs=image_logprobs)
    # Not even a loss that leaves a plan out may change what its image was drawn after.
    hidden = dataclasses.replace(segments[0], mask=jnp.zeros_like(segments[0].mask))
    options = dataclasses.replace(SCORING, image_logprobs=image_logprobs)
    scored = score(config, params, prompts, (hidden, segments[1]), options)
    for segment, (logprobs, entropies) in zip(segments, scored, strict=True):
        error = np.where(segment.mask, np.abs(logprobs - np.asarray(segment.logprobs)), 0).max()
        print(f"{segment.kind} {image_logprobs}: sampler against trainer {error:.1e}")
        assert error < 5 * LOGPROBS
        kept = np.asarray(entropies)[np.asarray(segment.mask)]
        assert entropies.shape == segment.values.shape and (kept > 0).all()


def test_unshifted_scoring_takes_the_state_behind_each_code(config, params, prompts, drawn):
    options = dataclasses.replace(SCORING, unshifted=True)
    text, codes = score(config, params, prompts, drawn, options)
    plain_text, _ = score(config, params, prompts, drawn, SCORING)
    np.testing.assert_array_equal(text[0], plain_text[0])
    row = int(np.asarray(drawn[0].mask).sum(-1).argmin())
    ids, written = contexts(drawn, prompts, row, blank=False)
    logits = full_code_logits(config, params, ids, [*written, 0])[1:]
    np.testing.assert_allclose(codes[0][row], log_softmax_at(logits, written), atol=LOGPROBS)


def test_a_plan_gets_gradients_from_its_image(config, params, prompts, drawn):
    """Through the states that the codes attend to: its words' embeddings have a gradient."""

    def loss(params):
        outputs = thinking.score_thinking(config, params, prompts, drawn, SCORING)
        return outputs[1][0].sum()

    table = jax.jit(jax.grad(loss))(params)["language_model"]["embed_tokens"]["embedding"]
    written = np.unique(np.asarray(drawn[0].values)[np.asarray(drawn[0].mask)])
    written = written[written != SPECIAL.eos]
    assert len(written) > 5 and (np.abs(np.asarray(table)[written]).max(-1) > 0).all()
    # The end of a plan is predicted but not read, as nothing else that was left out.
    assert (np.asarray(table)[SPECIAL.eos] == 0).all()


# ---- several devices


@pytest.mark.parametrize("axes", LAYOUTS, ids=layout_name)
def test_devices_change_nothing(config, params, axes):
    """Samples, log-probs of both segments and their gradient."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 90, (8, 8)).astype(np.int32)
    start = np.arange(8) * 3 % 5
    mask = np.arange(8) >= start[:, None]
    ids[~mask] = SPECIAL.pad
    ids[np.arange(8), start] = SPECIAL.bos
    prompts, keys = EncodedPrompts(ids, mask), keys_of(range(8))
    options = dataclasses.replace(SCORING, image_logprobs="guided")

    @jax.jit
    def measure(params, prompts, keys):
        segments = sample(config, params, prompts, keys)

        def loss(head):
            scored = thinking.score_thinking(
                config, params | {"lm_head": head}, prompts, segments, options
            )
            return sum((logprobs * s.mask).sum() for (logprobs, _), s in zip(scored, segments))

        return segments, jax.value_and_grad(loss)(params["lm_head"])

    expected = jax.device_get(measure(params, prompts, keys))
    mesh = make_mesh(*axes)
    spread = jax.device_put((prompts, keys), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        found = jax.device_get(measure(place_params(params, mesh, RULES), *spread))
    assert_same_samples(found[0], expected[0])
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_data_parallel_decoding_needs_no_communication(config, params, prompts):
    mesh = make_mesh(data=4, devices=jax.devices()[:4])
    spread = batch_sharding(mesh)
    with jax.set_mesh(mesh):
        arguments = (
            jax.device_put(params, param_shardings(params, mesh, RULES)),
            jax.device_put(prompts, spread),
            jax.device_put(keys_of(range(len(PADDING))), spread),
        )
        run = jax.jit(functools.partial(sample, config), static_argnames=("cfg_scale",))
        text = run.lower(*arguments).compile().as_text()
    # Whether all texts have ended is the one thing that devices tell each other.
    moved = [line for line in text.splitlines() if " all-gather(" in line or " all-to-all(" in line]
    assert not moved and text.count(" all-reduce(") <= 1


def test_windows_of_codes_change_no_image(config, params, prompts, drawn):
    """Images begin at other places of their completions, behind plans of other lengths."""
    windows = sample(config, params, prompts, keys_of(range(len(PADDING))), image_window=4)
    assert_same_samples(windows, drawn)
