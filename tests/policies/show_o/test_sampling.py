"""Sampling and scoring against whole sequences under masks, read again in every step."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.devices.mesh import batch_sharding, make_mesh, param_shardings
from corl_jax.plan import cost
from corl_jax.policies.family import (
    NOISE_KEYS,
    LogprobOptions,
    SamplingOptions,
    StraightThrough,
    Unmasking,
)
from corl_jax.policies.show_o import images, network, sampling
from corl_jax.policies.show_o.hiding import (
    COMMITTED_AT,
    HIDDEN_SHARES,
    choose_hidden,
    choose_scored,
)
from corl_jax.policies.show_o.layout import RULES
from corl_jax.policies.show_o.logprobs import score_answers, score_codes
from corl_jax.policies.show_o.own_images import (
    choose_code_vectors,
    sample_own_answers,
    score_own_answers,
)
from corl_jax.policies.show_o.reading import blank_ids, fill_codes, place_codes
from corl_jax.policies.show_o.unmasking import GIVEN, list_masked_counts, list_temperatures
from corl_jax.tasks import CODES, TEXT
from corl_jax.types import EncodedPrompts, Segment
from tests.support import tiny_show_o
from tests.support.show_o_masks import make_generation_mask, make_question_mask

SPECIAL, CONFIG = tiny_show_o.SPECIAL, tiny_show_o.CONFIG
PLACES, K = CONFIG.num_image_tokens, CONFIG.num_codes
STEPS, SCALE = 5, 3.0
TEXTS = ([5, 6, 7], [8, 9], [10, 11, 12, 13])
OPTIONS = SamplingOptions(
    SPECIAL, cfg_scale=SCALE, max_new_tokens=6, dtype=jnp.float32, attention="xla",
    unmasking=Unmasking(STEPS, "one_shot"),
)  # fmt: skip
SCORING = LogprobOptions(
    SPECIAL, cfg_scale=SCALE, remat="full", chunk=50, unmasking=OPTIONS.unmasking
)


@pytest.fixture(scope="module")
def params():
    return tiny_show_o.make_params()


@pytest.fixture(scope="module")
def model(params):
    return network.bind(CONFIG, params)


def pad_left(rows, length=8) -> EncodedPrompts:
    ids = np.array([[SPECIAL.pad] * (length - len(row)) + list(row) for row in rows], np.int32)
    return EncodedPrompts(ids, ids != SPECIAL.pad)


def drawing_prompts(length=8) -> EncodedPrompts:
    return pad_left([[SPECIAL.t2i, SPECIAL.eos, *text, SPECIAL.eos] for text in TEXTS], length)


def question_prompts(length=PLACES + 10) -> EncodedPrompts:
    image = [SPECIAL.soi, *[SPECIAL.mask] * PLACES, SPECIAL.eoi]
    prompts = pad_left([[SPECIAL.mmu, *image, SPECIAL.eos, *text] for text in TEXTS], length)
    side = 2 * CONFIG.magvit.downsample
    pixels = np.random.default_rng(0).uniform(-1, 1, (3, side, side, 3)).astype(np.float32)
    return dataclasses.replace(prompts, pixel_values=pixels)


def make_keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def slow_logits(model, ids, codes):
    """Logits of the codes behind prompts [N, P], of whole sequences under a mask."""
    image = jnp.pad(codes + SPECIAL.first_code, ((0, 0), (1, 1)))
    image = image.at[:, 0].set(SPECIAL.soi).at[:, -1].set(SPECIAL.eoi)
    whole = jnp.concatenate([ids, image], axis=1)
    hidden = model.language_model(model.embed_text(whole), make_generation_mask(whole, SPECIAL))
    return model.image_logits(hidden[:, -PLACES - 1 : -1])


def draw_slowly(model, prompts, codes, known, scale, gumbels, uniforms):
    """The sampler of the specification: a full pass over both sequences in each step."""
    group = len(codes) // len(prompts.input_ids)
    ids = jnp.repeat(jnp.asarray(prompts.input_ids), group, axis=0)
    tau, committed = 1.0, np.where(known, GIVEN, STEPS - 1)
    for s in range(STEPS):
        shown = jnp.where(known, codes, K)
        z = slow_logits(model, ids, shown)
        if scale != 1:
            weight = scale - 1
            z = (1 + weight) * z - weight * slow_logits(model, blank_ids(ids, SPECIAL), shown)
        logp = np.asarray(jax.nn.log_softmax(z))
        codes = np.where(known, codes, np.argmax(logp + gumbels[s], axis=-1))
        picked = np.take_along_axis(logp, codes[..., None], axis=-1)[..., 0]
        tau *= 1 - (s + 1) / STEPS
        noise = -np.log(np.maximum(-np.log(np.maximum(uniforms[s], 1e-20)), 1e-20))
        confidence = np.where(known, np.log(np.finfo(np.float32).max), picked) + tau * noise
        for n in range(len(codes)):
            unknown = (~known[n]).sum()
            m = max(1, min(unknown - 1, list_masked_counts(PLACES, STEPS)[s]))
            kept = known[n] | (confidence[n] >= np.sort(confidence[n])[m])
            committed[n] = np.where(kept & ~known[n], s, committed[n])
            known[n] = kept
    return codes, committed


@pytest.mark.parametrize("scale", [SCALE, 1.0])
@pytest.mark.parametrize("given", [0, 2])
def test_images_equal_an_eager_loop_over_whole_sequences(params, model, scale, given):
    prompts, count = drawing_prompts(), 6
    draw = np.random.default_rng(1)
    noise = (
        draw.gumbel(size=(STEPS, count, PLACES, K)).astype(np.float32),
        draw.random((STEPS, count, PLACES), np.float32),
    )
    codes = draw.integers(0, K, (count, PLACES)).astype(np.int32)
    known = np.argsort(draw.random((count, PLACES))) < given
    options = sampling.make_drawing(CONFIG, dataclasses.replace(OPTIONS, cfg_scale=scale))
    options = dataclasses.replace(options, unmasking=Unmasking(STEPS, "trajectory"))
    drawn, _, replay = sampling.image_program.default(
        CONFIG, params, prompts, make_keys(count), jnp.float32(scale), jnp.float32(1),
        (jnp.asarray(codes), jnp.asarray(known)), noise, options=options,
    )  # fmt: skip
    expected, committed = draw_slowly(model, prompts, codes, known.copy(), scale, *noise)
    np.testing.assert_array_equal(drawn.codes, expected)
    np.testing.assert_array_equal(replay[COMMITTED_AT], committed)
    assert list_temperatures(STEPS)[-1] == 0


def sample(params, prompts, keys, **changes):
    return sampling.sample_codes(
        CONFIG, params, prompts, keys, dataclasses.replace(OPTIONS, **changes)
    )


def test_a_sample_depends_on_its_key_and_prompt_alone(params):
    whole = sample(params, drawing_prompts(), make_keys(6))[0]
    assert len({tuple(row) for row in np.asarray(whole.values).tolist()}) > 3
    one = jax.tree.map(lambda x: x[1:2], drawing_prompts(14))
    part = sample(params, one, make_keys(6)[2:4])[0]
    np.testing.assert_array_equal(part.values, whole.values[2:4])
    mesh = make_mesh(data=1, fsdp=2, tensor=1, devices=jax.devices()[:2])
    doubled = jax.tree.map(lambda x: np.concatenate([x, x[:1]]), drawing_prompts())
    spread = jax.device_put(params, param_shardings(params, mesh, RULES))
    keys = jnp.concatenate([make_keys(6), make_keys(6)[:2]])
    with jax.set_mesh(mesh):
        placed = jax.device_put((doubled, keys), batch_sharding(mesh))
        sharded = sample(spread, *placed)[0]
    np.testing.assert_array_equal(sharded.values[:6], whole.values)


def test_layers_that_fsdp_splits_are_gathered_once_and_not_once_a_token(params):
    mesh = make_mesh(data=1, fsdp=2, tensor=1, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, param_shardings(params, mesh, RULES))
        questions = jax.tree.map(lambda x: x[:2], question_prompts())
        placed = jax.device_put((questions, make_keys(4)), batch_sharding(mesh))
        options = sampling.make_answering(CONFIG, OPTIONS)
        program = sampling.text_program.default.lower(
            CONFIG, spread, *placed, jnp.float32(1), options=options
        )
        text = program.compile().as_text()
    split = [x for x in jax.tree.leaves(spread) if not x.is_fully_replicated]
    assert 0 < cost.count_cost(text).collectives["all-gather"].count <= len(split)


def test_the_last_completion_can_be_greedy(params):
    mixed = sample(params, drawing_prompts(), make_keys(6), greedy_last=True)[0]
    greedy = sample(params, drawing_prompts(), make_keys(3), greedy=True)[0]
    plain = sample(params, drawing_prompts(), make_keys(6))[0]
    np.testing.assert_array_equal(mixed.values[1::2], greedy.values)
    np.testing.assert_array_equal(mixed.values[::2], plain.values[::2])


# ---- log-probs of images

FORMS = (
    Unmasking(STEPS, "one_shot"), Unmasking(STEPS, "complement"), Unmasking(STEPS, "trajectory"),
    Unmasking(STEPS, "trajectory", 2),
)  # fmt: skip


def take_prompts(tree, rows, count=3):
    """Prompts `rows` of arrays with a row, or a group, for each of `count` prompts."""
    return jax.tree.map(
        lambda x: x.reshape(count, -1, *x.shape[1:])[np.array(rows)].reshape(-1, *x.shape[1:]), tree
    )


@pytest.mark.parametrize(
    ("form", "distribution"),
    [
        (FORMS[0], "conditional"),
        (FORMS[1], "guided"),
        (FORMS[2], "guided"),
        (FORMS[3], "conditional"),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{x.logprobs}-{x.scored_steps}",
)
def test_scoring_repeats_what_the_sampler_recorded(params, form, distribution):
    prompts, changes = drawing_prompts(), {"image_logprobs": distribution, "unmasking": form}
    segments = sample(params, prompts, make_keys(6), temperature=1.5, **changes)
    options = dataclasses.replace(SCORING, temperature=1.5, **changes)
    (scored,) = choose_scored(prompts, segments, options)
    score = jax.jit(lambda *x: score_codes(CONFIG, params, *x, options)[0])
    logprobs, entropies = score(prompts, segments)
    np.testing.assert_allclose(logprobs, segments[0].logprobs, atol=2e-5)
    assert (np.asarray(logprobs)[~np.asarray(scored)] == 0).all()
    assert (np.asarray(logprobs)[np.asarray(scored)] < 0).all()
    assert (np.asarray(entropies)[np.asarray(scored)] > 0).all()
    assert np.asarray(scored).any(axis=-1).all() or form.scored_steps
    # In micro-batches too.
    for rows in ([0], [1], [2]):
        piece = score(take_prompts(prompts, rows), take_prompts(segments, rows))[0]
        np.testing.assert_allclose(piece, take_prompts(logprobs, rows), atol=2e-5)


def test_one_shot_log_probs_equal_a_masked_pass(params, model):
    prompts = drawing_prompts()
    segments = sample(params, prompts, make_keys(6))
    (hidden,) = choose_scored(drawing_prompts(), segments, SCORING)
    values = segments[0].values
    ids = jnp.repeat(jnp.asarray(prompts.input_ids), 2, axis=0)
    logits = slow_logits(model, ids, jnp.where(hidden, K, values))
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), values[..., None], axis=-1)[..., 0]
    ((logprobs, _),) = score_codes(CONFIG, params, prompts, segments, SCORING)
    np.testing.assert_allclose(logprobs, jnp.where(hidden, logp, 0), atol=2e-5)


def test_a_group_hides_equally_many_codes_at_different_places(params):
    segments = sample(params, drawing_prompts(), make_keys(24))
    (hidden,) = choose_scored(drawing_prompts(), segments, SCORING)
    counts = np.asarray(hidden).sum(axis=-1).reshape(3, 8)
    assert (counts == counts[:, :1]).all() and len({*counts[:, 0]}) > 1
    shares = np.asarray(segments[0].replay[HIDDEN_SHARES]).reshape(3, 8)
    np.testing.assert_array_equal(counts, np.maximum(1, np.round(shares * PLACES)))
    assert len({tuple(row) for row in np.asarray(hidden).tolist()}) > 3


def test_trajectories_and_complements_score_every_code_once(params):
    for form in (FORMS[1], FORMS[2]):
        segments = sample(params, drawing_prompts(), make_keys(6), unmasking=form)
        options = dataclasses.replace(SCORING, unmasking=form)
        assert np.asarray(choose_scored(drawing_prompts(), segments, options)[0]).all()


def test_given_images_hide_a_share_of_their_own():
    bits = jax.random.key_data(make_keys(400))
    codes = jnp.zeros((400, PLACES), jnp.int32)
    segment = Segment(CODES, codes, codes == 0, replay={NOISE_KEYS: bits})
    hidden = np.asarray(choose_scored(drawing_prompts(), (segment,), SCORING)[0]).sum(axis=-1)
    assert hidden.min() == 1 and hidden.max() == PLACES
    # The mean of cos(pi t / 2) is 2 / pi.
    assert abs(hidden.mean() / PLACES - 2 / np.pi) < 0.06


def test_gradients_flow_and_the_penalty_sees_a_moved_policy(params):
    prompts = drawing_prompts()
    for form in (FORMS[0], FORMS[3]):
        segments = sample(params, prompts, make_keys(6), unmasking=form)
        options = dataclasses.replace(SCORING, unmasking=form)

        def total(head):
            moved = params | {"lm_head": head}
            return score_codes(CONFIG, moved, prompts, segments, options)[0][0].sum()  # noqa: B023

        old, gradient = jax.jit(jax.value_and_grad(total))(params["lm_head"])
        moved = jax.tree.map(lambda x, g: x + 0.05 * g, params["lm_head"], gradient)
        assert total(moved) > old


# ---- answers


def slow_answers(model, prompts, count):
    """Greedy answers; every token is the result of a pass over the whole sequence, one row each."""

    @jax.jit
    def find_next(whole, length):
        mask = make_question_mask(whole, SPECIAL)
        hidden = model.language_model(model.embed_text(whole), mask)
        return jnp.argmax(model.text_logits(hidden[0, length - 1]))

    answers = []
    for row in np.asarray(fill_codes(model, prompts, SPECIAL)):
        tokens = row[row != SPECIAL.pad].tolist()
        begin = len(tokens)
        while len(tokens) < begin + count and SPECIAL.eos not in tokens[begin:]:
            # Padding on the right is later than every token.
            whole = jnp.asarray([tokens + [SPECIAL.pad] * (40 - len(tokens))])
            tokens.append(int(find_next(whole, len(tokens))))
        answers.append(tokens[begin:])
    return answers


@pytest.mark.parametrize("length", [PLACES + 10, PLACES + 19])
def test_greedy_answers_equal_whole_passes(params, model, length):
    prompts = question_prompts(length)
    options = dataclasses.replace(OPTIONS, greedy=True)
    (text,) = sampling.sample_answers(CONFIG, params, prompts, make_keys(3), options)
    found = [
        row[kept].tolist()
        for row, kept in zip(*map(np.asarray, (text.values, text.mask)), strict=True)
    ]
    assert found == slow_answers(model, prompts, 6)


def test_answers_are_scored_as_sampled(params):
    prompts = question_prompts()
    options = dataclasses.replace(OPTIONS, temperature=1.3)
    segments = sampling.sample_answers(CONFIG, params, prompts, make_keys(6), options)
    scoring = dataclasses.replace(SCORING, temperature=1.3)
    ((logprobs, _),) = score_answers(CONFIG, params, prompts, segments, scoring)
    mask = np.asarray(segments[0].mask)
    np.testing.assert_allclose(
        np.asarray(logprobs)[mask], np.asarray(segments[0].logprobs)[mask], atol=2e-5
    )


def test_own_images_are_asked_about_by_their_codes(params):
    questions = dataclasses.replace(question_prompts(), pixel_values=None)
    prompts = dataclasses.replace(drawing_prompts(), next=questions)
    segments = sample_own_answers(CONFIG, params, prompts, make_keys(6), OPTIONS)
    alone = sample(params, drawing_prompts(), make_keys(6))
    np.testing.assert_array_equal(segments[0].values, alone[0].values)
    scores = score_own_answers(CONFIG, params, prompts, segments, SCORING)
    for segment, (logprobs, _) in zip(segments, scores, strict=True):
        mask = np.asarray(segment.mask)
        np.testing.assert_allclose(
            np.asarray(logprobs)[mask], np.asarray(segment.logprobs)[mask], atol=2e-5
        )
    # The same answers as to questions with the codes in their ids.
    repeated = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), 2, axis=0), questions)
    ids = place_codes(repeated.input_ids, segments[0].values, SPECIAL)
    asked = dataclasses.replace(repeated, input_ids=ids)
    text = Segment(TEXT, segments[1].values, segments[1].mask)
    ((logprobs, _),) = score_answers(CONFIG, params, asked, (text,), SCORING)
    np.testing.assert_allclose(logprobs, scores[1][0], atol=2e-5)


@pytest.mark.parametrize("redraw", [False, True])
def test_hidden_codes_pass_the_gradient_of_an_answer(params, model, redraw):
    draw = np.random.default_rng(3)
    states = (draw.standard_normal((6, PLACES, CONFIG.phi.hidden_size)).astype(np.float32),)
    values = draw.integers(0, K, (6, PLACES)).astype(np.int32)
    bits = jax.random.key_data(make_keys(6))
    codes = Segment(CODES, values, values >= 0, replay={NOISE_KEYS: bits})
    hidden = choose_hidden(codes)
    options = dataclasses.replace(SCORING, straight_through=StraightThrough(redraw))

    def read(states):
        return choose_code_vectors(model, states, hidden, codes, options)

    vectors = np.asarray(read(states))
    changed = (vectors != np.asarray(model.embed_image_tokens(values))).any(axis=-1)
    assert changed.any() == redraw and not changed[~np.asarray(hidden)].any()
    weights = draw.standard_normal(vectors.shape)
    (gradient,) = jax.grad(lambda states: (read(states) * weights).sum())(states)
    np.testing.assert_array_equal(np.abs(gradient).max(axis=-1) > 0, hidden)


def test_log_probs_with_gradients_through_images_are_the_same(params):
    questions = dataclasses.replace(question_prompts(), pixel_values=None)
    prompts = dataclasses.replace(drawing_prompts(), next=questions)
    segments = sample_own_answers(CONFIG, params, prompts, make_keys(6), OPTIONS)

    def score(params, options):
        scores = score_own_answers(CONFIG, params, prompts, segments, options)
        return jnp.where(segments[1].mask, scores[1][0], 0.0).sum(), scores

    gradient = jax.jit(jax.grad(score, has_aux=True), static_argnums=1)
    detached, plain = gradient(params, SCORING)
    through, soft = gradient(
        params, dataclasses.replace(SCORING, straight_through=StraightThrough())
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), plain, soft)
    columns = [
        np.asarray(x["lm_head"]["kernel"])[:, SPECIAL.first_code : SPECIAL.mask]
        for x in (detached, through)
    ]
    assert np.isfinite(columns[1]).all() and np.abs(columns[1] - columns[0]).max() > 1e-4


def test_images_are_coded_and_decoded_in_even_chunks(params, model, monkeypatch):
    monkeypatch.setattr(images, "count_coded", lambda sizes, grid: 2)
    codes = np.random.default_rng(0).integers(0, K, (5, PLACES))
    pixels = model.vqmodel.decode(codes)
    levels = images.decode_images(CONFIG, params, codes)
    assert levels.dtype == np.uint8 and levels.shape == pixels.shape
    exact = np.clip((np.asarray(pixels) + 1) / 2 * 255, 0, 255)
    sure = np.abs(exact - exact.round()) > 1e-2  # elsewhere rounding decides the last unit
    np.testing.assert_array_equal(np.asarray(levels)[sure], exact.astype(np.uint8)[sure])
    again = images.encode_images(CONFIG, params, pixels)
    np.testing.assert_array_equal(again, model.vqmodel.encode(pixels))


def test_chunks_of_small_images_are_larger_but_on_cpus(monkeypatch):
    released = network.PRESETS["show-o-512x512"].magvit
    assert images.count_coded(released, 32) == 8
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [images.count_coded(released, grid) for grid in (32, 16)] == [8, 32]
    assert images.count_coded(CONFIG.magvit, 2) > 1000
