"""CLIP's layouts: those of transformers and of open_clip, with the image normalisation.

PickScore is published in the layout of transformers, HPS v2 in that of open_clip.

Sources: transformers 5.23 `models/clip`; open_clip 3.3 `model.py`, `transformer.py`, `factory.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corl_jax.errors import Problems
from corl_jax.models.clip import Activation, Clip, ClipConfig, ClipVisionConfig, TowerConfig
from corl_jax.weights.foreign_config import Fields, check_count, check_divisible, check_token_ids
from corl_jax.weights.kinds import COLUMN, INNER, OUTER, ROW, WHOLE, NetworkKind, Rules
from corl_jax.weights.storage import read_json
from corl_jax.weights.table import CONV, DENSE, SAME, Row, Shape, Table
from corl_jax.weights.table_rows import dense, embedding, norm

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def _make_transformers_layer_rows(key: str, path: str) -> list[Row]:
    torch, leaf = f"{key}.encoder.layers.{{layer}}", f"{path}/layers"
    return [
        *norm(f"{torch}.layer_norm1", f"{leaf}/layer_norm1"),
        *norm(f"{torch}.layer_norm2", f"{leaf}/layer_norm2"),
        *(
            row
            for name in (*_PROJECTIONS, "out_proj")
            for row in dense(f"{torch}.self_attn.{name}", f"{leaf}/attn/{name}")
        ),
        *dense(f"{torch}.mlp.fc1", f"{leaf}/mlp/fc1"),
        *dense(f"{torch}.mlp.fc2", f"{leaf}/mlp/fc2"),
    ]


def _make_open_clip_layer_rows(key: str, path: str) -> list[Row]:
    torch, leaf = f"{key}.resblocks.{{layer}}", f"{path}/layers"
    return [
        *norm(f"{torch}.ln_1", f"{leaf}/layer_norm1"),
        *norm(f"{torch}.ln_2", f"{leaf}/layer_norm2"),
        # open_clip fuses q, k and v: in_proj_weight [3D, D].
        *(
            Row(f"{torch}.attn.in_proj_{name}", f"{leaf}/attn/{part}/{field}", transform, (i, 3))
            for name, field, transform in (("weight", "kernel", DENSE), ("bias", "bias", SAME))
            for i, part in enumerate(_PROJECTIONS)
        ),
        *dense(f"{torch}.attn.out_proj", f"{leaf}/attn/out_proj"),
        *dense(f"{torch}.mlp.c_fc", f"{leaf}/mlp/fc1"),
        *dense(f"{torch}.mlp.c_proj", f"{leaf}/mlp/fc2"),
    ]


def make_vision_rows(key: str, path: str) -> list[Row]:
    """Returns the rows of a vision tower in transformers' layout."""
    return [
        Row(f"{key}.embeddings.class_embedding", f"{path}/class_embedding"),
        Row(f"{key}.embeddings.patch_embedding.weight", f"{path}/patch_embedding/kernel", CONV),
        *embedding(f"{key}.embeddings.position_embedding.weight", f"{path}/position_embedding"),
        # Spelt so in transformers.
        *norm(f"{key}.pre_layrnorm", f"{path}/pre_layernorm"),
        *_make_transformers_layer_rows(key, path),
        *norm(f"{key}.post_layernorm", f"{path}/post_layernorm"),
    ]


_TRANSFORMERS = Table(
    name="transformers",
    rows=(
        *make_vision_rows("vision_model", "vision_model"),
        *dense("visual_projection", "visual_projection", bias=False),
        *embedding("text_model.embeddings.token_embedding.weight", "text_model/token_embedding"),
        *embedding(
            "text_model.embeddings.position_embedding.weight", "text_model/position_embedding"
        ),
        *_make_transformers_layer_rows("text_model", "text_model"),
        *norm("text_model.final_layer_norm", "text_model/final_layernorm"),
        *dense("text_projection", "text_projection", bias=False),
        Row("logit_scale", "logit_scale"),
    ),
    dropped=(r"(vision|text)_model\.embeddings\.position_ids",),
)

_OPEN_CLIP = Table(
    name="open_clip",
    rows=(
        Row("visual.class_embedding", "vision_model/class_embedding"),
        Row("visual.conv1.weight", "vision_model/patch_embedding/kernel", CONV),
        *embedding("visual.positional_embedding", "vision_model/position_embedding"),
        *norm("visual.ln_pre", "vision_model/pre_layernorm"),
        *_make_open_clip_layer_rows("visual.transformer", "vision_model"),
        *norm("visual.ln_post", "vision_model/post_layernorm"),
        # open_clip multiplies its projections from the right, x @ W: they are [in, out] already.
        Row("visual.proj", "visual_projection/kernel"),
        *embedding("token_embedding.weight", "text_model/token_embedding"),
        *embedding("positional_embedding", "text_model/position_embedding"),
        *_make_open_clip_layer_rows("transformer", "text_model"),
        *norm("ln_final", "text_model/final_layernorm"),
        Row("text_projection", "text_projection/kernel"),
        Row("logit_scale", "logit_scale"),
    ),
    dropped=(r"attn_mask",),
)

TABLES: dict[str, Table] = {"transformers": _TRANSFORMERS, "open_clip": _OPEN_CLIP}


ACTIVATIONS: tuple[Activation, ...] = ("quick_gelu", "gelu")  # the first is transformers' default
VISION_TYPE = "clip_vision_model"
LEGACY_EOS = 2  # in old configs, although the tokenizer's end token is another
OPEN_CLIP_FILE = "open_clip_config.json"
BICUBIC = 3  # PIL's number
CHANNELS = 3
FEWEST_POSITIONS = 3  # start of text, a token, end of text

# Settings that change the network without changing its tensors' names, and what they must be.
_VISION_SETTINGS: dict[str, Any] = {
    "timm_model_name": None, "pool_type": "tok", "final_ln_after_pool": False,
    "no_ln_pre": False, "attentional_pool": False, "pos_embed_type": "learnable",
    "act_kwargs": None, "norm_kwargs": None,
}  # fmt: skip
_TEXT_SETTINGS: dict[str, Any] = {
    "hf_model_name": None, "pool_type": "argmax", "no_causal_mask": False, "embed_cls": False,
    "proj_type": "linear", "proj_bias": False, "act_kwargs": None, "norm_kwargs": None,
}  # fmt: skip


def check(config: ClipConfig, where: str) -> list[str]:
    """Lists sizes that do not fit each other, and settings that do not exist."""
    problems = check_divisible(
        where, ("image_size", config.image_size, "patch_size", config.patch_size)
    )
    for name, tower in (("vision", config.vision), ("text", config.text)):
        heads = ("hidden_size", tower.hidden_size, "num_heads", tower.num_heads)
        problems += check_divisible(f"{where}.{name}", heads)
        if tower.activation not in ACTIVATIONS:
            problems.append(
                f"{where}.{name}.activation is {tower.activation!r}, expected "
                f"{' or '.join(ACTIVATIONS)}"
            )
    problems += check_token_ids(
        where, "vocab_size", config.vocab_size, eos_token_id=config.eos_token_id
    )
    if config.context_length < FEWEST_POSITIONS:
        problems.append(
            f"{where}.context_length is {config.context_length}, expected at least "
            f"{FEWEST_POSITIONS}: a text stands between two special tokens"
        )
    for name in ("image_mean", "image_std"):
        problems += check_count(where, name, getattr(config, name), CHANNELS)
    return problems


def parse(folder: Path, layout: str, shapes: Mapping[str, Shape], problems: Problems) -> ClipConfig:
    """Returns the sizes of both towers and the image normalisation.

    Raises: InputError for a file that cannot be read.
    """
    if layout == "transformers":
        config = _parse_transformers(folder / "config.json", problems)
    elif (folder / OPEN_CLIP_FILE).is_file():
        config = _parse_open_clip(folder / OPEN_CLIP_FILE, problems)
    else:
        config = _find_known_sizes(folder, shapes, problems)
    return config


def _parse_transformers(file: Path, problems: Problems) -> ClipConfig:
    data = read_json(file)
    top = Fields(str(file), data, problems)
    top.expect("model_type", ("clip",), "the only architecture that is scored with here")
    text, vision = (_read_tower_fields(top, name) for name in ("text_config", "vision_config"))
    vision.expect("num_channels", (3,), "images are RGB")
    vocab = text.size("vocab_size", 49408)
    eos = text.size("eos_token_id", 49407)
    mean, std = _read_processor_norm(file.parent, problems)
    return ClipConfig(
        vision=_parse_transformers_tower(vision, TowerConfig(768, 3072, 12, 12)),
        text=_parse_transformers_tower(text, TowerConfig(512, 2048, 12, 8)),
        image_size=vision.size("image_size", 224),
        patch_size=vision.size("patch_size", 32),
        vocab_size=vocab,
        context_length=text.size("max_position_embeddings", 77),
        # With it transformers looks for the largest id of a row, which is the end token's.
        eos_token_id=vocab - 1 if eos == LEGACY_EOS else eos,
        projection_dim=top.size("projection_dim", 512),
        image_mean=mean,
        image_std=std,
    )


def parse_vision(folder: Path, problems: Problems) -> ClipVisionConfig:
    """Returns the sizes of the vision tower in a folder of transformers, and the normalisation.

    The folder holds a whole CLIP, or its vision tower alone.
    Raises: InputError for a file that cannot be read.
    """
    file = folder / "config.json"
    top = Fields(str(file), read_json(file), problems)
    top.expect("model_type", ("clip", VISION_TYPE), "the tower of a CLIP is read")
    is_whole = top.data.get("model_type") != VISION_TYPE
    vision = _read_tower_fields(top, "vision_config") if is_whole else top
    vision.expect("num_channels", (3,), "images are RGB")
    mean, std = _read_processor_norm(folder, problems)
    return ClipVisionConfig(
        vision=_parse_transformers_tower(vision, TowerConfig(768, 3072, 12, 12)),
        image_size=vision.size("image_size", 224),
        patch_size=vision.size("patch_size", 32),
        image_mean=mean,
        image_std=std,
    )


def check_vision(config: ClipVisionConfig, where: str) -> list[str]:
    """Lists sizes of a vision tower that do not fit each other."""
    tower = config.vision
    return check_divisible(
        where,
        ("image_size", config.image_size, "patch_size", config.patch_size),
        ("hidden_size", tower.hidden_size, "num_heads", tower.num_heads),
    )


def make_vision_files(config: ClipVisionConfig) -> dict[str, dict[str, Any]]:
    """Returns name -> JSON of the files with which transformers reads a vision tower alone."""
    tower, size = config.vision, config.image_size
    return {
        "config.json": {
            "architectures": ["CLIPVisionModel"], "attention_dropout": 0.0,
            "hidden_act": tower.activation, "hidden_size": tower.hidden_size, "image_size": size,
            "intermediate_size": tower.intermediate_size, "layer_norm_eps": tower.layer_norm_eps,
            "model_type": VISION_TYPE, "num_attention_heads": tower.num_heads, "num_channels": 3,
            "num_hidden_layers": tower.num_layers, "patch_size": config.patch_size,
        },
        "preprocessor_config.json": {
            "crop_size": {"height": size, "width": size}, "do_center_crop": True,
            "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
            "image_mean": list(config.image_mean), "image_processor_type": "CLIPImageProcessor",
            "image_std": list(config.image_std), "resample": BICUBIC,
            "rescale_factor": 1 / 255, "size": {"shortest_edge": size},
        },
    }  # fmt: skip


def _read_tower_fields(top: Fields, name: str) -> Fields:
    """Returns a tower's settings."""
    # Old files repeat them as `text_config_dict`, and transformers prefers that one.
    section, repeated = top.section(name), top.section(f"{name}_dict")
    return Fields(section.where, {**section.data, **repeated.data}, top.problems)


def _parse_transformers_tower(fields: Fields, usual: TowerConfig) -> TowerConfig:
    fields.expect("hidden_act", ACTIVATIONS, "no other is implemented")
    return TowerConfig(
        hidden_size=fields.size("hidden_size", usual.hidden_size),
        intermediate_size=fields.size("intermediate_size", usual.intermediate_size),
        num_layers=fields.size("num_hidden_layers", usual.num_layers, limit=10_000),
        num_heads=fields.size("num_attention_heads", usual.num_heads),
        activation=fields.data.get("hidden_act", ACTIVATIONS[0]),
        layer_norm_eps=fields.number("layer_norm_eps", 1e-5),
    )


def _read_processor_norm(folder: Path, problems: Problems) -> tuple[tuple[float, ...], ...]:
    """Returns mean and std from the image processor's file; without a file, CLIP's."""
    for name, section in (("preprocessor_config", None), ("processor_config", "image_processor")):
        file = folder / f"{name}.json"
        if not file.is_file():
            continue
        fields = Fields(str(file), read_json(file), problems)
        fields = fields if section is None else fields.section(section)
        fields.expect("resample", (BICUBIC,), "images are resized bicubically")
        for step in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
            fields.expect(step, (True,), "images are always prepared so")
        factor = fields.number("rescale_factor", 1 / 255)
        if abs(factor * 255 - 1) > 1e-4:
            problems.add(f"{fields.where}: rescale_factor is {factor}, expected 1 / 255")
        return _parse_norm(fields, "image_mean", "image_std")
    return ClipConfig().image_mean, ClipConfig().image_std


def _parse_norm(fields: Fields, mean: str, std: str) -> tuple[tuple[float, ...], ...]:
    usual = ClipConfig()
    mean_values = _parse_triple(fields, mean, usual.image_mean)
    std_values = _parse_triple(fields, std, usual.image_std)
    if 0 in std_values:
        fields.problems.add(f"{fields.where}: {std} is {std_values}, expected numbers above 0")
    return mean_values, std_values


def _parse_triple(fields: Fields, name: str, usual: tuple[float, ...]) -> tuple[float, ...]:
    value = fields.data.get(name)
    if value is None:
        return usual
    numbers = [x for x in value if type(x) in (int, float)] if isinstance(value, list) else []
    if len(numbers) != 3 or numbers != value or not 0 <= min(numbers) <= max(numbers) < 10:
        fields.problems.add(f"{fields.where}: {name} is {value!r}, expected 3 numbers below 10")
        return usual
    return tuple(float(x) for x in numbers)


def _parse_open_clip(file: Path, problems: Problems) -> ClipConfig:
    top = Fields(str(file), read_json(file), problems)
    model, pixels = top.section("model_cfg"), top.section("preprocess_cfg")
    vision, text = model.section("vision_cfg"), model.section("text_cfg")
    model.expect("quick_gelu", (False, True), "it chooses the activation")
    pixels.expect("interpolation", ("bicubic",), "images are resized bicubically")
    for fields, settings in ((vision, _VISION_SETTINGS), (text, _TEXT_SETTINGS)):
        for name, value in settings.items():
            fields.expect(name, (value,), "nothing else is implemented")
    activation = "quick_gelu" if model.data.get("quick_gelu") else "gelu"
    width = vision.size("width", 768)
    heads = max(1, width // vision.size("head_width", 64))
    mean, std = _parse_norm(pixels, "mean", "std")
    return ClipConfig(
        vision=_parse_open_clip_tower(vision, width, heads, activation),
        text=_parse_open_clip_tower(
            text, text.size("width", 512), text.size("heads", 8), activation
        ),
        image_size=vision.size("image_size", 224),
        patch_size=vision.size("patch_size", 16),
        vocab_size=text.size("vocab_size", 49408),
        context_length=text.size("context_length", 77),
        eos_token_id=text.size("vocab_size", 49408) - 1,
        projection_dim=model.size("embed_dim", None),
        image_mean=mean,
        image_std=std,
    )


def _parse_open_clip_tower(
    fields: Fields, width: int, heads: int, activation: Activation
) -> TowerConfig:
    return TowerConfig(
        hidden_size=width,
        intermediate_size=int(width * fields.number("mlp_ratio", 4.0)),
        num_layers=fields.size("layers", 12, limit=10_000),
        num_heads=heads,
        activation=activation,
    )


def _find_known_sizes(folder: Path, shapes: Mapping[str, Shape], problems: Problems) -> ClipConfig:
    """Returns the sizes of ViT-H/14, and adds a problem if the tensors have other sizes."""
    # HPS v2 is published without settings. Tensors tell neither the number of heads nor the
    # activation, so no other network can be read without them.
    usual = ClipConfig()
    width, features = (
        shapes.get(key, (0,))[-1:] for key in ("visual.class_embedding", "text_projection")
    )
    if (*width, *features) != (usual.vision.hidden_size, usual.projection_dim):
        problems.add(
            f"{folder / OPEN_CLIP_FILE}: is missing; without it only ViT-H/14 is known, of width "
            f"{usual.vision.hidden_size} and with {usual.projection_dim} features, found "
            f"{[*width, *features]}; put the model's {OPEN_CLIP_FILE} there"
        )
    return usual


RULES: Rules = (
    (r".*/layers/attn/[qkv]_proj/kernel", COLUMN),
    (r".*/layers/attn/out_proj/kernel", ROW),
    (r".*/layers/mlp/fc1/kernel", COLUMN),
    (r".*/layers/mlp/fc2/kernel", ROW),
    (r"text_model/token_embedding/embedding", OUTER),
    (r"(text|visual)_projection/kernel", INNER),
    (r"vision_model/(patch|position|class)_embedding(/.*)?", WHOLE),
    (r"text_model/position_embedding/embedding", WHOLE),
    (r".*layer_?norm[12]?/scale", WHOLE),
    (r"logit_scale", WHOLE),
    (r".*/bias", WHOLE),
)

KIND = NetworkKind(
    name="clip",
    module=Clip,
    config=ClipConfig,
    tables=TABLES,
    parse=parse,
    check=check,
    rules=RULES,
    model_types={"clip": None},
)
