"""Tiny models of CompVis latent-diffusion of every kind: their descriptions, and files of random numbers for them."""

import numpy as np
import reference_keys as reference
from reference_keys import IDENTITY, describe_diffusion, describe_first_stage, encoder

BETAS = (0.001, 0.02)
KL = describe_first_stage("kl", 4, (1, 2), ch=32, blocks=1, resolution=16)
VQ = describe_first_stage("vq", 3, (1, 1), (16,), 20, ch=32, blocks=1, resolution=16, interface=True)
WITH_KL, WITH_VQ = dict(z=4, first=KL), dict(z=3, first=VQ)


def tiny(condition=None, *, z=4, first=KL, into=0, target="LatentDiffusion", unet=None, **params):
    unet = dict(image_size=8, in_channels=z + into, out_channels=z, model_channels=32, attention_resolutions=[2],
                num_res_blocks=1, channel_mult=[1, 2], num_heads=2) | (unet or {})
    return describe_diffusion(first, unet, BETAS, condition, target=target, timesteps=20, **params)


def attending(context, depth=1, **more):
    return dict(use_spatial_transformer=True, transformer_depth=depth, context_dim=context) | more


CLASSES = ("crossattn", "class_label", encoder("ClassEmbedder", n_classes=11, embed_dim=32, key="class_label"))
TEXT = ("crossattn", "caption", encoder("BERTEmbedder", n_embed=32, n_layer=2, vocab_size=50, max_seq_len=6))
LAYOUT = ("crossattn", "objects_center_points", encoder(
    "BERTEmbedder", n_embed=32, n_layer=1, vocab_size=64, max_seq_len=8, use_tokenizer=False))
MODELS = {
    "unconditional": tiny(unet=dict(resblock_updown=True, use_scale_shift_norm=True, num_head_channels=32),
                          scale_by_std=True, loss_type="l1"),
    "pixels": tiny(first=None, z=3, target="DDPM", unet=dict(conv_resample=False)),
    "class": tiny(CLASSES, **WITH_VQ, unet=attending(32), learn_logvar=True),
    "text": tiny(TEXT, unet=attending(32, 2, legacy=False), scale_factor=0.18215, use_ema=False),
    "layout": tiny(LAYOUT, unet=attending(32, attention_resolutions=[1, 2]), use_ema=False),
    "clip": tiny(("crossattn", "txt", encoder("FrozenCLIPEmbedder", max_length=6)), unet=attending(64), use_ema=False),
    "vectors": tiny(("crossattn", "nix", IDENTITY), unet=attending(24), use_ema=False),
    "semantic": tiny(("concat", "segmentation", encoder("SpatialRescaler", n_stages=1, in_channels=7, out_channels=2)),
                     into=2, use_ema=False),
    "inpainting": tiny(("concat", "masked_image", "__is_first_stage__"), **WITH_VQ, into=4, use_ema=False),
    "super-resolution": tiny(("concat", "LR_image", IDENTITY), **WITH_VQ, into=3, use_ema=False),
    "added class": tiny(("adm", "class_label", IDENTITY), unet=dict(num_classes=5), use_ema=False),
}
LOSS = {"kl": dict(disc_start=5, disc_num_layers=2, kl_weight=1e-6, disc_weight=0.5),
        "vq": dict(disc_start=5, disc_ndf=16, use_actnorm=True, codebook_weight=1.0)}
TARGETS = {"kl": "ldm.modules.losses.LPIPSWithDiscriminator",
           "vq": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"}
AUTOENCODERS = {
    "kl": describe_first_stage("kl", 4, (1, 2), (8,), ch=32, blocks=1, resolution=16,
                               loss={"target": TARGETS["kl"], "params": LOSS["kl"]}),
    "vq": describe_first_stage("vq", 3, (1, 2), (), 20, ch=32, blocks=1, resolution=16, attn_type="none",
                               loss={"target": TARGETS["vq"], "params": LOSS["vq"]}),
    "linear": describe_first_stage("kl", 4, (2, 1), (16, 8), ch=32, blocks=2, resolution=16, attn_type="linear",
                                   tanh_out=True, resamp_with_conv=False),
}
AUTOENCODERS["vq"]["params"]["use_ema"] = True


def draw(shapes):
    """Random numbers of the types that the reference has."""
    rng, types = np.random.default_rng(0), {"num_updates": np.int32, "initialized": np.uint8,
                                            "num_batches_tracked": np.int64, "position_ids": np.int64}

    def values(key, shape):
        kind = types.get(key.rsplit(".", 1)[-1], np.float32)
        size = np.float32(np.prod(shape[1:]) ** 0.5) if len(shape) > 1 else 1  # so that activations keep theirs
        return rng.standard_normal(shape, np.float32) / size if kind == np.float32 else np.ones(shape, kind)

    return {key: np.asarray(values(key, shape)) for key, shape in shapes.items()}


def state_of(description, *, step=7):
    """A whole file's tensors."""
    params = description["model"]["params"]
    shapes = reference.diffusion(description)
    if params.get("cond_stage_config", {}) == MODELS["clip"]["model"]["params"]["cond_stage_config"]:
        shapes |= {f"cond_stage_model.{key}": shape for key, shape in reference.clip(40, 6, 2, 64).items()}
    state = draw(shapes) | {name: x.astype(np.float32) for name, x in reference.schedule(params).items()}
    for key in list(state):
        if params.get("cond_stage_config") == "__is_first_stage__" and key.startswith("cond_stage_model."):
            state[key] = state[key.replace("cond_stage_model.", "first_stage_model.")]
        if key.endswith("position_ids"):
            state[key] = np.arange(state[key].size).reshape(1, -1)
        if "to_logits" in key:
            state[key] = np.zeros_like(state[key])  # what is exported
    if params.get("use_ema", True):
        state |= {"model_ema.decay": np.array(0.9999, np.float32), "model_ema.num_updates": np.array(step, np.int32)}
    if params.get("scale_by_std"):
        state["scale_factor"] = np.array(0.7, np.float32)
    return state
