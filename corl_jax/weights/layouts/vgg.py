"""The layouts of LPIPS on VGG16: the trunk of torchvision or timm, or trunk and heads in one file.

The five heads have the same names in lpips's and torchmetrics' files. They ship with this package,
and are used if the files have none.

Sources: torchvision and timm, `models/vgg.py`; lpips 0.1.4; torchmetrics 1.9
`functional/image/lpips.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from corl_jax.assets import LPIPS_HEADS
from corl_jax.errors import Problems
from corl_jax.models.vgg import Lpips, VggConfig
from corl_jax.weights.foreign_config import check_count
from corl_jax.weights.kinds import WHOLE, NetworkKind, Rules
from corl_jax.weights.table import CONV, Row, Shape, Table
from corl_jax.weights.table_rows import conv

# Activations and poolings have numbers too: conv 0, ReLU 1, conv 2, ReLU 3, pool 4, conv 5, ..
PLACES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Numbers of each stage's convolutions in torchvision's `features`."""
LAYOUTS = {"torchvision": "features.{place}", "lpips": "net.slice{slice}.{place}"}


def make_trunk_key(layout: str, stage: int, index: int) -> str:
    """Returns the torch name of a convolution, without `.weight`."""
    return LAYOUTS[layout].format(slice=stage + 1, place=PLACES[stage][index])


def make_head_key(stage: int) -> str:
    """Returns the torch name of a head's weights."""
    return f"lin{stage}.model.1.weight"


def _make_rows(layout: str) -> tuple[Row, ...]:
    rows = []
    for stage, places in enumerate(PLACES):
        for index in range(len(places)):
            rows += conv(make_trunk_key(layout, stage, index), f"stages/{stage}/{index}")
        rows.append(Row(make_head_key(stage), f"heads/{stage}/kernel", CONV))
    return tuple(rows)


TABLES: dict[str, Table] = {
    "torchvision": Table(
        name="torchvision",
        rows=_make_rows("torchvision"),
        # The second and third are timm's names of the classifier.
        dropped=(r"classifier\..+", r"pre_logits\..+", r"head\..+"),
    ),
    "lpips": Table(
        name="lpips",
        rows=_make_rows("lpips"),
        # `lins` lists the heads a second time; the scaling is a constant of the method.
        dropped=(r"lins\..+", r"scaling_layer\..+"),
    ),
}


def check(config: VggConfig, where: str) -> list[str]:
    """Lists sizes with which the network cannot be built."""
    return check_count(where, "channels", config.channels, len(PLACES))


def parse(folder: Path, layout: str, shapes: Mapping[str, Shape], problems: Problems) -> VggConfig:
    """Returns the widths of the stages; without the trunk a problem says which file is absent."""
    trunk = [f"{make_trunk_key(layout, stage, 0)}.weight" for stage in range(len(PLACES))]
    if not any(key in shapes for key in trunk):
        problems.add(
            f"{folder}: VGG16's convolutions are missing ({trunk[0]} and others); put "
            "torchvision's vgg16-397923af.pth or the model.safetensors of timm/vgg16.tv_in1k there"
        )
    usual = VggConfig().channels
    widths = [shapes[key][0] if shapes.get(key) else usual[i] for i, key in enumerate(trunk)]
    return VggConfig(channels=tuple(widths))


RULES: Rules = (
    (r"(stages|heads)/.*/kernel", WHOLE),  # 59 MB of convolutions
    (r"stages/.*/bias", WHOLE),
)

KIND = NetworkKind(
    name="vgg",
    module=Lpips,
    config=VggConfig,
    tables=TABLES,
    parse=parse,
    check=check,
    rules=RULES,
    packaged=LPIPS_HEADS,
)
