"""Small random models of transformers, saved as folders in the forms that released models have.

Their layers and their packing are transformers' own; only the tensors of packed layers are put
together here, for transformers packs no model itself. Weights are bfloat16 numbers, so that a
folder in bfloat16 holds the same model. Unusual epsilons and thetas show in the logits if lost.
"""

import dataclasses
import json
from unittest import mock

import torch

# Their quantised layers ask for a compiler, which takes seconds to import and minutes to compile.
with mock.patch.object(torch, "compile", lambda function: function):
    from transformers.integrations.bitnet import pack_weights
torch.compiler.set_stance("force_eager")  # if somebody imported them before

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    BitNetConfig,
    BitNetForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.quantizers.quantizers_utils import should_convert_module  # noqa: E402
from transformers.utils import logging  # noqa: E402
from transformers.utils.quantization_config import BitNetQuantConfig  # noqa: E402

logging.set_verbosity_error()
logging.disable_progress_bar()

SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.3,
    "attn_implementation": "eager",
}  # fmt: skip
CLASSES = {"llama": (LlamaConfig, LlamaForCausalLM), "bitnet": (BitNetConfig, BitNetForCausalLM)}
TOKENS = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(5))


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model and the form its folder has.

    Attributes:
        kind: of class, "llama" or "bitnet".
        settings: of its configuration, beside `SHAPE`.
        quantized: arguments of BitNetQuantConfig; None for a full-precision model.
    """

    kind: str
    settings: dict = dataclasses.field(default_factory=dict)
    quantized: dict | None = None

    @property
    def online(self) -> bool:
        return self.quantized is not None and self.quantized.get("quantization_mode") == "online"


def random_model(variant, seed=0):
    """The full-precision model whose weights are the variant's master weights."""
    torch.manual_seed(seed)
    make_config, make_model = CLASSES[variant.kind]
    model = make_model(make_config(**SHAPE | {"rope_parameters": rope()} | variant.settings))
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms
            parameter.data = torch.rand_like(parameter) + 0.5
        parameter.data = parameter.data.bfloat16().float()
    return model.eval()


def rope(theta=700.0, **scaling):
    return {"rope_type": "default", "rope_theta": theta, **scaling}


def save(folder, variant, dtype=torch.float32, seed=0):
    """Save a variant's folder.

    Returns:
        Its master weights by tensor name.
    """
    model = random_model(variant, seed)
    masters = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    tensors = dict(masters)
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    if variant.quantized is not None:
        quantization = BitNetQuantConfig(**variant.quantized)
        model.config.quantization_config = quantization
        for name in [name for name in tensors if quantizes(quantization, name)]:
            tensors |= quantized_layer(quantization, name.removesuffix(".weight"), tensors[name])
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    settings = json.loads((folder / "config.json").read_text())
    settings["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(settings))
    return masters


def quantizes(quantization, name):
    """Whether a tensor is the weight of a layer that transformers converts."""
    module = name.removesuffix(".weight")
    kept = quantization.modules_to_not_convert or ["lm_head"]
    return module.endswith("_proj") and should_convert_module(module, kept)


def quantized_layer(quantization, module, weight):
    """The tensors of a converted layer."""
    tensors = {f"{module}.weight": weight}
    if quantization.use_rms_norm:
        norm = torch.rand(weight.shape[1]) + 0.5
        tensors[f"{module}.rms_norm.weight"] = norm.bfloat16().float()
    divides = quantization.linear_class == "bitlinear"
    if divides or quantization.quantization_mode == "offline":
        mean = weight.abs().mean().clamp(min=1e-5)
        codes = (weight * (1 / mean)).round().clamp(-1, 1)
        tensors[f"{module}.weight"] = pack_weights(codes)
        tensors[f"{module}.weight_scale"] = (1 / mean if divides else mean).reshape(1)
    return tensors


def load(folder, dtype=torch.float32):
    """The model that transformers makes of a folder; no tensor may be missing or left over."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


@torch.no_grad()
def logits(folder, dtype=torch.float32):
    """float32 `[2, 9, 96]` of `TOKENS`."""
    return load(folder, dtype)(TOKENS).logits.float().numpy()


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def change(folder, tensors=None, remove=(), **settings):
    """Change a saved folder: put or remove tensors, put (or with None remove) settings."""
    if tensors or remove:
        held = {n: t for n, t in tensors_of(folder).items() if n not in remove} | (tensors or {})
        save_file(held, folder / "model.safetensors", {"format": "pt"})
    values = json.loads((folder / "config.json").read_text()) | settings
    values = {key: value for key, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))
