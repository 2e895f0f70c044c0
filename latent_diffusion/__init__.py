"""Latent diffusion models (Rombach et al., CVPR 2022) in JAX and Flax."""
