"""The small files of a Show-o: the tokenizer of Phi-1.5, and the configs of the three parts.

    show-o/             config.json, pytorch_model.safetensors     showlab/show-o
        magvitv2/       config.json, pytorch_model.safetensors     showlab/magvitv2
        phi-1_5/        config.json, tokenizer.json, ...           microsoft/phi-1_5
        clip-vit-large-patch14-336/                                openai/clip-vit-large-patch14-336

The inner folders may also stand beside the outer one. The last one is for w_clip_vit alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corl_jax.errors import InputError
from corl_jax.models.clip import ClipVisionConfig
from corl_jax.models.phi import PhiConfig
from corl_jax.policies.show_o.checkpoint.show_o_keys import CLIP_FOLDER, CLIP_HUB_ID
from corl_jax.policies.show_o.network import ShowOConfig
from corl_jax.weights.folders import read_unmarked
from corl_jax.weights.kinds import Assets
from corl_jax.weights.layouts.clip import make_vision_files
from corl_jax.weights.parts import describe_missing, find_companion
from corl_jax.weights.shards import write_bytes, write_json
from corl_jax.weights.storage import read_json

PHI, PHI_HUB_ID = "phi-1_5", "microsoft/phi-1_5"
MAGVIT = "magvitv2"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt",
)  # fmt: skip
CLIP_FILES = ("config.json", "preprocessor_config.json", "pytorch_model.bin")
GENERATION_FILE = "generation_config.json"
VERSION = "0.30.1"
"""Version of diffusers that the published files name."""


def find_phi(folder: Path) -> Path | None:
    """Returns the folder with the files of microsoft/phi-1_5, inside of a model's or beside it."""
    return find_companion(folder, PHI)


def find_clip(folder: Path) -> Path | None:
    """Returns the folder with the vision tower, inside of a model's or beside it."""
    return find_companion(folder, CLIP_FOLDER)


def describe_missing_tower(folder: Path) -> str:
    """Describes a vision tower that is missing, with the command that downloads it."""
    return describe_missing(folder / CLIP_FOLDER, CLIP_HUB_ID, CLIP_FILES)


def find_tokenizer(folder: Path) -> Path:
    """Returns the folder of a model's tokenizer files: phi-1_5, or the model's folder itself.

    Raises: InputError with the command that downloads it.
    """
    place = locate_tokenizer(folder)
    if (place / "tokenizer.json").is_file():
        return place
    # By name: its weights are not needed, and versions of hf read several patterns differently.
    names = (*TOKENIZER_FILES, "config.json")
    raise InputError(describe_missing(folder / PHI, PHI_HUB_ID, names))


def locate_tokenizer(folder: Path) -> Path:
    """Returns the folder of the tokenizer files as `find_tokenizer`; `folder` if there are none."""
    phi = find_phi(folder)
    return phi if phi is not None and (phi / "tokenizer.json").is_file() else folder


def note_assumptions(folder: Path, config: ShowOConfig) -> list[str]:
    """Returns lines with the settings that no file states, and with the projector, if any."""
    place, phi, notes = find_phi(folder), config.phi, []
    file = folder / "config.json"
    stated = read_json(file) if file.is_file() else {}
    # Our own config.json states all sizes, and no class of the original code.
    is_original = "_class_name" in stated
    if is_original and not (place and (place / "config.json").is_file()):
        notes.append(
            f"{folder}: no file states the share of each head that is rotated, the rotary base, "
            "the norms' epsilon and the activation; they are taken to be those of "
            f"{PHI_HUB_ID}: {phi.partial_rotary_factor:g}, {phi.rope_theta:g}, "
            f"{phi.layer_norm_eps:g} and gelu_new"
        )
    if is_original and stated.get("num_vq_tokens") is None:
        notes.append(
            f"{file}: does not state num_vq_tokens; an image is taken to have "
            f"{config.num_vq_tokens} codes, as in the original code"
        )
    if config.w_clip_vit and config.clip is None:
        notes.append(
            f"{folder}: answers from CLIP's features, and has no vision tower, so it draws images "
            f"but answers no questions; {describe_missing_tower(folder)}"
        )
    return notes


def write_assets(
    folder: Path, layout: str, config: ShowOConfig, source: Assets | None, stated: Mapping[str, Any]
) -> list[str]:
    """Writes the small files of the inner folders; returns notes for the user."""
    origin = source.folder if source else None
    _write_magvit_config(folder, origin)
    if config.clip is not None:
        _write_clip_files(folder, config.clip, origin)
    notes = note_assumptions(origin, config) if origin else []
    notes += _write_phi(folder, config.phi, origin)
    if stated or (origin and (origin / GENERATION_FILE).is_file()):
        file = origin / GENERATION_FILE if origin else None
        old = read_json(file) if file and file.is_file() else {}
        write_json(folder / GENERATION_FILE, {**old, **stated})
    return notes


def _write_magvit_config(folder: Path, origin: Path | None) -> None:
    place = find_companion(origin, MAGVIT) if origin else None
    (folder / MAGVIT).mkdir(exist_ok=True)
    if place and (place / "config.json").is_file():
        write_bytes(folder / MAGVIT / "config.json", read_unmarked(place / "config.json"))
    else:
        new = {"_class_name": "MAGViTv2", "_diffusers_version": VERSION}
        write_json(folder / MAGVIT / "config.json", new)


def _write_clip_files(folder: Path, clip: ClipVisionConfig, origin: Path | None) -> None:
    place = find_clip(origin) if origin else None
    (folder / CLIP_FOLDER).mkdir(exist_ok=True)
    for name, made in make_vision_files(clip).items():
        if place and (place / name).is_file():
            write_bytes(folder / CLIP_FOLDER / name, read_unmarked(place / name))
        else:
            write_json(folder / CLIP_FOLDER / name, made)


def _write_phi(folder: Path, phi: PhiConfig, origin: Path | None) -> list[str]:
    place = find_phi(origin) if origin else None
    (folder / PHI).mkdir(exist_ok=True)
    if place and _has_sizes(place / "config.json", phi):
        write_bytes(folder / PHI / "config.json", read_unmarked(place / "config.json"))
    else:
        write_json(folder / PHI / "config.json", make_phi_config(phi))
    for name in TOKENIZER_FILES:
        # The tokenizer may also stand in the model's folder itself.
        file = next((p / name for p in (place, origin) if p and (p / name).is_file()), None)
        if file:
            write_bytes(folder / PHI / name, read_unmarked(file))
    if (folder / PHI / "tokenizer.json").is_file():
        return []
    return [
        f"no tokenizer.json of {PHI_HUB_ID} was found, so the output lacks one: copy it to "
        f"{folder.name}/{PHI} by hand"
    ]


def _has_sizes(file: Path, phi: PhiConfig) -> bool:
    """Returns whether a config.json is of a Phi of these sizes, which the original code needs."""
    stated, made = (read_json(file) if file.is_file() else {}), make_phi_config(phi)
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return all(stated.get(name) == made[name] for name in sizes)


def make_phi_config(phi: PhiConfig) -> dict[str, Any]:
    """Returns the config.json of a Phi of these sizes, as transformers reads it."""
    return {
        "architectures": ["PhiForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "embd_pdrop": 0.0,
        "eos_token_id": None,
        "hidden_act": "gelu_new",
        "hidden_size": phi.hidden_size,
        "intermediate_size": phi.intermediate_size,
        "layer_norm_eps": phi.layer_norm_eps,
        "max_position_embeddings": phi.max_position_embeddings,
        "model_type": "phi",
        "num_attention_heads": phi.num_heads,
        "num_hidden_layers": phi.num_layers,
        "num_key_value_heads": phi.num_kv_heads,
        "partial_rotary_factor": phi.partial_rotary_factor,
        # The published file has false, and the original code sets true.
        "qk_layernorm": True,
        "resid_pdrop": 0.0,
        "rope_scaling": None,
        "rope_theta": phi.rope_theta,
        "tie_word_embeddings": False,
        "vocab_size": phi.vocab_size,
    }
