"""Turns prompts and images into arrays on the host: control tokens, tokenizer, pixels.

A prompt for an image is `t2i sot text eot`; the sampler adds soi, the codes and eoi. A question is
`mmu soi codes eoi sot text`, with the mask token at the places of the codes. The codes come from
the pixels on the devices. A model that reads CLIP's features has questions of another form,
`mmu system soi features eoi text`, with the mask token at the places of the features.

Source: Show-o (arXiv 2408.12528), `UniversalPrompting` and `inference_mmu.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from corl_jax.errors import InputError
from corl_jax.input_files import LONE_SURROGATE, has_lone_surrogate
from corl_jax.models.clip import ClipVisionConfig
from corl_jax.policies.padding import pad_on_the_left
from corl_jax.policies.show_o.tokens import CONTROLS, PAD, SpecialTokens, load_tokenizer
from corl_jax.types import EncodedPrompts

logger = logging.getLogger(__name__)

GENERATE, QUESTION, PLAIN_TEXT = "generate", "question", "text"
"""Kinds of prompts: a text for image generation; a question about an image; a text alone."""
BUCKET = 32  # prompts are padded to a multiple, so that few shapes are compiled
MAX_TEXT = 128
"""Longest text of a prompt for an image, in tokens with its first; Show-o's `max_seq_length`."""
SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
"""In front of CLIP's features; 28 tokens of Phi-1.5. Other models have no system prompt."""
LONGEST_SHOWN = 80  # characters of a text in a message


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """The sizes of an image in a question; pixels are normalised to [-1, 1], or as CLIP's are."""

    side: int  # pixels
    num_tokens: int  # codes or features
    clip: ClipVisionConfig | None = None  # of the tower that makes the features; None: codes


class Processor:
    """Control tokens, tokenizer and image preprocessing of one Show-o directory."""

    def __init__(
        self,
        folder: str | Path,
        special: SpecialTokens,
        image: ImageSettings,
        *,
        bucket_size: int = BUCKET,
        max_text: int = MAX_TEXT,
        refusal: str | None = None,
    ):
        """Opens the tokenizer of a folder; `special` are the ids of a network.

        `refusal` says why the model answers no questions; None: it does.

        Raises:
            InputError: unreadable tokenizer, or one of another network.
        """
        self.tokenizer, self.special = load_tokenizer(folder, special)
        self.image = image
        self.bucket_size = bucket_size
        self.max_text = max_text
        self.refusal = refusal
        self.num_cut = 0  # prompts that were too long

    # By the network's sizes, because a tokenizer file may lack the control tokens.
    @property
    def num_tokens(self) -> int:
        """The number of tokens of texts, with the control tokens behind them."""
        return self.special.first_code

    @property
    def image_size(self) -> int:
        """The side of an image in a prompt, in pixels."""
        return self.image.side

    @property
    def num_image_tokens(self) -> int:
        """The number of tokens of an image in a prompt."""
        return self.image.num_tokens

    # ---- ids

    def t2i_ids(self, prompt: str) -> list[int]:
        """Returns the prompt of image generation up to the end of its text, unpadded.

        A text that is too long is cut, as in the original; a warning counts such texts.
        """
        ids = [self.special.t2i, *self._tokenize_text(prompt)]
        if len(ids) > self.max_text:
            ids = ids[: self.max_text]
            self._count_cut(prompt)
        return [*ids, self.special.eos]

    def mm2t_ids(
        self, question: str, system_prompt: str = "", *, lead: str | None = None
    ) -> list[int]:
        """Returns a question with the mask token at the places of its image, unpadded.

        `lead` stands before the question; None: as in the original.

        Raises: InputError if the model answers no questions.
        """
        if self.refusal:
            raise InputError(self.refusal)
        if self.image.clip is not None:
            return self._ask_about_features(question, system_prompt, lead or "")
        special = self.special
        lead = "\n" if lead is None else lead
        # Without an end token: the answer follows. The original never cuts a question.
        system = f"{system_prompt.strip()} " if system_prompt.strip() else ""
        text = self._tokenize_text(f"{system}USER: {lead}{question} ASSISTANT:")
        image = [special.soi, *[special.mask] * self.image.num_tokens, special.eoi]
        return [special.mmu, *image, *text]

    def _ask_about_features(self, question: str, system_prompt: str, lead: str) -> list[int]:
        special = self.special
        # Unlike the other form: the system prompt before the image, no start token, no line break.
        system = self._tokenize(system_prompt.strip() or SYSTEM_PROMPT)
        image = [special.soi, *[special.mask] * self.image.num_tokens, special.eoi]
        text = self._tokenize(f"USER: {lead}{question} ASSISTANT:")
        return [special.mmu, *system, *image, *text]

    def answer_ids(self, text: str) -> list[int]:
        """Returns the ids of a completion, without an end token."""
        # Answers follow "ASSISTANT:" behind a space, which is a part of their first token.
        return self._tokenize(f" {text.lstrip()}") if text.strip() else []

    def _tokenize_text(self, text: str) -> list[int]:
        """Returns the start of text and its ids."""
        ids, start = self._tokenize(text), self.special.eos
        return ids if ids[:1] == [start] else [start, *ids]

    def _tokenize(self, text: str) -> list[int]:
        if has_lone_surrogate(text):  # the tokenizer would end in a TypeError
            raise InputError(f"the text {text[:LONGEST_SHOWN]!a} {LONE_SURROGATE}")
        # The tokenizer would make the control token of it, which changes what attention sees.
        for name in (PAD, *CONTROLS):
            if name in text:
                raise InputError(
                    f"the text {text[:LONGEST_SHOWN]!r} contains {name!r}, a control token of "
                    "Show-o; remove it"
                )
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _count_cut(self, prompt: str) -> None:
        self.num_cut += 1
        # At 1, 10, 100, ..: a run over many long prompts should say so, but not in every step.
        if str(self.num_cut).strip("0") == "1":
            logger.warning(
                "prompts that were cut to %d tokens, the longest text of a Show-o: %d; the latest: "
                "%r", self.max_text, self.num_cut, prompt[:LONGEST_SHOWN],
            )  # fmt: skip

    # ---- kinds of prompts, by the names that `tasks.TASKS` uses

    def prompt_ids(
        self, prompt: str, columns: Mapping[str, Any], system_prompt: str = ""
    ) -> list[int]:
        """Returns the unpadded ids of a row's prompt of the kind `prompt`.

        Raises:
            InputError: a text with a control token, or a question about several images.
        """
        if prompt == GENERATE:
            return self.t2i_ids(columns["prompt"])
        if prompt == PLAIN_TEXT:
            return self._tokenize_text(columns["text"])
        assert prompt == QUESTION, prompt
        if (count := columns.get("num_images", 1)) != 1:
            raise InputError(f"question: found {count} images; a Show-o reads exactly one")
        return self.mm2t_ids(columns["qa_problem"], system_prompt, lead=columns.get("lead"))

    def encode(
        self,
        prompt: str,
        ids: Sequence[Sequence[int]],
        images: Sequence[Image.Image | Sequence[Image.Image]] | None = None,
        length: int | None = None,
    ) -> EncodedPrompts:
        """Pads prompts of the kind `prompt`, as `pad`; a question gets its image's pixels."""
        encoded = self.pad(ids, length)
        if prompt != QUESTION:
            return encoded
        assert images is not None, "a question is about an image"
        singles = [x if isinstance(x, Image.Image) else _take_only_image(x) for x in images]
        cut_down = self.image.clip is not None
        squares = [cut_square(x.convert("RGB"), self.image.side, cut_down) for x in singles]
        pixels = normalise_pixels(np.stack(squares), self.image)
        return dataclasses.replace(encoded, pixel_values=pixels)

    def pad(self, ids: Sequence[Sequence[int]], length: int | None = None) -> EncodedPrompts:
        """Pads rows of ids on the left to `length`, or to the bucket of the longest row."""
        if not ids:
            raise InputError("found no prompts; expected at least one")
        if length is None:
            length = self.bucket(max(map(len, ids)))
        return pad_on_the_left(ids, length, self.special.pad)

    def bucket(self, length: int) -> int:
        """Returns the padded length of a prompt: the next multiple of `bucket_size`."""
        return -(-length // self.bucket_size) * self.bucket_size

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of token ids, without end tokens, padding, image codes and masks.

        Other control tokens keep their names, as in the original.
        """
        first = self.special.pad + 1

        def decode_run(tokens: Iterable[int], is_control: bool) -> str:
            if is_control:
                return "".join(CONTROLS[token - first] for token in tokens)
            words = [token for token in tokens if token < self.special.pad]
            return self.tokenizer.decode(words, skip_special_tokens=True)

        # By our names, because the file of the tokenizer may lack them.
        runs = itertools.groupby(
            (token for token in np.asarray(ids).tolist() if token < self.special.first_code),
            lambda token: token >= first,
        )
        return "".join(decode_run(tokens, is_control) for is_control, tokens in runs)


def _take_only_image(images: Sequence[Image.Image]) -> Image.Image:
    if len(images) != 1:
        raise InputError(f"question: found {len(images)} images; a Show-o reads exactly one")
    return images[0]


def preprocess_image(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    """Returns the normalised centre of an image, float32 [side, side, 3]."""
    cut_down = settings.clip is not None
    return normalise_pixels(cut_square(image.convert("RGB"), settings.side, cut_down), settings)


def fit_pixels(images: Sequence[Image.Image], side: int) -> np.ndarray:
    """Returns the normalised centres of images for their codes, float32 [N, side, side, 3]."""
    squares = [cut_square(image.convert("RGB"), side) for image in images]
    return normalise_pixels(np.stack(squares), ImageSettings(side, num_tokens=0))


def cut_square(image: Image.Image, side: int, cut_down: bool = False) -> np.ndarray:
    """Returns the levels of the centre of an image, [side, side] or [side, side, channels].

    The short side is resized to `side` by Pillow's bicubic filter. `cut_down` rounds the place of
    the centre down, as CLIP's processor does, and not to the nearest even pixel.
    Source: torchvision's Resize and CenterCrop on a PIL image, as Show-o's `image_transform`;
    transformers' `CLIPImageProcessor`.
    """
    width, height = image.size
    short = min(width, height)
    if short != side:
        # int(), not round(), as torchvision: 100 x 75 -> side 64: 85 x 64
        width, height = (int(side * x / short) for x in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    # 3 pixels too many: round(1.5) = 2, and 1
    left, top = ((x - side) // 2 if cut_down else round((x - side) / 2) for x in image.size)
    return np.asarray(image.crop((left, top, left + side, top + side)))


def normalise_pixels(levels: Any, settings: ImageSettings) -> Any:
    """Returns levels 0..255 of numpy or JAX as normalised float32, rounded as torchvision does."""
    shares, clip = levels.astype(np.float32) / np.float32(255), settings.clip
    if clip is None:
        return (shares - np.float32(0.5)) / np.float32(0.5)
    mean, std = (np.asarray(x, np.float32) for x in (clip.image_mean, clip.image_std))
    return (shares - mean) / std
