"""A base with all layers of SD 2.1 at the widths of nano, which has half of them."""

from dataclasses import replace

from pfstorer_rt.config import PRESETS

_NANO = PRESETS["nano"]
SMALL_SD21 = replace(
    _NANO,
    layers=PRESETS["sd21"].layers,
    unet={**_NANO.unet, "layers_per_block": PRESETS["sd21"].unet["layers_per_block"]},
    structure=replace(_NANO.structure, res_blocks=PRESETS["sd21"].structure.res_blocks),
)
