"""The optax chain that a config describes, EMA, and gradient accumulation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Float, Int

from latent_diffusion.errors import choose


def effective_learning_rate(config: Any) -> float:
    """Peak rate: ``learning_rate``, times the global batch when ``scale_lr`` (the reference's --scale_lr rule,
    accumulation x devices x batch per device x base rate)."""
    scale = config.training.batch_size if config.optimizer.scale_lr else 1
    return config.optimizer.learning_rate * scale


def schedule(config: Any) -> optax.Schedule:
    """Learning rate at a step: linear warm-up from 0, then constant, cosine or linear decay to ``final_factor``."""
    options, peak = config.optimizer, effective_learning_rate(config)
    warmup, final = options.warmup_steps, options.final_factor
    rest = max(config.training.num_steps - warmup, 1)
    decays = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=final),
        "linear": lambda: optax.linear_schedule(peak, peak * final, rest),
    }
    decay = choose(decays, options.schedule, "optimizer.schedule")()
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup]) if warmup else decay


def create(config: Any, *, rate_factor: float = 1.0) -> optax.GradientTransformation:
    """Clipping by global norm (if any), then the optimizer. Weight decay covers every parameter, norms and biases
    too, as torch's AdamW in the reference.

    Args:
      config: a resolved config.
      rate_factor: multiplies the schedule (the discriminator's ``disc_factor``).
    """
    options, rate = config.optimizer, schedule(config)
    moments = dict(mu_dtype=options.moment_dtype)

    def learning_rate(count: Array) -> Array:
        return rate_factor * rate(count)
    optimizers = {
        "adam": lambda: optax.adam(learning_rate, options.b1, options.b2, options.eps, **moments),
        "adamw": lambda: optax.adamw(
            learning_rate, options.b1, options.b2, options.eps, weight_decay=options.weight_decay, **moments),
        "muon": lambda: optax.contrib.muon(
            learning_rate, eps=options.eps, weight_decay=options.weight_decay, adam_b1=options.b1, adam_b2=options.b2,
            adam_weight_decay=options.weight_decay, muon_weight_dimension_numbers=kernels_as_matrices,
            consistent_rms=0.2, **moments),
        "sgd": lambda: optax.sgd(learning_rate),
    }
    optimizer = choose(optimizers, options.name, "optimizer.name")()
    clip = [optax.clip_by_global_norm(options.clip_norm)] if options.clip_norm > 0 else []
    return optax.chain(*clip, optimizer)


def kernels_as_matrices(params: Any) -> Any:
    """What Muon orthogonalizes: the kernels of linear layers and convolutions (inputs x outputs, where the pixels of a
    convolution's window count as inputs). The rest - biases, norms, embeddings - is left to Adam (with
    Nesterov momentum in optax)."""
    def dimensions(path: Any, leaf: Array) -> Any:
        if getattr(path[-1], "key", None) != "kernel":
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), (leaf.ndim - 1,))
    return jax.tree_util.tree_map_with_path(dimensions, params)


def gradient_norm(gradients: Any) -> Float[Array, ""]:
    """The global norm, as a metric. Of gradients behind a barrier, because XLA's CPU code would store the squares of
    all of them to use them in Adam too, and the optimizer's part of a step would take twice as long."""
    return optax.tree.norm(jax.lax.optimization_barrier(gradients))


def ema_decay(step: Int[Array, ""], decay: float, warmup: bool) -> Float[Array, ""]:
    """Decay of the update after step number `step` (from 1): ``min(decay, (1 + n) / (10 + n))`` while warming up
    (the reference's LitEma counts n before using it)."""
    n = jnp.asarray(step, jnp.float32)
    return jnp.minimum(decay, (1 + n) / (10 + n)) if warmup else jnp.asarray(decay, jnp.float32)


def update_ema(ema_params: dict, params: dict, step: Int[Array, ""], options: Any) -> tuple[dict, dict]:
    """The averages after the update number `step` (from 1), with their decay as a metric.

    Args:
      ema_params: trees by name, ``{"unet": ...}``; they say what is averaged. Empty without EMA.
      params: the parameters after the update, of at least these names.
      options: ``config.ema``.
    """
    if not ema_params:
        return ema_params, {}
    decay = ema_decay(step, options.decay, options.warmup)
    covered = {name: params[name] for name in ema_params}
    return optax.incremental_update(covered, ema_params, 1 - decay), {"ema_decay": decay}


def accumulate(
    function: Callable[[Any, dict], tuple[Any, Any]], carry: Any, batch: dict, pieces: int
) -> tuple[Any, Any]:
    """Runs ``function(carry, piece) -> (carry, values)`` over `pieces` equal cuts of `batch` and averages the values,
    of which one sum is kept and not all, because gradients may be as large as the memory that is to be saved.

    Examples keep their ``index``, so that noise does not depend on the number of pieces.
    """
    if pieces == 1:
        return function(carry, batch)
    cut = jax.tree.map(lambda x: x.reshape(pieces, x.shape[0] // pieces, *x.shape[1:]), batch)

    def add(carry_and_sums: tuple[Any, Any], piece: dict) -> tuple[tuple[Any, Any], None]:
        carry, sums = carry_and_sums
        carry, values = function(carry, piece)
        return (carry, optax.tree.add(sums, values)), None

    _, shapes = jax.eval_shape(function, carry, jax.tree.map(lambda x: x[0], cut))
    (carry, sums), _ = jax.lax.scan(add, (carry, jax.tree.map(jnp.zeros_like, shapes)), cut)
    return carry, jax.tree.map(lambda x: x / pieces, sums)
