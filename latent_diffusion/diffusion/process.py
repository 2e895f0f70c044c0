"""The forward process, conversions between what a network may predict, and the training loss.

With z_t = alpha z_0 + sigma eps, a network predicts one of
    eps   the noise (Ho et al. 2020)
    x0    the data
    v     alpha eps - sigma z_0 (Salimans & Ho 2022, appendix D)
and any of them gives the others by a linear map, because alpha^2 + sigma^2 = 1.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from latent_diffusion.diffusion.schedule import NoiseSchedule, check_parameterization, gather
from latent_diffusion.errors import choose


def broadcast_to_image(values: Float[Array, "b"], like: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Appends axes of length 1, so that one value per example multiplies arrays of the shape of `like`."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def q_sample(
    schedule: NoiseSchedule, z_0: Float[Array, "b ..."], t: Int[Array, "b"], eps: Float[Array, "b ..."]
) -> Float[Array, "b ..."]:
    """z_t = alpha(t) z_0 + sigma(t) eps, a sample of q(z_t | z_0) (Ho et al., eq. 4); `t` in 0 .. T-1 per example."""
    return broadcast_to_image(schedule.alpha(t), z_0) * z_0 + broadcast_to_image(schedule.sigma(t), z_0) * eps


def x0_of(
    parameterization: str, prediction: Array, z_t: Array, *, alpha: Array, sigma: Array, inverse_alpha: Array,
    noise_level: Array,
) -> Array:
    """The data that a prediction implies at one noise level, whose four numbers must broadcast.

    inverse_alpha: 1 / alpha, and noise_level: sigma / alpha, of float64 quotients: at the noisy end they reach 100 and
    more.
    """
    if parameterization == "x0":
        return prediction
    if parameterization == "v":
        return alpha * z_t - sigma * prediction
    return inverse_alpha * z_t - noise_level * prediction


def eps_of(parameterization: str, prediction: Array, z_t: Array, *, alpha: Array, sigma: Array) -> Array:
    """The noise that a prediction implies at one noise level, whose numbers must broadcast."""
    if parameterization == "eps":
        return prediction
    if parameterization == "v":
        return sigma * z_t + alpha * prediction
    return (z_t - alpha * prediction) / sigma


def prediction_of(parameterization: str, x0: Array, eps: Array, *, alpha: Array, sigma: Array) -> Array:
    """What is predicted where data and noise are these, at one noise level, whose numbers must broadcast."""
    if parameterization == "eps":
        return eps
    if parameterization == "x0":
        return x0
    return alpha * eps - sigma * x0


def levels(
    schedule: NoiseSchedule, t: Num[Array, "b"], like: Float[Array, "b ..."]
) -> dict[str, Float[Array, "b ..."]]:
    """``alpha`` and ``sigma`` at timesteps, which may be fractional, with axes to multiply arrays like `like`."""
    alpha, sigma = schedule.levels(t)
    return {"alpha": broadcast_to_image(alpha, like), "sigma": broadcast_to_image(sigma, like)}


def to_x0(
    schedule: NoiseSchedule,
    parameterization: str,
    prediction: Float[Array, "b ..."],
    z_t: Float[Array, "b ..."],
    t: Int[Array, "b"],
) -> Float[Array, "b ..."]:
    """The data that a prediction implies. UserError if `parameterization` is unknown."""
    check_parameterization(parameterization)
    inverse_alpha = broadcast_to_image(gather(1 / np.sqrt(schedule.alphas_cumprod), t), z_t)
    noise_level = broadcast_to_image(gather(np.sqrt(1 / schedule.alphas_cumprod - 1), t), z_t)
    return x0_of(parameterization, prediction, z_t, **levels(schedule, t, z_t), inverse_alpha=inverse_alpha,
                 noise_level=noise_level)


def to_eps(
    schedule: NoiseSchedule,
    parameterization: str,
    prediction: Float[Array, "b ..."],
    z_t: Float[Array, "b ..."],
    t: Int[Array, "b"],
) -> Float[Array, "b ..."]:
    """The noise that a prediction implies. UserError if `parameterization` is unknown."""
    check_parameterization(parameterization)
    return eps_of(parameterization, prediction, z_t, **levels(schedule, t, z_t))


def target(
    schedule: NoiseSchedule,
    parameterization: str,
    z_0: Float[Array, "b ..."],
    eps: Float[Array, "b ..."],
    t: Int[Array, "b"],
) -> Float[Array, "b ..."]:
    """What a network should predict at z_t = q_sample(z_0, t, eps). UserError if `parameterization` is unknown."""
    check_parameterization(parameterization)
    return prediction_of(parameterization, z_0, eps, **levels(schedule, t, z_0))


def posterior_mean(
    schedule: NoiseSchedule, z_0: Float[Array, "b ..."], z_t: Float[Array, "b ..."], t: Int[Array, "b"]
) -> Float[Array, "b ..."]:
    """Mean of q(z_{t-1} | z_t, z_0) (Ho et al., eq. 7)."""
    coef1, coef2 = gather(schedule.posterior_mean_coef1, t), gather(schedule.posterior_mean_coef2, t)
    return broadcast_to_image(coef1, z_t) * z_0 + broadcast_to_image(coef2, z_t) * z_t


def slerp(
    one: Float[Array, "b ..."], other: Float[Array, "b ..."], amount: Float[Array, "b"]
) -> Float[Array, "b ..."]:
    """From `one` (amount 0) to `other` (1) along the great circle, each example by its own amount: of two pieces of
    unit noise it is unit noise, too, which a straight line is not (Shoemake 1985; Song et al. 2021, appendix D.5)."""
    flat, axes = one.reshape(one.shape[0], -1), (one.shape[0], -1)
    norms = jnp.linalg.norm(flat, axis=1) * jnp.linalg.norm(other.reshape(axes), axis=1)
    angle = jnp.arccos(jnp.clip(jnp.sum(flat * other.reshape(axes), axis=1) / norms, -1.0, 1.0))
    near = angle < 1e-4  # and where they are opposite there is no such circle
    sine = jnp.where(near, 1.0, jnp.sin(angle))
    weights = (jnp.where(near, 1 - amount, jnp.sin((1 - amount) * angle) / sine),
               jnp.where(near, amount, jnp.sin(amount * angle) / sine))
    return broadcast_to_image(weights[0], one) * one + broadcast_to_image(weights[1], one) * other


LOSSES = {"l1": jnp.abs, "l2": jnp.square}


def per_example_loss(
    prediction: Float[Array, "b ..."], target: Float[Array, "b ..."], loss: str = "l2"
) -> Float[Array, "b"]:
    """Mean absolute ("l1") or squared ("l2") error of each example, in float32. Raises UserError for another name."""
    magnitude = choose(LOSSES, loss, "diffusion.loss")
    error = magnitude(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    return error.reshape(error.shape[0], -1).mean(axis=1)


def min_snr_weights(schedule: NoiseSchedule, parameterization: str, gamma: float) -> np.ndarray:
    """Min-SNR-gamma weights (Hang et al. 2023, eq. 5 and section 3.4), (T,) float64.

    min(SNR, gamma) weighs an error in x0; the same loss written on eps has it divided by SNR, on v by SNR + 1.
    """
    check_parameterization(parameterization)
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    return np.minimum(snr, gamma) / {"x0": 1.0, "eps": snr, "v": snr + 1}[parameterization]


def diffusion_loss(
    schedule: NoiseSchedule,
    prediction: Float[Array, "b ..."],
    target: Float[Array, "b ..."],
    t: Int[Array, "b"],
    *,
    parameterization: str,
    loss: str = "l2",
    l_simple_weight: float = 1.0,
    original_elbo_weight: float = 0.0,
    min_snr_gamma: float = 0.0,
    logvar: Float[Array, "t"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The training loss as CompVis latent-diffusion composes it.

    With l the error per example (mean over all axes but the first) and lv = logvar[t],

        l_simple_weight * mean(w_t l / exp(lv) + lv) + original_elbo_weight * mean(lvlb_t l)

    Args:
        prediction: the network's output, any float type; the loss is float32.
        target: what `target()` returns.
        t: timesteps, 0 .. T-1.
        parameterization: "eps", "x0" or "v"; chooses the weights of the bound and of min-SNR.
        loss: "l1" or "l2".
        min_snr_gamma: 0 means w_t = 1; else w_t are the min-SNR-gamma weights (5 in the paper).
        logvar: (T,) log-variances per timestep, learned or constant; None means zeros.

    Returns:
        The scalar loss, and scalars: "loss_simple" = mean(l), "loss_vlb" = mean(lvlb_t l), "loss" and, with `logvar`,
        "loss_gamma" = mean(w_t l / exp(lv) + lv) and "logvar" = mean(logvar).

    Raises:
        UserError: for an unknown parameterization or loss.
    """
    errors = per_example_loss(prediction, target, loss)
    loss_vlb = jnp.mean(gather(schedule.lvlb_weights(parameterization), t) * errors)
    metrics = {"loss_simple": errors.mean(), "loss_vlb": loss_vlb}
    weighted = errors
    if min_snr_gamma > 0:
        weighted = gather(min_snr_weights(schedule, parameterization, min_snr_gamma), t) * errors
    if logvar is not None:
        logvar_t = logvar[t]
        weighted = weighted / jnp.exp(logvar_t) + logvar_t
        metrics |= {"loss_gamma": weighted.mean(), "logvar": logvar.mean()}
    total = l_simple_weight * weighted.mean() + original_elbo_weight * loss_vlb
    return total, metrics | {"loss": total}
