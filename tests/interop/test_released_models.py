"""Every released model of latent-diffusion: its description is understood, no key of its file is left over, and the
networks have as many parameters as published. The arrays are one number each, however large their shapes."""

import numpy as np
import pytest
import reference_keys as reference
from reference_keys import IDENTITY, describe_diffusion, describe_first_stage, encoder

from latent_diffusion.interop import compvis
from latent_diffusion.interop import compvis_settings as settings
from latent_diffusion.interop.compvis_description import to_description

KL_LOSS = {"target": "ldm.modules.losses.LPIPSWithDiscriminator",
           "params": dict(disc_start=50001, kl_weight=0.000001, disc_weight=0.5)}


def vq_loss(start, weight, layers=3):
    return {"target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": dict(
        disc_conditional=False, disc_in_channels=3, disc_num_layers=layers, disc_start=start, disc_weight=weight,
        codebook_weight=1.0)}


FIRST_STAGES = {  # name: latents, levels, attention, codebook, loss, how it ends; and how many parameters
    "kl-f4": (describe_first_stage("kl", 3, (1, 2, 4), loss=KL_LOSS), 55_312_063),
    "kl-f8": (describe_first_stage("kl", 4, (1, 2, 4, 4), loss=KL_LOSS), 83_653_863),
    "kl-f16": (describe_first_stage("kl", 16, (1, 1, 2, 2, 4), (16,), loss=KL_LOSS), 69_610_963),
    "kl-f32": (describe_first_stage("kl", 64, (1, 1, 2, 2, 4, 4), (16, 8), loss=KL_LOSS), 103_880_131),
    "vq-f4": (describe_first_stage("vq", 3, (1, 2, 4), (), 8192, loss=vq_loss(0, 0.75)), 55_322_782),
    "vq-f4-noattn": (describe_first_stage("vq", 3, (1, 2, 4), (), 8192, attn_type="none", loss=vq_loss(11, 0.75)),
                     53_219_486),
    "vq-f8": (describe_first_stage("vq", 4, (1, 2, 2, 4), (32,), 16384, loss=vq_loss(1, 0.6, 2)), 67_717_295),
    "vq-f8-n256": (describe_first_stage("vq", 4, (1, 2, 2, 4), (32,), 256, loss=vq_loss(250001, 0.75)), 67_652_783),
    "vq-f16": (describe_first_stage("vq", 8, (1, 1, 2, 2, 4), (16,), 16384, loss=vq_loss(250001, 0.75, 2)),
               69_593_371),
}
VQ_F4 = describe_first_stage("vq", 3, (1, 2, 4), (), 8192, interface=True)
VQ_F4_NOATTN = describe_first_stage("vq", 3, (1, 2, 4), (), 8192, attn_type="none", interface=True)
VQ_F8 = describe_first_stage("vq", 4, (1, 2, 2, 4), (32,), 16384, interface=True)
KL_F8 = describe_first_stage("kl", 4, (1, 2, 4, 4))
KL_F16 = describe_first_stage("kl", 16, (1, 1, 2, 2, 4), (16,))


def unet(size, channels, width, mult, attention, into=None, **options):
    return dict(image_size=size, in_channels=into or channels, out_channels=channels, model_channels=width,
                attention_resolutions=list(attention), num_res_blocks=2, channel_mult=list(mult), **options)


def transformer(context, depth=1, **options):
    return dict(use_spatial_transformer=True, transformer_depth=depth, context_dim=context, **options)


UNCONDITIONAL = describe_diffusion(
    VQ_F4, unet(64, 3, 224, (1, 2, 3, 4), (8, 4, 2), num_head_channels=32), (0.0015, 0.0195), rate=2e-6)
MODELS = {  # name: description, parameters of the UNet, of the conditioner, what conditions
    "celeba256, ffhq256, lsun_beds256": (UNCONDITIONAL, 274_056_163, 0, ("none", "none")),
    "lsun_churches256": (describe_diffusion(
        KL_F8, unet(32, 4, 192, (1, 2, 2, 4, 4), (1, 2, 4, 8), num_heads=8, use_scale_shift_norm=True,
                    resblock_updown=True),
        (0.0015, 0.0155), rate=5e-5, loss_type="l1", scale_by_std=True), 294_966_916, 0, ("none", "none")),
    "cin256": (describe_diffusion(
        VQ_F8, unet(32, 4, 256, (1, 2, 4), (4, 2, 1), num_head_channels=32, **transformer(512)), (0.0015, 0.0195),
        ("crossattn", "class_label", encoder("ClassEmbedder", n_classes=1000, embed_dim=512, key="class_label"))),
        394_984_196, 512_000, ("class", "none")),
    "cin256-v2": (describe_diffusion(
        VQ_F4, unet(64, 3, 192, (1, 2, 3, 5), (8, 4, 2), num_heads=1, **transformer(512)), (0.0015, 0.0195),
        ("crossattn", "class_label", encoder("ClassEmbedder", n_classes=1001, embed_dim=512, key="class_label")),
        rate=1e-4, use_ema=False), 400_920_579, 512_512, ("class", "none")),
    "text2img256": (describe_diffusion(
        VQ_F4, unet(64, 3, 192, (1, 2, 3, 5), (8, 4, 2), num_head_channels=32, **transformer(640)), (0.0015, 0.0195),
        ("crossattn", "caption", encoder("BERTEmbedder", n_embed=640, n_layer=32)), rate=2e-6),
        403_623_939, 186_154_682, ("text", "none")),
    "txt2img-1p4B": (describe_diffusion(
        KL_F8, unet(32, 4, 320, (1, 2, 4, 4), (4, 2, 1), num_heads=8, use_checkpoint=True, legacy=False,
                    **transformer(1280)),
        (0.00085, 0.012), ("crossattn", "caption", encoder("BERTEmbedder", n_embed=1280, n_layer=32)), rate=5e-5,
        scale_factor=0.18215, use_ema=False), 872_300_484, 581_994_042, ("text", "none")),
    "layout2img-openimages256": (describe_diffusion(
        VQ_F4, unet(64, 3, 128, (1, 2, 3, 4), (8, 4, 2), num_head_channels=32, **transformer(512, 3)),
        (0.0015, 0.0205), ("crossattn", "coordinates_bbox", encoder(
            "BERTEmbedder", n_embed=512, n_layer=16, vocab_size=8192, max_seq_len=92, use_tokenizer=False)),
        rate=2e-6, loss_type="l1"), 246_277_379, 58_858_496, ("layout", "none")),
    "bsr_sr": (describe_diffusion(
        VQ_F4, unet(64, 3, 160, (1, 2, 2, 4), (16, 8), 6, num_head_channels=32), (0.0015, 0.0155),
        ("concat", "LR_image", IDENTITY)), 113_622_563, 0, ("none", "low_res")),
    "inpainting_big": (describe_diffusion(
        VQ_F4_NOATTN, unet(64, 3, 256, (1, 2, 3, 4), (8, 4, 2), 7, num_heads=8, resblock_updown=True),
        (0.0015, 0.0205), ("concat", "masked_image", "__is_first_stage__"), loss_type="l1"),
        387_245_827, 0, ("none", "inpainting")),
    "semantic_synthesis256": (describe_diffusion(
        VQ_F4, unet(64, 3, 128, (1, 4, 8), (32, 16, 8), 6, num_heads=8), (0.0015, 0.0205),
        ("concat", "segmentation", encoder("SpatialRescaler", n_stages=2, in_channels=182, out_channels=3)),
        loss_type="l1"), 215_229_315, 546, ("none", "segmentation")),
    "rdm768x768": (describe_diffusion(
        KL_F16, unet(48, 16, 448, (1, 2, 3, 4), (4, 2, 1), num_head_channels=32, use_checkpoint=True,
                     **transformer(768)),
        (0.0015, 0.015), ("crossattn", "nix", IDENTITY), rate=1e-4, scale_factor=0.22765929),
        1_335_480_400, 0, ("vectors", "none")),
}


def numbers(shapes):
    return {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}


def sizes_of(report):
    return {row.name: row.parameters for row in report}


# Those of which another has every kind of layer take their time only where there is enough of it.
ALIKE = {"kl-f4", "kl-f16", "kl-f32", "vq-f4", "vq-f8", "vq-f8-n256", "celeba256, ffhq256, lsun_beds256", "cin256",
         "cin256-v2", "text2img256", "layout2img-openimages256", "bsr_sr", "rdm768x768"}


def slow_if_alike(names):
    return [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in names]


@pytest.mark.parametrize("name", slow_if_alike(FIRST_STAGES))
def test_first_stage(name):
    description, published = FIRST_STAGES[name]
    loss = description["params"]["lossconfig"]["params"]
    shapes = reference.first_stage(description["params"])
    assert reference.count(shapes) == published
    shapes |= reference.losses(64, loss.get("disc_num_layers", 3), "batch", kl=name.startswith("kl"))
    imported = compvis.read_model({"model": description}, numbers(shapes))
    found = sizes_of(imported.report)
    assert found["autoencoder"] == published and "unknown" not in found, imported.report
    assert {"discriminator", "lpips"} <= set(found) and found["lpips"] == 14_716_160  # VGG16 to conv5_3, five heads
    config = imported.config
    assert config.training.loss.disc_start == loss["disc_start"]
    assert (config.training.loss.disc_weight, config.training.loss.disc_layers) == (
        loss["disc_weight"], loss.get("disc_num_layers", 3))
    assert settings.to_config(to_description(config)) == config


@pytest.mark.parametrize("name", slow_if_alike(MODELS))
def test_diffusion_model(name):
    description, of_unet, of_conditioner, conditions = MODELS[name]
    params, parts = description["model"]["params"], reference.networks(description)
    assert (reference.count(parts["unet"]), reference.count(parts["conditioner"])) == (of_unet, of_conditioner)
    state = numbers(reference.diffusion(description)) | {
        table: values.astype(np.float32) for table, values in reference.schedule(params).items()}
    if params.get("scale_by_std"):
        state["scale_factor"] = np.float32(0.2)
    imported = compvis.read_model(description, state)
    found, config = sizes_of(imported.report), imported.config
    assert "unknown" not in found, imported.report
    unused = sum(reference.count({key: shape}) for key, shape in parts["conditioner"].items() if "to_logits" in key)
    assert found["unet"] == of_unet and found.get("conditioner", 0) == of_conditioner - unused
    assert found["first_stage"] == reference.count(parts["first_stage"])
    assert ("unet" in imported.ema_params) == params.get("use_ema", True)
    assert (config.conditioning.crossattn, config.conditioning.concat) == conditions
    assert config.first_stage.scale_factor == np.float32(0.2) if params.get("scale_by_std") else (
        params.get("scale_factor", 1.0))
    assert (config.sampling.spacing, config.diffusion.loss) == ("reference", params.get("loss_type", "l2"))


@pytest.mark.parametrize("name", [*FIRST_STAGES, *MODELS])
def test_descriptions_come_back(name):
    config = settings.to_config(MODELS[name][0] if name in MODELS else {"model": FIRST_STAGES[name][0]})
    assert settings.to_config(to_description(config)) == config
