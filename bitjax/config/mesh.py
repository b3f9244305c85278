"""How a run is spread over devices."""

from __future__ import annotations

from dataclasses import dataclass

from bitjax.config.fields import check_fields, require_positive


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; their product is how many a run uses.

    Rows of a batch are shared out over data x fsdp. Weights and the optimiser's state are cut over
    fsdp (ZeRO, arXiv 1910.02054) and tensor (Megatron, arXiv 1909.08053); see
    `bitjax.train.sharding`. The mesh changes no setting of what is computed: a run may go on with
    another one.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        check_fields(self)
        require_positive(self, "data", "fsdp", "tensor")

    @property
    def devices(self) -> int:
        """How many there are."""
        return self.data * self.fsdp * self.tensor
