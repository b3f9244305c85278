"""Write a checkpoint as a GGUF file that llama.cpp or bitnet.cpp runs.

Linear layers are stored as TQ2_0, TQ1_0 or I2_S (x86 form) if they are ternary, and otherwise, with
embedding and head, as float16: it keeps the perplexity of float32 (17.109 for BitNet b1.58 2B4T,
bitnet.cpp's src/README.md) and is read by every engine; `tables` asks for another. Vectors are
float32.

Scales: I2_S keeps the float32 scale. Blocks of TQ2_0 and TQ1_0, and float16 matrices, hold it as
float16, a relative error of up to 2^-11, but for the architecture bitnet, whose graph takes the
scale from a tensor of its own: there blocks hold 1.

`check_gguf` says what keeps a model from being written, `gguf_notes` what to know of the file.

Sources: as `architecture`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bitjax.config import ModelConfig, to_json
from bitjax.interop.checkpoint import Checkpoint, Ternary, layer_of, tensor_shapes
from bitjax.interop.gguf import architecture as arch
from bitjax.interop.gguf import blocks
from bitjax.interop.gguf.container import Tensor, write_container
from bitjax.interop.gguf.reader import CONFIG_KEY, GROUP_KEY
from bitjax.quant import quantize_matrix, require_finite

Kind = Literal["TQ2_0", "TQ1_0", "I2_S", "F16", "F32"]
Table = Literal["F32", "F16", "BF16", "Q8_0"]
# general.file_type of llama.cpp; of bitnet.cpp for I2_S.
FILE_TYPES: dict[Kind, int] = {"F32": 0, "F16": 1, "TQ1_0": 36, "TQ2_0": 37, "I2_S": 40}
GROUP = 128  # of I2_S
ROWS_AT_ONCE = 2**22  # values of a matrix that are encoded together
UNUSED = 5  # tokenizer.ggml.token_type of a token that stands for nothing


def architecture_of(config: ModelConfig) -> str:
    """The GGUF architecture that computes a model of this shape.

    Raises:
        ValueError: there is none.
    """
    if config.inner_norm or config.linear_norm_eps is not None:
        raise ValueError("no GGUF architecture has a norm inside every linear layer")
    if config.activation == "relu2" and not config.sub_norm:
        raise ValueError("no GGUF architecture has ReLU^2 without sub-norms")
    if not config.sub_norm:
        return "llama"
    return "bitnet-b1.58" if config.activation == "relu2" else "bitnet"


def check_gguf(config: ModelConfig, kind: Kind) -> None:
    """Refuse a model that a GGUF file of this kind cannot express.

    Raises:
        ValueError: saying why.
    """
    if kind not in FILE_TYPES:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(FILE_TYPES)}")
    setting = config.trained_only()
    if setting is not None:
        raise ValueError(f"GGUF cannot express this model's {setting}")
    name = architecture_of(config)
    graph = f"GGUF's {name} architecture"
    if name != "llama" and not config.tie_embeddings:
        raise ValueError(f"{graph} takes the embedding as head; this model has a head of its own")
    if name != "llama" and config.num_heads * config.head_dim != config.hidden_size:
        raise ValueError(
            f"{graph} has heads of hidden_size / num_heads dimensions; this model has "
            f"{config.num_heads} heads of {config.head_dim} and hidden_size={config.hidden_size}"
        )
    if name == "bitnet" and config.rope_scaling.kind == "llama3":
        raise ValueError(f"{graph} has no factors for rotary frequencies")
    if kind not in blocks.TERNARY:
        return
    if config.weights == "float":
        raise ValueError(f"{kind} is for ternary models; this one has float weights")
    step = GROUP if kind == "I2_S" else blocks.BY_NAME[kind].values
    for tensor in _ternary_matrices(config):
        cols = tensor_shapes(config)[tensor][1]
        if cols % step:
            other = "F16" if cols % GROUP or kind == "I2_S" else "I2_S or F16"
            raise ValueError(
                f"{kind} needs rows of a multiple of {step} values; {tensor} has rows of {cols}. "
                f"{other} can hold it"
            )


def gguf_notes(config: ModelConfig, kind: Kind) -> list[str]:
    """Sentences on which engines run the file and how they differ; as `check_gguf` raises."""
    check_gguf(config, kind)
    notes = []
    if architecture_of(config) == "bitnet-b1.58":
        notes.append("runs in bitnet.cpp; llama.cpp cannot, its bitnet graph has no ReLU^2")
    elif kind == "I2_S":
        notes.append("runs in bitnet.cpp; llama.cpp cannot, it has no I2_S")
    if config.weights == "float":
        return notes
    if kind == "I2_S":
        notes.append("groups are those of builds for x86; builds for Arm read others")
    if kind in blocks.TERNARY and config.activations == "float":
        notes.append(
            f"engines quantise the activations of {kind} matrices to 8 bits; this model does not"
        )
    if kind in blocks.BLOCKWISE and config.activations == "int8":
        notes.append(
            "activations get a scale for every 256 values instead of one for every token: "
            "logits differ a little"
        )
    if kind not in blocks.TERNARY and config.activations == "int8":
        notes.append(
            f"engines do not quantise the activations of {kind} matrices, as this model does; "
            "the file is for quantising further"
        )
    return notes


def write_gguf(
    path: Path,
    checkpoint: Checkpoint,
    kind: Kind,
    overwrite: bool = False,
    tables: Table = "F16",
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write a checkpoint, one matrix at a time.

    Args:
        path: of the file, which appears only when complete.
        checkpoint: of any source.
        kind: how linear layers are stored; float ones as F16 (with kind F32 as F32).
        overwrite: replace a file of that name.
        tables: how embedding and head are stored; F32 with kind F32.
        on_bytes: told how many bytes of tensors are written, and of how many.

    Raises:
        ValueError: the file exists, the format cannot express the model (before anything is
            written), or a weight is not finite or outside its type.
    """
    config = checkpoint.config
    check_gguf(config, kind)
    if tables not in (*blocks.FLOATS, "Q8_0"):
        raise ValueError(f"tables={tables!r} is not one of {', '.join(blocks.FLOATS)}, Q8_0")
    if tables == "Q8_0" and config.hidden_size % blocks.BY_NAME["Q8_0"].values:
        raise ValueError(f"Q8_0 needs rows of a multiple of 32 values, not {config.hidden_size}")
    architecture = architecture_of(config)
    metadata = arch.metadata_for(architecture, config) | {
        "general.name": Path(checkpoint.origin).stem or "model",
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,
        CONFIG_KEY: to_json(config),
    }
    if kind == "I2_S":
        metadata[GROUP_KEY] = GROUP
    metadata |= _tokenizer_metadata(checkpoint)
    tensors = _Tensors(checkpoint, architecture, kind, "F32" if kind == "F32" else tables)
    to_write, done = tensors.all(), 0
    total = sum(blocks.nbytes(tensor.type, tensor.shape) for tensor in to_write)

    def written(count: int) -> None:
        nonlocal done
        done += count
        on_bytes(done, total)

    write_container(path, metadata, to_write, overwrite, written)


def _ternary_matrices(config: ModelConfig) -> list[str]:
    """Matrices that are ternary: those of no float layer."""
    if config.weights == "float":
        return []
    return [name for name in arch.matrix_names(config) if not config.is_float_layer(layer_of(name))]


def _tokenizer_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """The tokenizer's entries, its tokens as many as the embedding has rows."""
    if checkpoint.tokenizer is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    from bitjax.interop.tokenizers.gguf import gguf_metadata  # imports much else

    metadata = gguf_metadata(checkpoint.tokenizer)
    tokens = list(metadata["tokenizer.ggml.tokens"])
    missing = checkpoint.config.vocab_size - len(tokens)
    if missing < 0:
        raise ValueError(
            f"{checkpoint.origin}: the tokenizer has {len(tokens)} tokens, the embedding "
            f"{checkpoint.config.vocab_size} rows"
        )
    metadata["tokenizer.ggml.tokens"] = tokens + [f"[PAD{len(tokens) + i}]" for i in range(missing)]
    for key, filler in (("token_type", UNUSED), ("scores", -1e4)):
        stored = metadata.get(f"tokenizer.ggml.{key}")
        if stored is not None:
            padded = np.pad(np.asarray(stored), (0, missing), constant_values=filler)
            metadata[f"tokenizer.ggml.{key}"] = padded
    return metadata


@dataclasses.dataclass(frozen=True)
class _Tensors:
    """The tensors of a file, made of a checkpoint's one by one."""

    checkpoint: Checkpoint
    architecture: str
    kind: Kind
    tables: Table
    scales: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # of matrices written

    def all(self) -> list[Tensor]:
        """In file order."""
        config = self.checkpoint.config
        ternary = set(_ternary_matrices(config))
        tensors: list[Tensor] = []
        for name, shape in tensor_shapes(config).items():
            if name in ternary:
                tensors.append(self._tensor(name, self.kind, shape, self._ternary_parts))
                if self._own_scale:
                    tensors.append(self._tensor(name, "F32", (1,), self._scale_parts, "scale"))
            elif len(shape) == 1:
                tensors.append(self._tensor(name, "F32", shape, self._float_parts))
            elif name in ("embedding", "head"):
                tensors.append(self._tensor(name, self.tables, shape, self._float_parts))
            else:
                form = "F32" if self.kind == "F32" else "F16"
                tensors.append(self._tensor(name, form, shape, self._float_parts))
        if config.rope_scaling.kind == "llama3":
            factors = arch.rope_factors(config)
            kind = blocks.BY_NAME["F32"]
            tensors.append(Tensor(arch.ROPE_FACTORS, kind, factors.shape, lambda: [factors]))
        return tensors

    @property
    def _own_scale(self) -> bool:
        """Whether scales are tensors of their own, which I2_S has no need of."""
        return self.architecture == "bitnet" and self.kind != "I2_S"

    def _tensor(
        self,
        name: str,
        form: str,
        shape: tuple[int, ...],
        parts: Callable[[str, str], Iterable[np.ndarray]],
        suffix: str = "weight",
    ) -> Tensor:
        return Tensor(
            arch.gguf_name(name, suffix), blocks.BY_NAME[form], shape, lambda: parts(name, form)
        )

    def _where(self, name: str) -> str:
        return f"{self.checkpoint.origin}: {name}"

    def _float_parts(self, name: str, form: str) -> Iterable[np.ndarray]:
        value = self.checkpoint.read(name)
        if isinstance(value, Ternary):
            value = value.codes * value.scale.reshape(-1, 1)
        require_finite(self._where(name), value)
        if self.architecture == "llama":
            value = arch.interleaved(self.checkpoint.config, name, value)
        for part in _parts(value):
            yield self._floats(name, part, form)

    def _floats(self, name: str, values: np.ndarray, form: str) -> np.ndarray:
        """Values in a float type or Q8_0, none of them beyond its range."""
        values = np.asarray(values, np.float32)
        if form == "Q8_0":
            import gguf.quants

            return gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        with np.errstate(over="ignore"):
            stored = values.astype(blocks.FLOATS[form])
        if form == "F16" and np.isinf(stored).any():
            raise ValueError(
                f"{self._where(name)} holds {np.abs(values).max():g}, beyond float16's 65504"
            )
        return stored

    def _ternary(self, name: str) -> Ternary:
        """Codes and scale of a matrix, its rows in the file's order."""
        config, value = self.checkpoint.config, self.checkpoint.read(name)
        if not isinstance(value, Ternary):
            require_finite(self._where(name), value)
            value = Ternary(*quantize_matrix(config.weights, value, config.weight_scale))
        require_finite(f"{self._where(name)}'s scale", value.scale)
        codes, scale = value.codes, np.asarray(value.scale)
        if scale.ndim and (scale == scale[0]).all():
            scale = scale[0]
        if scale.ndim and (self._own_scale or self.kind == "I2_S"):
            raise ValueError(
                f"{self._where(name)} has a scale for every row; {self.kind} in GGUF's "
                f"{self.architecture} architecture has one for the matrix"
            )
        if self.architecture == "llama":
            codes = arch.interleaved(config, name, codes)
            scale = arch.interleaved(config, name, scale) if scale.ndim else scale
        return Ternary(codes, np.asarray(scale, np.float32))

    def _scale_parts(self, name: str, form: str) -> Iterable[np.ndarray]:
        yield self.scales[name].reshape(1).astype("<f4")

    def _ternary_parts(self, name: str, form: str) -> Iterable[np.ndarray]:
        value = self._ternary(name)
        if form == "I2_S":
            yield blocks.encode_i2s(value.codes, float(value.scale), GROUP)
            return
        self.scales[name] = value.scale
        scale_R = np.ones((), np.float32) if self._own_scale else value.scale
        scale_R = np.broadcast_to(scale_R, len(value.codes))
        stored_R = self._floats(name, scale_R, "F16" if form in blocks.BLOCKWISE else form)
        if ((stored_R == 0) & (scale_R != 0)).any():
            raise ValueError(f"{self._where(name)} has a scale of {scale_R.min():g}, which float16 "
                             "rounds to 0")  # fmt: skip
        kind = blocks.BY_NAME[form]
        start = 0
        for codes in _parts(value.codes):
            scales = stored_R[start : start + len(codes)]
            start += len(codes)
            if form in blocks.BLOCKWISE:
                per_block = np.repeat(scales[:, None], codes.shape[1] // kind.values, axis=1)
                yield blocks.encode_blockwise(kind, codes, per_block)
            else:
                yield codes.astype(scales.dtype) * scales[:, None]


def _parts(values: np.ndarray) -> Iterable[np.ndarray]:
    """Consecutive rows, a few million values at a time."""
    step = max(1, ROWS_AT_ONCE // max(1, values[0].size))
    for start in range(0, len(values), step):
        yield values[start : start + step]
