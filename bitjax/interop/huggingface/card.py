"""README.md of a Hugging Face folder: what the model is, and how to load it."""

from __future__ import annotations

import math
from pathlib import Path

from bitjax.interop.checkpoint import Checkpoint, tensor_shapes
from bitjax.interop.huggingface.target import Form, Target

FORMS = {
    "packed": "ternary weights at two bits each, one scale a matrix (`autobitlinear`, offline)",
    "masters": "master weights, made ternary when they are used (`autobitlinear`, online)",
    "dense": "weights used as they are",
}


def model_card(name: str, checkpoint: Checkpoint, target: Target, form: Form) -> str:
    """Markdown with the metadata that hubs read."""
    config = checkpoint.config
    parameters = sum(math.prod(shape) for shape in tensor_shapes(config).values())
    tags = ["bitnet", "1.58-bit"] if config.weights == "ternary" else []
    rows = {
        "parameters": f"{parameters:,}",
        "layers": config.num_layers,
        "hidden size": config.hidden_size,
        "FFN size": config.intermediate_size,
        "heads (key-value heads)": f"{config.num_heads} ({config.num_kv_heads})",
        "vocabulary": config.vocab_size,
        "context": config.max_seq_len,
        "activation": config.activation,
        "weights": config.weights,
        "activations": config.activations,
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [{", ".join(["bitjax", *tags])}]
---
# {name}

Written by bitjax from {Path(checkpoint.origin).name} in the form {form}: {FORMS[target.storing]}.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path of this folder")
```
"""
