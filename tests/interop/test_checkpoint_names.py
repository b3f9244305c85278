"""Names and shapes of a checkpoint's tensors."""

from tiny import tiny_config

from bitjax.interop.checkpoint import tensor_shapes


def test_norms_of_matrices():
    config = tiny_config(linear_norm_eps=1e-6, float_layers=("blocks.1.*", "*.qkv"))
    norms = {name: shape for name, shape in tensor_shapes(config).items() if name.endswith(".norm")}
    assert norms == {
        "blocks.0.attention.o.norm": (24,), "blocks.0.ffn.gate.norm": (32,),
        "blocks.0.ffn.up.norm": (32,), "blocks.0.ffn.down.norm": (24,),
    }  # fmt: skip
    inner = tensor_shapes(tiny_config(inner_norm=True, float_layers=("*",)))
    assert sum(name.endswith(".norm") for name in inner) == 14
    assert not any("attention_norm" in name or "ffn_norm" in name for name in inner)
