"""A config with the keys that the data code reads, and a small copy of the emoji set."""

import pytest
from ml_collections import ConfigDict


@pytest.fixture
def make_config():
    def make(batch_size=4, seed=0, **data):
        defaults = dict(
            source="memory", name="", path="", data_dir="", split="train", eval_split="validation", image_size=16,
            channels=3, crop="center", min_crop_scale=1.0, flip=False, background="white", image_key="image",
            label_key="label", caption_key="caption", styles=("twemoji", "openmoji"), groups=(), skin_tones=False,
            duplicates=False, style_prefix=False, holdout=0.25, on_corrupt="error", workers=0, threads=2,
            num_examples=12,
        )
        assert not set(data) - set(defaults)
        return ConfigDict(dict(
            seed=seed, data={**defaults, **data}, training=dict(batch_size=batch_size),
            conditioning=dict(text=dict(max_length=12)),
        ))

    return make


@pytest.fixture(scope="session")
def emoji_dir(tmp_path_factory):
    """A TFDS directory with the 32-pixel emoji set made of 120 of its names."""
    from latent_diffusion.data import sources
    from latent_diffusion.data.emoji import Emoji

    directory = tmp_path_factory.mktemp("tfds")
    sources._build(Emoji(config="32", data_dir=directory, limit=120))
    return str(directory)
