"""Stage 1, KL-regularized autoencoders (paper section 3.1 and Table 8; the reference's configs/autoencoder/*kl*).

    python train.py --config configs/autoencoder_kl.py:f8,imagenet --workdir DIR

Variants: f4, f8, f16, f32 (default f4), and rows of Table 8 that were not released: f2, f16_c8, f32_c16 (fewer
channels). f1 is the identity, pixel space, which has nothing to train: give stage 2 first_stage.model.kind=identity.
Modifiers: imagenet, openimages (what to train on), emoji (built-in 64x64 pictures, minutes on a CPU), small (64x64
pictures of your own, README.md), smoke (seconds). Arguments: tfds=NAME (any TFDS set), folder=DIR (a folder of images),
size=PIXELS, channels=1 (grey images).
The reference trained on one A100, batch 12 accumulated twice, on random crops of ImageNet. ImageNet-val reconstruction
in its README: f4 rFID 0.27, PSNR 27.53 (177k steps); f8 0.90, 24.19 (247k); f16 0.87, 24.08 (443k); f32 2.04, 22.27
(407k); in Table 8: f2 0.086, 32.47; f16_c8 2.63, 21.94; f32_c16 7.3, 20.38. Not reproduced here yet.
"""

from latent_diffusion import config as config_lib
from latent_diffusion import defaults


def _variant(channels: int, ch_mult: tuple[int, ...], **model: object) -> dict:
    return dict(
        data=dict(crop="random", min_crop_scale=0.5),  # the reference's ImageNetSR loader
        model=dict(embed_dim=channels, z_channels=channels, ch_mult=ch_mult, **model),
        training=dict(batch_size=24, accumulate=2),
    )


VARIANTS = {
    "f4": _variant(3, (1, 2, 4)),
    "f8": _variant(4, (1, 2, 4, 4)),
    "f16": _variant(16, (1, 1, 2, 2, 4), attn_resolutions=(16,)),
    "f32": _variant(64, (1, 1, 2, 2, 4, 4), attn_resolutions=(16, 8)),
    "f2": _variant(2, (1, 2)),
    "f16_c8": _variant(8, (1, 1, 2, 2, 4), attn_resolutions=(16,)),
    "f32_c16": _variant(16, (1, 1, 2, 2, 4, 4), attn_resolutions=(16, 8)),
    "f1": dict(model=dict(kind="identity")),
}
_PLAIN = dict(data=dict(crop="center", min_crop_scale=1.0), training=dict(accumulate=1))  # whatever the variant says
EMOJI = defaults.merged(_PLAIN, dict(
    data=dict(source="emoji", image_size=64, styles=("twemoji",)),
    model=dict(embed_dim=4, z_channels=4, ch=8, ch_mult=(1, 2, 8), num_res_blocks=1, norm_groups=2,
               attn_resolutions=(), resolution=64, attn_type="none", resamp_with_conv=False),
    optimizer=dict(name="muon", learning_rate=1e-2, scale_lr=False, b1=0.9, b2=0.99, schedule="cosine",
                   warmup_steps=50, clip_norm=1.0),
    training=dict(batch_size=8, num_steps=1400, log_every=25, image_every=700,
                  loss=dict(perceptual="alex", perceptual_weight=0.2, kl_weight=3e-2, disc_factor=0.0)),
    evaluation=dict(every=700),
    checkpoint=dict(every=140),
))
SMALL = defaults.merged(_PLAIN, dict(
    data=dict(image_size=64),
    model=dict(embed_dim=4, z_channels=4, ch=16, ch_mult=(1, 2, 4), num_res_blocks=1, norm_groups=4,
               attn_resolutions=(), attn_type="none"),
    optimizer=dict(name="muon", learning_rate=1e-2, scale_lr=False, b1=0.9, b2=0.99, schedule="cosine", warmup_steps=50,
                   clip_norm=1.0),
    training=dict(batch_size=16, num_steps=2000, log_every=25, image_every=250,
                  loss=dict(perceptual="alex", perceptual_weight=0.2, kl_weight=3e-2, disc_factor=0.0)),
    evaluation=dict(every=250),
    checkpoint=dict(every=250),
))
SMOKE = defaults.merged(_PLAIN, dict(
    data=dict(source="memory", image_size=32),
    model=dict(ch=32, ch_mult=(1, 1), num_res_blocks=1, norm_groups=8, resolution=32, attn_resolutions=()),
    training=dict(batch_size=8, num_steps=4, log_every=2, image_every=0,
                  loss=dict(perceptual="none", disc_start=2, disc_channels=8, disc_layers=1)),
    evaluation=dict(every=0, num_images=4),
    checkpoint=dict(every=2),
))
ARGUMENTS = config_lib.data_arguments(stage="autoencoder")


def get_config(argument: str = ""):
    """The config that ``configs/autoencoder_kl.py:argument`` names."""
    return config_lib.resolve(argument, defaults.autoencoder(), file="configs/autoencoder_kl.py",
                              variants=VARIANTS, arguments=ARGUMENTS,
                              modifiers=defaults.SETS | {"emoji": EMOJI, "small": SMALL, "smoke": SMOKE})
