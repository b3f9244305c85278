"""The pure training step: (state, batch) -> (state, metrics), and how losses become gradients."""

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

from bitjax.config import RunConfig, TrainConfig
from bitjax.corpus.rows import Batch
from bitjax.model import Transformer, abstract_model, bit_linears, float_logits
from bitjax.ops import training, training_attention
from bitjax.train import processes, spikes
from bitjax.train.loss import next_token_losses
from bitjax.train.next_token import predicted
from bitjax.train.objective import make_objective
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


def quantization_strength(step: jax.typing.ArrayLike, warmup_steps: int) -> jax.Array:
    """Lambda at a step: `min(1, step / warmup_steps)`, and 1 without a warm-up.

    Source: "Fine-tuning LLMs to 1.58bit" (Hugging Face, 2024), its linear schedule.
    """
    return jnp.minimum(1.0, jnp.asarray(step, jnp.float32) / warmup_steps if warmup_steps else 1.0)


# Folded into the seed's key, so that draws of rounding are not those of the initial weights.
_ROUNDING = 0x726F756E


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantizing:
    """How a training step quantises; where a field is None, as the finished model does.

    Attributes:
        strength: lambda of the warm-up.
        weights, activations: keys of stochastic rounding; every layer folds its place in.
    """

    strength: jax.Array | None = None
    weights: jax.Array | None = None
    activations: jax.Array | None = None

    @classmethod
    def at(cls, step: jax.Array, config: TrainConfig) -> Quantizing:
        """Of a step: a function of it and the configuration alone, so a resumed run repeats it."""
        warmup, drawn = config.quantization_warmup_steps, config.stochastic_rounding
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), _ROUNDING), step)
        return cls(
            quantization_strength(step, warmup) if warmup else None,
            jax.random.fold_in(key, 0) if drawn in ("weights", "both") else None,
            jax.random.fold_in(key, 1) if drawn in ("activations", "both") else None,
        )

    def of_part(self, part: jax.Array) -> Quantizing:
        """Of one accumulation step: its activations have other draws, weights the same."""
        if self.activations is None:
            return self
        return dataclasses.replace(self, activations=jax.random.fold_in(self.activations, part))

    def set(self, model: Transformer) -> None:
        """Make a model's layers quantise so."""
        for place, (_, layer) in enumerate(bit_linears(model)):
            layer.strength = self.strength
            for name, key in (("weight_key", self.weights), ("activation_key", self.activations)):
                setattr(layer, name, None if key is None else jax.random.fold_in(key, place))


FINISHED = Quantizing()


class Trainer:
    """The compiled functions of one run configuration; holds no training state."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        if config.train.products == "integer":
            training.require_available()
        if config.train.attention == "fused":
            training_attention.require_available()
        self.objective = make_objective(config.train)
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
        # Of the finished model: mean measures of a batch, and [B] log-likelihoods of its rows.
        self.means: Callable[[Params, Batch], Metrics] = jax.jit(self._means)
        self.likelihoods: Callable[[Params, Batch], jax.Array] = jax.jit(self._likelihoods)

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

    def _losses(self, params: Params, batch: Batch, how: Quantizing) -> jax.Array:
        """Float32 `[B, T]`, negative log-likelihoods of the next tokens in nats."""
        model = self.model(params)
        model.remat = self.config.train.remat
        how.set(model)
        for _, layer in bit_linears(model):
            layer.products = self.config.train.products
        for block in model.blocks:
            block.attention.training = self.config.train.attention
        tokens = jnp.asarray(batch.tokens)
        segments = None if batch.segments is None else jnp.asarray(batch.segments)[:, :-1]
        hidden, table = model.before_head(tokens[:, :-1], segments)
        head = functools.partial(float_logits, dtype=model.dtype)
        return next_token_losses(head, hidden, table, tokens[:, 1:])

    def _likelihoods(self, params: Params, batch: Batch) -> jax.Array:
        losses_BxT = self._losses(params, batch, FINISHED)
        return -losses_BxT.sum(axis=1, where=predicted(batch))

    def _sums(
        self, params: Params, batch: Batch, how: Quantizing = FINISHED
    ) -> dict[str, jax.Array]:
        return self.objective.sums(self._losses(params, batch, how), batch)

    def _means(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        items = jnp.maximum(self.objective.items(batch), 1)
        return {name: total / items for name, total in self._sums(params, batch).items()}

    def _gradients(
        self, params: Params, batch: Batch, how: Quantizing = FINISHED
    ) -> tuple[dict[str, jax.Array], Params]:
        """Mean measures, and gradients, of the whole batch, in `accumulate` equal parts.

        The gradients are of the losses' mean or sum over the batch: every part's sum is scaled by
        what the whole batch has.
        """
        parts = self.config.train.accumulate
        items = jnp.maximum(self.objective.items(batch), 1)
        scale = 1.0 if self.config.train.loss_reduction == "sum" else 1.0 / items

        def scaled(
            params: Params, part: Batch, how: Quantizing
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            sums = self._sums(params, part, how)
            return sums["loss"] * scale, sums

        def found(part: Batch, how: Quantizing) -> tuple[dict[str, jax.Array], Params]:
            (_, sums), gradients = jax.value_and_grad(scaled, has_aux=True)(params, part, how)
            return sums, gradients

        if parts == 1:
            sums, gradients = found(batch, how)
        else:
            zero = {name: jnp.zeros((), jnp.float32) for name in self.objective.measures}
            cut = jax.tree.map(lambda x: x.reshape(parts, -1, x.shape[1]), batch)
            (sums, gradients), _ = jax.lax.scan(
                lambda total, part: (
                    jax.tree.map(jnp.add, total, found(part[0], how.of_part(part[1]))), None
                ),
                (zero, jax.tree.map(jnp.zeros_like, params)), (cut, jnp.arange(parts)),
            )  # fmt: skip
        return {name: total / items for name, total in sums.items()}, gradients

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        how = Quantizing.at(state.step, self.config.train)
        means, gradients = self._gradients(state.params, batch, how)
        loss = means["loss"]
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            **means,
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
