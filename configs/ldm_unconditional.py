"""Stage 2, unconditional (paper Tables 1 and 12; the reference's configs/latent-diffusion/*-ldm-*.yaml).

    python train.py --config configs/ldm_unconditional.py:ffhq256,folder=FFHQ --config.first_stage.workdir=AE \\
        --workdir DIR

Variants and the paper's scores (FID, 50k samples; not reproduced here yet), with its time on one A100 (in days of a
V100, Table 18): celebahq256 5.11 (410k steps, batch 48, 14.4 days), ffhq256 4.98 (635k, 42, 26 days), lsun_churches256
4.02 (500k, 96, 18 days), lsun_bedrooms256 2.95 (1.9M, 48, 60 days); and the sweep over f of Table 14 on CelebA-HQ (500k
steps each): ldm1, ldm2, ldm4, ldm8, ldm16, ldm32. Modifiers: emoji (built-in pictures), small (64x64 pictures of your
own, README.md), smoke (seconds). Arguments: size=PIXELS, tfds=NAME, folder=DIR.
"""

from latent_diffusion import config as config_lib
from latent_diffusion import defaults

_VQ = "configs/autoencoder_vq.py"
_LDM4 = dict(image_size=0, in_channels=0, out_channels=0, model_channels=224, num_res_blocks=2,
             attention_resolutions=(8, 4, 2), channel_mult=(1, 2, 3, 4), num_heads=-1, num_head_channels=32)


def _ldm4(batch_size, num_steps):
    return dict(model=_LDM4, first_stage=dict(scale_factor=1.0, config=f"{_VQ}:f4"), optimizer=dict(learning_rate=2e-6),
                training=dict(batch_size=batch_size, num_steps=num_steps), sampling=dict(steps=200, eta=1.0))


def _sweep(channels, channel_mult, attention, batch_size, rate, first="", **first_stage):
    return dict(
        data=dict(name="celeb_a_hq/256", split="train[:25000]", eval_split="train[25000:]"),
        model=_LDM4 | dict(model_channels=channels, attention_resolutions=attention, channel_mult=channel_mult),
        first_stage=dict(scale_factor=1.0, config=first and f"{_VQ}:{first}", **first_stage),
        optimizer=dict(learning_rate=rate, scale_lr=False),
        training=dict(batch_size=batch_size, num_steps=500_000), sampling=dict(steps=200))


VARIANTS = {
    "lsun_churches256": dict(
        data=dict(name="lsun/church_outdoor", flip=True),
        model=dict(image_size=0, in_channels=0, out_channels=0, model_channels=192, num_res_blocks=2,
                   attention_resolutions=(1, 2, 4, 8), channel_mult=(1, 2, 2, 4, 4), num_heads=8,
                   use_scale_shift_norm=True, resblock_updown=True),
        first_stage=dict(config="configs/autoencoder_kl.py:f8"),
        diffusion=dict(linear_end=0.0155, loss="l1"),
        optimizer=dict(learning_rate=5e-5, scale_lr=False, warmup_steps=10_000),
        training=dict(batch_size=96, num_steps=500_000), sampling=dict(steps=200)),
    "celebahq256": _ldm4(48, 410_000) | dict(
        data=dict(name="celeb_a_hq/256", split="train[:25000]", eval_split="train[25000:]"),
        sampling=dict(steps=500, eta=0.0)),
    "ffhq256": _ldm4(42, 635_000) | dict(data=dict(source="folder")),
    "lsun_bedrooms256": _ldm4(48, 1_900_000) | dict(data=dict(name="lsun/bedroom", flip=True)),
    "ldm1": _sweep(192, (1, 1, 2, 2, 4, 4), (32, 16, 8), 9, 9e-5, model=dict(kind="identity")),
    "ldm2": _sweep(192, (1, 2, 2, 4, 4), (16, 8, 4), 11, 1.1e-4, "f2"),
    "ldm4": _sweep(224, (1, 2, 3, 4), (8, 4, 2), 48, 9.6e-5, "f4"),
    "ldm8": _sweep(256, (1, 2, 4), (4, 2, 1), 96, 9.6e-5, "f8"),
    "ldm16": _sweep(256, (1, 2, 4), (4, 2, 1), 128, 1.3e-4, "f16"),
    "ldm32": _sweep(256, (1, 2, 4), (4, 2, 1), 128, 1.3e-4, "f32"),
}
EMOJI = defaults.merged(defaults.EMOJI, dict(
    model=dict(model_channels=64, channel_mult=(1, 2, 3)),
    optimizer=dict(name="adamw", learning_rate=1.5e-3),
    ema=dict(decay=0.998),
    training=dict(num_steps=3600, log_every=50, image_every=1800),
    evaluation=dict(every=1800),
    checkpoint=dict(every=300),
    sampling=dict(steps=50),
))
MODIFIERS = {"emoji": EMOJI, "small": defaults.SMALL, "smoke": defaults.SMOKE}
ARGUMENTS = config_lib.data_arguments(stage="diffusion")


def get_config(argument: str = ""):
    """The config that ``configs/ldm_unconditional.py:argument`` names."""
    return config_lib.resolve(argument, defaults.diffusion(), file="configs/ldm_unconditional.py",
                              variants=VARIANTS, arguments=ARGUMENTS,
                              modifiers=MODIFIERS)
