"""Stage 2, super-resolution x4 (paper section 4.4, Tables 5, 11 and 15): the small picture is joined to z_t.

    python train.py --config configs/ldm_superres.py:bicubic,tfds=imagenet2012 --config.first_stage.workdir=AE \\
        --workdir DIR
    python sample.py --workdir DIR --low_res picture.png

Variants: bicubic (ImageNet 64 -> 256; the paper: batch 64, 860k steps on one A100, FID 2.8 / 4.8 against validation /
training pictures, PSNR 24.4 dB with 100 steps), bsr (the released bsr_sr model, same networks, degraded as by
bsrgan_light). The first stage is VQ-f4; nothing has been reproduced here yet. 113,622,563 parameters in the UNet.
Modifiers: emoji (built-in pictures, minutes on a CPU), small (64-pixel pictures of your own), smoke (seconds).
Arguments: size=PIXELS, tfds=NAME, folder=DIR.
"""

from latent_diffusion import config as config_lib
from latent_diffusion import defaults


def _variant(degradation: str) -> dict:
    return dict(
        data=dict(crop="random", min_crop_scale=0.5),
        model=dict(image_size=0, in_channels=0, out_channels=0, model_channels=160, num_res_blocks=2,
                   attention_resolutions=(16, 8), channel_mult=(1, 2, 2, 4), num_heads=-1, num_head_channels=32),
        conditioning=dict(concat="low_res", low_res=dict(factor=4, degradation=degradation)),
        first_stage=dict(scale_factor=1.0, config="configs/autoencoder_vq.py:f4"),
        diffusion=dict(linear_start=0.0015, linear_end=0.0155),
        optimizer=dict(learning_rate=1e-6),
        training=dict(batch_size=64, num_steps=860_000), sampling=dict(steps=100, eta=1.0),
    )


VARIANTS = {"bicubic": _variant("bicubic"), "bsr": _variant("bsrgan_light")}
MODIFIERS = {
    "emoji": defaults.EMOJI,
    "small": defaults.SMALL,
    "smoke": defaults.merged(defaults.SMOKE, dict(conditioning=dict(low_res=dict(factor=2)))),
}
ARGUMENTS = config_lib.data_arguments(stage="diffusion")


def get_config(argument: str = ""):
    """The config that ``configs/ldm_superres.py:argument`` names."""
    return config_lib.resolve(argument, defaults.diffusion(), file="configs/ldm_superres.py",
                              variants=VARIANTS, arguments=ARGUMENTS, modifiers=MODIFIERS)
