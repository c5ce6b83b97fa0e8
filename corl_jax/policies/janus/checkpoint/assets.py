"""Writes tokenizer and processor files: copies them within a layout, rewrites them between two."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from corl_jax.errors import InputError
from corl_jax.models.siglip import SiglipConfig
from corl_jax.policies.generation_config import FILE as GENERATION_FILE
from corl_jax.policies.generation_config import parse_generation
from corl_jax.policies.janus.checkpoint import transformers as transformers_layout
from corl_jax.policies.janus.tokens import (
    ROLES,
    STRINGS,
    choose_template,
    read_tokenizer,
    special_tokens,
)
from corl_jax.weights.folders import read_unmarked
from corl_jax.weights.kinds import OWN_LAYOUT, Assets
from corl_jax.weights.shards import write_bytes, write_json, write_text
from corl_jax.weights.storage import read_json

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
ORIGINAL_SPECIALS = (
    *(STRINGS["image"], "<patch_placeholder>", "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>"),
    *("<|grounding|>", *ROLES["deepseek"]),
)
_IMAGE = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "min_size": 14}


class Sizes(Protocol):
    """The sizes of a model that these files state."""

    @property
    def siglip(self) -> SiglipConfig: ...


def copy_assets(source: Path, out: Path, names: tuple[str, ...] = COPIED) -> None:
    """Copies files of these names, without byte order marks; skips names the source lacks."""
    for name in names:
        if (source / name).is_file():
            write_bytes(out / name, read_unmarked(source / name))


def write_assets(
    folder: Path, layout: str, config: Sizes, source: Assets | None, stated: Mapping[str, Any]
) -> list[str]:
    """Writes tokenizer, processor and generation settings; returns notes on missing files."""
    # The layout of corl_jax has the files of its source's layout, or else of the original one.
    source_layout = source.layout if source else "original"
    target = source_layout if layout == OWN_LAYOUT else layout
    origin = source.folder if source else None
    (write_original if target == "original" else write_transformers)(origin, folder, config)
    # Copied after the new files are written: the source's file wins, and files that it lacks stay.
    if origin is not None and source_layout == target:
        # Two chat templates would contradict each other.
        if (origin / "chat_template.json").is_file():
            (folder / "chat_template.jinja").unlink(missing_ok=True)
        copy_assets(origin, folder)
    write_generation(folder, layout, origin, stated)
    if (folder / "tokenizer.json").is_file():
        return []
    return [
        f"no tokenizer.json was found, so the output lacks one: copy it to {folder.name} by hand"
    ]


def write_generation(
    folder: Path, layout: str, source: Path | None, stated: Mapping[str, Any]
) -> None:
    """Writes generation_config.json: the source's values, replaced by the values in `stated`.

    The transformers layout always gets a file. Other layouts get one if there are values.
    """
    file = source / GENERATION_FILE if source else None
    old = read_json(file) if file and file.is_file() else {}
    parse_generation(old, file or folder / GENERATION_FILE)  # refuses wrong values of the source
    new = {**old, **stated}
    kwargs = old.get("generation_kwargs")
    has_boi = isinstance(kwargs, dict) and "boi_token_id" in kwargs
    # transformers cannot generate an image without the BOI id in this place.
    if layout == "transformers" and not has_boi:
        made = transformers_layout.write_generation(special_tokens(require_tokenizer(source)))
        kwargs = {**(kwargs if isinstance(kwargs, dict) else {}), **made["generation_kwargs"]}
        new = {**made, **new, "generation_kwargs": kwargs}
    if file and new == old and file.is_file():
        # Unchanged values: the same bytes, so that a round trip changes no file.
        write_bytes(folder / GENERATION_FILE, file.read_bytes())
    elif new:
        write_json(folder / GENERATION_FILE, new)


def require_tokenizer(folder: Path | None) -> Path:
    """Returns the folder of the tokenizer. Raises: InputError without a folder."""
    if folder is None:
        raise InputError(
            "transformers' layout needs the tokenizer's ids: name a model directory that has "
            "tokenizer.json, or write another layout"
        )
    return folder


def write_original(source: Path | None, out: Path, config: Sizes) -> None:
    """Writes the files that the original package's VLChatProcessor reads."""
    if source is not None and (source / "tokenizer.json").is_file():
        copy_assets(source, out, _TOKENIZER)
        write_json(out / "tokenizer_config.json", _make_original_tokenizer(source))
        write_json(out / "special_tokens_map.json", _make_special_map(source))
    processor = {
        "add_special_token": False,
        "ignore_id": -100,
        "image_tag": STRINGS["image"],
        "mask_prompt": True,
        "num_image_tokens": config.siglip.num_tokens,
        "processor_class": "VLChatProcessor",
        "sft_format": _find_sft_format(source),
    }
    write_json(out / "processor_config.json", processor)
    image = {
        "background_color": [127, 127, 127],
        "do_normalize": True,
        "image_processor_type": "VLMImageProcessor",
        "image_size": config.siglip.image_size,
        "processor_class": "VLChatProcessor",
        "rescale_factor": 1 / 255,
        **_read_image_settings(source),
    }
    write_json(out / "preprocessor_config.json", image)


def write_transformers(source: Path | None, out: Path, config: Sizes) -> None:
    """Writes the files that transformers' JanusProcessor reads."""
    if source is not None and (source / "tokenizer.json").is_file():
        copy_assets(source, out, _TOKENIZER)
        tokenizer = add_bos(read_tokenizer(source / "tokenizer.json"), source)
        write_json(out / "tokenizer.json", tokenizer)
        write_json(out / "tokenizer_config.json", _make_transformers_tokenizer(source))
    processor = {
        "num_image_tokens": config.siglip.num_tokens,
        "processor_class": "JanusProcessor",
        "use_default_system_prompt": False,
    }
    write_json(out / "processor_config.json", processor)
    size = config.siglip.image_size
    image = {
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_processor_type": "JanusImageProcessor",
        "processor_class": "JanusProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": size, "width": size},
        **_read_image_settings(source),
    }
    write_json(out / "preprocessor_config.json", image)
    write_text(out / "chat_template.jinja", make_chat_template(_find_sft_format(source)))


def make_chat_template(sft_format: str) -> str:
    """Returns the original's conversation template; contents are strings or lists of parts."""
    user, assistant = ROLES.get(sft_format, ROLES["deepseek"])
    return f"""\
{{%- macro text_of(content) -%}}
    {{%- if content is string -%}}
        {{{{- content -}}}}
    {{%- else -%}}
        {{%- for part in content -%}}
            {{%- if part["type"] == "image" -%}}
                {{{{- "{STRINGS["image"]}" + ("" if loop.last else "\\n") -}}}}
            {{%- else -%}}
                {{{{- part["text"] -}}}}
            {{%- endif -%}}
        {{%- endfor -%}}
    {{%- endif -%}}
{{%- endmacro -%}}
{{%- for message in messages -%}}
    {{%- set text = text_of(message["content"]) | trim -%}}
    {{%- if message["role"] == "system" -%}}
        {{{{- text + "\\n\\n" if text else "" -}}}}
    {{%- elif message["role"] | lower == "user" -%}}
        {{{{- "{user}: " + text + "\\n\\n" -}}}}
    {{%- else -%}}
        {{{{- "{assistant}:" + (" " + text if text else "") -}}}}
        {{{{- "{STRINGS["eos"]}" if text and not (loop.last and not add_generation_prompt) -}}}}
    {{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}
    {{{{- "{assistant}:" -}}}}
{{%- endif -%}}
"""


def add_bos(tokenizer: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns a tokenizer.json whose post-processor puts BOS first.

    Raises: InputError for a file that the tokenizers library cannot use.
    """
    # In the original the tokenizer class adds BOS. The generic class that the output names follows
    # tokenizer.json alone, so the rule must be in the file.
    bos = special_tokens(folder).bos
    if _find_first_id(tokenizer, folder / "tokenizer.json") == bos:
        return tokenizer
    post = tokenizer.get("post_processor")
    steps = [] if post is None else [post]
    if post is not None and post["type"] == "Sequence":
        steps = list(post["processors"])
    templates = [i for i, step in enumerate(steps) if step["type"] == "TemplateProcessing"]
    if templates:
        # A second template would take the parts of the first one for a pair of texts.
        steps[templates[0]] = _put_bos_first(steps[templates[0]], bos)
    else:
        first, second = ({"Sequence": {"id": "AB"[i], "type_id": i}} for i in (0, 1))
        bare = {"single": [first], "pair": [first, second], "special_tokens": {}}
        steps.append(_put_bos_first({"type": "TemplateProcessing", **bare}, bos))
    processor = steps[0] if len(steps) == 1 else {"type": "Sequence", "processors": steps}
    return tokenizer | {"post_processor": processor}


def _find_first_id(tokenizer: dict[str, Any], file: Path) -> int | None:
    """Returns the first id of a text by the rules of the file."""
    from tokenizers import Tokenizer

    try:
        ids = Tokenizer.from_str(json.dumps(tokenizer)).encode("a").ids
    except Exception as error:  # the library raises bare Exceptions
        raise InputError(f"{file}: not a usable tokenizer.json ({error})") from error
    return ids[0] if ids else None


def _put_bos_first(template: dict[str, Any], number: int) -> dict[str, Any]:
    """Returns a TemplateProcessing with BOS in front."""
    bos = STRINGS["bos"]
    special = {"SpecialToken": {"id": bos, "type_id": 0}}
    known = {bos: {"id": bos, "ids": [number], "tokens": [bos]}}
    return {
        **template,
        **{name: [special, *template[name]] for name in ("single", "pair")},
        "special_tokens": {**template["special_tokens"], **known},
    }


def _make_transformers_tokenizer(source: Path) -> dict[str, Any]:
    """Returns settings with a generic class, and with the tokens that JanusProcessor needs."""
    named = {f"{name}_token": STRINGS[name] for name in ("image", "boi", "eoi")}
    return {
        **_make_common_tokenizer(source),
        **named,
        "extra_special_tokens": named,
        "processor_class": "JanusProcessor",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _make_original_tokenizer(source: Path) -> dict[str, Any]:
    return {
        **_make_common_tokenizer(source),
        "add_eos_token": False,
        "processor_class": "VLChatProcessor",
        "tokenizer_class": "LlamaTokenizerFast",
    }


def _make_common_tokenizer(source: Path) -> dict[str, Any]:
    old = _read_if_present(source, "tokenizer_config.json")
    length = old.get("model_max_length")
    # Some files state 10**30 for "no limit"; then the released Janus's limit is written.
    return {
        "add_bos_token": True,
        "bos_token": STRINGS["bos"],
        "clean_up_tokenization_spaces": False,
        "eos_token": STRINGS["eos"],
        "model_max_length": length if type(length) is int and length < 10**9 else 16384,
        "pad_token": STRINGS["pad"],
        "padding_side": "left",
    }


def _make_special_map(source: Path) -> dict[str, Any]:
    added = read_json(source / "tokenizer.json").get("added_tokens") or []
    have = {token.get("content") for token in added if isinstance(token, dict)}
    return {
        "additional_special_tokens": [name for name in ORIGINAL_SPECIALS if name in have],
        **{f"{name}_token": STRINGS[name] for name in ("bos", "eos", "pad")},
    }


def _find_sft_format(source: Path | None) -> str:
    """Returns the name of the conversation template: the stated one, or by the role tokens."""
    stated = _read_if_present(source, "processor_config.json").get("sft_format")
    stated = stated if isinstance(stated, str) else None
    if source is None or not (source / "tokenizer.json").is_file():
        return stated or "deepseek"
    return choose_template(stated, _make_special_map(source)["additional_special_tokens"])


def _read_image_settings(source: Path | None) -> dict[str, Any]:
    """Returns the normalisation that the source states, or else that of Janus."""
    # transformers has two places for it; preprocessor_config.json wins.
    nested = _read_if_present(source, "processor_config.json").get("image_processor")
    settings = {
        **(nested if isinstance(nested, dict) else {}),
        **_read_if_present(source, "preprocessor_config.json"),
    }
    return {name: settings.get(name) or default for name, default in _IMAGE.items()}


def _read_if_present(source: Path | None, name: str) -> dict[str, Any]:
    if source is None or not (source / name).is_file():
        return {}
    return read_json(source / name)
