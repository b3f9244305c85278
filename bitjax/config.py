"""Frozen configurations: what a model is, what it learns from, and how it is trained.

Every default lives here and nowhere else. Dimensions, with the letters that name array axes in
the code (`x_BxTxD`):

    B batch          T positions in a sequence    S positions in a KV cache
    D hidden_size    F intermediate_size          V vocab_size
    H num_heads      G num_kv_heads               h head_dim
    N rows (output features) and K columns (input features) of one linear layer
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

WeightQuantizer = Literal["ternary", "binary", "float"]
ActivationQuantizer = Literal["int8", "float"]
DType = Literal["float32", "bfloat16"]
CacheDType = Literal["float32", "bfloat16", "int8"]
C = TypeVar("C")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies `f` are slowed down for contexts longer than those first trained on.

    linear: `f / factor`. llama3: as linear for wavelengths `2 pi / f` above `original_max_seq_len /
    low_freq_factor`, unchanged below `original_max_seq_len / high_freq_factor`, interpolated
    between ("The Llama 3 Herd of Models", arXiv 2407.21783; Llama 3.1's released code).
    """

    kind: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self) -> None:
        _check_fields(self)
        _require_positive(
            self, "factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"
        )
        _require(
            self.low_freq_factor < self.high_freq_factor,
            f"rope_scaling.low_freq_factor={self.low_freq_factor} is not below "
            f"rope_scaling.high_freq_factor={self.high_freq_factor}",
        )


@dataclass(frozen=True)
class ModelConfig:
    """The shape and number formats of one decoder-only transformer (no biases anywhere)."""

    vocab_size: int = 256
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 32
    max_seq_len: int = 256  # positions a KV cache may hold
    activation: Literal["silu", "relu2"] = "relu2"  # gate of the FFN; relu2(x) = max(x, 0)^2
    sub_norm: bool = True  # SubLN: RMSNorm before the attention output and FFN down projections
    inner_norm: bool = False  # RMSNorm inside every BitLinear instead of the block's pre-norms
    linear_norm_eps: float | None = None  # not None: RMSNorm of its own before every matrix (q, k,
    # v, ... each), after the block's norms; transformers' use_rms_norm
    float_layers: tuple[str, ...] = ()  # shell patterns of linear layers that stay float, both
    # weights and activations: "blocks.0.*", "*.ffn.down"
    tie_embeddings: bool = True
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    norm_eps: float = 1e-5
    weights: WeightQuantizer = "ternary"  # every linear layer but the embedding and the head
    activations: ActivationQuantizer = "int8"  # inputs of those layers, per token
    init_std: float = 0.02  # standard deviation of every initial weight

    def __post_init__(self) -> None:
        _check_fields(self)
        _require_positive(
            self, "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads",
            "num_kv_heads", "head_dim", "max_seq_len", "rope_theta", "norm_eps", "init_std",
        )  # fmt: skip
        _require(
            self.linear_norm_eps is None or self.linear_norm_eps > 0,
            f"model.linear_norm_eps={self.linear_norm_eps} must be above 0",
        )
        _require(
            not self.inner_norm or self.linear_norm_eps is None,
            "model.inner_norm and model.linear_norm_eps both put a norm before every matrix; "
            "choose one",
        )
        _require(
            len(self.float_layers) <= 4 * self.num_layers,
            f"model.float_layers has {len(self.float_layers)} patterns for "
            f"{4 * self.num_layers} linear layers",
        )
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads={self.num_heads} is not a multiple of "
            f"model.num_kv_heads={self.num_kv_heads}",
        )
        _require(
            self.head_dim % 2 == 0,
            f"model.head_dim={self.head_dim} is odd; rotary embedding needs it even",
        )

    def is_float_layer(self, name: str) -> bool:
        """Whether `float_layers` names a linear layer, e.g. `blocks.0.attention.qkv`."""
        return any(fnmatchcase(name, pattern) for pattern in self.float_layers)

    def full_precision_twin(self) -> ModelConfig:
        """The same shape with float weights and activations."""
        return dataclasses.replace(self, weights="float", activations="float")


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from."""

    text: str = ""  # path of a UTF-8 or binary file, read as bytes; empty: the packaged Shakespeare
    valid_fraction: float = 0.1  # the last part of the text, never trained on

    def __post_init__(self) -> None:
        _check_fields(self)
        _require(
            0 < self.valid_fraction < 1,
            f"data.valid_fraction={self.valid_fraction} is not between 0 and 1",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with the two-stage schedule of the b1.58 training tips.

    At step t of n: `lr(t) = peak(t) * min(1, (t + 1) / warmup_steps) * (1 - t / n)`, with
    `peak = learning_rate` and decay `weight_decay` before `stage_two_at * n`, and
    `stage_two_learning_rate` and `stage_two_weight_decay` from there on.
    Source: "The Era of 1-bit LLMs: Training Tips, Code and FAQ" (Microsoft, 2024), section 2.
    """

    learning_rate: float = 1.5e-3
    stage_two_learning_rate: float | None = 1.0e-3  # None: learning_rate throughout
    weight_decay: float = 0.1
    stage_two_weight_decay: float | None = 0.0  # None: weight_decay throughout
    stage_two_at: float = 0.5  # fraction of all steps
    warmup_steps: int = 50
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0  # global gradient norm

    def __post_init__(self) -> None:
        _check_fields(self)
        _require_positive(self, "learning_rate", "eps", "clip_norm")
        for name in ("stage_two_learning_rate", "weight_decay", "stage_two_weight_decay"):
            value = getattr(self, name)
            _require(value is None or value >= 0, f"optimizer.{name}={value} is negative")
        _require(self.warmup_steps >= 0, f"optimizer.warmup_steps={self.warmup_steps} is negative")
        for name in ("b1", "b2"):
            _require(0 <= getattr(self, name) < 1, f"optimizer.{name} is not in [0, 1)")
        _require(0 < self.stage_two_at <= 1, "optimizer.stage_two_at is not in (0, 1]")


@dataclass(frozen=True)
class TrainConfig:
    """How long and how often."""

    steps: int = 1000
    batch_size: int = 32  # sequences per optimiser step, all accumulation steps together
    seq_len: int = 128  # tokens predicted per sequence
    accumulate: int = 1  # gradient accumulation steps; divides batch_size
    compute_dtype: DType = "float32"  # of activations; master weights are always float32
    seed: int = 0  # of initial weights and of the data order
    log_every: int = 10  # steps
    eval_every: int = 250  # steps; 0: only at the end
    checkpoint_every: int = 250  # steps; the last step is always kept
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        _check_fields(self)
        _require_positive(
            self, "steps", "batch_size", "seq_len", "accumulate", "log_every",
            "checkpoint_every", "keep_checkpoints",
        )  # fmt: skip
        _require(self.eval_every >= 0, f"train.eval_every={self.eval_every} is negative")
        _require(self.seed >= 0, f"train.seed={self.seed} is negative")
        _require(
            self.batch_size % self.accumulate == 0,
            f"train.batch_size={self.batch_size} is not a multiple of "
            f"train.accumulate={self.accumulate}",
        )


@dataclass(frozen=True)
class RunConfig:
    """One training run: everything needed to repeat it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        _check_fields(self)
        _require(
            self.train.seq_len <= self.model.max_seq_len,
            f"train.seq_len={self.train.seq_len} exceeds "
            f"model.max_seq_len={self.model.max_seq_len}",
        )


def to_json(config: Any) -> str:
    """Serialise a configuration; `from_json` restores an equal one."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(kind: type[C], text: str) -> C:
    """Restore a configuration of class `kind`.

    Raises:
        ValueError: not JSON, an unknown or missing key, or a value of the wrong type or range.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{kind.__name__} is not valid JSON: {error}") from None
    return from_dict(kind, data)


def from_dict(kind: type[C], data: Any, where: str = "") -> C:
    """Build `kind` from nested mappings; keys left out take their defaults.

    Raises:
        ValueError: an unknown key, or a value of the wrong type or range.
    """
    name = where.rstrip(".") or kind.__name__
    _require(isinstance(data, Mapping), f"{name} is not an object of settings: {data!r:.60}")
    hints = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in data:
        shown = key if str(key).isprintable() else repr(key)
        _require(key in known, f"unknown setting {where}{shown}; {name} has {', '.join(known)}")

    def value_of(key: str, value: Any) -> Any:
        if dataclasses.is_dataclass(hints[key]):
            return from_dict(hints[key], value, f"{where}{key}.")
        return tuple(value) if isinstance(value, list) else value  # JSON has no tuples

    return kind(**{key: value_of(key, value) for key, value in data.items()})


def override(config: C, settings: Iterable[str]) -> C:
    """Apply `"section.key=value"` settings, each typed by the field it names.

    Raises:
        ValueError: a setting without `=`, an unknown key, or a value of the wrong type or range.
    """
    data = dataclasses.asdict(config)  # type: ignore[call-overload]
    for setting in settings:
        path, separator, text = setting.partition("=")
        _require(bool(separator), f"setting {setting!r} is not of the form section.key=value")
        *sections, key = path.strip().split(".")
        kind: Any = type(config)
        target = data
        for section in sections:
            kind = typing.get_type_hints(kind).get(section)
            _require(
                dataclasses.is_dataclass(kind), f"unknown setting {path}: no section {section!r}"
            )
            target = target[section]
        known = [f.name for f in dataclasses.fields(kind)]
        _require(key in known, f"unknown setting {path}; known here: {', '.join(known)}")
        target[key] = _parse(path, text.strip(), typing.get_type_hints(kind)[key])
    return from_dict(type(config), data)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _section(config: Any) -> str:
    """Name of a configuration's class as a section: OptimizerConfig -> optimizer."""
    name = type(config).__name__.removesuffix("Config")
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).removeprefix("_")


def _require_positive(config: Any, *names: str) -> None:
    section = _section(config)
    for name in names:
        value = getattr(config, name)
        _require(value > 0, f"{section}.{name}={value} must be above 0")


def _options(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a field's type: `float | None` -> (float, NoneType)."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if hint is float:  # an int that float64 can hold is a fine float; a bool, NaN, infinity is not
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if typing.get_origin(hint) is tuple:  # of strings
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return "a list of strings"
    return "None" if hint is type(None) else f"of type {hint.__name__}"


def _check_fields(config: Any) -> None:
    """Raise ValueError for a field whose value is not of its declared type.

    For a float field a large integer becomes a float: JAX would take it for one of 32 bits.
    """
    section = _section(config)
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        _require(
            any(_fits(value, option) for option in _options(hint)),
            f"{section}.{name}={value!r} is not {' or '.join(map(_describe, _options(hint)))}",
        )
        if type(value) is int and float in _options(hint) and abs(value) >= 2**31:
            object.__setattr__(config, name, float(value))


def _parse(path: str, text: str, hint: Any) -> Any:
    """The value that `text` spells for a field of type `hint`."""
    for option in _options(hint):
        if option is type(None) and text.lower() in ("none", "null"):
            return None
        if option is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if option is str or (typing.get_origin(option) is Literal and _fits(text, option)):
            return text
        if typing.get_origin(option) is tuple:
            return tuple(filter(None, text.split(",")))
        if option in (int, float):
            try:
                return option(text)
            except ValueError:
                continue
    wanted = " or ".join(map(_describe, _options(hint)))
    raise ValueError(f"{path}={text} is not {wanted}")
