"""`KIND`: the checkpoints of Show-o, in the original files and in the layout of corl_jax."""

from __future__ import annotations

from corl_jax.policies.show_o.checkpoint import sizes
from corl_jax.policies.show_o.checkpoint.files import (
    TOKENIZER_FILES,
    locate_tokenizer,
    note_assumptions,
    write_assets,
)
from corl_jax.policies.show_o.checkpoint.show_o_keys import PARTS, TABLE, derive
from corl_jax.policies.show_o.layout import RULES
from corl_jax.policies.show_o.network import ShowO, ShowOConfig
from corl_jax.weights.adapters import adapter_table
from corl_jax.weights.kinds import ForeignExport, NetworkKind, PeftFormat

KIND = NetworkKind(
    name="show_o",
    module=ShowO,
    config=ShowOConfig,
    tables={"original": TABLE},
    parse=sizes.parse,
    check=sizes.check,
    parts=PARTS,
    derive=derive,
    # Most sizes are in the tensors, so these are read before the sizes.
    model_types={sizes.CLASS_NAME: None},
    note_assumptions=note_assumptions,
    rules=RULES,
    files=TOKENIZER_FILES,
    find_tokenizer=locate_tokenizer,
    foreign_export=ForeignExport(
        check=sizes.check_expressible,
        write_config=sizes.write_config,
        restate_config=lambda layout, data: data,
        write_assets=write_assets,
        carried_sizes=lambda config: None,
    ),
    peft=PeftFormat(
        table=adapter_table(TABLE, "language_model/layers/"),
        auto_mapping={"base_model_class": "Showo", "parent_library": "models.modeling_showo"},
        layers=r"showo\.model\.layers\.\d+\.(self_attn|mlp)\.",
    ),
)
