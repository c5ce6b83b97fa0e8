"""Show-o from a folder in the original layout against `show_o_reference`, as a user opens it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

import corl_jax
from corl_jax.algorithms.likelihoods import NEGATIVE_LOG_LIKELIHOOD
from corl_jax.algorithms.losses import LossConstants
from corl_jax.devices.mesh import make_mesh, param_shardings
from corl_jax.policies.family import NOISE_KEYS, LogprobOptions, SamplingOptions, Unmasking
from corl_jax.policies.show_o import images, network, sampling
from corl_jax.policies.show_o.hiding import POSITIONS, SHARES, choose_hidden
from corl_jax.policies.show_o.layout import RULES
from corl_jax.tasks import CODES, TEXT
from corl_jax.train.step import TaskBatch, UpdateOptions, gradients
from corl_jax.types import Segment
from tests.parity import show_o_reference as reference
from tests.support import show_o_files
from tests.support.show_o_masks import make_generation_mask
from tests.support.tiny_models import tiny_image

pytestmark = pytest.mark.usefixtures("exact_products")

TEXTS = ("a red circle", "", "<|endoftext|>two blue squares", "a red circle and two blue squares")
PLACES = 16


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = show_o_files.original_folder(tmp_path_factory.mktemp("models") / "show-o")
    policy = corl_jax.load(folder, dtype="float32").policy
    return SimpleNamespace(
        folder=folder, theirs=reference.open_reference(folder), ours=policy,
        processor=policy.processor,
    )  # fmt: skip


def encode(pair, texts, length=None):
    return pair.processor.encode("generate", [pair.processor.t2i_ids(text) for text in texts],
                                 length=length)  # fmt: skip


@pytest.mark.parametrize("most", [31, 47, 63])
def test_states_and_logits_of_drawing(pair, most):
    """Several numbers of pads, places that are known and places that are not."""
    draw = np.random.default_rng(most)
    codes = draw.integers(0, 33, (len(TEXTS), PLACES)) + pair.theirs.tokens.offset
    prompts = encode(pair, TEXTS, most + 1).input_ids
    model = network.bind(pair.ours.sizes, pair.ours.params)
    special = pair.processor.special
    for row, (text, image) in enumerate(zip(TEXTS, codes, strict=True)):
        ids = reference.make_drawing_ids(pair.theirs.tokens, text, most, image.tolist())
        whole = np.concatenate([prompts[row], [special.soi], image, [special.eoi]])
        assert whole.tolist() == ids
        seen = reference.mask_drawing(pair.theirs.tokens, ids)
        mask = make_generation_mask(jnp.asarray(whole)[None], special)
        np.testing.assert_array_equal(mask[0], seen.numpy())
        states, logits = pair.theirs.forward(ids, seen)
        hidden = model.language_model(model.embed_text(jnp.asarray(whole)[None]), mask)
        np.testing.assert_allclose(hidden[0], states, atol=1e-4)
        np.testing.assert_allclose(model.text_logits(hidden)[0], logits, atol=1e-3)


def draw_both(pair, texts, scale, steps, *, given=0, length=None, params=None):
    rows, draw = len(texts), np.random.default_rng(steps)
    codes = pair.ours.sizes.num_codes
    gumbels = draw.gumbel(size=(steps, rows, PLACES, codes)).astype(np.float32)
    uniforms = draw.random((steps, rows, PLACES), np.float32)
    known = np.argsort(draw.random((rows, PLACES))) < given
    start = draw.integers(0, codes, (rows, PLACES)).astype(np.int32)
    expected = []
    for row, text in enumerate(texts):
        of_row = {int(place): int(start[row, place]) for place in np.flatnonzero(known[row])}
        expected.append(
            reference.draw(
                pair.theirs, text, 31, scale - 1, steps, gumbels[:, row], uniforms[:, row], of_row
            )
        )
    options = SamplingOptions(
        pair.processor.special, cfg_scale=scale, dtype=jnp.float32, attention="xla",
        unmasking=Unmasking(steps, "trajectory"),
    )  # fmt: skip
    drawing = dataclasses.replace(sampling.make_drawing(pair.ours.sizes, options), record=True)
    drawn, _, _ = sampling.image_program.default(
        pair.ours.sizes, pair.ours.params if params is None else params,
        encode(pair, texts, length), jax.random.split(jax.random.key(0), rows),
        jnp.float32(scale), jnp.float32(1), (jnp.asarray(start), jnp.asarray(known)),
        (gumbels, uniforms), options=drawing,
    )  # fmt: skip
    return drawn, expected


def assert_same_trajectories(drawn, expected, num_codes):
    for row, (codes, states) in enumerate(expected):
        assert np.asarray(drawn.codes)[row].tolist() == codes
        for step, state in enumerate(states):
            shown = [state.get(place, num_codes) for place in range(PLACES)]
            assert np.asarray(drawn.steps.codes)[step, row].tolist() == shown, (row, step)


@pytest.mark.parametrize(
    ("scale", "steps", "given", "length"),
    [(1.0, 6, 0, None), (3.0, 8, 0, 64), (6.0, 20, 0, None), (2.75, 6, 9, 40), (1.0, 1, 0, 33)],
    ids=["w 0", "w 2", "more steps than places", "in-painting", "one step"],
)
def test_trajectories(pair, scale, steps, given, length):
    """An odd number of prompts of different lengths; other numbers of pads than the reference."""
    drawn, expected = draw_both(pair, TEXTS[:3], scale, steps, given=given, length=length)
    assert_same_trajectories(drawn, expected, pair.ours.sizes.num_codes)


def test_trajectories_on_eight_devices(pair):
    texts = (*TEXTS, *TEXTS)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    params = jax.device_put(pair.ours.params, param_shardings(pair.ours.params, mesh, RULES))
    with jax.set_mesh(mesh):
        drawn, expected = draw_both(pair, texts, 3.0, 6, params=params)
    assert_same_trajectories(drawn, expected, pair.ours.sizes.num_codes)


def test_greedy_answers_about_images_of_any_form(pair):
    """Codes of images that are not square, and answers that end early or do not end."""
    model = corl_jax.load(pair.folder, dtype="float32")
    pictures = [tiny_image(0, (37, 50)), tiny_image(1, (16, 16)), tiny_image(2, (90, 33))]
    questions = ["how many?", "", "<|endoftext|>which colour is the circle?"]
    side = pair.processor.image_size
    answers = []
    for picture, question in zip(pictures, questions, strict=True):
        scale = side / min(picture.size)
        size = [int(scale * x) if x > min(picture.size) else side for x in picture.size]
        resized = picture.resize(size, Image.Resampling.BICUBIC) if scale != 1 else picture
        top, left = (round((x - side) / 2) for x in (resized.height, resized.width))
        square = np.asarray(resized, np.float32)[top : top + side, left : left + side]
        pixels = torch.from_numpy((square / 255 - 0.5) / 0.5).permute(2, 0, 1)[None]
        codes = pair.theirs.encode(pixels)[0].tolist()
        answers.append(reference.answer(pair.theirs, question, codes, 6))
    encoded = pair.processor.encode(
        "question", [pair.processor.prompt_ids("question", {"qa_problem": x}) for x in questions],
        pictures,
    )  # fmt: skip
    options = SamplingOptions(
        pair.processor.special, greedy=True, max_new_tokens=6, dtype=jnp.float32, attention="xla"
    )
    (text,) = sampling.sample_answers(
        pair.ours.sizes, pair.ours.params, encoded, jax.random.split(jax.random.key(0), 3), options
    )
    for tokens, mask, expected in zip(text.values, text.mask, answers, strict=True):
        assert np.asarray(tokens)[np.asarray(mask)].tolist() == expected
    for picture, question, expected in zip(pictures, questions, answers, strict=True):
        if not question:  # refused where a user asks
            continue
        said = model.answer(picture, question, greedy=True, max_new_tokens=6)
        assert said == pair.processor.decode(expected)


def test_texts_of_any_tokens(pair):
    """Control tokens, codes, and letters that are cut between their bytes."""
    theirs, draw = pair.theirs.tokens, np.random.default_rng(4)
    for _ in range(50):
        ids = draw.integers(0, pair.ours.sizes.vocab_size, 12).tolist()
        expected = theirs.tokenizer.decode(ids, skip_special_tokens=True)
        assert pair.processor.decode(ids) == expected


def test_pixels_of_codes(pair):
    codes = np.random.default_rng(3).integers(0, pair.ours.sizes.num_codes, (3, PLACES))
    with torch.no_grad():
        expected = pair.theirs.decode(torch.from_numpy(codes).view(-1, 4, 4)).numpy()
    decoded = np.asarray(
        images.decode_images(pair.ours.sizes, pair.ours.params, jnp.asarray(codes))
    )
    # A level that is a whole number up to rounding may be cut off to the one below.
    difference = np.abs(decoded.astype(int) - expected.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


# ---- losses of given images and texts


def compute_losses(pair, batch, *, released, micro_batches=1):
    options = UpdateOptions(
        loss=NEGATIVE_LOG_LIKELIHOOD,
        constants=LossConstants(),
        logprobs=LogprobOptions(
            pair.processor.special, image=pair.processor.image, is_given=True, released=released,
        ),
        weights=tuple(dict.fromkeys(batch, 1.0).items()), dtype=jnp.float32,
        micro_batches=micro_batches,
    )  # fmt: skip
    trained = {name: pair.ours.params[name] for name in ("language_model", "lm_head")}
    frozen = {"vqmodel": pair.ours.params["vqmodel"]}
    compute = jax.jit(
        lambda batch: gradients(
            pair.ours.family, pair.ours.sizes, options, trained, frozen, batch
        )[1]
    )  # fmt: skip
    return float(compute(batch)["loss"])


@pytest.mark.parametrize("released", [False, True])
def test_the_loss_of_given_images(pair, released):
    rows = len(TEXTS)
    codes = np.random.default_rng(0).integers(0, pair.ours.sizes.num_codes, (rows, PLACES))
    keys = jax.random.split(jax.random.key(5), rows)
    segment = Segment(
        CODES, jnp.asarray(codes), jnp.ones(codes.shape, bool),
        replay={NOISE_KEYS: jax.random.key_data(keys)},
    )  # fmt: skip
    hidden = np.asarray(choose_hidden(segment))
    for row, key in enumerate(keys):
        time = float(jax.random.uniform(jax.random.fold_in(key, SHARES)))
        draws = np.asarray(jax.random.uniform(jax.random.fold_in(key, POSITIONS), (PLACES,)))
        np.testing.assert_array_equal(hidden[row], reference.choose_masked(time, draws))
    assert len({*hidden.sum(axis=-1)}) > 1
    expected = reference.drawing_loss(
        pair.theirs, list(zip(TEXTS, codes.tolist(), hidden, strict=True)), 31, ends=released
    )
    batch = {"t2i": TaskBatch(encode(pair, TEXTS), (segment,))}
    for pieces in (1, 2):
        loss = compute_losses(pair, batch, released=released, micro_batches=pieces)
        assert abs(loss - expected) < 2e-5 * expected


@pytest.mark.parametrize("released", [False, True])
def test_the_loss_of_given_answers(pair, released):
    questions, answers = ["how many?", "what is it? and where?"], ["two", "a red circle"]
    tokens, special = pair.theirs.tokens, pair.processor.special
    encoded = pair.processor.encode(
        "question", [pair.processor.prompt_ids("question", {"qa_problem": x}) for x in questions],
        [tiny_image(i, (16, 16)) for i in range(2)],
    )  # fmt: skip
    with torch.no_grad():
        codes = pair.theirs.encode(torch.from_numpy(encoded.pixel_values).permute(0, 3, 1, 2))
    rows, targets = [], []
    for question, answer, image in zip(questions, answers, codes.tolist(), strict=True):
        front = reference.make_question_ids(tokens, question, image)
        text = tokens.encode(f"USER: \n{question} ASSISTANT: {answer}")
        ids = [*front[: 3 + PLACES], tokens.end, *text, tokens.end]
        first = 3 + PLACES if released else len(front)
        is_target = [place >= first for place in range(len(ids))]
        rows.append((ids, reference.mask_question(tokens, ids), is_target))
        targets.append([*pair.processor.answer_ids(answer), special.eos])
    expected = reference.shifted_loss(pair.theirs, rows)
    length = max(map(len, targets)) + 2
    values = np.array([[*row, *[special.eos] * (length - len(row))] for row in targets], np.int32)
    mask = np.arange(length) < np.array([[len(row)] for row in targets])
    batch = {"mm2t": TaskBatch(encoded, (Segment(TEXT, jnp.asarray(values), jnp.asarray(mask)),))}
    loss = compute_losses(pair, batch, released=released)
    assert abs(loss - expected) < 2e-5 * expected


def test_in_bfloat16_the_image_tokenizer_stays_in_float32(pair):
    """A rounded latent would change the codes that a question reads."""
    half = corl_jax.load(pair.folder, dtype="bfloat16")
    dtypes = {name: {x.dtype.name for x in jax.tree.leaves(tree)} for name, tree in
              half.policy.params.items()}  # fmt: skip
    assert dtypes == {
        "language_model": {"bfloat16"}, "lm_head": {"bfloat16"}, "vqmodel": {"float32"},
    }  # fmt: skip
    picture = tiny_image(3, (40, 24))
    (question,) = pair.processor.encode("question", [[0]], [picture]).pixel_values
    codes = [
        images.encode_images(policy.sizes, policy.params, jnp.asarray(question)[None])
        for policy in (half.policy, pair.ours)
    ]
    np.testing.assert_array_equal(*codes)
    with torch.no_grad():
        theirs = pair.theirs.encode(torch.from_numpy(question)[None].permute(0, 3, 1, 2))
    np.testing.assert_array_equal(codes[0], theirs.numpy())
    drawn = half.generate_images("a red circle", n=3, image_steps=3)
    assert [image.size for image in drawn] == [(16, 16)] * 3
