"""Stage 2 in pixel space: the baselines that latent diffusion is measured against (paper Figures 6 and 7, Table 18).

    python train.py --config configs/pixel_diffusion.py:adm256 --config.data.name=imagenet2012 --workdir DIR

Variants: adm256 (the network of ADM on ImageNet at 256 pixels, Dhariwal and Nichol 2021: batch 256, 1.98M steps, FID
10.94, 916 V100 days), ldm1_celebahq256 (LDM-1 of Table 14, 270,458,115 parameters, batch 9, 500k steps on one A100).
ADM has 553,838,086 parameters; here the 6,915 of its learned variances are missing. Not reproduced here yet.
Modifiers: emoji (built-in 32-pixel pictures), small (32-pixel pictures of your own), smoke (seconds).
Arguments: size=PIXELS, tfds=NAME, folder=DIR.
"""

from latent_diffusion import config as config_lib
from latent_diffusion import defaults

_PIXELS = dict(first_stage=dict(scale_factor=1.0, model=dict(kind="identity")),
               model=dict(image_size=0, in_channels=0, out_channels=0, num_res_blocks=2, num_heads=-1))
VARIANTS = {
    "adm256": defaults.merged(_PIXELS, dict(
        data=dict(name="imagenet2012", flip=True),
        model=dict(model_channels=256, attention_resolutions=(32, 16, 8), channel_mult=(1, 1, 2, 2, 4, 4),
                   num_head_channels=64, use_scale_shift_norm=True, resblock_updown=True),
        conditioning=dict(label=True, dropout=0.0, null_class=False),
        diffusion=dict(beta_schedule="sqrt_linear", linear_start=0.0001, linear_end=0.02),
        optimizer=dict(learning_rate=1e-4, scale_lr=False, weight_decay=0.0),
        training=dict(batch_size=256, num_steps=1_980_000), sampling=dict(sampler="ddpm", steps=250,
                                                                        clip_x0=True),
    )),
    "ldm1_celebahq256": defaults.merged(_PIXELS, dict(
        data=dict(name="celeb_a_hq/256", split="train[:25000]", eval_split="train[25000:]"),
        model=dict(model_channels=192, attention_resolutions=(32, 16, 8), channel_mult=(1, 1, 2, 2, 4, 4),
                   num_head_channels=32),
        optimizer=dict(learning_rate=9e-5, scale_lr=False),
        training=dict(batch_size=9, num_steps=500_000), sampling=dict(steps=200),
    )),
}
_OWN = dict(data=dict(image_size=32), first_stage=dict(scale_factor=1.0, config=""),
            model=dict(attention_resolutions=(4,), channel_mult=(1, 2, 2)),
            diffusion=dict(beta_schedule="linear"), conditioning=dict(label=False, null_class=True))
MODIFIERS = {
    "emoji": defaults.merged(defaults.EMOJI, _OWN),
    "small": defaults.merged(defaults.SMALL, _OWN),
    "smoke": defaults.merged(defaults.SMOKE, _OWN, dict(data=dict(image_size=16))),
}
ARGUMENTS = config_lib.data_arguments(stage="diffusion")


def get_config(argument: str = ""):
    """The config that ``configs/pixel_diffusion.py:argument`` names."""
    return config_lib.resolve(argument, defaults.diffusion(), file="configs/pixel_diffusion.py",
                              variants=VARIANTS, arguments=ARGUMENTS, modifiers=MODIFIERS)
