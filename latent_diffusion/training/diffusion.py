"""Stage 2: the loss, the training step and the evaluation step of the latent diffusion model (paper equations 2, 3).

    L = E_{z_0, y, eps, t} || eps - eps_theta(z_t, t, tau_theta(y)) ||^2,   z_0 = scale_factor * E(x)

tau_theta (the conditioner) is trained jointly with the UNet; the first stage is frozen.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from latent_diffusion import keys
from latent_diffusion.conditions import SEQUENCES
from latent_diffusion.diffusion import process
from latent_diffusion.models.conditioning import HybridConditioner
from latent_diffusion.parallel import mean_over_devices, sum_over_devices
from latent_diffusion.training.batch import as_floats
from latent_diffusion.training.optimizer import accumulate, gradient_norm, update_ema
from latent_diffusion.training.state import TrainState

# Batch keys that hold a condition y. Those with a null value (in `frozen["null"]`) are dropped in training, with the
# option of their own beside ``dropout``; maps are not, they are there in both passes of guidance.
OWN_DROPOUT = {"tokens": "text_dropout", "label": "label_dropout", "layout": ""}


def posterior(
    models: Any, params: Any, image: Float[Array, "b h w c"], moments: dict | None = None
) -> tuple[Array, Array]:
    """Mean and standard deviation of the unscaled latents (std 0 for first stages without a posterior); `moments` that
    the groups are normalized by, if not their own: see `models.layers.GroupNorm`."""
    encoded = models.first_stage.apply({"params": params, "moments": moments or {}}, image, method="encode")
    if isinstance(encoded, jax.Array):
        return encoded.astype(jnp.float32), jnp.zeros(encoded.shape, jnp.float32)
    return encoded.mean, encoded.std


def latents(models: Any, first_stage: Any, batch: dict, key: Key[Array, ""]) -> Float[Array, "b h w c"]:
    """Unscaled z_0: a sample of the posterior (not its mean, as the reference), from a cached batch
    (``latent_mean``, ``latent_std``) or by encoding ``image``."""
    if "latent_mean" in batch:
        mean, std = batch["latent_mean"], batch["latent_std"]
    else:
        mean, std = posterior(models, first_stage, batch["image"])
    return mean + std * keys.normal(key, batch["index"], mean.shape[1:])


def drop_conditions(batch: dict, null: dict, key: Key[Array, ""], options: Any) -> dict:
    """Conditioning dropout per example (Ho and Salimans 2021): with probability ``dropout`` every condition becomes
    its null value, in addition ``text_dropout`` and ``label_dropout`` drop one of them alone."""
    all_key, *own_keys = jax.random.split(key, 1 + len(OWN_DROPOUT))
    index = batch["index"]
    drop_all = keys.bernoulli(all_key, index, options.dropout)
    dropped = {}
    for (name, option), own_key in zip(OWN_DROPOUT.items(), own_keys, strict=True):
        if name in batch:
            drop = drop_all | keys.bernoulli(own_key, index, options[option]) if option else drop_all
            drop = drop.reshape(-1, *[1] * (batch[name].ndim - 1))
            dropped[name] = jnp.where(drop, null[name], batch[name])
    return dropped


def has_frozen_text(options: Any) -> bool:
    """Whether `options`, the config's ``conditioning``, have a text encoder that no step updates."""
    return options.crossattn == "text" and options.text.kind == "clip"


def sequence_conditioner(models: Any) -> Any:
    """The part of the conditioner that makes a sequence for cross-attention."""
    conditioner = models.conditioner
    return conditioner.crossattn if isinstance(conditioner, HybridConditioner) else conditioner


def with_frozen(params: Any, frozen: dict) -> dict:
    """All parameters of tau_theta and the UNet: `params`, and the frozen part of the conditioner."""
    conditioner = {**frozen.get("conditioner", {}), **params.get("conditioner", {})}
    return {**params, "conditioner": conditioner} if conditioner else dict(params)


def condition(models: Any, params: Any, conditions: dict, options: Any, **apply: Any) -> dict:
    """What the UNet receives for raw conditions without maps: ``context`` = tau_theta(y) and/or ``label``.

    Args:
      models, params: networks and ``{"conditioner": ...}``.
      conditions: ``tokens`` (b, l), ``layout`` (b, l), ``label`` (b,), int32, or ``vectors`` (b, l, width), the context
        itself, as far as `options` asks for them.
      options: the config's ``conditioning``.
      **apply: passed to the conditioner's apply (``train``, ``rngs``).
    """
    inputs = {}
    if options.crossattn != "none":
        method = "sequence" if isinstance(models.conditioner, HybridConditioner) else None
        y = conditions[SEQUENCES[options.crossattn]]
        inputs["context"] = y if options.crossattn == "vectors" else models.conditioner.apply(
            {"params": params["conditioner"]}, y, method=method, **apply)
    if options.label:
        inputs["label"] = conditions["label"]
    return inputs


def condition_map(
    models: Any, params: Any, first_stage: Any, conditions: dict, options: Any, *,
    encode: Callable[[Array], Array] | None = None, **apply: Any,
) -> dict:
    """What is joined to z_t channel by channel, ``concat``, (b, h, w, c) at the size of the latents; {} for no map.

    Args:
      models, params, options, **apply: as for `condition`.
      first_stage: its parameters, for inpainting.
      conditions: ``segmentation`` (b, H, W) class numbers; or ``low_res`` (b, h, w, c) in [-1, 1]; or, for inpainting,
        ``image`` (b, H, W, c) in [-1, 1] and ``mask`` (b, H, W, 1), 1 = to be painted.
      encode: maps pictures to the means of their unscaled latents, for inpainting, where not by `posterior`.
    """
    if options.concat == "none":
        return {}
    if options.concat == "low_res":
        return {"concat": conditions["low_res"]}
    if options.concat == "segmentation":
        method = "map" if isinstance(models.conditioner, HybridConditioner) else None
        y = conditions["segmentation"]
        return {"concat": models.conditioner.apply({"params": params["conditioner"]}, y, method=method, **apply)}
    mask = conditions["mask"].astype(jnp.float32)
    masked = jnp.where(mask > 0.5, -1.0, conditions["image"])  # black, as the reference's holes
    mean = encode(masked) if encode else posterior(models, first_stage, masked)[0]  # the mode, unscaled
    factor = mask.shape[1] // mean.shape[1]
    small = mask[:, ::factor, ::factor]  # torch's nearest neighbor
    return {"concat": jnp.concatenate([mean, 2 * small - 1], axis=-1)}


def loss_and_metrics(
    params: Any, frozen: dict, batch: dict, key: Key[Array, ""], *, scale_factor: Array, models: Any, schedule: Any,
    config: Any, train: bool,
) -> tuple[Float[Array, ""], dict]:
    """The loss of one batch: draws the posterior sample, t, eps and the dropped conditions by example."""
    latent_key, t_key, eps_key, drop_key, dropout_key = jax.random.split(key, 5)
    batch = as_floats(batch)
    index, options = batch["index"], config.diffusion
    z_0 = scale_factor * latents(models, frozen.get("first_stage"), batch, latent_key)
    t = keys.integers(t_key, index, schedule.timesteps)
    eps = keys.normal(eps_key, index, z_0.shape[1:])
    z_t = process.q_sample(schedule, z_0, t, eps)

    conditions, apply = batch, {"train": train}
    if train:
        conditions = drop_conditions(batch, frozen["null"], drop_key, config.conditioning)
        apply["rngs"] = {"dropout": jax.random.fold_in(dropout_key, index[0])}  # of this device and piece alone
    every = with_frozen(params, frozen)
    inputs = condition(models, every, conditions, config.conditioning, **apply) | condition_map(
        models, every, frozen.get("first_stage"), batch, config.conditioning, **apply)
    prediction = models.unet.apply({"params": params["unet"]}, z_t, t, **inputs, **apply).astype(jnp.float32)

    target = process.target(schedule, options.parameterization, z_0, eps, t)
    loss, metrics = process.diffusion_loss(
        schedule, prediction, target, t, parameterization=options.parameterization, loss=options.loss,
        l_simple_weight=options.l_simple_weight, original_elbo_weight=options.original_elbo_weight,
        min_snr_gamma=options.min_snr_gamma, logvar=log_variance(params, options))
    return loss, metrics


def log_variance(params: dict, options: Any) -> Float[Array, "t"] | None:
    """The log-variance of the loss at each timestep: learned, constant, or None for zero."""
    if "logvar" in params or options.logvar_init == 0.0:
        return params.get("logvar")
    return jnp.full((options.timesteps,), options.logvar_init)


def averaged_subset(params: dict, config: Any) -> dict:
    """The part of the parameters that EMA covers: the UNet, and the conditioner by option."""
    names = ("unet", "conditioner") if config.ema.include_conditioner else ("unet",)
    return {name: params[name] for name in names if name in params}


def sampling_params(params: dict, ema_params: dict) -> dict:
    """EMA weights where there are any, the raw ones elsewhere."""
    return {**params, **(ema_params or {})}


def train_step(
    state: TrainState, frozen: dict, batch: dict, rng: Key[Array, ""], *, models: Any, schedule: Any,
    tx: optax.GradientTransformation, config: Any,
) -> tuple[TrainState, dict]:
    """One optimizer step and EMA update, per device.

    Args:
      state: replicated.
      frozen: ``first_stage`` parameters (unless latents are cached), ``null``, the null condition of each kind, and
        ``conditioner``, the part of tau_theta that is not trained.
      batch: this device's part: ``image`` or ``latent_mean`` and ``latent_std``, conditions (`condition`,
        `condition_map`), and ``index`` (b,); pictures may be uint8, latents float16.
      rng: the run's key; folded with the step and each example's index.
      models, schedule, tx, config: static.

    Returns:
      The new state and a dict of scalars, equal on all devices.
    """
    key = jax.random.fold_in(rng, state.step)

    def gradients_of(carry, piece):
        (_, metrics), gradients = jax.value_and_grad(loss_and_metrics, has_aux=True)(
            state.params, frozen, piece, key, scale_factor=state.scale_factor, models=models, schedule=schedule,
            config=config, train=True)
        return carry, (gradients, metrics)

    _, (gradients, metrics) = accumulate(gradients_of, None, batch, config.training.accumulate)
    gradients, metrics = mean_over_devices((gradients, metrics))
    with jax.named_scope("optimizer"):
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    with jax.named_scope("ema"):
        ema_params, ema_metrics = update_ema(state.ema_params, params, state.step + 1, config.ema)
    metrics |= ema_metrics | {"grad_norm": gradient_norm(gradients)}
    return state.replace(step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state), metrics


def create_state(rng: Key[Array, ""], *, models: Any, tx: optax.GradientTransformation, config: Any) -> TrainState:
    """The state at step 0, with scale factor 1."""
    unet_key, conditioner_key = jax.random.split(rng)
    options, size, one = config.conditioning, config.model.image_size, jnp.zeros((1,), jnp.int32)
    params, inputs, examples = {}, {}, []
    if options.crossattn != "none":
        inputs["context"] = jnp.zeros((1, 1, config.model.context_dim))
    if options.crossattn not in ("none", "vectors"):
        examples.append(one if options.crossattn == "class" else jnp.zeros(
            (1, options[options.crossattn].max_length), jnp.int32))
    if options.concat == "segmentation":
        examples.append(jnp.zeros((1, config.data.image_size, config.data.image_size), jnp.int32))
    if examples:
        params["conditioner"] = models.conditioner.init(conditioner_key, *examples)["params"]
    if has_frozen_text(options):
        whole = sequence_conditioner(models) is models.conditioner
        params.pop("conditioner") if whole else params["conditioner"].pop("crossattn")
    if options.label:
        inputs["label"] = one
    z = jnp.zeros((1, size, size, config.model.in_channels))
    params["unet"] = models.unet.init(unet_key, z, one, **inputs)["params"]
    if config.diffusion.learn_logvar:
        params["logvar"] = jnp.full((config.diffusion.timesteps,), config.diffusion.logvar_init, jnp.float32)
    ema_params = averaged_subset(params, config) if config.ema.decay > 0 else {}
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, ema_params=jax.tree.map(jnp.copy, ema_params),
                      opt_state=tx.init(params), scale_factor=jnp.ones(()))


def latent_moments(params: Any, frozen: dict, batch: dict, rng: Key[Array, ""], *, models: Any) -> dict:
    """Sums over all devices that give the latents' standard deviation: ``sum``, ``square``, ``count``."""
    del params
    z = latents(models, frozen.get("first_stage"), as_floats(batch), rng)
    return sum_over_devices({"sum": jnp.sum(z), "square": jnp.sum(z**2), "count": jnp.asarray(float(z.size))})


def eval_step(
    weights: dict, frozen: dict, batch: dict, rng: Key[Array, ""], *, models: Any, schedule: Any, config: Any
) -> dict:
    """The loss of one held-out batch as sums over devices, and their ``count``. Noise and t depend on the example
    only, so that evaluations of a run compare.

    Args:
      weights: ``params`` (EMA weights joined in) and ``scale_factor``.
      frozen, batch, rng, models, schedule, config: as for `train_step`.
    """
    _, metrics = loss_and_metrics(weights["params"], frozen, batch, rng, scale_factor=weights["scale_factor"],
                                  models=models, schedule=schedule, config=config, train=False)
    return sum_over_devices(metrics | {"count": jnp.ones(())})
