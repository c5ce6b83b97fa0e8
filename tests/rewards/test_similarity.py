"""Text terms of the cycle reward on a tiny random BERT, and on numbers worked out by hand."""

from __future__ import annotations

import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corl_jax.devices.mesh import network_shardings
from corl_jax.errors import InputError
from corl_jax.models import modules
from corl_jax.models.bert import Bert, BertConfig
from corl_jax.params import map_with_path
from corl_jax.rewards import similarity
from corl_jax.rewards.samples import Network
from corl_jax.weights.layouts import KINDS
from tests.support.tolerances import NETWORK

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["a", "the", "red", "blue", "cat", "dog", "two", "small", "sits", "on", "under", "tree"]
CONFIG = BertConfig(
    vocab_size=len(SPECIALS) + len(WORDS), hidden_size=16, intermediate_size=24, num_layers=2,
    num_heads=2, max_position_embeddings=40,
)  # fmt: skip
SCORES = [similarity.bert_score, similarity.sentence_similarity]
PREDICTIONS = ["a red cat", "two dog sits on the tree", "the small blue dog", "a cat under a tree"]
TARGETS = ["the red cat sits", "a dog", "the small blue dog", "two small tree"]


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Network:
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(SPECIALS + WORDS))
    rng = np.random.default_rng(0)

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = 0.4 * rng.standard_normal(leaf.shape).astype(np.float32)
        return jnp.asarray(noise + 1 if path.endswith("/scale") else noise)

    params = map_with_path(draw, modules.make_abstract(Bert, CONFIG))
    return Network(CONFIG, params, folder, jnp.float32)


def states_of(network: Network, text: str, layer: int = -1) -> np.ndarray:
    """Hidden states [T, D] of one text alone, unpadded, in float64."""
    vocabulary = SPECIALS + WORDS
    ids = np.array([[vocabulary.index(word) for word in f"[CLS] {text} [SEP]".split()]])
    with jax.default_matmul_precision("highest"):
        model = modules.bind(Bert, network.config, network.params)
        return np.asarray(model(ids, np.ones_like(ids, bool), layer=layer)[0], np.float64)


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


# ---- what is computed


@pytest.mark.parametrize("layer", [-1, 1])
def test_bert_score_word_by_word(network, layer):
    found = similarity.bert_score(network, PREDICTIONS, TARGETS, layer=layer)
    assert found.dtype == np.float32
    for value, prediction, target in zip(found, PREDICTIONS, TARGETS, strict=True):
        first, second = (states_of(network, text, layer)[1:-1] for text in (prediction, target))
        matrix = [[max(cosine(x, y), 0.0) for y in second] for x in first]
        precision = sum(max(row) for row in matrix) / len(first)
        recall = sum(max(column) for column in zip(*matrix, strict=True)) / len(second)
        expected = 2 * precision * recall / (precision + recall)
        assert value == pytest.approx(expected, abs=NETWORK)


def test_bert_score_by_hand():
    """Precision (1 + 0.6) / 2, recall 1; the rows of [CLS] and [SEP] would match perfectly."""
    special = [[0.0, 1.0]]
    prediction = np.array([*special, [1, 0], [0.6, 0.8], *special], np.float32)
    target = np.array([*special, [1, 0], *special], np.float32)
    assert similarity._compute_matched_f1(prediction, target) == pytest.approx(1.6 / 1.8)
    opposite = np.array([*special, [-1, 0], *special], np.float32)
    assert similarity._compute_matched_f1(opposite, target) == 0.0


def test_sentence_similarity_is_the_cosine_of_means(network):
    found = similarity.sentence_similarity(network, PREDICTIONS, TARGETS)
    means = [[states_of(network, text).mean(axis=0) for text in pair]
             for pair in zip(PREDICTIONS, TARGETS, strict=True)]  # fmt: skip
    np.testing.assert_allclose(found, [cosine(*pair) for pair in means], atol=NETWORK)
    assert np.ptp(found) > 0.1


def test_clamp_takes_away_what_lies_below_zero(network, monkeypatch):
    vectors = {"a": np.array([1.0, 0]), "b": np.array([-0.6, 0.8]), "c": np.array([0.6, 0.8])}
    monkeypatch.setattr(similarity, "_encode", lambda *_: vectors)
    pairs = ["a", "a"], ["b", "c"]
    np.testing.assert_allclose(similarity.sentence_similarity(network, *pairs), [-0.6, 0.6])
    clamped = similarity.sentence_similarity(network, *pairs, clamp=True)
    np.testing.assert_allclose(clamped, [0.0, 0.6])


@pytest.mark.parametrize("score", SCORES)
def test_a_text_with_itself_is_one(score, network):
    np.testing.assert_allclose(score(network, TARGETS, TARGETS), 1.0, atol=NETWORK)


@pytest.mark.parametrize("score", SCORES)
def test_a_row_does_not_depend_on_its_neighbours(score, network):
    together = score(network, PREDICTIONS, TARGETS)
    order = [2, 0, 3, 1]
    shuffled = score(network, [PREDICTIONS[i] for i in order], [TARGETS[i] for i in order])
    np.testing.assert_allclose(shuffled, together[order], atol=NETWORK)
    for row, pair in enumerate(zip(PREDICTIONS, TARGETS, strict=True)):
        alone = score(network, [pair[0]], [pair[1]])
        np.testing.assert_allclose(alone, together[row : row + 1], atol=NETWORK)


@pytest.mark.parametrize("score", [*SCORES, lambda network, *texts: similarity.rouge_l(*texts)])
def test_nothing_said_is_zero_and_nothing_asked_is_nan(score, network):
    predictions = ["", None, " \n", "a cat", "a cat", None]
    targets = ["a cat", "a cat", "a cat", "", None, " \t"]
    found = score(network, predictions, targets)
    np.testing.assert_array_equal(found, np.float32([0, 0, 0, np.nan, np.nan, np.nan]))
    assert score(network, [], []).shape == (0,)


@pytest.mark.parametrize("score", SCORES)
def test_lists_of_different_lengths_are_refused(score, network):
    with pytest.raises(ValueError):
        score(network, ["a", "a"], ["a"])


@pytest.mark.parametrize("score", SCORES)
def test_what_is_longer_than_allowed_is_cut(score, network):
    target = ["a dog"]
    short = score(network, ["red cat under"], target)
    cut = score(network, ["red cat under the tree two"], target, max_tokens=5)  # [CLS], 3, [SEP]
    np.testing.assert_allclose(cut, short, atol=NETWORK)
    cut = score(network, ["cat dog " * 100], target)  # 40 positions leave 38 words
    np.testing.assert_allclose(cut, score(network, ["cat dog " * 19], target), atol=NETWORK)


def test_bfloat16_parameters_come_close(network):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), network.params)
    smaller = Network(CONFIG, half, network.folder, jnp.bfloat16)
    for score in SCORES:
        found = score(smaller, PREDICTIONS, TARGETS)
        np.testing.assert_allclose(found, score(network, PREDICTIONS, TARGETS), atol=0.05)


# ---- how it is run


def test_each_text_runs_once(network, monkeypatch):
    seen = []

    def program(config, params, ids, lengths):
        seen.extend(
            tuple(row[:n]) for row, n in zip(np.asarray(ids), lengths, strict=True) if n > 1
        )
        return jnp.zeros((len(ids), ids.shape[1], 2))

    group = ["a red cat", "a cat", "a red cat", "two dog"]
    prompt = "the red cat sits"
    encoded = similarity._encode(network, group + [prompt] * 4, program, 512, 64)
    assert len(seen) == len(set(seen)) == 4
    assert {text: len(row) for text, row in encoded.items()} == {
        "a red cat": 5, "a cat": 4, "two dog": 4, prompt: 6,
    }  # fmt: skip


def test_programs_are_compiled_per_bucket_and_not_per_length(network, monkeypatch):
    monkeypatch.setattr(similarity, "LENGTHS", (16, 33))
    program = similarity._encode_tokens.default

    def texts(number: int, words: int) -> list[str]:
        return [f"{WORDS[i % 12]} {'cat ' * (words - 2)} {WORDS[i // 12]}" for i in range(number)]

    similarity.bert_score(network, texts(3, 4), texts(2, 5)[:1] * 3)
    before = program._cache_size()
    for number, words in ((2, 3), (6, 9), (5, 14)):  # up to 8 texts of up to 16 tokens
        similarity.bert_score(network, texts(number, words), ["a cat"] * number)
    assert program._cache_size() == before
    similarity.bert_score(network, texts(2, 15), ["a cat"] * 2)  # 17 tokens: the next length
    assert program._cache_size() == before + 1


@pytest.mark.parametrize("score", [similarity.bert_score, similarity.sentence_similarity])
def test_longer_padding_changes_nothing(score, network, monkeypatch):
    found = score(network, PREDICTIONS, TARGETS)
    monkeypatch.setattr(similarity, "LENGTHS", (16, 32, 64, 128))
    np.testing.assert_allclose(score(network, PREDICTIONS, TARGETS), found, atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 300), st.sampled_from([1, 6, 64]))
def test_rows_are_rounded_up_to_few_sizes(count, chunk):
    config = BertConfig(10, 8, 8, 1, 1, 12)
    network = Network(config, {}, None, jnp.float32)
    tokens, lengths = similarity._pad_texts(network, [[2, 5, 3]] * count, 16, count, chunk)
    size = len(tokens)
    assert tokens.shape == (size, 12) and size >= count
    assert size % chunk == 0 or (size in (8, 16, 32) and count < chunk)
    assert lengths.tolist() == [3] * count + [1] * (size - count)  # a row of no token is NaN


def test_chunks_give_what_one_piece_gives(network):
    together = similarity.bert_score(network, PREDICTIONS, TARGETS)
    in_pieces = similarity.bert_score(network, PREDICTIONS, TARGETS, chunk=3)
    np.testing.assert_allclose(in_pieces, together, atol=NETWORK)


@pytest.mark.parametrize("score", SCORES)
def test_several_devices_give_what_one_gives(score, network, mesh):
    split = jax.device_put(
        network.params, network_shardings(network.params, mesh, KINDS["bert"].rules)
    )
    spread = Network(CONFIG, split, network.folder, jnp.float32)
    with jax.set_mesh(mesh):
        found = score(spread, PREDICTIONS, TARGETS)
    np.testing.assert_allclose(found, score(network, PREDICTIONS, TARGETS), atol=NETWORK)


def test_every_process_runs_the_programs_of_all(network, monkeypatch):
    """Another process has nine short texts, and long ones where this one has none."""
    expected = similarity.bert_score(network, PREDICTIONS, TARGETS)
    monkeypatch.setattr(similarity, "LENGTHS", (16, 64, 128))
    counts = np.array([9, 2, 0], np.int32)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        "jax.experimental.multihost_utils.process_allgather", lambda mine: np.stack([mine, counts])
    )
    shapes = []
    run = similarity.run_in_pieces

    def run_in_pieces(program, take, rows, *rest):
        shapes.append(take(np.arange(rows))[0].shape)
        return run(program, take, rows, *rest)

    monkeypatch.setattr(similarity, "run_in_pieces", run_in_pieces)
    for texts in ((PREDICTIONS, TARGETS), (["a"], [None])):
        shapes.clear()
        found = similarity.bert_score(network, *texts)
        assert shapes == [(16, 16), (8, 40)]  # 40 of 64 positions: the network has no more
    assert math.isnan(found[0])
    found = similarity.bert_score(network, PREDICTIONS, TARGETS)
    np.testing.assert_allclose(found, expected, atol=NETWORK)


# ---- what is refused


def test_a_layer_that_does_not_exist(network):
    for layer in (3, -4):
        with pytest.raises(InputError, match=f"layer is {layer}, expected -3 to 2"):
            similarity.bert_score(network, PREDICTIONS, TARGETS, layer=layer)


def test_a_folder_without_a_tokenizer(network, tmp_path):
    bare = Network(CONFIG, network.params, tmp_path, jnp.float32)
    with pytest.raises(InputError, match=r"no tokenizer found, expected tokenizer.json or vocab"):
        similarity.bert_score(bare, ["a"], ["a"])


def test_a_tokenizer_that_cannot_be_read(network, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    broken = Network(CONFIG, network.params, tmp_path, jnp.float32)
    with pytest.raises(InputError, match="its tokenizer cannot be read"):
        similarity.bert_score(broken, ["a"], ["a"])


def test_a_tokenizer_of_other_weights(network, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIALS, *WORDS, "mat"]))
    other = Network(CONFIG, network.params, tmp_path, jnp.float32)
    with pytest.raises(InputError, match="has 18 tokens, expected at most the network's 17"):
        similarity.sentence_similarity(other, ["a"], ["a"])


@pytest.mark.parametrize(
    ("pooling", "right"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, True),
        ({"pooling_mode": "mean", "include_prompt": True}, True),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, False),
        ({"pooling_mode": "cls"}, False),
        ({"pooling_mode": ["mean", "max"]}, False),
    ],
)
def test_only_networks_that_take_the_mean(network, tmp_path, pooling, right):
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (tmp_path / "vocab.txt").write_text("\n".join(SPECIALS + WORDS))
    pooled = Network(CONFIG, network.params, tmp_path, jnp.float32)
    if right:
        assert similarity.sentence_similarity(pooled, ["a"], ["a"]) == pytest.approx(1.0)
    else:
        with pytest.raises(InputError, match="another pooling than the mean"):
            similarity.sentence_similarity(pooled, ["a"], ["a"])


# ---- words


def test_rouge_l_by_hand():
    """The longest common subsequence: 5 of 5 and of 6 words; 2 of 3 and of 4; 1 of 2 and 2."""
    found = similarity.rouge_l(
        ["The cat on the mat!", "blue cat sits", "mat cat", "dog"],
        ["the cat sat on the mat", "a cat, sits under", "cat mat", "cat"],
    )
    np.testing.assert_allclose(found, [10 / 11, 4 / 7, 1 / 2, 0.0], rtol=1e-6)


def test_rouge_l_does_not_apply_to_words_of_another_script():
    assert np.isnan(similarity.rouge_l(["a cat"], ["一只猫"])).all()


def test_rouge_l_without_its_package(monkeypatch):
    assert similarity.find_rouge_problem() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'corl-jax\[rewards\]'"):
        similarity.rouge_l(["a"], ["a"])
