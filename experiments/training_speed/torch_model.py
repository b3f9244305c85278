"""The same model in PyTorch: what `run.py` measures against.

BitNet b1.58 as `bitjax.model` has it (ternary absmean weights, absmax int8 activations, straight-
through gradients, SubLN, ReLU^2 gate, rotary positions, tied embedding), written as a PyTorch user
would for speed: stacked q/k/v and gate/up, fused attention (`scaled_dot_product_attention`), fused
AdamW. `run.py` checks that loss and gradients are the same on the same weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from bitjax.config import ModelConfig, OptimizerConfig

EPS = 1e-5


def ternary_weight(w: Tensor) -> Tensor:
    m = w.abs().mean().clamp_min(EPS)
    return w + ((w / m).round().clamp(-1, 1) * m - w).detach()


def int8_activations(x: Tensor) -> Tensor:
    a = x.abs().amax(dim=-1, keepdim=True).clamp_min(EPS)
    return x + ((x * (127 / a)).round().clamp(-128, 127) * (a / 127) - x).detach()


class BitLinear(nn.Module):
    """Matrices of the same input, stacked; each has its own scale."""

    def __init__(self, inputs: int, *outputs: int, quantized: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(sum(outputs), inputs))
        self.outputs = outputs
        self.quantized = quantized

    def forward(self, x: Tensor) -> Tensor:
        if not self.quantized:
            return F.linear(x, self.weight)
        parts = [ternary_weight(w) for w in self.weight.split(self.outputs)]
        return F.linear(int8_activations(x), parts[0] if len(parts) == 1 else torch.cat(parts))


class RMSNorm(nn.Module):
    def __init__(self, features: int, eps: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(features))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale.to(x.dtype), self.eps)


class Block(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        D, H, G, h, inner = (
            c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size,
        )  # fmt: skip
        quantized = c.weights == "ternary"
        self.heads = (H, G, h)
        self.attention_norm = RMSNorm(D, c.norm_eps)
        self.qkv = BitLinear(D, H * h, G * h, G * h, quantized=quantized)
        self.attention_sub_norm = RMSNorm(H * h, c.norm_eps)
        self.o = BitLinear(H * h, D, quantized=quantized)
        self.ffn_norm = RMSNorm(D, c.norm_eps)
        self.gate_up = BitLinear(D, inner, inner, quantized=quantized)
        self.ffn_sub_norm = RMSNorm(inner, c.norm_eps)
        self.down = BitLinear(inner, D, quantized=quantized)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = x.shape
        H, G, h = self.heads
        qkv = self.qkv(self.attention_norm(x)).view(B, T, H + 2 * G, h).transpose(1, 2)
        turned, v = qkv.split((H + G, G), dim=1)
        first, second = turned.chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        q, k = turned.to(v.dtype).split((H, G), dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G)
        mixed = mixed.transpose(1, 2).reshape(B, T, H * h)
        x = x + self.o(self.attention_sub_norm(mixed))
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.down(self.ffn_sub_norm(F.relu(gate).square() * up))


class Model(nn.Module):
    """Next-token model over `config.vocab_size` tokens; `forward` gives the mean loss in nats."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        half = config.head_dim // 2
        frequencies = config.rope_theta ** (-torch.arange(half) / half)
        angles = torch.arange(config.max_seq_len)[:, None] * frequencies[None, :]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        T = inputs.shape[1]
        x = F.embedding(inputs, self.embedding)
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        logits = F.linear(self.norm(x), self.embedding)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def optimizer_of(model: Model, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW as `bitjax.train.optimizer`: decay for the weights of linear layers only."""
    decayed = [p for n, p in model.named_parameters() if n.endswith(".weight")]
    others = [p for n, p in model.named_parameters() if not n.endswith(".weight")]
    return torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate, betas=(config.b1, config.b2), eps=config.eps,
        weight_decay=config.weight_decay, fused=True,
    )  # fmt: skip
