"""The built-in set: emoji in two drawing styles, made from pip packages. Importing this registers it with TFDS."""

from latent_diffusion.data.emoji.emoji import RESOLUTIONS, Emoji

__all__ = ["Emoji", "RESOLUTIONS"]
