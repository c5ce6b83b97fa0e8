"""The layouts of the VAE of Stable Diffusion, as diffusers and as latent diffusion name it.

    sdxl-vae/       config.json, diffusion_pytorch_model.safetensors     stabilityai/sdxl-vae

`find_vae` also finds such a folder as `vae` or `sdxl-vae` in the folder of a larger model. Fields
that config.json lacks have the defaults of diffusers' AutoencoderKL. A file in the layout of latent
diffusion needs no config.json.

Sources: diffusers 0.42 `models/autoencoders`; CompVis/latent-diffusion, `ldm/modules`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corl_jax.errors import InputError, Problems
from corl_jax.models.sd_vae import SdVae, SdVaeConfig
from corl_jax.types import DTYPES, Params
from corl_jax.weights.autoencoder_rows import make_res_block_rows, make_vq_half_rows
from corl_jax.weights.checkpoint import Checkpoint, open_checkpoint
from corl_jax.weights.foreign_config import Fields, check_divisible
from corl_jax.weights.hub import resolve_path
from corl_jax.weights.kinds import WHOLE, Assets, ForeignExport, NetworkKind, Rules, WeightsPart
from corl_jax.weights.parts import find_companion
from corl_jax.weights.recognise import read_stated_type, recognise_kind
from corl_jax.weights.selection import list_weights
from corl_jax.weights.storage import read_json
from corl_jax.weights.table import POINTWISE, Row, Shape, Table
from corl_jax.weights.table_rows import conv, norm

CLASS_NAME, HUB_ID = "AutoencoderKL", "stabilityai/sdxl-vae"
FOLDERS = ("vae", "sdxl-vae")
"""Names of the VAE's folder in the folder of a larger model, or beside it."""
STEM = "diffusion_pytorch_model"
DIFFUSERS, OLD_DIFFUSERS, LDM = "diffusers", "diffusers_old", "ldm"
ATTENTION = {
    DIFFUSERS: ("to_q", "to_k", "to_v", "to_out.0"),
    OLD_DIFFUSERS: ("query", "key", "value", "proj_attn"),
}
"""Names of the attention's layers; those of the second were written until diffusers 0.14."""
LDM_LEVELS = 4  # of every published VAE in this layout
_MAX_BLOCKS, _MAX_LEVELS = 100, 8
_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
_VERSION = "0.42.1"


def _make_attention_rows(key: str, path: str, names: Sequence[str]) -> list[Row]:
    # diffusers has linear layers where our network and latent diffusion have 1x1 convolutions.
    rows = norm(f"{key}.group_norm", f"{path}/norm")
    for torch, leaf in zip(names, ("q", "k", "v", "proj_out"), strict=True):
        rows.append(Row(f"{key}.{torch}.weight", f"{path}/{leaf}/kernel", POINTWISE))
        rows.append(Row(f"{key}.{torch}.bias", f"{path}/{leaf}/bias"))
    return rows


def _make_half_rows(half: str, levels: str, resample: str, names: Sequence[str]) -> list[Row]:
    # ("encoder", "down", "downsample"): {i} is the level, {j} the block of a level.
    torch, leaf = f"{half}.{levels}_blocks.{{i}}", f"{half}/{levels}/{{i}}"
    mid, bottom = f"{half}.mid_block", f"{half}/mid"
    return [
        *conv(f"{half}.conv_in", f"{half}/conv_in"),
        *make_res_block_rows(f"{torch}.resnets.{{j}}", f"{leaf}/block/{{j}}", "conv_shortcut"),
        *conv(f"{torch}.{resample}rs.0.conv", f"{leaf}/{resample}/conv"),
        *make_res_block_rows(f"{mid}.resnets.0", f"{bottom}/block_1"),
        *_make_attention_rows(f"{mid}.attentions.0", f"{bottom}/attn_1", names),
        *make_res_block_rows(f"{mid}.resnets.1", f"{bottom}/block_2"),
        *norm(f"{half}.conv_norm_out", f"{half}/norm_out"),
        *conv(f"{half}.conv_out", f"{half}/conv_out"),
    ]


def _make_ldm_rows() -> list[Row]:
    mid = ("block_1", "attn_1", "block_2")
    rows = make_vq_half_rows("encoder", "encoder", "down", "block", mid, "downsample", "down")
    for row in make_vq_half_rows("decoder", "decoder", "up", "block", mid, "upsample", "up"):
        if "{i}" not in row.key:
            rows.append(row)
            continue
        # Latent diffusion numbers the decoder's levels from the finest: up.3 runs first.
        for level in range(LDM_LEVELS):
            key = row.key.replace("{i}", str(LDM_LEVELS - 1 - level))
            rows.append(Row(key, row.path.replace("{i}", str(level)), row.transform))
    return rows


def make_rows(layout: str = DIFFUSERS, key: str = "", path: str = "") -> tuple[Row, ...]:
    """Returns the rows of a VAE in a layout, with `key` and `path` before all names.

    A larger model puts them into its own table: make_rows(key="vae/", path="vae/").
    """
    if layout == LDM:
        halves = _make_ldm_rows()
    else:
        names = ATTENTION[layout]
        halves = _make_half_rows("encoder", "down", "downsample", names)
        halves += _make_half_rows("decoder", "up", "upsample", names)
    rows = [
        *halves,
        *conv("quant_conv", "quant_conv"),
        *conv("post_quant_conv", "post_quant_conv"),
    ]
    return tuple(Row(key + row.key, path + row.path, row.transform) for row in rows)


TABLES: dict[str, Table] = {
    DIFFUSERS: Table(name=DIFFUSERS, rows=make_rows(DIFFUSERS)),
    OLD_DIFFUSERS: Table(name=OLD_DIFFUSERS, rows=make_rows(OLD_DIFFUSERS)),
    # Files of a training also have its loss, which is a network, and averaged weights.
    LDM: Table(name=LDM, rows=make_rows(LDM), dropped=(r"loss\..+", r"model_ema\..+")),
}


def read_sizes(folder: Path, problems: Problems) -> SdVaeConfig:
    """Reads the sizes that diffusers' config.json of a VAE states; adds problems to `problems`."""
    file = folder / "config.json"
    if not file.is_file():
        problems.add(
            f"{file}: not found, but it states the VAE's sizes and its scaling_factor; copy the "
            f"config.json that belongs to the weights; for those of {HUB_ID} run "
            f"`hf download {HUB_ID} config.json --local-dir {folder}`"
        )
        return SdVaeConfig()
    fields = Fields(str(file), read_json(file), problems)
    if fields.data.get("_class_name") != CLASS_NAME:
        problems.add(
            f"{file}: _class_name is {fields.data.get('_class_name')!r}, expected {CLASS_NAME!r}; "
            f"give the folder of a VAE such as {HUB_ID}"
        )
        return SdVaeConfig()
    _check_fixed_settings(fields)
    config = SdVaeConfig(
        latent_channels=fields.size("latent_channels", 4, limit=1024),
        block_channels=fields.sizes("block_out_channels", (64,)),
        num_res_blocks=fields.size("layers_per_block", 1, limit=_MAX_BLOCKS),
        norm_groups=fields.size("norm_num_groups", 32),
        scaling_factor=fields.number("scaling_factor", 0.18215),
    )
    for name, block in _BLOCKS.items():
        blocks = fields.data.get(name, [block])
        if blocks != [block] * len(config.block_channels):
            problems.add(
                f"{file}: {name} is {blocks!r}, expected {block!r} for each of the "
                f"{len(config.block_channels)} block_out_channels: no other block is implemented"
            )
    return config


def _check_fixed_settings(fields: Fields) -> None:
    """Checks the settings of which the network supports one value."""
    fields.expect("in_channels", (3,), "images are RGB")
    fields.expect("out_channels", (3,), "images are RGB")
    fields.expect("act_fn", ("silu", "swish"), "the only activation implemented")
    for name in ("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"):
        fields.expect(name, (True,), "a VAE without it is not implemented")
    for name in ("shift_factor", "latents_mean", "latents_std"):
        fields.expect(name, (None,), "latents are scaled by scaling_factor alone")


def parse(
    folder: Path, layout: str, shapes: Mapping[str, Shape], problems: Problems
) -> SdVaeConfig:
    """Reads the sizes of a VAE with the tensors `shapes`; adds problems to `problems`."""
    if layout == LDM and not (folder / "config.json").is_file():
        return _infer_sizes(shapes)
    return read_sizes(folder, problems)


def _infer_sizes(shapes: Mapping[str, Shape]) -> SdVaeConfig:
    """Returns the sizes that tensors named by latent diffusion show, else those of SDXL."""
    usual = SdVaeConfig()
    widths = [
        shapes.get(f"encoder.down.{level}.block.0.conv1.weight", ()) for level in range(LDM_LEVELS)
    ]
    blocks = sum(f"encoder.down.0.block.{n}.conv1.weight" in shapes for n in range(_MAX_BLOCKS))
    latents = shapes.get("post_quant_conv.bias", ())
    return SdVaeConfig(
        latent_channels=latents[0] if latents and latents[0] else usual.latent_channels,
        block_channels=tuple(
            width[0] if width and width[0] else fallback
            for width, fallback in zip(widths, usual.block_channels)
        ),
        num_res_blocks=blocks or usual.num_res_blocks,
    )


def check(config: SdVaeConfig, where: str) -> list[str]:
    """Lists sizes with which the network cannot be built."""
    levels, problems = len(config.block_channels), []
    if levels > _MAX_LEVELS:
        problems.append(
            f"{where}: found {levels} block_channels, expected at most {_MAX_LEVELS} levels"
        )
    groups = "norm_groups", config.norm_groups
    widths = dict.fromkeys(config.block_channels)
    return problems + check_divisible(where, *(("block_channels", n, *groups) for n in widths))


def note_assumptions(folder: Path, config: SdVaeConfig) -> list[str]:
    """Returns a line with the settings that no file states."""
    if (folder.parent if folder.is_file() else folder).joinpath("config.json").is_file():
        return []
    return [
        f"{folder}: no config.json states scaling_factor and the groups of the norms; they are "
        f"taken to be those of {HUB_ID}: {config.scaling_factor:g} and {config.norm_groups}"
    ]


def make_config(config: SdVaeConfig) -> dict[str, Any]:
    """Returns the config.json of a VAE of these sizes, as diffusers reads it."""
    levels = len(config.block_channels)
    return {
        "_class_name": CLASS_NAME,
        "_diffusers_version": _VERSION,
        "act_fn": "silu",
        "block_out_channels": list(config.block_channels),
        **{name: [block] * levels for name, block in _BLOCKS.items()},
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.norm_groups,
        "out_channels": 3,
        "scaling_factor": config.scaling_factor,
    }


def _check_written(layout: str, config: SdVaeConfig) -> None:
    if layout == LDM:
        raise InputError(f"layout {LDM!r}: is only read; write {DIFFUSERS!r}")


def _write_assets(
    folder: Path, layout: str, config: SdVaeConfig, source: Assets | None, stated: Mapping[str, Any]
) -> list[str]:
    return note_assumptions(source.folder, config) if source and source.layout == LDM else []


def _explain(problems: list[str], layout: str, data: Mapping[str, Any]) -> list[str]:
    remedy = (
        f"its weights are not those of the VAE that its config.json states; run `hf download "
        f"{HUB_ID} --local-dir DIR`, and give DIR"
    )
    # In front, because a command prints the first problems alone.
    return [remedy, *problems] if problems else []


RULES: Rules = ((r".*", WHOLE),)  # 84 million parameters: small beside a model of latents

KIND = NetworkKind(
    name="sd_vae",
    module=SdVae,
    config=SdVaeConfig,
    tables=TABLES,
    parse=parse,
    check=check,
    parts=(WeightsPart("", STEM, "", HUB_ID),),
    model_types={CLASS_NAME: None},
    note_assumptions=note_assumptions,
    rules=RULES,
    files=(),
    explain=_explain,
    foreign_export=ForeignExport(
        check=_check_written,
        write_config=lambda layout, config, dtype, tokenizer: make_config(config),
        restate_config=lambda layout, data: data,
        write_assets=_write_assets,
        carried_sizes=lambda config: None,
    ),
)


def find_vae(path: Path) -> Path:
    """Returns the file or folder of a VAE: `path` itself, or `vae` or `sdxl-vae` in it.

    Raises: InputError with the command that downloads one.
    """
    if path.is_file() or recognise_kind(path, [KIND]):
        return path
    inside = [path / name for name in FOLDERS if (path / name).is_dir()]
    # A file of latent diffusion has no config.json beside it.
    if not inside and not (path / "config.json").is_file() and list_weights(path):
        return path
    if not inside:
        stated = _read_class(path)
        other = f"; its config.json is of {stated!r}" if stated else ""
        raise InputError(f"{path}: holds no VAE{other}{_describe_remedy(path)}")
    return inside[0]


def find_vae_of(folder: Path) -> Path:
    """Returns the folder of a larger model's VAE: `vae` or `sdxl-vae`, inside of it or beside it.

    Raises: InputError with the command that downloads one.
    """
    place = find_companion(folder, *FOLDERS)
    if place is None:
        if file := _find_lone_file(folder):
            raise InputError(_describe_lone_file(file, folder / FOLDERS[0]))
        raise InputError(
            f"{folder}: no folder {' or '.join(FOLDERS)} is in it or beside it"
            f"{_describe_remedy(folder / FOLDERS[0])}"
        )
    return place


def _find_lone_file(folder: Path) -> Path | None:
    """Returns weights whose name says that they are of a VAE, in a model's folder or beside it."""
    files = (file for place in (folder, folder.absolute().parent) for file in list_weights(place))
    return next((file for file in files if "vae" in file.name.lower()), None)


def _describe_lone_file(file: Path, place: Path) -> str:
    # Not read with usual settings: VAEs of other scales have tensors of the same names and shapes.
    return (
        f"{file}: found a file of weights, expected a folder {place} with config.json and "
        f"{STEM}.safetensors; if the file is of {HUB_ID} by diffusers' names, move it to "
        f"{place / STEM}{file.suffix} and run `hf download {HUB_ID} config.json --local-dir "
        f"{place}`; else run `hf download {HUB_ID} --local-dir {place}`"
    )


def _read_class(folder: Path) -> Any:
    file = folder / "config.json"
    return read_stated_type(read_json(file)) if file.is_file() else None


def _describe_remedy(place: Path) -> str:
    return (
        f", expected config.json of an {CLASS_NAME} and {STEM}.safetensors there; run "
        f"`hf download {HUB_ID} --local-dir {place}`, or copy the folder there"
    )


def open_vae(path_or_hub_id: str | Path) -> Checkpoint:
    """Opens and checks a VAE at a place of `find_vae` or on the hub.

    Raises: InputError listing every setting and tensor that does not fit.
    """
    return open_checkpoint(find_vae(resolve_path(path_or_hub_id)), KIND)


def load_vae(path_or_hub_id: str | Path, dtype: str = "float32") -> tuple[SdVaeConfig, Params]:
    """Returns the sizes and the parameters, as NumPy arrays, of a VAE; see `open_vae`.

    Raises: InputError also for NaN in the weights, and for a dtype in which it cannot compute.
    """
    if dtype not in DTYPES:
        raise InputError(
            f"dtype: found {dtype!r} for the VAE, expected {' or '.join(DTYPES)}: float16 "
            "overflows in its decoder"
        )
    with open_vae(path_or_hub_id) as opened:
        return opened.config, opened.load(DTYPES[dtype])
