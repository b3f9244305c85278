"""config.json of a Hugging Face folder, read as a `ModelConfig`; both spellings of transformers.

Transformers 5 writes `rope_parameters` and `dtype` where 4 wrote `rope_theta`, `rope_scaling` and
`torch_dtype`. What a model needs and bitjax does not have is refused, key by key; keys that change
no number (dropout, caches, initialisation) are not looked at.

A `quantization_config` with `quant_method` "bitnet" says how matrices are stored:

    linear_class    quantization_mode   matrix                                  weight_scale
    bitlinear       any                 packed (or masters, without a scale)    divides
    autobitlinear   offline             packed, or -1, 0, 1 as floats           multiplies
    autobitlinear   online              masters                                 none

Source: transformers 5.23, integrations/bitnet.py, models/{llama,bitnet}, modeling_rope_utils.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from bitjax.config import ModelConfig, RopeScaling
from bitjax.interop.checkpoint import STACKED, layer_of
from bitjax.interop.huggingface.names import (
    FAMILIES,
    MATRICES,
    Family,
    LinearClass,
    module_name,
)

ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu2": "relu2"}
# Settings whose other values change the model, with those that do not.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "sliding_window": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
}
# Patterns are regular expressions, of a kind that is matched in no time: of those below, two
# repetitions try at most the square of a name's 40 characters.
SAFE_PATTERN = re.compile(r"[\w.*+\\^$-]{1,200}")
MAX_REPETITIONS = 2
MAX_LAYERS = 4096  # the deepest released models have some 130
MAX_COMPARISONS = (
    250_000  # of patterns with layers, a second; 126 layers named matrix by matrix: 111,132
)
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a config.json says.

    Attributes:
        config: of the model; its `max_seq_len` are the positions it was made for.
        family: of names.
        linear_class: how packed scales work; None if no matrix is packed.
        online: matrices are master weights, to be quantised.
    """

    config: ModelConfig
    family: Family
    linear_class: LinearClass | None = None
    online: bool = False


class _Fields:
    """Typed access to a JSON object, with errors that say where."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of a key; `default`, if there is one, where it is missing or null."""
        value: Any = self.values.get(key)
        if value is None and default is not None:
            return default
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = number and (kind is float or isinstance(value, int)) if kind in (int, float) else (
            isinstance(value, kind)
        )  # fmt: skip
        if not fits:
            wanted = {int: "an integer", float: "a number", str: "a name", dict: "an object",
                      bool: "true or false", list: "a list"}[kind]  # fmt: skip
            got = f"is {value!r:.60}" if key in self.values else "is missing"
            raise ValueError(f"{self.where}: {key} {got}; wanted {wanted}")
        try:
            return float(value) if kind is float else value
        except OverflowError:
            raise ValueError(f"{self.where}: {key} is beyond all floating-point numbers") from None

    def section(self, key: str) -> _Fields | None:
        """The object under a key, if there is one."""
        if self.values.get(key) is None:
            return None
        return _Fields(self.get(key, dict), f"{self.where}: {key}")


def parse_settings(values: dict[str, Any], where: Path | str) -> Settings:
    """Understand the object of a config.json, which `where` names in errors.

    Raises:
        ValueError: something is missing, of another type, or nothing that bitjax can express.
    """
    fields = _Fields(values, str(where))
    family = _family(fields)
    for key, harmless in HARMLESS.items():
        if values.get(key) not in harmless:
            raise ValueError(
                f"{where}: {key} is {values[key]!r:.60}, which bitjax's model does not have"
            )
    if any(kind != "full_attention" for kind in fields.get("layer_types", list, [])):
        raise ValueError(f"{where}: layer_types has attention that is not full_attention")
    activation = fields.get("hidden_act", str)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{where}: hidden_act is {activation!r:.60}; bitjax has {', '.join(ACTIVATIONS)}"
        )
    heads, hidden = fields.get("num_attention_heads", int), fields.get("hidden_size", int)
    theta, scaling = _rotary(fields, family)
    shape: dict[str, Any] = {
        "vocab_size": fields.get("vocab_size", int),
        "hidden_size": hidden,
        "intermediate_size": fields.get("intermediate_size", int),
        "num_layers": fields.get("num_hidden_layers", int),
        "num_heads": heads,
        "num_kv_heads": fields.get("num_key_value_heads", int, heads),
        "head_dim": fields.get("head_dim", int, hidden // heads if heads > 0 else 0),
        "max_seq_len": fields.get("max_position_embeddings", int),
        "activation": ACTIVATIONS[activation],
        "sub_norm": bool(family.sub_norms),
        "tie_embeddings": fields.get("tie_word_embeddings", bool, False),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": fields.get("rms_norm_eps", float),
    }
    config = _build(str(where), ModelConfig, **shape, weights="float", activations="float")
    if config.num_layers > MAX_LAYERS:
        raise ValueError(
            f"{where}: num_hidden_layers is {config.num_layers}; more than {MAX_LAYERS} are refused"
        )
    return _with_quantization(fields, config, family)


def _build(where: str, make: Callable[..., T], *args: Any, **values: Any) -> T:
    """`make(...)`, whose ValueError is told with the place it comes from."""
    try:
        return make(*args, **values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _family(fields: _Fields) -> Family:
    named = fields.get("architectures", list, [])
    kind = fields.get("model_type", str, "")
    if named:
        family = FAMILIES.get(named[0]) if len(named) == 1 and isinstance(named[0], str) else None
    else:
        family = next((f for f in FAMILIES.values() if kind in f.model_types), None)
    if family is None or (kind and kind not in family.model_types):
        name = ", ".join(map(str, named)) or "not named"
        known = (f"{f.architecture} of {' or '.join(f.model_types)}" for f in FAMILIES.values())
        found = f"the architecture is {name:.80}, model_type {kind or 'none':.40}"
        raise ValueError(
            f"{fields.where}: {found if found.isprintable() else repr(found)}; bitjax reads "
            f"{', '.join(known)}"
        )
    return family


def _rotary(fields: _Fields, family: Family) -> tuple[float, RopeScaling]:
    new, old = fields.section("rope_parameters"), fields.section("rope_scaling")
    if new is not None and old is not None and new.values != old.values:
        raise ValueError(f"{fields.where}: rope_parameters and rope_scaling contradict each other")
    rope = new or old or _Fields({}, fields.where)
    default = fields.get("rope_theta", float, family.rope_theta)
    theta = rope.get("rope_theta", float, default)
    if rope.values.get("partial_rotary_factor") not in HARMLESS["partial_rotary_factor"]:
        raise ValueError(
            f"{rope.where}: partial_rotary_factor is {rope.values['partial_rotary_factor']!r:.60}, "
            "which bitjax's model does not have"
        )
    kind = rope.get("rope_type", str, rope.get("type", str, "default"))
    if kind == "default":
        return theta, RopeScaling()
    if kind == "linear":
        return theta, _build(rope.where, RopeScaling, "linear", rope.get("factor", float))
    if kind == "llama3":
        trained = fields.get("max_position_embeddings", int)
        return theta, _build(
            rope.where, RopeScaling, "llama3",
            *(rope.get(key, float) for key in ("factor", "low_freq_factor", "high_freq_factor")),
            rope.get("original_max_position_embeddings", int, trained),
        )  # fmt: skip
    raise ValueError(f"{rope.where}: rope_type is {kind!r:.60}; bitjax has default, linear, llama3")


def _with_quantization(fields: _Fields, config: ModelConfig, family: Family) -> Settings:
    """The settings with what `quantization_config` (1bitLLM: weight_bits, input_bits) says."""
    about = fields.section("quantization_config")
    if about is None:
        bits = [fields.get(f"{what}_bits", int, 0) for what in ("weight", "input")]
        if family is not FAMILIES["BitnetForCausalLM"] and bits == [0, 0]:
            return Settings(config, family)
        if bits[0] not in (0, 1) or bits[1] not in (0, 8):  # left out, they are 1 and 8
            raise ValueError(
                f"{fields.where}: weight_bits is {bits[0]} and input_bits {bits[1]}; bitjax reads "
                "1 (ternary) and 8"
            )
        ternary = dataclasses.replace(config, weights="ternary", activations="int8")
        return Settings(ternary, family, online=True)
    method = about.get("quant_method", str)
    if method != "bitnet":
        raise ValueError(f"{about.where}: quant_method is {method!r:.60}; bitjax reads bitnet")
    linear_class = about.get("linear_class", str, "bitlinear")
    mode = about.get("quantization_mode", str, "offline")
    if linear_class not in ("bitlinear", "autobitlinear") or mode not in ("offline", "online"):
        raise ValueError(
            f"{about.where}: linear_class is {linear_class!r:.60} and quantization_mode "
            f"{mode!r:.60}; wanted bitlinear or autobitlinear, offline or online"
        )
    online = linear_class == "autobitlinear" and mode == "online"
    eps = about.get("rms_norm_eps", float, 1e-6) if about.get("use_rms_norm", bool, False) else None
    config = _build(
        about.where, dataclasses.replace, config, weights="ternary", activations="int8",
        linear_norm_eps=eps, float_layers=_float_layers(about, config, family, online),
    )  # fmt: skip
    return Settings(config, family, linear_class, online)


def _float_layers(
    about: _Fields, config: ModelConfig, family: Family, online: bool
) -> tuple[str, ...]:
    """The linear layers that `modules_to_not_convert` leaves alone."""
    patterns = about.get("modules_to_not_convert", list, [])
    if not patterns:
        return ()
    if len(patterns) * config.num_layers > MAX_COMPARISONS:
        raise ValueError(
            f"{about.where}: modules_to_not_convert has {len(patterns):,} entries; that is more "
            "than the model has matrices"
        )
    matchers = [_matcher(pattern, about.where) for pattern in patterns]

    def kept(module: str) -> bool:
        return any(
            module.endswith(text) or expression.match(module) for text, expression in matchers
        )

    if online and not kept("lm_head"):
        raise ValueError(
            f"{about.where}: modules_to_not_convert leaves lm_head out, which makes the head "
            "ternary; bitjax's head is not"
        )
    layers = []
    for i in range(config.num_layers):
        names = {part: kept(module_name(f"blocks.{i}.{part}", family)) for part in MATRICES}
        for part, keep in names.items():
            layer = layer_of(f"blocks.{i}.{part}")
            if keep is not names[_first_of_layer(part)]:
                raise ValueError(
                    f"{about.where}: modules_to_not_convert keeps only some of the matrices of "
                    f"{layer}, which bitjax stacks as one"
                )
            if keep and layer not in layers:
                layers.append(layer)
    return tuple(layers)


def _first_of_layer(part: str) -> str:
    parent, _, last = part.rpartition(".")
    stack = next((parts for parts in STACKED.values() if last in parts), (last,))
    return f"{parent}.{stack[0]}"


def _matcher(pattern: Any, where: str) -> tuple[str, re.Pattern[str]]:
    """A pattern as transformers reads it: the end of a name, or an expression for its beginning."""
    if not isinstance(pattern, str):
        raise ValueError(f"{where}: modules_to_not_convert holds {pattern!r:.60}; wanted names")
    repetitions = pattern.count("*") + pattern.count("+")
    if not SAFE_PATTERN.fullmatch(pattern) or repetitions > MAX_REPETITIONS:
        raise ValueError(
            f"{where}: modules_to_not_convert holds {pattern!r:.60}; bitjax reads names of "
            f"modules with at most {MAX_REPETITIONS} wildcards"
        )
    try:
        return pattern, re.compile(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))")
    except re.error as error:
        raise ValueError(
            f"{where}: modules_to_not_convert holds {pattern!r:.60}: {error}"
        ) from None
