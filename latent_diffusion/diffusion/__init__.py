"""The mathematics of diffusion on arrays: schedules, the forward process and its losses, samplers, guidance.

Nothing here knows a network: a model enters as a function `denoise_fn(z_t, t) -> prediction`.
"""
