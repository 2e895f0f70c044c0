"""Stage 1, vector-quantized autoencoders (paper section 3.1 and Table 8; the reference's first_stage_models/vq-*).

    python train.py --config configs/autoencoder_vq.py:f4,imagenet --workdir DIR

Variants: f4, f4_noattn, f8, f8_n256, f16 (default f4), and rows of Table 8 that were not released: f2, f2_n64,
f4_n256, f32 (with the losses of f4 and f16, since the paper does not say).
Modifiers: imagenet, openimages (what to train on), emoji (built-in 64x64 pictures), small (64x64 pictures of your own),
smoke (seconds). Arguments: tfds=NAME (any TFDS set), folder=DIR (a folder of images), size=PIXELS, channels=1 (grey).
Training took 29 V100 days for f4 and 66 for f8 (paper, Table 18), on OpenImages.
ImageNet-val reconstruction in the reference's README: f4 rFID 0.58, PSNR 27.43 (533k steps); f4_noattn 1.06, 25.21
(658k); f8 1.14, 23.07 (971k); f8_n256 1.49, 22.35 (1.6M); f16 5.15, 20.83 (1.1M); Table 8: f2 0.16, 30.85; f2_n64 0.40,
29.13; f4_n256 0.47, 26.43; f32 31.83, 17.45. Not reproduced here yet.
"""

from latent_diffusion import config as config_lib
from latent_diffusion import defaults


def _variant(channels, ch_mult, n_embed, batch_size, disc_start, disc_weight, *, disc_layers=3, **model):
    return dict(
        data=dict(crop="random", min_crop_scale=2 / 3),  # about the reference's: resized to 384, cropped to 256
        model=dict(kind="vq", double_z=False, embed_dim=channels, z_channels=channels, ch_mult=ch_mult,
                   n_embed=n_embed, **model),
        training=dict(batch_size=batch_size, loss=dict(
            disc_start=disc_start, disc_weight=disc_weight, disc_layers=disc_layers)),
    )


VARIANTS = {
    "f4": _variant(3, (1, 2, 4), 8192, 8, 0, 0.75),
    "f4_noattn": _variant(3, (1, 2, 4), 8192, 8, 11, 0.75, attn_type="none"),
    "f8": _variant(4, (1, 2, 2, 4), 16384, 10, 1, 0.6, disc_layers=2, attn_resolutions=(32,)),
    "f8_n256": _variant(4, (1, 2, 2, 4), 256, 10, 250_001, 0.75, attn_resolutions=(32,)),
    "f16": _variant(8, (1, 1, 2, 2, 4), 16384, 14, 250_001, 0.75, disc_layers=2, attn_resolutions=(16,)),
    "f2": _variant(2, (1, 2), 2048, 8, 0, 0.75),
    "f2_n64": _variant(2, (1, 2), 64, 8, 0, 0.75),
    "f4_n256": _variant(3, (1, 2, 4), 256, 8, 0, 0.75),
    "f32": _variant(16, (1, 1, 2, 2, 4, 4), 16384, 14, 250_001, 0.75, disc_layers=2, attn_resolutions=(16, 8)),
}
_PLAIN = dict(data=dict(crop="center", min_crop_scale=1.0))  # whatever the variant says
EMOJI = defaults.merged(_PLAIN, dict(
    data=dict(source="emoji", image_size=64),
    model=dict(ch=16, ch_mult=(1, 2, 4), num_res_blocks=1, norm_groups=8, attn_resolutions=(), resolution=64,
               attn_type="none", n_embed=1024),
    optimizer=dict(learning_rate=1e-3, scale_lr=False, b1=0.9, b2=0.99, schedule="cosine", warmup_steps=50,
                   clip_norm=1.0),
    training=dict(batch_size=16, num_steps=1300, log_every=25, image_every=650,
                  loss=dict(perceptual="alex", perceptual_weight=0.2, disc_factor=0.0)),
    evaluation=dict(every=650),
    checkpoint=dict(every=130),
))
SMALL = defaults.merged(_PLAIN, dict(
    data=dict(image_size=64),
    model=dict(embed_dim=4, z_channels=4, ch=16, ch_mult=(1, 2, 4), num_res_blocks=1, norm_groups=8,
               attn_resolutions=(), attn_type="none", n_embed=1024),
    optimizer=dict(learning_rate=1e-3, scale_lr=False, b1=0.9, b2=0.99, schedule="cosine", warmup_steps=50,
                   clip_norm=1.0),
    training=dict(batch_size=16, num_steps=2000, log_every=25, image_every=250,
                  loss=dict(perceptual="alex", perceptual_weight=0.2, disc_factor=0.0)),
    evaluation=dict(every=250),
    checkpoint=dict(every=250),
))
SMOKE = defaults.merged(_PLAIN, dict(
    data=dict(source="memory", image_size=32),
    model=dict(ch=32, ch_mult=(1, 1), num_res_blocks=1, norm_groups=8, resolution=32, attn_resolutions=(),
               n_embed=64),
    training=dict(batch_size=8, num_steps=4, log_every=2, image_every=0,
                  loss=dict(perceptual="none", disc_start=2, disc_channels=8, disc_layers=1)),
    evaluation=dict(every=0, num_images=4),
    checkpoint=dict(every=2),
))
ARGUMENTS = config_lib.data_arguments(stage="autoencoder")


def get_config(argument: str = ""):
    """The config that ``configs/autoencoder_vq.py:argument`` names."""
    return config_lib.resolve(argument, defaults.autoencoder(), file="configs/autoencoder_vq.py",
                              variants=VARIANTS, arguments=ARGUMENTS,
                              modifiers=defaults.SETS | {"emoji": EMOJI, "small": SMALL, "smoke": SMOKE})
