"""A small Show-o, a tokenizer in the form of Phi-1.5's, and processors on it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax

from corl_jax.models.magvit import MagvitConfig
from corl_jax.models.phi import PhiConfig
from corl_jax.policies.show_o import network
from corl_jax.policies.show_o.checkpoint import KIND
from corl_jax.policies.show_o.network import ShowOConfig
from corl_jax.policies.show_o.prompts import ImageSettings, Processor
from corl_jax.policies.show_o.tokens import END, SpecialTokens, make_special_tokens
from corl_jax.weights.export import save_checkpoint
from tests.support.tiny_models import CORPUS

CODES = 8
SIDE, TOKENS = 64, 16
"""An image of 64 pixels has 4 x 4 codes."""

MAGVIT = MagvitConfig(
    z_channels=3, base_channels=32, encoder_channels=(32, 32, 32), encoder_blocks=(1, 1, 1),
    decoder_channels=(32, 32, 32), decoder_blocks=(1, 1, 1),
)  # fmt: skip
TEXT_TOKENS = 20
CONFIG = ShowOConfig(
    phi=PhiConfig(
        vocab_size=TEXT_TOKENS + 10 + CODES + 1, hidden_size=16, intermediate_size=32, num_layers=2,
        num_heads=2, num_kv_heads=2, head_dim=8, max_position_embeddings=128,
    ),
    magvit=MAGVIT, num_vq_tokens=4, llm_vocab_size=TEXT_TOKENS,
)  # fmt: skip
SPECIAL = SpecialTokens(
    eos=0, pad=20, soi=21, eoi=22, t2i=25, mmu=26, first_code=30, mask=30 + CODES
)


def make_params(config: ShowOConfig = CONFIG, scale: float = 10.0):
    """Random parameters; a larger language model's kernels make its choices differ."""
    params = network.init(config, jax.random.key(0))
    for name in ("language_model", "lm_head"):
        params[name] = jax.tree.map(
            lambda x: x * scale if x.ndim > 1 and x.std() > 0 else x, params[name]
        )
    return params


def tokenizer_dir(path: Path) -> Path:
    """Writes a byte-level BPE tokenizer without Show-o's control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    path.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([CORPUS] * 4, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def count_tokens(folder: Path) -> int:
    """Returns the number of tokens of a tokenizer."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()


def processor(folder: Path, **options) -> Processor:
    """Opens a processor of `tokenizer_dir` for CODES codes and 4 x 4 of them."""
    special = make_special_tokens(count_tokens(folder), CODES)
    return Processor(folder, special, ImageSettings(SIDE, TOKENS), **options)


def model_dir(folder: Path) -> Path:
    """Writes a checkpoint in our own layout, with its tokenizer and room for its text."""
    words = tokenizer_dir(folder.parent / "words")
    text_tokens = count_tokens(words)
    phi = dataclasses.replace(
        CONFIG.phi, vocab_size=text_tokens + 10 + CODES + 1, max_position_embeddings=512
    )
    config = dataclasses.replace(CONFIG, phi=phi, llm_vocab_size=text_tokens, num_vq_tokens=16)
    save_checkpoint(folder, KIND, config, make_params(config), layout="jax")
    shutil.copytree(words, folder / "phi-1_5", dirs_exist_ok=True)
    return folder
