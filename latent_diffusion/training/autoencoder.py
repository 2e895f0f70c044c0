"""Stage 1: losses, the training step and the evaluation step of the perceptual-compression autoencoder.

Paper section 3.1 and appendix G; numbers and order of operations as in the reference's LPIPSWithDiscriminator (KL) and
VQLPIPSWithDiscriminator (VQ). One step updates the generator (the autoencoder), then the discriminator on fresh
reconstructions of the updated autoencoder. Everything is defined on the *global* batch: gradients, the adaptive
weight and the discriminator's batch statistics do not depend on the number of devices.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from latent_diffusion import keys
from latent_diffusion.errors import choose
from latent_diffusion.models.discriminator import PatchDiscriminator
from latent_diffusion.models.perceptual import LPIPS
from latent_diffusion.parallel import AXIS, mean_over_devices, sum_over_devices
from latent_diffusion.training.batch import as_floats
from latent_diffusion.training.optimizer import accumulate, gradient_norm, update_ema
from latent_diffusion.training.state import AutoencoderTrainState

# --- losses ----------------------------------------------------------------------------------------------------------

PIXEL_LOSSES = {"l1": jnp.abs, "l2": jnp.square}

DISCRIMINATOR_LOSSES = {  # (logits of real, logits of fake) -> scalar
    "hinge": lambda real, fake: 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))),
    "vanilla": lambda real, fake: 0.5 * (jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake))),
    "non_saturating": lambda real, fake: jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake)),
}
GENERATOR_LOSSES = {  # logits of fake -> scalar; the reference uses -mean for both of its discriminator losses
    "hinge": lambda fake: -jnp.mean(fake),
    "vanilla": lambda fake: -jnp.mean(fake),
    "non_saturating": lambda fake: jnp.mean(jax.nn.softplus(-fake)),
}


def adaptive_weight(nll_grad: Array, generator_grad: Array, disc_weight: float) -> Float[Array, ""]:
    """lambda of VQGAN (Esser et al. 2021, equation 7): the ratio of the last layer's gradient norms,
    ``clip(|grad nll| / (|grad g| + 1e-4), 0, 1e4) * disc_weight``, without gradient."""
    ratio = jnp.linalg.norm(nll_grad.ravel()) / (jnp.linalg.norm(generator_grad.ravel()) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, 1e4)) * disc_weight


def discriminator(config: Any) -> PatchDiscriminator:
    """The PatchGAN of a stage-1 config."""
    loss = config.training.loss
    return PatchDiscriminator(ndf=loss.disc_channels, num_layers=loss.disc_layers, norm=loss.disc_norm, axis_name=AXIS)


def uses_discriminator(config: Any) -> bool:
    """Whether there is an adversarial term at all; ``disc_factor=0`` leaves it out of the compiled step."""
    return config.training.loss.disc_factor > 0


def perceptual_distance(frozen: dict, x: Array, y: Array, options: Any, key: Key[Array, ""]) -> Float[Array, "b"]:
    """LPIPS between two batches in [-1, 1], or zeros when the config has none."""
    if options.perceptual == "none":
        return jnp.zeros(x.shape[0])
    lpips = LPIPS(net=options.perceptual, dropout=options.perceptual_dropout)
    return lpips.apply({"params": frozen["lpips"]}, x, y, rngs={"dropout": key})


def reconstruct(
    params: Any, batch: dict, key: Key[Array, ""], *, models: Any, config: Any, train: bool = True
) -> tuple[tuple[Float[Array, "b h w c"], Float[Array, ""]], dict]:
    """(reconstruction, unweighted regularization) and metrics of the latents.

    KL: a posterior sample per example; regularization = sum of the KL over latents, mean over images (as the
    reference: sum / batch). VQ: the codebook and commitment loss, a mean over elements.
    """
    model, x = models.first_stage, batch["image"]
    noise_key, dropout_key = jax.random.split(key)
    first = batch["index"][0]  # of this device and piece alone
    apply = dict(rngs={"dropout": jax.random.fold_in(dropout_key, first)})
    encoded = model.apply({"params": params}, x, train=train, method="encode", **apply)
    if config.model.kind == "kl":
        z = encoded.sample_from(keys.normal(noise_key, batch["index"], encoded.mean.shape[1:]))
        regularization, extra = jnp.mean(encoded.kl()), {"posterior_std": jnp.mean(encoded.std)}
        decode = {}
    elif config.model.kind == "vq":
        z, indices, regularization = model.apply({"params": params}, encoded, method="quantize")
        extra, decode = codebook_use(indices, config.model.n_embed), {"quantize": False}
    else:
        z, regularization, extra, decode = encoded, jnp.zeros(()), {}, {}
    x_rec = model.apply({"params": params}, z, train=train, method="decode", **decode, **apply)
    moments = mean_over_devices({"mean": jnp.mean(z), "square": jnp.mean(z**2)})
    std = jnp.sqrt(jnp.maximum(moments["square"] - moments["mean"] ** 2, 0.0))
    return (x_rec.astype(jnp.float32), regularization), {"latent_mean": moments["mean"], "latent_std": std, **extra}


def codebook_use(indices: Array, n_embed: int) -> dict:
    """Perplexity ``exp(entropy)`` of the code histogram over the global batch, and the number of codes used."""
    counts = sum_over_devices(jnp.bincount(indices.ravel(), length=n_embed))
    p = counts / jnp.sum(counts)
    perplexity = jnp.exp(-jnp.sum(p * jnp.log(p + 1e-10)))
    return {"perplexity": perplexity, "codes_used": jnp.sum(counts > 0).astype(jnp.float32)}


def negative_log_likelihood(
    x: Array, x_rec: Array, logvar: Array, frozen: dict, key: Key[Array, ""], config: Any
) -> tuple[Float[Array, ""], dict]:
    """``rec / exp(logvar) + logvar`` with the map ``rec = |x - x_rec| + weight * LPIPS`` (LPIPS broadcast over pixels
    and channels): summed over the map and divided by the batch for KL, its mean for VQ (then without logvar)."""
    options = config.training.loss
    pixel = choose(PIXEL_LOSSES, options.pixel, "training.loss.pixel")(x - x_rec)
    perceptual = perceptual_distance(frozen, x, x_rec, options, key)
    rec = pixel + options.perceptual_weight * perceptual[:, None, None, None]
    if config.model.kind == "vq":
        nll = jnp.mean(rec)
    else:
        nll = jnp.sum(rec / jnp.exp(logvar) + logvar) / x.shape[0]
    return nll, {"pixel_loss": jnp.mean(pixel), "perceptual_loss": jnp.mean(perceptual), "nll": nll}


# --- the step --------------------------------------------------------------------------------------------------------


def generator_gradients(params, disc_stats, batch, key, *, state, frozen, models, config):
    """Gradients of the autoencoder's loss on one piece of the batch: nll + weight * regularization + adaptive weight
    * adversarial term. Returns the new discriminator statistics, the gradients and metrics.

    The backward pass of the network runs once: the loss's gradients meet at the reconstruction, where the adversarial
    part is scaled; the two last-layer gradients of the adaptive weight cost one convolution each.
    """
    options, x = config.training.loss, batch["image"]
    rec_key, lpips_key = jax.random.split(key)
    lpips_key = jax.random.fold_in(lpips_key, batch["index"][0])
    (x_rec, regularization), backward, metrics = jax.vjp(
        lambda p: reconstruct(p, batch, rec_key, models=models, config=config), params["autoencoder"], has_aux=True)

    (nll, parts), (dx, dlogvar) = jax.value_and_grad(
        lambda xr, logvar: negative_log_likelihood(x, xr, logvar, frozen, lpips_key, config), (0, 1), has_aux=True,
    )(x_rec, params["logvar"])
    weight = options.codebook_weight if config.model.kind == "vq" else options.kl_weight
    loss = nll + weight * regularization
    metrics |= parts | {"regularization": regularization}

    if uses_discriminator(config):
        def adversarial(xr):
            logits, new = discriminator(config).apply(
                {"params": state.disc_params["discriminator"], "batch_stats": disc_stats}, xr, train=True,
                mutable=["batch_stats"])
            return choose(GENERATOR_LOSSES, options.disc_loss, "training.loss.disc_loss")(logits), new["batch_stats"]
        (g_loss, disc_stats), dx_adversarial = jax.value_and_grad(adversarial, has_aux=True)(x_rec)
        def last_layer(cotangent):
            gradients = backward((cotangent, jnp.zeros(())))[0]
            return mean_over_devices(gradients["decoder"]["conv_out"]["kernel"])
        d_weight = adaptive_weight(last_layer(dx), last_layer(dx_adversarial), options.disc_weight)
        factor = jnp.where(state.step >= options.disc_start, options.disc_factor, 0.0)
        dx = dx + d_weight * factor * dx_adversarial
        loss = loss + d_weight * factor * g_loss
        metrics |= {"g_loss": g_loss, "adaptive_weight": d_weight, "disc_factor": factor}

    gradients = {"autoencoder": backward((dx, jnp.asarray(weight, jnp.float32)))[0],
                 "logvar": dlogvar if options.learn_logvar else jnp.zeros_like(dlogvar)}
    return disc_stats, (gradients, metrics | {"loss": loss})


def discriminator_gradients(disc_params, disc_stats, batch, key, *, params, step, models, config):
    """Gradients of the discriminator's loss on one piece of the batch; real and fake are two passes with batch
    statistics of their own, on reconstructions from the updated autoencoder with a fresh posterior sample."""
    options = config.training.loss
    (x_rec, _), _ = reconstruct(params["autoencoder"], batch, key, models=models, config=config)

    def loss_fn(p):
        def logits(image, stats):
            value, new = discriminator(config).apply(
                {"params": p["discriminator"], "batch_stats": stats}, image, train=True, mutable=["batch_stats"])
            return value, new["batch_stats"]
        real, stats = logits(batch["image"], disc_stats)
        fake, stats = logits(jax.lax.stop_gradient(x_rec), stats)
        factor = jnp.where(step >= options.disc_start, options.disc_factor, 0.0)
        loss = factor * choose(DISCRIMINATOR_LOSSES, options.disc_loss, "training.loss.disc_loss")(real, fake)
        return loss, (stats, {"disc_loss": loss, "logits_real": jnp.mean(real), "logits_fake": jnp.mean(fake)})

    gradients, (stats, metrics) = jax.grad(loss_fn, has_aux=True)(disc_params)
    return stats, (gradients, metrics)


def train_step(
    state: AutoencoderTrainState, frozen: dict, batch: dict, rng: Key[Array, ""], *, models: Any, schedule: Any,
    tx: tuple[optax.GradientTransformation, optax.GradientTransformation], config: Any,
) -> tuple[AutoencoderTrainState, dict]:
    """One optimizer step of the autoencoder and one of the discriminator, per device.

    Args:
      state: replicated.
      frozen: ``{"lpips": ...}`` unless the perceptual loss is off.
      batch: ``image`` (b, h, w, c) in [-1, 1] or uint8 and ``index`` (b,), this device's part.
      rng: the run's key; folded with the step and each example's index.
      models, schedule, tx, config: static; tx = (autoencoder's, discriminator's); schedule is unused (None).

    Returns:
      The new state and a dict of scalars, equal on all devices.
    """
    batch = as_floats(batch)
    generator_key, disc_key = jax.random.split(jax.random.fold_in(rng, state.step))
    generator_tx, disc_tx = tx
    pieces = config.training.accumulate

    disc_stats, (gradients, metrics) = accumulate(
        lambda stats, piece: generator_gradients(
            state.params, stats, piece, generator_key, state=state, frozen=frozen, models=models, config=config),
        state.disc_stats, batch, pieces)
    gradients, metrics = mean_over_devices((gradients, metrics))
    with jax.named_scope("optimizer"):
        updates, opt_state = generator_tx.update(gradients, state.opt_state, state.params)
        if not config.training.loss.learn_logvar:  # weight decay must not move it either
            updates["logvar"] = jnp.zeros_like(updates["logvar"])
        params = optax.apply_updates(state.params, updates)
    with jax.named_scope("ema"):
        ema_params, ema_metrics = update_ema(state.ema_params, params, state.step + 1, config.ema)
    metrics |= ema_metrics | {"grad_norm": gradient_norm(gradients)}

    disc_params, disc_opt_state = state.disc_params, state.disc_opt_state
    if uses_discriminator(config):
        disc_stats, (disc_gradients, disc_metrics) = accumulate(
            lambda stats, piece: discriminator_gradients(
                disc_params, stats, piece, disc_key, params=params, step=state.step, models=models, config=config),
            disc_stats, batch, pieces)
        disc_gradients, disc_metrics = mean_over_devices((disc_gradients, disc_metrics))
        metrics |= disc_metrics | {"disc_grad_norm": gradient_norm(disc_gradients)}
        with jax.named_scope("optimizer"):
            updates, disc_opt_state = disc_tx.update(disc_gradients, disc_opt_state, disc_params)
            disc_params = optax.apply_updates(disc_params, updates)

    return state.replace(step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state,
                         disc_params=disc_params, disc_stats=disc_stats, disc_opt_state=disc_opt_state), metrics


# --- start and evaluation --------------------------------------------------------------------------------------------


def create_state(state: None, frozen: dict, batch: dict, rng: Key[Array, ""], *, models: Any, tx: Any, config: Any):
    """The state at step 0, inside a pmapped call: ActNorm's data-dependent parameters come from the first batch of
    all devices. Returns ``(state, {})``."""
    model_key, disc_key, sample_key = jax.random.split(rng, 3)
    batch = as_floats(batch)
    x = batch["image"]
    autoencoder = models.first_stage.init(model_key, x[:1], None)["params"]
    params = {"autoencoder": autoencoder, "logvar": jnp.asarray(config.training.loss.logvar_init, jnp.float32)}
    disc_params, disc_stats, disc_opt_state = {}, {}, ()
    if uses_discriminator(config):
        (x_rec, _), _ = reconstruct(autoencoder, batch, sample_key, models=models, config=config)
        variables = discriminator(config).init(disc_key, x_rec, train=True)
        disc_params = {"discriminator": variables["params"]}
        disc_stats = variables.get("batch_stats", {})
        disc_opt_state = tx[1].init(disc_params)
    ema_params = {"autoencoder": jax.tree.map(jnp.copy, autoencoder)} if config.ema.decay > 0 else {}
    return AutoencoderTrainState(
        step=jnp.zeros((), jnp.int32), params=params, ema_params=ema_params, opt_state=tx[0].init(params),
        disc_params=disc_params, disc_stats=disc_stats, disc_opt_state=disc_opt_state), {}


def psnr(x: Float[Array, "b h w c"], y: Float[Array, "b h w c"]) -> Float[Array, "b"]:
    """Peak signal-to-noise ratio per image in dB, of images in [-1, 1] clipped and rounded to 8 bits."""
    def to_bytes(image):
        return jnp.round((jnp.clip(image, -1, 1) + 1) * 127.5)
    error = jnp.mean(jnp.square(to_bytes(x) - to_bytes(y)), axis=(1, 2, 3))
    return 10 * jnp.log10(255.0**2 / jnp.maximum(error, 1e-10))


def reconstruct_mode(params: Any, x: Float[Array, "b h w c"], *, models: Any, config: Any) -> tuple[Array, Array]:
    """Reconstruction from the posterior's mode (KL) or the quantized latents (VQ), and the unscaled latents."""
    model = models.first_stage
    encoded = model.apply({"params": params}, x, method="encode")
    z = encoded.mode() if config.model.kind == "kl" else encoded
    return model.apply({"params": params}, z, method="decode").astype(jnp.float32), z


def eval_step(params: Any, frozen: dict, batch: dict, rng: Key[Array, ""], *, models: Any, config: Any) -> dict:
    """Sums over the valid images of all devices (``valid`` 1): PSNR, LPIPS and L1 of `reconstruct_mode`, moments of
    the latents, and the ``count`` of images."""
    del rng
    x, valid = as_floats(batch)["image"], batch["valid"]
    x_rec, z = reconstruct_mode(params["autoencoder"], x, models=models, config=config)
    values = {"psnr": psnr(x, x_rec), "l1": jnp.mean(jnp.abs(x - x_rec), axis=(1, 2, 3)),
              "latent_mean": jnp.mean(z, axis=(1, 2, 3)), "latent_square": jnp.mean(z**2, axis=(1, 2, 3))}
    network = config.training.loss.perceptual
    if network != "none":
        values[f"lpips_{network}"] = LPIPS(net=network).apply(
            {"params": frozen["lpips"]}, x, jnp.clip(x_rec, -1, 1))
    sums = {name: jnp.sum(value * valid) for name, value in values.items()}
    return sum_over_devices(sums | {"count": jnp.sum(valid)})
