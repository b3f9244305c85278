"""The whole system on one text: train, compare, pack, reload, generate.

Trains a small ternary model and its full-precision twin on the same bytes in the same order,
scores both on the held-out end of the text, packs the ternary one, and generates from the packed
file with the custom calls. Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bitjax import terminal
from bitjax.config import RunConfig, WeightQuantizer
from bitjax.evaluate import TextScore, model_scorer, score_text
from bitjax.infer import Generator, SamplingParams, pack_model
from bitjax.model import Transformer, bit_linears
from bitjax.model.files import load_model, save_model
from bitjax.ops import ffi
from bitjax.plots import plot_losses
from bitjax.presets import shakespeare
from bitjax.printable import without_controls
from bitjax.terminal import console
from bitjax.train import Trainer, data, read_metrics, train

ARMS: dict[str, WeightQuantizer] = {
    "ternary": "ternary",
    "full precision": "float",
}  # label -> ModelConfig.weights


def run_demo(directory: Path, text: str = "", prompt: str = "ROMEO:\n", seed: int = 0) -> None:
    """Run every stage in `directory`, printing as it goes.

    Args:
        directory: gets one run directory per model, three model files and `loss.png`.
        text: path of the training text; empty for the packaged Shakespeare.
        prompt: that the sample continues.
        seed: of both models.

    Raises:
        ValueError: a text that cannot be read or is too short; a directory with another run.
        Interrupted: by a signal; the state is saved.
    """
    configs = {label: shakespeare(weights, text, seed) for label, weights in ARMS.items()}
    models = {
        label: _trained(label, config, directory / _slug(label))
        for label, config in configs.items()
    }
    _compare(directory, configs, models)
    packed = _pack(directory, models)
    _show_agreement(models["ternary"], packed, configs["ternary"])
    _sample(packed, directory, prompt, seed)


def _trained(label: str, config: RunConfig, directory: Path) -> Transformer:
    with terminal.training_progress(f"{label:<14}") as on_report:
        state = train(config, directory, on_report)
    return Trainer(config).model(state.params)


def _compare(
    directory: Path, configs: dict[str, RunConfig], models: dict[str, Transformer]
) -> None:
    config = configs["ternary"]
    text = data.load_text(config.data)
    scores: dict[str, TextScore] = {
        label: score_text(model_scorer(model), text.valid, config.train.seq_len)
        for label, model in models.items()
    }
    gap = scores["ternary"].bits_per_byte - scores["full precision"].bits_per_byte
    terminal.table(
        ("model", "bits per byte", "perplexity per byte"),
        [(label, f"{s.bits_per_byte:.3f}", f"{s.perplexity:.2f}") for label, s in scores.items()]
        + [("gap", f"{gap:+.3f}", "")],
        title=f"{text.name}: all {len(text.valid):,} held-out bytes",
    )
    runs = {label: read_metrics(directory / _slug(label)) for label in configs}
    plot_losses(directory / "loss.png", runs)
    console.print(f"loss curves: {directory / 'loss.png'}\n")


def _pack(directory: Path, models: dict[str, Transformer]) -> Transformer:
    """Write the three model files and read the packed one back."""
    files = [directory / f"{_slug(label)}.safetensors" for label in models]
    packed_path = directory / "ternary-packed.safetensors"
    for model, path in zip(models.values(), files, strict=True):
        save_model(path, model)
    save_model(packed_path, pack_model(models["ternary"]))
    files.append(packed_path)
    linear = sum(layer.weight[...].size for _, layer in bit_linears(models["ternary"]))
    total = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(models["ternary"], nnx.Param)))
    terminal.table(
        ("file", "size", "bits per parameter"),
        [
            (path.name, terminal.size(path.stat().st_size),
             f"{8 * path.stat().st_size / total:.2f}")
            for path in files
        ],
        title=f"{total:,} parameters, {linear:,} of them in linear layers",
    )  # fmt: skip
    packed = load_model(packed_path)
    codes = sum(layer.weight.get_value().codes.nbytes for _, layer in bit_linears(packed))
    console.print(
        f"linear layers: {8 * codes / linear:.2f} bits per weight packed; "
        "embedding and norms stay float32\n"
    )
    return packed


def _show_agreement(trained: Transformer, packed: Transformer, config: RunConfig) -> None:
    """Compare the logits of the training-time and the packed model on held-out bytes.

    The bound is 0 while norms, gates and residuals stay outside the packed product. Both then run
    the same operations on the same inputs outside the linear layers. Inside, both round the same
    products to the same codes; the sums of code products are integers below 2^24, exact in float32
    in any order; and both scale them by `scale_x * scale_w` once. So operation by operation
    nothing can differ. Compiled, XLA and the fused products order the float32 sums of norms,
    softmax and means in their own ways, and an activation at a rounding tie may then land on the
    next code.
    """
    tokens_1xT = data.load_text(config.data).valid[: config.train.seq_len].astype(np.int32)[None]
    plain = nnx.clone(packed)
    for _, layer in bit_linears(plain):
        layer.fuse = False
    tokens = jnp.asarray(tokens_1xT)
    trained_logits, packed_logits = trained(tokens), plain(tokens)
    compiled = [
        jax.jit(lambda p, t, g=graph: nnx.merge(g, p)(t))(params, tokens)
        for graph, params in (nnx.split(trained), nnx.split(packed))
    ]
    terminal.table(
        ("packed against trained logits", "bound", "difference", "same next byte"),
        [
            ("operation by operation", "0", *_difference(trained_logits, packed_logits)),
            ("compiled and fused: sums reordered", "none", *_difference(*compiled)),
        ],
        title=f"kernel: {ffi.active_kernel()}" if ffi.available() else "pure JAX",
    )


def _difference(a: jax.Array, b: jax.Array) -> tuple[str, str]:
    same = jnp.mean(jnp.argmax(a, -1) == jnp.argmax(b, -1))
    return f"{float(jnp.max(jnp.abs(a - b))):.2g}", f"{float(same):.1%}"


def _sample(packed: Transformer, directory: Path, prompt: str, seed: int) -> None:
    params = SamplingParams(
        max_new_tokens=packed.config.max_seq_len, temperature=0.8, min_p=0.1, seed=seed
    )
    console.print(
        f"\n[bold]{directory / 'ternary-packed.safetensors'}[/bold] continues:\n", markup=True
    )
    stream_text(Generator(packed), prompt, params)


def stream_text(generator: Generator, prompt: str, params: SamplingParams) -> None:
    """Print the prompt and its continuation as it is generated, then the rate and the kernel."""
    started = time.perf_counter()
    generator.compile(prompt, params)
    compiled = time.perf_counter() - started
    stream = generator.stream(prompt, params)
    for piece in itertools.chain([prompt], stream):
        shown = without_controls(piece) if console.is_terminal else piece
        console.print(shown, end="", markup=False, soft_wrap=True)
    done = stream.completion
    kernel = ffi.active_kernel() if ffi.available() else "pure JAX"
    console.print(
        f"\n\n[dim]{done.tokens} tokens, {done.tokens_per_second:,.0f} tokens/s, "
        f"prompt in {1000 * done.prefill_seconds:.1f} ms, compiled in {compiled:.1f} s, "
        f"kernel {kernel}[/dim]",
        soft_wrap=True,
        markup=True,
    )


def _slug(label: str) -> str:
    return label.replace(" ", "-")
