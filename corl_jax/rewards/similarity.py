"""Text terms of the cycle reward: how similar a caption and its prompt are.

`bert_score` and `sentence_similarity` use a BERT, given as `rewards.samples.Network`. `rouge_l`
compares words. All take N predictions and N targets and return [N] float32. NaN: the target has
no words, so the reward does not apply to the row. 0: only the prediction has no words.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from corl_jax.console import hide_import_advice
from corl_jax.devices.batches import run_in_pieces
from corl_jax.devices.compiling import ExactProgram
from corl_jax.devices.processes import all_gather
from corl_jax.errors import InputError, Problems
from corl_jax.models import modules
from corl_jax.models.bert import Bert, BertConfig
from corl_jax.types import Params
from corl_jax.weights.folders import open_unmarked_folder
from corl_jax.weights.storage import read_json

Texts = Sequence[str | None]

LENGTHS = (64, 128, 512)
"""Texts are padded to one of these numbers of tokens, so that few programs are compiled: most
captions and prompts take the first."""
CHUNK, FEWEST = 64, 8
"""Largest and smallest number of texts in one program."""
SENTENCE_TOKENS = 256
MEAN_POOLING = "pooling_mode_mean_tokens"

# ---- learned terms


def bert_score(
    network: Any,
    predictions: Texts,
    targets: Texts,
    *,
    layer: int = -1,
    max_tokens: int = LENGTHS[-1],
    chunk: int = CHUNK,
) -> np.ndarray:
    """Computes BERTScore F1 of each pair, in [0, 1], without idf weights and baseline rescaling.

    For each token the largest cosine with a token of the other text counts. `layer` is the hidden
    state that is compared (0: embeddings, -1: last layer). Texts are cut to `max_tokens`, [CLS] and
    [SEP] included; these two are never compared.

    Raises:
        InputError: no such layer, or a tokenizer that does not fit.
    Source: Zhang et al. 2020 (arXiv 1904.09675), section 3.
    """
    depth = network.config.num_layers
    if not -depth - 1 <= layer <= depth:
        raise InputError(
            f"bert_score: layer is {layer}, expected {-depth - 1} to {depth}: the network has "
            f"{depth} layers"
        )
    # torchmetrics 1.9 gives the same for one pair. In a batch it undoes its sorting by length with
    # the sorting permutation instead of the inverse, and so scores texts of other rows.
    program = functools.partial(_encode_tokens, layer=layer)
    texts = [*predictions, *targets]
    return _compare(
        _encode(network, texts, program, max_tokens, chunk),
        _compute_matched_f1,
        predictions,
        targets,
    )


def sentence_similarity(
    network: Any,
    predictions: Texts,
    targets: Texts,
    *,
    clamp: bool = False,
    max_tokens: int = SENTENCE_TOKENS,
    chunk: int = CHUNK,
) -> np.ndarray:
    """Computes the cosine of two sentence embeddings, in [-1, 1]; `clamp` sets negative ones to 0.

    An embedding is the mean of the last hidden state over all tokens, [CLS] and [SEP] included, as
    in sentence-transformers. Texts are cut to `max_tokens`; 256 is the setting of
    all-MiniLM-L6-v2.

    Raises:
        InputError: a network trained for another pooling, or a tokenizer that does not fit.
    Source: Reimers and Gurevych 2019 (arXiv 1908.10084).
    """
    check_pooling(network.folder)
    texts = [*predictions, *targets]
    vectors = _encode(network, texts, _encode_sentences, max_tokens, chunk)
    # By rounding, the cosine of equal texts can exceed 1.
    cosine = _compare(vectors, np.dot, predictions, targets)
    return np.clip(cosine, 0.0 if clamp else -1.0, 1.0)


@functools.partial(ExactProgram, static_argnames=("config", "layer"))
def _encode_tokens(
    config: BertConfig, params: Params, ids: jax.Array, lengths: jax.Array, *, layer: int
) -> jax.Array:
    """Returns unit vectors [B, T, D] float32 of all tokens of ids [B, T], padding included."""
    with jax.default_matmul_precision("highest"):
        return _normalise(
            modules.bind(Bert, config, params)(ids, _make_token_mask(ids, lengths), layer=layer)
        )


@functools.partial(ExactProgram, static_argnames=("config",))
def _encode_sentences(
    config: BertConfig, params: Params, ids: jax.Array, lengths: jax.Array
) -> jax.Array:
    """Returns unit vectors [B, D] float32 of texts; the first `lengths` [B] of ids [B, T] count."""
    is_token = _make_token_mask(ids, lengths)
    with jax.default_matmul_precision("highest"):
        hidden = modules.bind(Bert, config, params)(ids, is_token).astype(jnp.float32)
    return _normalise(jnp.where(is_token[..., None], hidden, 0.0).sum(axis=1) / lengths[:, None])


def _make_token_mask(ids: jax.Array, lengths: jax.Array) -> jax.Array:
    # lengths [2, 3], T = 4 -> [[T, T, F, F], [T, T, T, F]]
    return jnp.arange(ids.shape[1]) < lengths[:, None]


def _normalise(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _compute_matched_f1(prediction: np.ndarray, target: np.ndarray) -> float:
    """Computes the F1 of the unit vectors [T, D] of two texts, without [CLS] and [SEP]."""
    # On the host: the work is small, and each pair of lengths would need another program.
    inside = slice(1, -1)  # [CLS] is first, [SEP] is last
    # Cosines below 0 count as 0: both known implementations leave a zero vector where a token is
    # masked, and its cosine 0 wins every maximum over negative ones.
    cosine = np.clip(prediction[inside] @ target[inside].T, 0.0, 1.0)
    precision, recall = cosine.max(axis=1).mean(), cosine.max(axis=0).mean()
    total = precision + recall
    return float(2 * precision * recall / total) if total else 0.0


def _compare(
    encoded: Mapping[str, np.ndarray],
    measure: Callable[[np.ndarray, np.ndarray], float],
    predictions: Texts,
    targets: Texts,
) -> np.ndarray:
    """Compares each pair by `measure`. A text that is not in `encoded` has no words."""

    def compare(prediction: str | None, target: str | None) -> float:
        if target is None or target not in encoded:
            return float("nan")
        if prediction is None or prediction not in encoded:
            return 0.0
        return measure(encoded[prediction], encoded[target])

    return _score_pairs(compare, predictions, targets)


def _score_pairs(function: Callable[[str | None, str | None], float], *texts: Texts) -> np.ndarray:
    return np.array([function(*pair) for pair in zip(*texts, strict=True)], np.float32)


# ---- encoding


def _encode(
    network: Any, texts: Texts, program: Callable[..., jax.Array], max_tokens: int, chunk: int
) -> dict[str, np.ndarray]:
    """Returns text -> its row of the output of `program`; texts without words are left out.

    A text of several rows runs once. Rows with an axis of tokens are cut to the text's tokens. All
    processes of a run call the same programs, whatever their texts.
    """
    ids = _tokenize(network, texts, max_tokens)
    groups: dict[int, list[str]] = {length: [] for length in LENGTHS}
    for text, row in ids.items():
        groups[next(length for length in LENGTHS if length >= len(row))].append(text)
    # Process 0 has 3 texts of up to 64 tokens and process 1 has none: both run that program, with
    # 3 rows and padding.
    counts = _find_largest_of_all_processes([len(group) for group in groups.values()])
    run = functools.partial(program, network.config, network.params)
    encoded = {}
    for (length, group), count in zip(groups.items(), counts, strict=True):
        if not count:
            continue
        tokens, lengths = _pad_texts(network, [ids[text] for text in group], length, count, chunk)

        def take(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return tokens[index], lengths[index]  # noqa: B023

        (rows,) = run_in_pieces(run, take, len(tokens), chunk, network.params)
        for text, row in zip(group, np.asarray(rows), strict=False):  # the rest is padding
            encoded[text] = row[: len(ids[text])] if row.ndim > 1 else row
    return encoded


def _tokenize(network: Any, texts: Texts, max_tokens: int) -> dict[str, list[int]]:
    """Returns text -> ids with [CLS] and [SEP], for distinct texts with other tokens as well."""
    limit = min(max_tokens, network.config.max_position_embeddings, LENGTHS[-1])
    different = list(dict.fromkeys(text for text in texts if text))
    if not different:
        return {}
    tokenizer = load_tokenizer(Path(network.folder), network.config.vocab_size)
    rows = tokenizer(different, truncation=True, max_length=limit)["input_ids"]
    return {text: row for text, row in zip(different, rows, strict=True) if len(row) > 2}


@functools.lru_cache(maxsize=8)
def load_tokenizer(folder: Path, vocab_size: int) -> Any:
    """Loads the folder's WordPiece tokenizer.

    Raises: InputError for a folder without a tokenizer, or with one that does not fit.
    """
    with hide_import_advice():
        from transformers import BertTokenizer

    names = ("tokenizer.json", "vocab.txt")
    # Without either file transformers makes a tokenizer without words.
    if not any((folder / name).is_file() for name in names):
        raise InputError(
            f"{folder}: no tokenizer found, expected {' or '.join(names)}; copy it from the "
            "model's own folder"
        )
    try:
        with open_unmarked_folder(folder) as readable:
            tokenizer = BertTokenizer.from_pretrained(readable)
    except InputError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise InputError(f"{folder}: its tokenizer cannot be read ({error})") from error
    if len(tokenizer) > vocab_size:
        raise InputError(
            f"{folder}: its tokenizer has {len(tokenizer)} tokens, expected at most the network's "
            f"{vocab_size}; use the tokenizer that belongs to the weights"
        )
    return tokenizer


def _pad_texts(
    network: Any, rows: list[list[int]], length: int, count: int, chunk: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids [R, T] and token counts [R] of `rows`, then of padding rows with one token."""
    # Rounded up to a power of two or to whole chunks: the number of distinct texts changes from
    # step to step and must not need a new program each time. 3 -> 8, 20 -> 32, 65 -> 128.
    size = -(-count // chunk) * chunk
    if count < chunk:
        size = min(chunk, max(FEWEST, 1 << (count - 1).bit_length()))
    width = min(length, network.config.max_position_embeddings)
    tokens, lengths = np.zeros((size, width), np.int32), np.ones(size, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], lengths[i] = row, len(row)
    return tokens, lengths


def _find_largest_of_all_processes(counts: list[int]) -> list[int]:
    return all_gather(np.array(counts, np.int32)).max(axis=0).tolist()


def check_assets(checkpoint: Any) -> None:
    """Checks the folder's tokenizer.

    Raises: InputError for a tokenizer that cannot be used.
    """
    load_tokenizer(Path(checkpoint.folder), checkpoint.config.vocab_size)


def check_sentence_assets(checkpoint: Any) -> None:
    """Checks the folder's tokenizer and pooling.

    Raises: InputError listing both if they cannot be used.
    """
    problems = Problems()
    problems.attempt(check_assets, checkpoint)
    problems.attempt(check_pooling, checkpoint.folder)
    problems.raise_any()


def check_pooling(folder: Path) -> None:
    """Checks that a network was trained for the mean of its tokens.

    Raises: InputError for another pooling.
    """
    # A plain BERT has no such file; its mean is taken.
    file = Path(folder) / "1_Pooling" / "config.json"
    if not file.is_file():
        return
    settings = read_json(file)
    active = [name for name, value in settings.items() if value is True]
    # The older form of the file has a switch per mode, the newer one a name.
    modes = [name for name in active if name.startswith("pooling_mode_")]
    if settings.get("pooling_mode", "mean") != "mean" or modes not in ([], [MEAN_POOLING]):
        raise InputError(
            f"{file}: the network was trained for another pooling than the mean ({settings}); use "
            "one that takes the mean of all tokens, such as all-MiniLM-L6-v2"
        )


# ---- words


def find_rouge_problem() -> str | None:
    """Returns why `rouge_l` cannot run here, with the remedy; None if it can."""
    if importlib.util.find_spec("rouge_score") is None:
        return "rouge_l: found no package rouge-score; run pip install 'corl-jax[rewards]'"
    return None


def rouge_l(predictions: Texts, targets: Texts) -> np.ndarray:
    """Computes ROUGE-L F1 of each pair, in [0, 1]: the longest common subsequence of words.

    Words are runs of the letters a to z and of digits, in lower case and unstemmed.

    Raises:
        InputError: the package rouge-score is not installed.
    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries".
    """
    if problem := find_rouge_problem():
        raise InputError(problem)
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)

    def compare(prediction: str | None, target: str | None) -> float:
        # rouge-score drops all other characters, so such a target has no words.
        if target is None or not re.search(r"[a-z0-9]", target.lower()):
            return float("nan")
        return scorer.score(target, prediction or "")["rougeL"].fmeasure

    return _score_pairs(compare, predictions, targets)
