"""`KIND`: the checkpoints of JanusFlow, in the original layout and in that of corl_jax."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corl_jax.policies.janus.checkpoint import assets
from corl_jax.policies.janus.checkpoint.kind import find_strange_weights
from corl_jax.policies.janus_flow.checkpoint import flow_config
from corl_jax.policies.janus_flow.checkpoint.flow_keys import TABLE
from corl_jax.policies.janus_flow.checkpoint.vae_files import (
    PARTS,
    explain_vae_problems,
    write_vae_config,
)
from corl_jax.policies.janus_flow.layout import RULES
from corl_jax.policies.janus_flow.network import JanusFlow, JanusFlowConfig
from corl_jax.weights.adapters import adapter_table
from corl_jax.weights.kinds import Assets, ForeignExport, NetworkKind, PeftFormat


def find_other_kind(data: Mapping[str, Any]) -> str | None:
    """Describes a config.json of a Janus, which has the model_type of a JanusFlow."""
    if flow_config.ENCODER in data:
        return None
    return (
        f"has no {flow_config.ENCODER}, so it is not of a JanusFlow but probably of a Janus; give "
        "a JanusFlow, or use this model where a Janus is expected"
    )


def _find_janus(problems: list[str]) -> str | None:
    """Returns the place of weights with the image decoder of a Janus, in either of its layouts."""
    for name in ("gen_vision_model.", "model.vqmodel."):
        if where := find_strange_weights(problems, name):
            return where
    return None


def explain_problems(problems: list[str], layout: str, data: Mapping[str, Any]) -> list[str]:
    """Returns the problems of the tensors, with the remedy in front if they are of the VAE.

    If the tensors are those of a Janus, returns this cause alone.
    """
    if layout == "original" and (where := _find_janus(problems)):
        return [
            f"{where}: its tensors are those of a Janus, but its config.json is of a JanusFlow; "
            "put the config.json there that came with the weights"
        ]
    return [*explain_vae_problems(problems), *problems]


def write_assets(
    folder: Path, layout: str, config: JanusFlowConfig, source: Assets | None,
    stated: Mapping[str, Any],
) -> list[str]:  # fmt: skip
    """Writes the small files of the model and of its VAE; returns notes on missing files."""
    write_vae_config(folder, config.vae, source.folder if source else None)
    return assets.write_assets(folder, layout, config, source, stated)


KIND = NetworkKind(
    name="janus_flow",
    module=JanusFlow,
    config=JanusFlowConfig,
    tables={"original": TABLE},
    parse=flow_config.parse,
    check=flow_config.check,
    parts=PARTS,
    model_types={"multi_modality": "original"},
    find_other_kind=find_other_kind,
    rules=RULES,
    files=assets.COPIED,
    foreign_export=ForeignExport(
        check=flow_config.check_expressible,
        write_config=flow_config.write_config,
        restate_config=lambda layout, data: data,
        write_assets=write_assets,
        # The carried tensors belong to the vision tower, so its sizes are theirs.
        carried_sizes=lambda config: config.siglip,
    ),
    explain=explain_problems,
    peft=PeftFormat(
        table=adapter_table(TABLE, "language_model/layers/"),
        auto_mapping={
            "base_model_class": "MultiModalityCausalLM",
            "parent_library": "janus.janusflow.models.modeling_vlm",
        },
        layers=r"language_model\.model\.layers\.\d+\.(self_attn|mlp)\.",
    ),
)
