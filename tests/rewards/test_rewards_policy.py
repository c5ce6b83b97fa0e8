"""Rewards of the policy on its own drawings, against recomputation row by row."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from corl_jax.data.instructions import CAPTION
from corl_jax.devices.mesh import make_mesh, param_shardings
from corl_jax.errors import InputError
from corl_jax.params import map_with_path
from corl_jax.policies.janus import family, network, sampling
from corl_jax.policies.janus.family import FAMILY
from corl_jax.policies.janus.layout import RULES
from corl_jax.policies.janus.prompts import Processor
from corl_jax.rewards import cycle, policy, text
from corl_jax.rewards.image_rewards import compare_to_real_images
from corl_jax.rewards.registry import REGISTRY, Context, Samples
from corl_jax.types import EncodedPrompts
from tests.support.tiny_models import encode_questions, tiny_image, tiny_tokenizer_dir
from tests.support.tolerances import NETWORK

CAPTIONS = ["a red circle", "two blue squares and a green triangle, left of a yellow shape", "ring"]
SIDE = 16


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return Processor.from_dir(tiny_tokenizer_dir(folder, image_size=SIDE, patch_size=4))


@pytest.fixture(scope="module")
def context(tiny_config, processor):
    """A policy whose vocabulary is the tokenizer's."""
    vocabulary = len(processor.tokenizer)
    llama = dataclasses.replace(tiny_config.llama, vocab_size=vocabulary)
    config = dataclasses.replace(tiny_config, llama=llama)
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        noise = 0.3 * rng.standard_normal(leaf.shape).astype(np.float32)
        return jnp.asarray(noise + 1 if path.endswith("/scale") else noise)

    params = map_with_path(draw, network.abstract(config))
    return Context(FAMILY, config, params, processor, jnp.float32, seed=3, step=0)


def pictures(count, side=SIDE):
    return np.stack([np.asarray(tiny_image(i, (side, side))) for i in range(count)])


def samples(count=3, **columns):
    columns = {"prompt": [CAPTIONS[i % 3] for i in range(count)], **columns}
    return Samples(columns, images=pictures(count))


# ---- what the policy is shown


@pytest.mark.parametrize("side", [SIDE, 24])
def test_pixels_are_the_processors_to_the_bit(context, processor, side):
    images = np.random.default_rng(0).integers(0, 256, (4, side, side, 3), dtype=np.uint8)
    expected = [processor.preprocess_image(Image.fromarray(image)) for image in images]
    encoded = policy.encode_questions(context.policy, [[1]] * 4, images, 32)
    assert (encoded.pixel_values.dtype == np.uint8) == (side == SIDE)
    found = policy.normalise_pixels(context.policy, jax.tree.map(jnp.asarray, encoded))
    np.testing.assert_array_equal(found.pixel_values, np.stack(expected))


# ---- t2i_ti_sim


def unpadded_hidden(context, caption, image):
    """Last hidden states of the one row, and its ids."""
    processor = context.processor
    encoded = encode_questions(processor, [caption], [Image.fromarray(image)])
    ids = np.asarray(encoded.input_ids[0])[np.asarray(encoded.attention_mask[0])]
    model = network.bind(context.config, context.params)
    features = model.image_features(jnp.asarray(encoded.pixel_values))
    embeds = model.prompt_embeds(jnp.asarray(ids[None]), processor.special.image, features)
    hidden = model.language_model(embeds, jnp.ones((1, len(ids)), bool))
    return np.asarray(hidden[0], np.float64), ids


def similarity(pictures, words):
    """The reward in plain loops."""

    def cosine(a, b):
        return a @ b / np.sqrt((a @ a) * (b @ b))

    of_pictures = [max(cosine(p, w) for w in words) for p in pictures]
    of_words = [max(cosine(p, w) for p in pictures) for w in words]
    return 0.5 * (np.mean(of_pictures) + np.mean(of_words))


@pytest.fixture(scope="module")
def hidden(context):
    images = pictures(3)
    return [unpadded_hidden(context, c, i) for c, i in zip(CAPTIONS, images, strict=True)]


def test_ti_sim_equals_each_row_by_itself(context, hidden):
    """Batched, padded and in pieces; the caption's tokens are found here by decoding."""
    expected = []
    for (states, ids), caption in zip(hidden, CAPTIONS, strict=True):
        tokens = context.processor.tokenizer
        behind = int(np.flatnonzero(ids == context.processor.special.eoi)[0]) + 1
        length = len(context.processor.answer_ids(caption))
        first = behind + len(context.processor.answer_ids("\n"))
        assert tokens.decode(ids[first : first + length]) == caption
        picture = states[ids == context.processor.special.image]
        assert len(picture) == context.config.num_image_tokens
        expected.append(similarity(picture, states[first : first + length]))
    for chunk in (64, 2):
        found = np.asarray(policy.score_ti_sim(samples(), context, chunk=chunk))
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=NETWORK)
    assert np.ptp(expected) > 1e-3


def test_hidden_states_are_read_by_the_kernel_of_training(context, hidden, monkeypatch):
    """XLA's results equal those of the plain forward pass, padded prompts of odd length too."""
    config, processor = context.config, context.processor
    longest = max(len(ids) for _, ids in hidden)
    pictures_of_rows = [Image.fromarray(x) for x in pictures(3)]
    encoded = jax.tree.map(
        jnp.asarray, encode_questions(processor, CAPTIONS, pictures_of_rows, longest + 1 | 1)
    )
    asked = []
    choose = family.choose_training_kernel
    monkeypatch.setattr(family, "choose_training_kernel", lambda *x: asked.append(x) or choose(*x))
    family.compute_hidden_states.clear_cache()  # the kernel is chosen while it is traced
    found = family.compute_hidden_states(
        config, context.params, encoded, processor.special, jnp.float32
    )
    assert asked == [(jnp.float32, config.llama.head_dim)] and choose(*asked[0]) == "xla"

    @jax.jit
    def read(params):
        model = network.bind(config, params)
        features = model.image_features(encoded.pixel_values)
        embeds = model.prompt_embeds(encoded.input_ids, processor.special.image, features)
        return model.language_model(embeds, encoded.attention_mask)

    seen = np.asarray(encoded.attention_mask)
    assert seen.shape[1] % 2 and not seen.all()
    np.testing.assert_array_equal(np.asarray(found)[seen], np.asarray(read(context.params))[seen])


def test_ti_sim_with_the_released_positions(context, hidden):
    picture = context.config.num_image_tokens
    expected = [
        similarity(states[5 : 5 + picture], states[5 + picture + 5 :]) for states, _ in hidden
    ]
    found = np.asarray(policy.score_ti_sim(samples(), context, fixed_spans=True))
    np.testing.assert_allclose(found, expected, atol=NETWORK)
    assert (np.abs(found - np.asarray(policy.score_ti_sim(samples(), context))) > 1e-4).all()


def test_ti_sim_does_not_apply_without_a_caption(context):
    found = np.asarray(policy.score_ti_sim(samples(prompt=["  ", None, "ring"]), context))
    assert np.isnan(found).tolist() == [True, True, False]


def test_ti_sim_and_answers_on_a_mesh(context):
    """Rows that the devices do not divide, parameters split over them."""
    mesh = make_mesh(data=2, fsdp=4)
    placed = jax.device_put(context.params, param_shardings(context.params, mesh, RULES))
    spread = dataclasses.replace(context, params=placed)
    options = {"stream": "caption", "greedy": True, "max_new_tokens": 3}
    with jax.set_mesh(mesh):
        found = np.asarray(policy.score_ti_sim(samples(3), spread))
        answers = policy.ask_scorer(samples(3), spread, [CAPTION] * 3, **options)()
    np.testing.assert_allclose(
        found, np.asarray(policy.score_ti_sim(samples(3), context)), atol=NETWORK
    )
    assert answers == policy.ask_scorer(samples(3), context, [CAPTION] * 3, **options)()


def test_ti_sim_in_bfloat16_is_near(context):
    half = dataclasses.replace(context, dtype=jnp.bfloat16)
    found, exact = (
        np.asarray(policy.score_ti_sim(samples(), half)),
        np.asarray(policy.score_ti_sim(samples(), context)),
    )
    np.testing.assert_allclose(found, exact, atol=0.03)
    assert found.dtype == np.float32 and (found != exact).all()


def test_matched_similarity_by_hand():
    pictures = jnp.array([[[2.0, 0.0], [0.0, 1.0]]])
    tokens = jnp.array([[[1.0, 0.0], [3.0, 4.0], [0.0, -5.0]]])
    found = policy.matched_similarity(pictures, tokens, jnp.array([[False, True, True]]))
    # images: best of (.6, 0) and of (.8, -1); tokens: best of (.6, .8) and of (0, -1)
    np.testing.assert_allclose(found, [0.5 * ((0.6 + 0.8) / 2 + (0.8 + 0.0) / 2)], rtol=1e-6)
    assert np.isnan(policy.matched_similarity(pictures, tokens, jnp.zeros((1, 3), bool)))[0]


@pytest.mark.parametrize("role_tokens", [True, False])
@pytest.mark.parametrize("caption", [*CAPTIONS, "a.", "un café ☕", "two\nlines", "<|User|>: x"])
def test_caption_tokens_hold_the_caption_and_nothing_else(tmp_path, role_tokens, caption):
    processor = Processor.from_dir(tiny_tokenizer_dir(tmp_path, role_tokens=role_tokens))
    spans = processor.caption_prompt(f" {caption} \n")
    ids = np.asarray(spans.ids)
    assert processor.tokenizer.decode(ids[spans.is_caption]) == caption
    assert spans.ids == processor.mm2t_ids(caption)
    images = np.flatnonzero(ids == processor.special.image)
    np.testing.assert_array_equal(spans.image_places, images)


def test_tokens_that_merge_line_breaks_with_the_caption(processor, monkeypatch, tmp_path):
    """`.` and the line breaks after it as one token: it holds a part of the caption."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    merging = Processor.from_dir(tiny_tokenizer_dir(tmp_path))
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    extra = {"ĊĊ": 256, ".ĊĊ": 257}
    plain = Tokenizer(models.BPE(letters | extra, [("Ċ", "Ċ"), (".", "ĊĊ")]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    monkeypatch.setattr(merging, "_plain", plain)
    for caption, last, kept in (("ab.", 257, 3), ("ab", ord("b") - ord("a") + letters["a"], 2)):
        spans = merging.caption_prompt(caption)
        assert spans.is_caption.sum() == kept
        assert np.asarray(spans.ids)[spans.is_caption][-1] == last


# ---- captions and answers


def alone(context, image, question, **options):
    """The greedy answer about one image, sampled without padding or company."""
    processor = context.processor
    encoded = encode_questions(processor, [question], [Image.fromarray(image)])
    real = int(encoded.attention_mask.sum())
    prompts = EncodedPrompts(
        encoded.input_ids[:, -real:], encoded.attention_mask[:, -real:], encoded.pixel_values
    )
    rollout = sampling.sample_text(
        context.config, context.params, prompts, jax.random.split(jax.random.key(0), 1),
        special=processor.special, greedy=True, dtype=context.dtype, **options,
    )  # fmt: skip
    return processor.decode(np.asarray(rollout.values[0])[np.asarray(rollout.mask[0])])


def test_answers_do_not_depend_on_the_batch(context):
    questions = ["how many circles are there?", None, "what shape is left of the red one here?"]
    options = {"stream": "qa", "greedy": True, "max_new_tokens": 6}
    batch = policy.ask_scorer(samples(), context, questions, **options)()
    assert batch == policy.ask_scorer(samples(), context, questions, chunk=2, **options)()
    for row in (0, 2):
        assert batch[row] == alone(context, pictures(3)[row], questions[row], max_new_tokens=6)
    assert len(set(batch)) > 1


def test_drawn_answers_come_from_seed_and_step(context):
    def captions(**changes):
        return policy.ask_scorer(
            samples(), dataclasses.replace(context, **changes), [CAPTION] * 3, stream="caption",
            greedy=False, max_new_tokens=6,
        )()  # fmt: skip

    first = captions()
    assert captions() == first
    assert captions(step=1) != first != captions(seed=4)


def test_cycle_reward_is_caption_overlap_plus_image_term(context):
    real = [tiny_image(7, (40, 20)), None, tiny_image(2, (SIDE, SIDE))]
    batch = samples(real_image=real)
    captions = policy.ask_scorer(
        batch, context, [CAPTION] * 3, stream="caption", greedy=True, max_new_tokens=5
    )()
    words = [text.soft_jaccard(p, c) for p, c in zip(CAPTIONS, captions, strict=True)]
    for name, exact in (("rmse", 1.0), ("ssim", 1.0), ("mse", 1.0)):
        found = np.asarray(cycle.score_bid_cycle(batch, context, image_term=name, max_new_tokens=5))
        pixels = np.asarray(compare_to_real_images(batch, context, name, "squash"))
        assert np.isnan(found).tolist() == [False, True, False]
        np.testing.assert_allclose(pixels[2], exact, atol=NETWORK)  # its own real image
        np.testing.assert_allclose(found[[0, 2]], np.array(words)[[0, 2]] + pixels[[0, 2]],
                                   atol=NETWORK)  # fmt: skip
        assert found[0] < 1 + words[0]
    halved = np.asarray(
        cycle.score_bid_cycle(batch, context, image_term="mse", max_new_tokens=5, normalise=True)
    )
    np.testing.assert_allclose(halved, found / 2, atol=1e-6)


def test_cycle_reward_scores_the_caption(context, monkeypatch):
    asked = {}

    def answer(samples, context, questions, **options):
        asked.update(options, questions=questions)
        return lambda: ["a red circle", "nothing", "a ring"]

    monkeypatch.setattr(policy, "ask_scorer", answer)
    real = [Image.fromarray(picture) for picture in pictures(3)]
    found = np.asarray(
        cycle.score_bid_cycle(
            samples(prompt=["a red circle", "a ring", None], real_image=real), context
        )
    )
    np.testing.assert_allclose(found[:2], [2.0, 1.0], atol=1e-6)
    assert np.isnan(found[2])
    assert asked["questions"] == [CAPTION] * 3
    assert asked["greedy"] and asked["max_new_tokens"] == 64


def fixed_answers(monkeypatch, answers):
    monkeypatch.setattr(policy, "ask_scorer", lambda *args, **options: lambda: answers)


def test_likelihood_of_the_true_answer_about_the_own_drawing(context, processor):
    questions = ["how many squares are there?", "what color?", None, "what color?"]
    solutions = ["two", "red and blue", "two", ""]
    rows = samples(4, qa_problem=questions, qa_solution=solutions)
    found = np.asarray(policy.score_answer_logprob(rows, context, chunk=3))
    np.testing.assert_array_equal(np.isnan(found), [False, False, True, True])
    model = network.bind(context.config, context.params)
    for row in range(2):
        ids = processor.mm2t_ids(questions[row])
        answer = [*processor.answer_ids(solutions[row]), processor.special.eos]
        pixels = processor.preprocess_image(Image.fromarray(rows.images[row]))
        features = model.image_features(jnp.asarray(pixels)[None])
        whole = jnp.asarray([ids + answer])
        embeds = model.prompt_embeds(whole, processor.special.image, features)
        hidden = model.language_model(embeds, jnp.ones(whole.shape, bool))
        logprobs = jax.nn.log_softmax(model.text_logits(hidden[0, len(ids) - 1 : -1]))
        expected = np.exp(np.mean([logprobs[i, token] for i, token in enumerate(answer)]))
        np.testing.assert_allclose(found[row], expected, rtol=1e-3)


def test_qa_on_the_own_drawing(context, monkeypatch):
    fixed_answers(
        monkeypatch,
        ["<think>x</think><answer>B</answer>", "B", "<answer>UNK</answer>", "<answer>A</answer>",
         "<answer>B</answer>", "<answer>B</answer>"],
    )  # fmt: skip
    found = policy.score_qa(
        samples(
            6,
            qa_problem=["Which?\nOptions:\nA. red\nB. blue"] * 4 + [None, "Which?"],
            qa_solution=["<answer>B</answer>"] * 5 + [None],
            qa_type=["MC"] * 6,
        ),
        context,
    )
    np.testing.assert_allclose(found, [1.0, 0.8, 0.2, 0.0, np.nan, np.nan])


def test_oc_and_od_on_the_own_drawing(context, monkeypatch):
    fixed_answers(monkeypatch, ["<answer>Red Fox</answer>", "fox", "<answer>cat</answer>"])
    columns = {
        "cls_problem": ["Identify.", "Identify.", None],
        "cls_solution": ["red fox", "red fox", None],
        "qa_problem": [None, None, "What animal?"],
        "qa_solution": [None, "never read", "dog"],
        "prompt": ["a red fox", "a red fox", "a cat and a dog"],
    }
    np.testing.assert_allclose(policy.score_oc(samples(**columns), context), [1.0, 0.35, 0.5])
    released = policy.score_oc(samples(**columns), context, substrings=True)
    np.testing.assert_allclose(released, [1.0, 0.7, 0.5])

    answer = "<answer>[{'Position': [0, 0, 100, 100], 'Confidence': 0.90}]</answer>"
    fixed_answers(monkeypatch, [answer, "none", answer])
    boxes = [[(0, 0, 100, 100)], [(0, 0, 100, 100)], None]
    found = policy.score_od(samples(od_problem=["Detect"] * 3, od_solution=boxes), context)
    np.testing.assert_allclose(found, [1.0, 0.0, np.nan])


def test_the_policy_really_answers(context):
    """From the registry's own functions, with nothing replaced."""
    batch = samples(
        qa_problem=["a?", "b?", None], qa_solution=["A", "B", "A"], qa_type=["MC", "OE", "MC"],
        od_problem=["a?"] * 3, od_solution=[[(0, 0, 1, 1)]] * 3,
    )  # fmt: skip
    for name in ("t2i_qa", "t2i_oc", "t2i_od"):
        found = np.asarray(REGISTRY[name].function(batch, context, max_new_tokens=4))
        assert found.shape == (3,) and found.dtype == np.float32
        assert not np.isnan(found[:2]).any() and np.nanmax(found) <= 1
        assert np.isnan(found[2]) == (name != "t2i_od")


def test_the_policy_is_asked_for_by_name():
    context = Context(None, None, None, None, None, 0, 0)
    with pytest.raises(InputError, match="found no model"):
        np.asarray(policy.score_ti_sim(samples(), context))
