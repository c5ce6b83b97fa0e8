"""Turns prompts and images into arrays on the host: chat template, tokenizer, pixels.

Sources: Janus `VLChatProcessor`, `conversation.py` and `VLMImageProcessor`; transformers'
`JanusProcessor` produces the same ids (system prompt off) and, where `int()` and `round()`
agree on the resized sides, the same pixels.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from corl_jax.console import hide_import_advice
from corl_jax.errors import InputError, Problems
from corl_jax.input_files import LONE_SURROGATE, has_lone_surrogate
from corl_jax.nearest import suggest_name
from corl_jax.policies.family import CaptionPrompt, ChatRoles
from corl_jax.policies.janus.checkpoint.settings import parse_vision
from corl_jax.policies.janus.image_settings import (
    ImageSettings,
    ParseVision,
    make_square,
    normalise_levels,
    preprocess_image,
    read_image_settings,
)
from corl_jax.policies.janus.tokens import (
    ROLE_NAMES,
    ROLES,
    STRINGS,
    choose_template,
    read_tokenizer,
    special_tokens,
)
from corl_jax.policies.padding import pad_on_the_left
from corl_jax.types import EncodedPrompts
from corl_jax.weights.storage import read_json

FILES = ("config", "processor_config", "preprocessor_config")
GENERATE, QUESTION, THINK = "generate", "question", "think"
"""Kinds of prompts: a text for image generation; a question about an image; a text for a plan and
an image."""
PLAN_INSTRUCTION = (
    "Before you draw this, plan the picture in one or two short sentences: what it shows, how many "
    "of each, which colors, and what is where."
)
"""Follows the text of an image that is planned first."""
# Q7: the released code takes the image tokens from position 5 on, skips five tokens and takes the
# rest as the caption. Only two tokens, EOI and a line break, are before the caption.
FIXED_START, FIXED_GAP = 5, 5
BUCKET = 32  # prompts are padded to a multiple, so that few shapes are compiled
LONGEST_SHOWN = 80  # characters of a text in a message


class Processor:
    """Chat template, tokenizer and image preprocessing of one Janus directory.

    Text of a user never becomes structure. The string of a special token inside a prompt or a
    question is tokenised as plain characters.
    """

    def __init__(
        self,
        model_dir: str | Path,
        image: ImageSettings,
        *,
        template: str | None = None,
        bucket_size: int = BUCKET,
    ):
        """Opens the tokenizer. `template` is a key of `ROLES`; see `tokens.choose_template`.

        Raises:
            InputError: unreadable tokenizer, missing special tokens, unknown template.
        """
        with hide_import_advice():
            from transformers import PreTrainedTokenizerFast

        tokenizer_file = Path(model_dir) / "tokenizer.json"
        self.special = special_tokens(model_dir)
        tokenizer, self._added, self._plain = _load_tokenizers(tokenizer_file)
        # A vocabulary may contain a structural token that is no added token.
        for name, string in STRINGS.items():
            self._added.setdefault(string, {"id": getattr(self.special, name)})
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=STRINGS["bos"],
            eos_token=STRINGS["eos"],
            pad_token=STRINGS["pad"],
            padding_side="left",
            clean_up_tokenization_spaces=False,
        )
        self.image = image
        self.bucket_size = bucket_size
        template = choose_template(template, self._added)
        if template not in tuple(ROLES):  # which need not be hashable
            raise InputError(f"sft_format: found {template!r}; expected one of {', '.join(ROLES)}")
        self.roles = ROLES[template]

    @classmethod
    def from_dir(cls, model_dir: str | Path, *, bucket_size: int = BUCKET) -> Processor:
        """Opens any of the three kinds of model directory.

        Raises:
            InputError: listing every missing file, setting and special token.
        """
        folder = Path(model_dir)
        configs, image = read_settings(folder)
        template = configs["processor_config"].get("sft_format")
        return cls(folder, image, template=template, bucket_size=bucket_size)

    @property
    def num_tokens(self) -> int:
        """The number of tokens of the tokenizer, added tokens included."""
        return len(self.tokenizer)

    @property
    def image_size(self) -> int:
        """The side of an image in a prompt, in pixels."""
        return self.image.size

    @property
    def num_image_tokens(self) -> int:
        """The number of tokens of an image in a prompt."""
        return self.image.num_tokens

    # ---- templates

    def _make_t2i_parts(self, prompt: str) -> list[str]:
        # Source: Janus's `deepseek` template.
        user, assistant = self.roles
        return [user, f": {prompt.strip()}\n\n", assistant, ":", STRINGS["boi"]]

    def _make_mm2t_parts(self, text: str, system_prompt: str, num_images: int) -> list[str]:
        user, assistant = self.roles
        system = f"{system_prompt.strip()}\n\n" if system_prompt.strip() else ""
        images = [STRINGS["image"]] * num_images
        # The original strips the whole message, which starts with the placeholder.
        return [system, user, ": ", *images, f"{text.rstrip()}\n\n", assistant, ":"]

    def _make_think_parts(self, prompt: str) -> list[str]:
        # As for an image, but the assistant begins with a text. BOI follows that text.
        user, assistant = self.roles
        return [user, f": {prompt.strip()}\n{PLAN_INSTRUCTION}\n\n", assistant, ":"]

    def choose_roles(self, name: str | None) -> ChatRoles:
        """Returns this processor with a pair of chat roles; None: those of the checkpoint.

        Raises:
            InputError: unknown name, or `pro` with a tokenizer that has no such token.
        """
        missing = [role for role in ROLES[ROLE_NAMES["pro"]] if role not in self._added]
        if name is None:
            name = next(key for key in ROLE_NAMES if ROLES[ROLE_NAMES[key]] == self.roles)
        if name not in ROLE_NAMES:
            raise InputError(f"found {name}; {suggest_name(name, ROLE_NAMES, 'expected one of')}")
        if name == "pro" and missing:
            raise InputError(
                f"found pro, but the tokenizer has no token {', '.join(missing)}; give old, the "
                "roles of models before Janus-Pro"
            )
        chosen = copy.copy(self)
        chosen.roles = ROLES[ROLE_NAMES[name]]
        return ChatRoles(name, "".join(chosen._make_t2i_parts("PROMPT")), chosen)

    # ---- ids

    def t2i_ids(self, prompt: str) -> list[int]:
        """Returns BOS, the prompt of image generation and BOI, unpadded."""
        # Parts 0, 2 and 4 are the roles and BOI; part 1 is the user's text.
        return self._tokenize_parts(self._make_t2i_parts(prompt), structure=(0, 2, 4))

    def think_ids(self, prompt: str) -> list[int]:
        """Returns BOS and the prompt of a plan, behind which the plan and its image come."""
        return self._tokenize_parts(self._make_think_parts(prompt), structure=(0, 2))

    def mm2t_ids(
        self, question: str, system_prompt: str = "", *, num_images: int = 1, lead: str = "\n"
    ) -> list[int]:
        """Returns BOS and the understanding prompt with BOI, image tokens and EOI, unpadded.

        All images come first, then `lead` and the question.
        """
        parts = self._make_mm2t_parts(lead + question, system_prompt, num_images)
        ids = self._tokenize_parts(parts, structure=(1, *range(3, 3 + num_images), 4 + num_images))
        # [.., IMAGE, ..] -> [.., BOI, IMAGE x 576, EOI, ..]; the user's text cannot contain IMAGE
        special = self.special
        image = [special.boi, *[special.image] * self.num_image_tokens, special.eoi]
        return [i for token in ids for i in (image if token == special.image else [token])]

    def pad(self, rows: Sequence[Sequence[int]], length: int | None = None) -> EncodedPrompts:
        """Left-pads rows of ids to `length`, or to the bucket of the longest row."""
        if not rows:
            raise InputError("found no prompts; expected at least one")
        if length is None:
            length = self.bucket(max(map(len, rows)))
        return pad_on_the_left(rows, length, self.special.pad)

    def caption_prompt(self, caption: str, fixed_spans: bool = False) -> CaptionPrompt:
        """Returns the question prompt of a caption, and which of its tokens belong to the caption.

        A token belongs to the caption if it has a character of it. `fixed_spans` takes the
        positions of the released code (Q7).

        Raises:
            InputError: the tokenizer changes the text between its special tokens.
        """
        caption = caption.strip()
        ids = self.mm2t_ids(caption)
        is_caption, slots = np.zeros(len(ids), bool), np.arange(self.num_image_tokens)
        if fixed_spans:
            is_caption[FIXED_START + self.num_image_tokens + FIXED_GAP :] = True
            return CaptionPrompt(ids, FIXED_START + slots, is_caption)
        start = ids.index(self.special.image)
        first = start + self.num_image_tokens + 1  # behind the end-of-image token
        # The text between two added tokens is tokenised alone. So the same text gives the same ids
        # here, with the offsets of characters. A role that is no added token belongs to the text.
        role = self.roles[1]
        tail = "" if role in self.tokenizer.get_added_vocab() else f"{role}:"
        # Without a caption the line break before it is stripped, too, as in `_make_mm2t_parts`.
        text = f"\n{caption}".rstrip()
        encoding = self._plain.encode(f"{text}\n\n{tail}", add_special_tokens=False)
        if encoding.ids != ids[first : first + len(encoding.ids)]:
            raise InputError(
                "t2i_ti_sim: the tokenizer drops white space next to its special tokens, so the "
                "caption's tokens cannot be separated; set the tokens' lstrip and rstrip to false"
            )
        for position, (begin, end) in enumerate(encoding.offsets, start=first):
            # Character 0 is the line break, so the caption is [1, 1 + len). True if the two spans
            # overlap: a token that merges a line break with caption characters counts.
            is_caption[position] = max(begin, 1) < min(end, 1 + len(caption))
        return CaptionPrompt(ids, start + slots, is_caption)

    # ---- kinds of prompts, by the names that `tasks.TASKS` uses

    def prompt_ids(
        self, prompt: str, columns: Mapping[str, Any], system_prompt: str = ""
    ) -> list[int]:
        """Returns the unpadded ids of a row's prompt of the kind `prompt`."""
        if prompt == GENERATE:
            return self.t2i_ids(columns["prompt"])
        if prompt == THINK:
            return self.think_ids(columns["prompt"])
        assert prompt == QUESTION, prompt
        return self.mm2t_ids(
            columns["qa_problem"], system_prompt, num_images=columns.get("num_images", 1),
            lead=columns.get("lead", "\n"),
        )  # fmt: skip

    def encode(
        self,
        prompt: str,
        ids: Sequence[Sequence[int]],
        images: Sequence[Image.Image | Sequence[Image.Image]] | None = None,
        length: int | None = None,
    ) -> EncodedPrompts:
        """Pads prompts of the kind `prompt`, as `pad`; a question gets its images' pixels.

        The pixels are [B, S, S, 3], or [B, I, S, S, 3] if all prompts have lists of I images.
        """
        encoded = self.pad(ids, length)
        if prompt != QUESTION:
            return encoded
        assert images is not None, "a question is about an image"
        levels = np.stack([self._make_squares(image) for image in images])
        return dataclasses.replace(encoded, pixel_values=normalise_levels(levels, self.image))

    def bucket(self, length: int) -> int:
        """Returns the padded length of a prompt: the next multiple of `bucket_size`."""
        # 33 -> 64 for a bucket size of 32
        return -(-length // self.bucket_size) * self.bucket_size

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of token ids, without special tokens."""
        return str(self.tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True))

    def _tokenize_parts(self, parts: Sequence[str], structure: Sequence[int]) -> list[int]:
        """Returns BOS and the ids of the parts; parts in `structure` may be added tokens."""
        # A tokenizer tokenises the pieces between added tokens alone. So these are the ids of the
        # whole string, except that text of a user cannot become a special token:
        # ["<|User|>", ": hi\n\n", "<|Assistant|>", ":"] -> BOS, <|User|>, ids(": hi\n\n"), ..
        ids, text = [self.special.bos], ""
        strip_next = False
        for number, part in enumerate(parts):
            token = self._added.get(part) if number in structure else None
            if token is None:
                # Added tokens with lstrip or rstrip swallow white space next to them.
                text += part.lstrip() if strip_next and not text else part
                continue
            ids += self._tokenize_plain(text.rstrip() if token.get("lstrip") else text)
            ids.append(token["id"])
            text, strip_next = "", bool(token.get("rstrip"))
        return ids + self._tokenize_plain(text)

    def answer_ids(self, text: str) -> list[int]:
        """Returns the ids of a completion without BOS and EOS; special strings are plain text."""
        return self._tokenize_plain(text)

    def _tokenize_plain(self, text: str) -> list[int]:
        if has_lone_surrogate(text):  # the tokenizer would end in a TypeError
            raise InputError(f"the text {text[:LONGEST_SHOWN]!a} {LONE_SURROGATE}")
        return self._plain.encode(text, add_special_tokens=False).ids if text else []

    # ---- images

    def preprocess_image(self, image: Image.Image) -> np.ndarray:
        """Returns an image as normalised float32 [S, S, 3]; see `image_settings`."""
        return preprocess_image(image, self.image)

    def _make_squares(self, images: Image.Image | Sequence[Image.Image]) -> np.ndarray:
        if isinstance(images, Image.Image):
            return make_square(images, self.image)
        return np.stack([make_square(image, self.image) for image in images])


def read_settings(
    folder: Path, parse: ParseVision = parse_vision
) -> tuple[dict[str, dict[str, Any]], ImageSettings]:
    """Returns the contents of a model directory's FILES, and its image settings.

    Raises:
        InputError: listing every missing file, setting and special token.
    """
    problems, configs, image = Problems(), {}, None
    problems.attempt(special_tokens, folder)
    with problems.collect():
        for name in FILES:
            file = folder / f"{name}.json"
            configs[name] = read_json(file) if file.is_file() else {}
        image = read_image_settings(configs, folder, parse)
    problems.raise_any()
    assert image is not None  # otherwise there was a problem
    return configs, image


def _load_tokenizers(path: Path) -> tuple[Any, dict[str, dict], Any]:
    """Returns the tokenizer, its added tokens by string, and a tokenizer for plain text.

    The tokenizer for plain text tokenises the strings of special tokens as any other text.
    """
    from tokenizers import Tokenizer

    structural = {*STRINGS.values(), *ROLES["deepseek"]}
    content = read_tokenizer(path)
    try:
        tokenizer = Tokenizer.from_str(json.dumps(content))
        added = {token["content"]: token for token in content.get("added_tokens") or []}
        # Only tokens that are flagged as special can be switched off, and some files do not flag
        # structural tokens. `added` shares its dicts with `content`, so this changes `content`.
        for string in structural & added.keys():
            added[string]["special"] = True
        plain = Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the Rust parser raises a bare Exception
        raise InputError(f"{path}: not a usable tokenizer.json ({error})") from error
    # The file may state padding and truncation, which would change the ids of single texts.
    plain.no_padding()
    plain.no_truncation()
    plain.encode_special_tokens = True
    return tokenizer, added, plain
