"""The VAE of a JanusFlow, which is published apart and stands in the model's folder or beside it.

JanusFlow-1.3B/         config.json, model.safetensors, ...           deepseek-ai/JanusFlow-1.3B
    vae/                config.json, diffusion_pytorch_model.safetensors    stabilityai/sdxl-vae
"""

from __future__ import annotations

from pathlib import Path

from corl_jax.errors import Problems
from corl_jax.models.sd_vae import SdVaeConfig
from corl_jax.policies.janus_flow.network import JanusFlowConfig
from corl_jax.weights.kinds import WeightsPart
from corl_jax.weights.layouts import sd_vae
from corl_jax.weights.parts import find_companion
from corl_jax.weights.shards import write_bytes, write_json

VAE = "vae/"
"""Prefix of the VAE's tensors in the table, and of its parameters."""
PARTS = (
    WeightsPart("", None, "", "deepseek-ai/JanusFlow-1.3B"),
    WeightsPart("vae", sd_vae.STEM, VAE, sd_vae.HUB_ID, other_folders=sd_vae.FOLDERS[1:]),
)
ROWS = sd_vae.make_rows(key=VAE, path=VAE)
SCALING = SdVaeConfig().scaling_factor


def read_vae(folder: Path, problems: Problems) -> SdVaeConfig:
    """Reads the sizes of the VAE of a model's folder; adds problems to `problems`.

    Raises: InputError without a VAE, with the command that downloads it.
    """
    place = sd_vae.find_vae_of(folder)
    problems_of_file = Problems()
    sizes = sd_vae.read_sizes(place, problems_of_file)
    # A file that is not read has default sizes, whose problems would be no problems of its own.
    if not problems_of_file:
        problems_of_file.add(_find_scaling_problems(sizes, str(place / "config.json"), place))
    problems.add(problems_of_file)
    return sizes


def find_problems_of_folder(config: JanusFlowConfig, folder: Path) -> list[str]:
    """Lists the problems of the VAE of a model's folder, each with the VAE's own file."""
    place = sd_vae.find_vae_of(folder)
    where = str(place / "config.json")
    return sd_vae.check(config.vae, where) or find_vae_problems(config, where, place)


def find_vae_problems(config: JanusFlowConfig, where: str, place: Path | None = None) -> list[str]:
    """Lists the sizes of a VAE that do not belong to those of the model.

    `where`: the VAE's settings; `place`: its folder, if it has one.
    """
    vae, uvit, patch = config.vae, config.uvit, config.siglip.patch_size
    problems = _find_scaling_problems(vae, where, place)
    if vae.latent_channels != uvit.latent_channels:
        problems.append(
            f"{where}: latent_channels is {vae.latent_channels}, expected "
            f"{uvit.latent_channels}, as the model draws them; {_describe_remedy(place)}"
        )
    if uvit.patch_size * vae.downsample != patch:
        problems.append(
            f"{where}: makes one latent of {vae.downsample} pixels a side, and the model a "
            f"token of {uvit.patch_size} latents, together {uvit.patch_size * vae.downsample} "
            f"pixels, expected {patch}: drawn images have the grid of those in prompts; "
            f"{_describe_remedy(place)}"
        )
    return problems


def _find_scaling_problems(vae: SdVaeConfig, where: str, place: Path | None = None) -> list[str]:
    if vae.scaling_factor == SCALING:
        return []
    return [
        f"{where}: scaling_factor is {vae.scaling_factor:g}, expected {SCALING:g}: this is not "
        f"the VAE with whose latents the model was trained; {_describe_remedy(place)}"
    ]


def explain_vae_problems(problems: list[str]) -> list[str]:
    """Returns a line with the remedy if some of the problems are of the VAE's tensors."""
    sign = f": {VAE}"
    folders = [problem.partition(sign)[0] for problem in problems if sign in problem]
    if not folders:
        return []
    return [
        f"{folders[0]}: the weights of its VAE are not those that the VAE's config.json states, by "
        f"diffusers' names; {_describe_remedy(Path(folders[0]) / PARTS[1].folder)}, or load the "
        f"VAE with diffusers' {sd_vae.CLASS_NAME}, and save it again, or copy the folder "
        "that came with the model"
    ]


def _describe_remedy(place: Path | None = None) -> str:
    return f"run `hf download {sd_vae.HUB_ID} --local-dir {place or 'DIR/vae'}`"


def write_vae_config(folder: Path, vae: SdVaeConfig, origin: Path | None) -> None:
    """Writes the VAE's config.json: that of the model's source, or a new one of these sizes."""
    place = find_companion(origin, *sd_vae.FOLDERS) if origin else None
    file = place / "config.json" if place else None
    (folder / VAE).mkdir(exist_ok=True)
    target = folder / VAE / "config.json"
    if file and file.is_file():
        problems = Problems()
        # The source's file keeps settings that this package does not read.
        if sd_vae.read_sizes(file.parent, problems) == vae and not problems:
            write_bytes(target, file.read_bytes())
            return
    write_json(target, sd_vae.make_config(vae))
