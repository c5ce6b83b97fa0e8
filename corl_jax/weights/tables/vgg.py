"""LPIPS on VGG16: torchvision's trunk with the heads in a file of their own, or both in one.

Convolutions are numbered by their place among the activations and poolings between them. The
five heads are named alike in lpips's and torchmetrics' files.
Sources: torchvision `models/vgg.py`; lpips 0.1.4; torchmetrics 1.9 `functional/image/lpips.py`.
"""

from __future__ import annotations

from corl_jax.weights.table import CONV, Row, Table
from corl_jax.weights.tables.rows import conv

PLACES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Of the convolutions of each stage among torchvision's `features`."""
LAYOUTS = {"torchvision": "features.{place}", "lpips": "net.slice{slice}.{place}"}


def trunk_key(layout: str, stage: int, index: int) -> str:
    """The torch name of a convolution, without `.weight`."""
    return LAYOUTS[layout].format(slice=stage + 1, place=PLACES[stage][index])


def head_key(stage: int) -> str:
    """The torch name of a head's weights."""
    return f"lin{stage}.model.1.weight"


def _rows(layout: str) -> tuple[Row, ...]:
    rows = []
    for stage, places in enumerate(PLACES):
        for index in range(len(places)):
            rows += conv(trunk_key(layout, stage, index), f"stages/{stage}/{index}")
        rows.append(Row(head_key(stage), f"heads/{stage}/kernel", CONV))
    return tuple(rows)


TABLES: dict[str, Table] = {
    "torchvision": Table(
        name="torchvision",
        rows=_rows("torchvision"),
        # The second and third are what timm calls the classifier.
        dropped=(r"classifier\..+", r"pre_logits\..+", r"head\..+"),
    ),
    "lpips": Table(
        name="lpips",
        rows=_rows("lpips"),
        # `lins` lists the heads a second time; the scaling is a constant of the method.
        dropped=(r"lins\..+", r"scaling_layer\..+"),
    ),
}
