"""What training costs elsewhere: an accelerator's speed and price."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bitjax.config.fields import require


@dataclass(frozen=True)
class Prices:
    """An accelerator, by default an H100: 989 TFLOP/s of dense bfloat16 (NVIDIA's data sheet), 40 %
    of which large trainings reach (Llama 3, arXiv 2407.21783, table 4: 38 to 43 %), and about what
    an hour is rented for."""

    flops_per_second: float = 4e14
    dollars_per_hour: float = 2.5

    def __post_init__(self) -> None:
        for name in ("flops_per_second", "dollars_per_hour"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name}={value} is not a number above 0")
