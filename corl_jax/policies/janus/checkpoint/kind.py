"""`KIND`: the checkpoints of Janus, in both PyTorch layouts and in that of corl_jax."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corl_jax.policies.janus.checkpoint import original, original_keys, transformers
from corl_jax.policies.janus.checkpoint import transformers_keys as keys
from corl_jax.policies.janus.checkpoint.assets import COPIED, require_tokenizer, write_assets
from corl_jax.policies.janus.checkpoint.settings import MODEL_TYPES, OWN_FORMAT, check, parse
from corl_jax.policies.janus.layout import RULES
from corl_jax.policies.janus.network import Janus, JanusConfig
from corl_jax.policies.janus.tokens import special_tokens
from corl_jax.weights.adapters import adapter_table
from corl_jax.weights.kinds import ForeignExport, NetworkKind, PeftFormat

FLOW_SECTION = "vision_gen_enc_config"
"""Section of config.json that a JanusFlow has and a Janus has not."""


def check_expressible(layout: str, config: JanusConfig) -> None:
    """Checks that the layout can express the sizes. Raises: InputError if not."""
    if layout == "transformers":
        transformers.check_expressible(config)


def write_config(
    layout: str, config: JanusConfig, dtype: str, tokenizer: Path | None
) -> dict[str, Any]:
    """Returns the JSON of a new config.json.

    Raises: InputError without the tokenizer whose ids transformers' layout states.
    """
    if layout == "original":
        return original.write(config, dtype)
    return transformers.write(config, dtype, special_tokens(require_tokenizer(tokenizer)))


def restate_config(layout: str, data: dict[str, Any]) -> dict[str, Any]:
    """Returns the source's config.json with untied embeddings, as the weights are written."""
    # transformers' class default is tied: it would replace lm_head by the embeddings.
    return {**data, "tie_word_embeddings": False} if layout == "transformers" else data


def explain_tied_head(problems: list[str], layout: str, data: Mapping[str, Any]) -> list[str]:
    """Returns the problems; adds a remedy to a missing text head of a tied checkpoint."""
    # An absent key counts as tied: transformers' class default is true.
    if layout != "transformers" or not data.get("tie_word_embeddings", True):
        return problems
    head, table = (
        keys.TABLE.find_row(path)[0].key
        for path in ("lm_head/kernel", "language_model/embed_tokens/embedding")
    )
    return [
        f"{problem}; this checkpoint is tied (tie_word_embeddings): store a copy of {table} as "
        f"{head}, and set tie_word_embeddings to false in config.json"
        if f": {head} is missing" in problem
        else problem
        for problem in problems
    ]


def explain_problems(problems: list[str], layout: str, data: Mapping[str, Any]) -> list[str]:
    """Returns the problems of the tensors with their cause or their remedy, where it is known."""
    if layout == "original" and (where := find_strange_weights(problems, "vision_gen_enc_model.")):
        return [
            f"{where}: its tensors are those of a JanusFlow, but its config.json is of a Janus; "
            "put the config.json there that came with the weights"
        ]
    return explain_tied_head(problems, layout, data)


def find_strange_weights(problems: list[str], name: str) -> str | None:
    """Returns the place of weights with an unknown tensor whose name begins with `name`."""
    sign = f": {name}"
    return next((p.split(sign)[0] for p in problems if sign in p and " is unknown to" in p), None)


def find_other_kind(data: Mapping[str, Any]) -> str | None:
    """Describes a config.json of a JanusFlow, which has the model_type of a Janus."""
    if FLOW_SECTION not in data:
        return None
    return (
        f"has a {FLOW_SECTION}, so it is of a JanusFlow, expected a Janus; give a Janus, or use "
        "this model where a JanusFlow is expected"
    )


KIND = NetworkKind(
    name="janus",
    module=Janus,
    config=JanusConfig,
    tables={"original": original_keys.TABLE, "transformers": keys.TABLE},
    parse=parse,
    check=check,
    model_types=MODEL_TYPES,
    find_other_kind=find_other_kind,
    rules=RULES,
    files=COPIED,
    own_format=OWN_FORMAT,
    foreign_export=ForeignExport(
        check=check_expressible,
        write_config=write_config,
        restate_config=restate_config,
        write_assets=write_assets,
        # The carried tensors belong to the vision tower, so its sizes are theirs.
        carried_sizes=lambda config: config.siglip,
        usual_layout="transformers",
    ),
    explain=explain_problems,
    peft=PeftFormat(
        table=adapter_table(keys.TABLE, "language_model/layers/"),
        auto_mapping={
            "base_model_class": "JanusForConditionalGeneration",
            "parent_library": "transformers.models.janus.modeling_janus",
        },
        layers=r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.",
    ),
)
