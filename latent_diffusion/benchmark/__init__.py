"""Throughput of training, sampling, encoding, decoding and loading: `python -m latent_diffusion.benchmark --help`."""
