"""One training run: everything needed to repeat it."""

from __future__ import annotations

from dataclasses import dataclass, field

from bitjax.config.data import DataConfig
from bitjax.config.fields import check_fields, require
from bitjax.config.mesh import MeshConfig
from bitjax.config.model import ModelConfig
from bitjax.config.optimizer import OptimizerConfig
from bitjax.config.train import TrainConfig


@dataclass(frozen=True)
class RunConfig:
    """One training run: everything needed to repeat it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            self.train.seq_len <= self.model.max_seq_len,
            f"train.seq_len={self.train.seq_len} exceeds "
            f"model.max_seq_len={self.model.max_seq_len}",
        )
        model, mesh = self.model, self.mesh
        require(
            self.train.products == "xla" or model.has_integer_products,
            "train.products='integer' wants quantised weights with a scale a tensor or row, and "
            f"int8 activations; got model.weights={model.weights!r}, "
            f"model.weight_scale={model.weight_scale!r}, model.activations={model.activations!r}",
        )
        require(
            self.train.products == "xla" or mesh.devices == 1,
            f"train.products='integer' runs on one device; the mesh has {mesh.devices}",
        )
        require(
            self.train.attention == "xla" or mesh.devices == 1,
            f"train.attention='fused' runs on one device; the mesh has {mesh.devices}",
        )
        require(
            self.train.attention == "xla" or (model.head_dim % 16 == 0 and model.head_dim <= 512),
            "train.attention='fused' wants heads of a multiple of 16 dimensions, 512 at most; got "
            f"model.head_dim={model.head_dim}",
        )
        for name in ("weights", "activations"):
            require(
                self.train.stochastic_rounding not in (name, "both")
                or getattr(self.model, name) != "float",
                f"train.stochastic_rounding={self.train.stochastic_rounding!r} rounds {name}, and "
                f"model.{name}='float' are never rounded",
            )
