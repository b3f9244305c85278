"""Frozen configurations: what a model is, what it learns from, and how it is trained.

Every default lives here and nowhere else. Dimensions, with the letters that name array axes in
the code (`x_BxTxD`):

    B batch          T positions in a sequence    S positions in a KV cache
    D hidden_size    F intermediate_size          V vocab_size
    H num_heads      G num_kv_heads               h head_dim
    N rows (output features) and K columns (input features) of one linear layer
"""

from bitjax.config.batch import BatchConfig, BatchOrder
from bitjax.config.corpus import TOKENIZER_VOCAB_SIZE, CorpusConfig, CorpusKind
from bitjax.config.data import DataConfig
from bitjax.config.engine import EngineConfig
from bitjax.config.fields import from_dict, from_json, override, to_json
from bitjax.config.mesh import MeshConfig
from bitjax.config.model import (
    ActivationQuantizer,
    CacheDType,
    DType,
    ModelConfig,
    RopeScaling,
    WeightQuantizer,
)
from bitjax.config.optimizer import OptimizerConfig
from bitjax.config.run import RunConfig
from bitjax.config.scaling import Group, StudyConfig
from bitjax.config.serve import ServeConfig
from bitjax.config.train import WATCHING, Products, TrainAttention, TrainConfig

__all__ = [
    "TOKENIZER_VOCAB_SIZE", "WATCHING", "ActivationQuantizer", "BatchConfig", "BatchOrder",
    "CacheDType", "CorpusConfig", "CorpusKind", "DType", "DataConfig", "EngineConfig", "Group",
    "MeshConfig", "ModelConfig", "OptimizerConfig", "Products", "RopeScaling", "RunConfig",
    "ServeConfig", "StudyConfig", "TrainAttention", "TrainConfig", "WeightQuantizer", "from_dict",
    "from_json", "override", "to_json",
]  # fmt: skip
