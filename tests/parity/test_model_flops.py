"""Model FLOPs of the published networks, in GFLOP for one picture, against what torch's FlopCounterMode counted on the
reference's own modules (2 for a multiplication with its addition), and their numbers of parameters."""

import pytest

from latent_diffusion import config as config_lib
from latent_diffusion import sizes
from latent_diffusion.benchmark import work

UNETS = {  # config: parameters that are trained, forward pass of the UNet
    "ldm_class.py:cin256_v2": (400_920_579 + 1001 * 512, 208.4),
    "ldm_class.py:cin256": (394_984_196 + 1000 * 512, 114.1),
    "ldm_unconditional.py:celebahq256": (274_056_163, 202.4),
    "ldm_unconditional.py:lsun_churches256": (294_966_916, 41.8),
    "ldm_text.py:cc256": (None, 211.4),
    "ldm_text.py:txt2img_1p4b": (None, 182.1),
    "ldm_text.py:sd_v1": (859_520_964, 803.3),
    "ldm_layout.py:openimages": (246_277_379 + 54_656_000, 151.2),
    "ldm_semantic.py:landscapes256": (None, 207.6),
    "ldm_semantic.py:landscapes512": (None, 833.7),
    "ldm_superres.py:bsr": (113_622_563, 80.5),
    "ldm_inpainting.py:big": (387_245_827, 300.9),
    "pixel_diffusion.py:adm256": (553_838_086 - 6_915, 2239.7 - 0.9),  # without the variances, 2 * 256^2 * 6912
    "pixel_diffusion.py:ldm1_celebahq256": (270_458_115, 1132.8),
}
FIRST_STAGES = {  # config: encoder, decoder, at 256 pixels
    "autoencoder_kl.py:f4": (345, 671), "autoencoder_kl.py:f8": (273, 622), "autoencoder_kl.py:f16": (138, 252),
    "autoencoder_kl.py:f32": (136, 251), "autoencoder_vq.py:f4": (345, 671), "autoencoder_vq.py:f4_noattn": (302, 628),
    "autoencoder_vq.py:f8": (226, 472), "autoencoder_vq.py:f16": (138, 252),
}


def complete(name):
    config = config_lib.load(f"configs/{name}").unlock()
    if config.stage == "diffusion":
        if config.first_stage.model.kind != "identity":
            config.first_stage.model = config_lib.load(config.first_stage.config).model
        config.conditioning.num_classes = config.conditioning.num_classes or 1000
        sizes.complete(config)
    return config


@pytest.mark.parametrize("name", UNETS)
def test_unets(name):
    parameters, forward = UNETS[name]
    found = work.of(complete(name))
    assert found.unet / 1e9 == pytest.approx(forward, abs=0.06)
    assert parameters in (None, found.parameters)


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_first_stages(name):
    found = work.of(complete(name))
    assert (found.encoder / 1e9, found.decoder / 1e9) == pytest.approx(FIRST_STAGES[name], abs=0.8)
