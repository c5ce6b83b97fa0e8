"""Writes tokenizer files of full size for random networks: common words and made-up words.

A made-up word is one token, so that a caption of a random BLIP has as many tokens for BERT.
"""

from __future__ import annotations

import itertools
import json
import shutil
import string
from pathlib import Path
from typing import Any

import corl_jax
from corl_jax.policies.janus.network import JanusConfig
from corl_jax.policies.janus.prompts import Processor
from corl_jax.policies.janus_flow import prompts as janus_flow_prompts
from corl_jax.policies.janus_flow.family import FAMILY as JANUS_FLOW
from corl_jax.policies.janus_flow.network import JanusFlowConfig
from corl_jax.policies.show_o import family as show_o
from corl_jax.policies.show_o import prompts as show_o_prompts
from corl_jax.policies.show_o.network import ShowOConfig
from corl_jax.policies.show_o.tokens import END, END_ID, make_special_tokens

MINI = Path(corl_jax.__file__).parent / "assets" / "mini_janus"

COMMON = """a an the and or of on in at to with without under over behind near beside between is
are was one two three four five six seven eight nine ten red green blue yellow black white brown
orange purple pink grey golden small large tiny huge old young round square tall wooden metal glass
dog cat bird horse cow sheep man woman child boy girl person people car bus train bicycle boat
plane road street bridge house building door window wall roof tree grass flower field forest hill
mountain river lake sea beach sky cloud sun moon star rain snow table chair bed sofa lamp book
clock phone cup plate bowl bottle knife fork spoon apple banana bread cake pizza ball toy hat coat
shirt shoes bag umbrella photo picture painting drawing standing sitting running walking flying
sleeping eating holding wearing looking left right top bottom front back side many few bright dark
quiet busy empty full open closed what how which where who color number there""".split()  # noqa: SIM905

# The ids of the special tokens in bert-base-uncased; BLIP's config names its separator, 102.
_BERT_SPECIAL = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
_CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
_BLIP_IMAGES = {
    "do_normalize": True, "do_resize": True, "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip


def make_words(count: int) -> list[str]:
    """Returns different lower-case words, the common ones first."""
    letters = itertools.product(string.ascii_lowercase, repeat=4)
    made_up = ("x" + "".join(four) for four in letters)
    return list(itertools.islice(itertools.chain(dict.fromkeys(COMMON), made_up), count))


def write_bert(folder: Path, size: int) -> None:
    """Writes a vocab.txt of `size` tokens."""
    pieces = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    pieces += [f"##{piece}" for piece in string.ascii_lowercase + string.digits]
    pieces += (word for word in make_words(size) if len(word) > 1)
    plain = iter(pieces)
    lines = [_BERT_SPECIAL.get(i) or next(plain) for i in range(size)]
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_clip(folder: Path, size: int) -> None:
    """Writes a byte-level vocabulary of `size` tokens without merges: every letter is a token."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    # CLIP marks the end of a word: "dog" is the token "dog</w>".
    plain = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    plain += [f"{word}</w>" for word in make_words(size) if len(word) > 1]
    tokens = [*plain[: size - len(_CLIP_SPECIAL)], *_CLIP_SPECIAL]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")


def write_network(folder: Path, kind: str, config: Any) -> Path:
    """Writes the small files of a reward network of a kind of `weights.layouts.KINDS`."""
    folder.mkdir(parents=True)
    if kind == "bert":
        write_bert(folder, config.vocab_size)
    elif kind == "blip":
        write_bert(folder, config.text.bos_token_id)
        side = config.vision.image_size
        settings = _BLIP_IMAGES | {"size": {"height": side, "width": side}}
        _write_json(folder / "preprocessor_config.json", settings)
    elif kind == "clip":
        write_clip(folder, config.vocab_size)
    return folder


def write_processor(folder: Path, config: JanusConfig) -> Processor:
    """Writes and returns a processor: tokenizer of the mini Janus, image settings of `config`."""
    _copy_tokenizer(folder)
    side = config.siglip.image_size
    _write_settings(folder, "preprocessor_config.json", size={"height": side, "width": side})
    _write_settings(folder, "processor_config.json", num_image_tokens=config.num_image_tokens)
    return Processor.from_dir(folder)


def write_janus_flow_processor(
    folder: Path, config: JanusFlowConfig
) -> janus_flow_prompts.Processor:
    """Writes the tokenizer of the mini Janus, and returns a processor with it."""
    _copy_tokenizer(folder)
    _write_settings(folder, "preprocessor_config.json", image_size=config.siglip.image_size)
    return janus_flow_prompts.Processor(folder, JANUS_FLOW.stand_in_image(config))


def write_show_o_processor(folder: Path, config: ShowOConfig) -> show_o_prompts.Processor:
    """Writes and returns a processor of words, with as many tokens of text as the network."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True)
    count = config.llm_vocab_size
    # As in Phi-1.5, if there are so many: the end has id 50256.
    words = make_words(count - 1)
    words.insert(min(END_ID, count - 1), END)
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = make_special_tokens(count, config.num_codes)
    return show_o_prompts.Processor(folder, special, show_o.describe_image(config))


def _copy_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MINI / name, folder / name)


def _write_settings(folder: Path, name: str, **changes: Any) -> None:
    """Writes a file of the mini Janus's settings with changes."""
    _write_json(folder / name, json.loads((MINI / name).read_text(encoding="utf-8")) | changes)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
