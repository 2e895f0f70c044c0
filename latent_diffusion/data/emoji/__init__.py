"""The built-in sets, made from pip packages: emoji in two drawing styles, and scenes of them. Importing this registers
them with TFDS."""

from latent_diffusion.data.emoji.emoji import RESOLUTIONS, Emoji
from latent_diffusion.data.emoji.scenes import EmojiScenes

__all__ = ["RESOLUTIONS", "Emoji", "EmojiScenes"]
