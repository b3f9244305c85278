"""The pure training step: (state, batch) -> (state, metrics)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from bitjax.config import RunConfig
from bitjax.corpus.loader import Batch
from bitjax.model import Transformer, abstract_model, bit_linears, float_logits
from bitjax.ops.training import require_available
from bitjax.train import processes, spikes
from bitjax.train.loss import next_token_loss
from bitjax.train.optimizer import learning_rate, make_optimizer
from bitjax.train.sharding import batch_sharding, make_mesh, state_shardings

Params = nnx.State
Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step changes: a pytree.

    Attributes:
        step: int32 scalar, steps done.
        params: float32 master weights.
        opt_state: of the optax chain.
        guard: against spikes, where the run has one.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    guard: spikes.Guard | None = None


def predicted(batch: Batch) -> jax.Array | None:
    """Bool `[B, T]`, which next tokens are of the same document; None if all count."""
    if batch.segments is None:
        return None
    segments = jnp.asarray(batch.segments)
    return segments[:, 1:] == segments[:, :-1]


def predictions(batch: Batch) -> jax.Array | int:
    """How many next tokens count."""
    counted = predicted(batch)
    return batch.tokens[:, 1:].size if counted is None else counted.sum()


def quantization_strength(step: jax.typing.ArrayLike, warmup_steps: int) -> jax.Array:
    """Lambda at a step: `min(1, step / warmup_steps)`, and 1 without a warm-up.

    Source: "Fine-tuning LLMs to 1.58bit" (Hugging Face, 2024), its linear schedule.
    """
    return jnp.minimum(1.0, jnp.asarray(step, jnp.float32) / warmup_steps if warmup_steps else 1.0)


class Trainer:
    """The compiled functions of one run configuration; holds no training state."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        if config.train.products == "integer":
            require_available()
        self.graph = nnx.graphdef(abstract_model(config.model, config.train.compute_dtype))
        self.optimizer = make_optimizer(config.optimizer, config.train.steps)
        self.learning_rate = learning_rate(config.optimizer, config.train.steps)
        self.mesh = make_mesh(config.mesh)
        self._shardings: tuple[Any, NamedSharding, NamedSharding] | None = None
        spread: dict[str, Any] = {}
        if self.mesh is not None:
            state = state_shardings(self.mesh, jax.eval_shape(self._init))
            rows = config.train.batch_size // config.train.accumulate
            everywhere = NamedSharding(self.mesh, PartitionSpec())
            self._shardings = state, batch_sharding(self.mesh, rows), everywhere
            spread["in_shardings"] = self._shardings[:2]
            spread["out_shardings"] = state, everywhere
        self.step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]] = jax.jit(
            self._step, donate_argnums=0, **spread
        )
        self.loss: Callable[[Params, Batch], jax.Array] = jax.jit(self._loss)

    def init(self) -> TrainState:
        """The state before the first step, a function of the seed alone: no mesh changes it.

        With a mesh every device makes its own part, so the whole need not fit one.
        """
        if self._shardings is None:
            return self._init()
        return jax.jit(self._init, out_shardings=self._shardings[0])()

    def place(self, state: TrainState) -> TrainState:
        """The state on the devices of the mesh, if the run has one."""
        if self._shardings is None:
            return state
        return jax.tree.map(processes.spread, state, self._shardings[0])

    def place_batch(self, batch: Batch, cut: bool = True) -> Batch:
        """A batch on the devices of the mesh, if the run has one: cut, or whole on each."""
        if self._shardings is None:
            return batch
        sharding = self._shardings[1 if cut else 2]
        return jax.tree.map(lambda x: processes.spread(x, sharding), batch)

    def _init(self) -> TrainState:
        rngs = nnx.Rngs(params=self.config.train.seed)
        params = nnx.state(Transformer(self.config.model, rngs=rngs), nnx.Param)
        return TrainState(
            jnp.zeros((), jnp.int32), params, self.optimizer.init(params),
            spikes.new_guard(self.config.train),
        )  # fmt: skip

    def model(self, params: Params) -> Transformer:
        """The model with these parameters."""
        return nnx.merge(self.graph, params)

    def _loss(self, params: Params, batch: Batch, strength: jax.Array | None = None) -> jax.Array:
        """With `strength` of the quantisation; without, that of the finished model."""
        model = self.model(params)
        model.remat = self.config.train.remat
        for _, layer in bit_linears(model):
            layer.strength, layer.products = strength, self.config.train.products
        tokens = jnp.asarray(batch.tokens)
        segments = None if batch.segments is None else jnp.asarray(batch.segments)[:, :-1]
        hidden, table = model.before_head(tokens[:, :-1], segments)
        head = functools.partial(float_logits, dtype=model.dtype)
        return next_token_loss(head, hidden, table, tokens[:, 1:], predicted(batch))

    def _gradients(
        self, params: Params, batch: Batch, strength: jax.Array | None = None
    ) -> tuple[jax.Array, Params]:
        """Loss and gradients of the whole batch, in `accumulate` equal parts."""
        parts = self.config.train.accumulate
        if parts == 1:
            return jax.value_and_grad(self._loss)(params, batch, strength)

        def add(total: Any, part: Batch) -> tuple[Any, None]:
            found = jax.value_and_grad(self._loss)(params, part, strength)
            share = predictions(part) / predictions(batch)
            return jax.tree.map(lambda sum_, x: sum_ + x * share, total, found), None

        zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
        cut = jax.tree.map(lambda x: x.reshape(parts, -1, x.shape[1]), batch)
        return jax.lax.scan(add, zeros, cut)[0]

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        warmup = self.config.train.quantization_warmup_steps
        strength = quantization_strength(state.step, warmup) if warmup else None
        loss, gradients = self._gradients(state.params, batch, strength)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "gradient_norm": optax.tree.norm(gradients),
            "update_norm": optax.tree.norm(updates),
            "learning_rate": self.learning_rate(state.step),
        }
        guard = state.guard
        if guard is not None:
            norm = metrics["gradient_norm"]
            spike = spikes.judge(guard, loss, norm, self.config.train.spike_factor)
            params = spikes.unless(spike, params, state.params)
            opt_state = spikes.unless(spike, opt_state, state.opt_state)
            guard = spikes.noted(guard, loss, norm, spike)
            metrics |= {"spikes_in_a_row": guard.in_a_row}
        return TrainState(state.step + 1, params, opt_state, guard), metrics
