"""Exact parameter counts of the published models, from the configs that train them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import program_files
import pytest

from latent_diffusion import config as config_lib
from latent_diffusion import models, sizes
from latent_diffusion.training import diffusion as stage2

CONFIGS = Path(__file__).parents[1] / "configs"
# Counted on the reference's own modules. The text and layout transformers have an unused head there, `to_logits`: width
# x vocabulary and a bias for each entry.
BERT_HEAD, LAYOUT_HEAD = 30522 * (1280 + 1), 8192 * (512 + 1)
CC_HEAD = 30522 * (640 + 1)
RELEASED = {  # config:variant -> first stage, UNet, conditioner (all but its head)
    "ldm_unconditional:celebahq256": ("autoencoder_vq:f4", 274_056_163, 0),
    "ldm_unconditional:ffhq256": ("autoencoder_vq:f4", 274_056_163, 0),
    "ldm_unconditional:lsun_bedrooms256": ("autoencoder_vq:f4", 274_056_163, 0),
    "ldm_unconditional:lsun_churches256": ("autoencoder_kl:f8", 294_966_916, 0),
    "ldm_class:cin256": ("autoencoder_vq:f8", 394_984_196, 1000 * 512),
    "ldm_class:cin256_v2": ("autoencoder_vq:f4", 400_920_579, 1001 * 512),
    "ldm_text:cc256": ("autoencoder_vq:f4", 403_623_939, 186_154_682 - CC_HEAD),
    "ldm_text:txt2img_1p4b": ("autoencoder_kl:f8", 872_300_484, 581_994_042 - BERT_HEAD),
    "ldm_text:sd_v1": ("autoencoder_kl:f8", 859_520_964, 0),  # its text encoder is frozen, see below
    "ldm_layout:openimages": ("autoencoder_vq:f4", 246_277_379, 58_858_496 - LAYOUT_HEAD),
    "ldm_layout:coco": ("autoencoder_vq:f8", 312_241_540, 58_858_496 - LAYOUT_HEAD),  # our count, see the config
    "ldm_semantic:landscapes256": ("autoencoder_vq:f4", 215_229_315, 546),
    "ldm_semantic:landscapes512": ("autoencoder_vq:f4", 215_229_315, 546),
    "ldm_superres:bsr": ("autoencoder_vq:f4", 113_622_563, 0),
    "ldm_superres:bicubic": ("autoencoder_vq:f4", 113_622_563, 0),
    "ldm_inpainting:ldm4": ("autoencoder_vq:f4", 215_229_315 + 9 * 128, 0),  # the semantic model and a channel more
    "ldm_inpainting:big": ("autoencoder_vq:f4_noattn", 387_245_827, 0),
    "pixel_diffusion:ldm1_celebahq256": (None, 270_458_115, 0),
    "pixel_diffusion:adm256": (None, 553_838_086 - 3 * (256 * 9 + 1), 0),  # eps alone
}
FIRST_STAGES = {  # all, encoder, decoder
    "autoencoder_kl:f4": (55_312_063, 22_351_238, 32_960_771),
    "autoencoder_kl:f8": (83_653_863, 34_163_592, 49_490_179),
    "autoencoder_kl:f16": (69_610_963, 28_265_760, 41_343_875),
    "autoencoder_kl:f32": (103_880_131, 42_614_656, 61_244_803),
    "autoencoder_vq:f4": (55_322_782, 22_337_411, 32_960_771),
    "autoencoder_vq:f4_noattn": (53_219_486, 21_285_763, 31_909_123),
    "autoencoder_vq:f8": (67_717_295, 27_397_764, 40_253_955),
    "autoencoder_vq:f8_n256": (67_652_783, 27_397_764, 40_253_955),
    "autoencoder_vq:f16": (69_593_371, 28_155_144, 41_307_011),
}
# Millions, paper Tables 13 and 14. Table 13 has 391 for LDM-4, whose network is the released one of Table 3: 400.
SWEEPS = {
    "ldm_class": {"ldm1": 396, "ldm2": 391, "ldm4": 400, "ldm8": 395, "ldm16": 395, "ldm32": 395},
    "ldm_unconditional": {"ldm1": 270, "ldm2": 265, "ldm4": 274, "ldm8": 258, "ldm16": 260, "ldm32": 258},
}
OF_FACTOR = {"ldm2": "f2", "ldm4": "f4", "ldm8": "f8", "ldm16": "f16", "ldm32": "f32"}


def load(name: str):
    file, variant = name.split(":")
    return program_files.load(CONFIGS / f"{file}.py").get_config(variant)


def complete(config, first_stage: str | None):
    """What training fills in from the first stage and the data."""
    with config.unlocked():
        config.data.name, config.data.path = config.data.name or "set", config.data.path or "folder"
        first = config.first_stage.model
        if first_stage is not None:
            first.update(load(first_stage).model)
        latent = sizes.latent_channels(config)
        config.model.update(image_size=config.data.image_size // sizes.factor(first), out_channels=latent,
                            in_channels=latent + sizes.map_channels(config))
        config.conditioning.num_classes = config.conditioning.num_classes or 1000
        config.conditioning.layout.num_classes = 300
    return config


def count(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


COUNTED: dict[tuple, tuple[int, int]] = {}  # of networks that several models have


def counts(config) -> tuple[int, int]:
    """Parameters of the UNet and of the conditioner."""
    networks = models.build(config)
    key = networks.unet, networks.conditioner, str(config.conditioning)
    if key not in COUNTED:
        state = jax.eval_shape(lambda key: stage2.create_state(
            key, models=networks, tx=optax.identity(), config=config), jax.random.key(0))
        COUNTED[key] = count(state.params["unet"]), count(state.params.get("conditioner", {}))
    return COUNTED[key]


@pytest.mark.parametrize("name", RELEASED)
def test_released_model(name):
    first_stage, unet, conditioner = RELEASED[name]
    config = complete(load(name), first_stage)
    config_lib.validate(config)
    assert counts(config) == (unet, conditioner)


def test_clip_vit_l_14():
    network = models.build(complete(load("ldm_text:sd_v1"), "autoencoder_kl:f8")).conditioner
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 77), jnp.int32))["params"]
    assert count(shapes) == 123_060_480  # transformers' CLIPTextModel of openai/clip-vit-large-patch14


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_released_first_stage(name):
    network = models.build(load(name)).first_stage
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    assert (count(shapes), count(shapes["encoder"]), count(shapes["decoder"])) == FIRST_STAGES[name]


@pytest.mark.slow  # rounded counts of networks much like those above
@pytest.mark.parametrize("family,variant", [(family, variant) for family in SWEEPS for variant in SWEEPS[family]])
def test_sweep_over_f_of_the_paper(family, variant):
    config = complete(load(f"{family}:{variant}"),
                      f"autoencoder_vq:{OF_FACTOR[variant]}" if variant in OF_FACTOR else None)
    unet, _ = counts(config)
    assert abs(unet / 1e6 - SWEEPS[family][variant]) < 3
