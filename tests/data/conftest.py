"""A config with the keys that the data code reads, and a small copy of the emoji set."""

import pytest

from latent_diffusion import defaults


@pytest.fixture
def make_config():
    def make(batch_size=4, seed=0, **data):
        config = defaults.diffusion()
        config.data.update(source="memory", image_size=16, holdout=0.25, threads=2, num_examples=12)
        config.data.update(data)
        config.conditioning.text.max_length = 12
        config.training.batch_size, config.seed = batch_size, seed
        return config

    return make


@pytest.fixture(scope="session")
def emoji_dir(tmp_path_factory):
    """A TFDS directory with the 32-pixel emoji set made of 120 of its names."""
    from latent_diffusion.data import sources
    from latent_diffusion.data.emoji import Emoji

    directory = tmp_path_factory.mktemp("tfds")
    sources._build(Emoji(config="32", data_dir=directory, limit=120))
    return str(directory)
