"""Folders of diffusers in and out: the networks, the tokenizers and the pictures of its own pipelines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion as ldm_text  # noqa: E402

from latent_diffusion import clip_tokens, conditions, models  # noqa: E402
from latent_diffusion.diffusion import samplers  # noqa: E402
from latent_diffusion.errors import UserError  # noqa: E402
from latent_diffusion.interop import __main__ as interop  # noqa: E402
from latent_diffusion.interop import diffusers as ours  # noqa: E402
from latent_diffusion.pipeline import LatentDiffusion  # noqa: E402
from latent_diffusion.training import diffusion as stage2  # noqa: E402

ATOL = 5e-5
PROMPTS = ["red apples", "a apple"]
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "apple", "##s", "a")


def _nchw(x):
    return torch.tensor(np.array(x)).permute(0, 3, 1, 2)


def _nhwc(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def _first_stage(randomize, kind, **options):
    common = dict(in_channels=3, out_channels=3, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=32,
                  sample_size=32) | options
    plain = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    if kind == "kl":
        return randomize(diffusers.AutoencoderKL(latent_channels=4, scaling_factor=0.3, **plain | common), 1)
    return randomize(diffusers.VQModel(latent_channels=3, vq_embed_dim=3, num_vq_embeddings=16, scaling_factor=1.0,
                                       **plain | common), 1)


def _unet(randomize, **options):
    types = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    return randomize(diffusers.UNet2DModel(**dict(
        sample_size=16, in_channels=3, out_channels=3, block_out_channels=(32, 64), layers_per_block=1,
        attention_head_dim=16) | types | options), 2)


def _conditional_unet(randomize, width, **options):
    return randomize(diffusers.UNet2DConditionModel(**dict(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=4, norm_num_groups=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width) | options), 2)


def _ddim(**options):
    return diffusers.DDIMScheduler(**dict(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear",
                                          clip_sample=False, timestep_spacing="trailing") | options)


def _bert_tokenizer(root):
    conditions.Vocabulary(WORDS).save(root)
    return transformers.BertTokenizer(str(root / "vocab.txt"), model_max_length=77)


def _clip_tokenizer(root):
    clip_tokens.from_merges((("a", "p</w>"), ("r", "e"))).save(root)
    return transformers.CLIPTokenizer.from_pretrained(root, model_max_length=77)


def _pipeline(kind, randomize, root):
    if kind == "ldm":
        first = _first_stage(randomize, "vq", down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
                             up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"))
        return diffusers.LDMPipeline(vqvae=first, unet=_unet(randomize), scheduler=_ddim())
    if kind == "ldm, resampled by blocks":
        first = _first_stage(randomize, "vq", mid_block_add_attention=False)
        unet = _unet(randomize, downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift",
                     down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"), attention_head_dim=None,
                     up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), attn_norm_num_groups=32)
        return diffusers.LDMPipeline(vqvae=first, unet=unet, scheduler=_ddim())
    if kind == "super-resolution":
        return diffusers.LDMSuperResolutionPipeline(
            vqvae=_first_stage(randomize, "vq"), unet=_unet(randomize, in_channels=6), scheduler=_ddim())
    if kind == "text":
        bert = ldm_text.LDMBertModel(ldm_text.LDMBertConfig(
            vocab_size=len(WORDS), encoder_layers=2, encoder_ffn_dim=128, d_model=32, dropout=0.0))
        return diffusers.LDMTextToImagePipeline(
            vqvae=_first_stage(randomize, "kl"), bert=randomize(bert, 3), tokenizer=_bert_tokenizer(root),
            unet=_conditional_unet(randomize, 32), scheduler=_ddim())
    tokenizer = _clip_tokenizer(root)
    clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        projection_dim=64))
    return diffusers.StableDiffusionPipeline(
        vae=_first_stage(randomize, "kl"), text_encoder=randomize(clip, 3), tokenizer=tokenizer,
        unet=_conditional_unet(randomize, 64, transformer_layers_per_block=2), scheduler=_ddim(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)


KINDS = ("ldm", "ldm, resampled by blocks", "super-resolution", "text", "stable diffusion")


@pytest.fixture(scope="module")
def saved(randomize, tmp_path_factory):
    """kind -> (pipeline, its folder); the first with weights as pickles."""
    made = {}

    def make(kind):
        if kind not in made:
            root = tmp_path_factory.mktemp("pipeline")
            torch.manual_seed(0)
            pipeline = _pipeline(kind, randomize, root)
            pipeline.save_pretrained(root / "saved", safe_serialization=kind != "ldm")
            made[kind] = pipeline, root / "saved"
        return made[kind]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_networks(saved, kind):
    pipeline, folder = saved(kind)
    config, params = ours.import_model(folder)
    networks = models.build(config)
    rng = np.random.default_rng(0)
    z, t = jnp.asarray(rng.normal(size=(2, 16, 16, config.model.out_channels)), jnp.float32), np.array([3, 700])
    given, asked, joined = {}, {}, z
    if kind == "super-resolution":
        given["concat"] = jnp.asarray(rng.normal(size=(2, 16, 16, 3)), jnp.float32)
        joined = np.concatenate([z, given["concat"]], axis=-1)
    if config.conditioning.crossattn == "text":
        encoder = pipeline.bert if kind == "text" else pipeline.text_encoder
        ids = np.array(pipeline.tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True).input_ids)
        np.testing.assert_array_equal(ours.tokenizer(folder, config).encode(PROMPTS, 77), ids)
        given |= stage2.condition(networks, params, {"tokens": jnp.asarray(ids)}, config.conditioning)
        with torch.no_grad():
            asked["encoder_hidden_states"] = encoder(torch.tensor(ids))[0]
        np.testing.assert_allclose(given["context"], asked["encoder_hidden_states"], rtol=0, atol=ATOL)
    first = pipeline.vae if kind == "stable diffusion" else pipeline.vqvae
    x = jnp.asarray(rng.uniform(-1, 1, (1, 32, 32, 3)), jnp.float32)
    with torch.no_grad():
        expected = pipeline.unet(_nchw(joined), torch.tensor(t), **asked).sample
        encoded, decoded = first.encode(_nchw(x)), first.decode(_nchw(z)).sample
    encoded = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean
    apply = {name: {"params": params[name]} for name in ("unet", "first_stage")}
    np.testing.assert_allclose(
        networks.unet.apply(apply["unet"], z, jnp.asarray(t), **given), _nhwc(expected), rtol=0, atol=ATOL)
    mean, _ = stage2.posterior(networks, params["first_stage"], x)
    np.testing.assert_allclose(mean, _nhwc(encoded), rtol=0, atol=ATOL)
    np.testing.assert_allclose(
        networks.first_stage.apply(apply["first_stage"], z, method="decode"), _nhwc(decoded), rtol=0, atol=ATOL)


@pytest.mark.parametrize("kind", KINDS)
def test_out_and_in_again(saved, kind, tmp_path):
    pipeline, folder = saved(kind)
    config, params = ours.import_model(folder)
    ours.export_model(config, params, tmp_path / "out", ours.tokenizer(folder, config))
    again_config, again = ours.import_model(tmp_path / "out")
    assert again_config == config
    jax.tree.map(np.testing.assert_array_equal, again, params)
    loaded = type(pipeline).from_pretrained(tmp_path / "out")
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            expected, found = component.state_dict(), getattr(loaded, name).state_dict()
            assert set(found) == set(expected)
            assert all(torch.equal(found[key], expected[key]) for key in expected if "to_logits" not in key)
    if config.conditioning.crossattn == "text":
        for prompt in PROMPTS:
            assert loaded.tokenizer(prompt).input_ids == pipeline.tokenizer(prompt).input_ids


def _noise(config, seed):
    size = config.model.image_size
    shape = (2, size, size, config.model.out_channels)
    return _nchw(samplers.initial_noise(jax.random.key(seed), np.arange(2), shape))


@pytest.mark.parametrize("spacing, name", [
    (dict(steps_offset=1, set_alpha_to_one=False), "reference"), (dict(steps_offset=1), "leading_1"), ({}, "leading")])
def test_pictures_at_the_timesteps_of_the_scheduler(saved, spacing, name, monkeypatch, tmp_path):
    pipeline, _ = saved("ldm")
    spacing = dict(timestep_spacing="leading") | spacing
    pipeline.scheduler = _ddim(**spacing)
    pipeline.save_pretrained(tmp_path / "saved")
    model = LatentDiffusion.from_diffusers(tmp_path / "saved")
    assert model.config.sampling.spacing == name
    images = model.sample(num_samples=2, steps=5, seed=3).images
    monkeypatch.setattr("diffusers.pipelines.deprecated.latent_diffusion_uncond.pipeline_latent_diffusion_uncond"
                        ".randn_tensor", lambda *_, **__: _noise(model.config, 3))
    theirs = pipeline(batch_size=2, num_inference_steps=5, output_type="np", eta=0.0).images
    assert images.std() > 10
    assert np.abs(np.round(theirs * 255) - images).max() <= 1


def test_pictures_of_text_through_a_workdir(saved, tmp_path):
    pipeline, folder = saved("stable diffusion")
    assert interop.main(["import", "--checkpoint", str(folder), "--workdir", str(tmp_path / "workdir")]) == 0
    model = LatentDiffusion.from_workdir(tmp_path / "workdir")
    images = model.sample(PROMPTS, steps=4, guidance_scale=3.0, seed=5).images
    asked = dict(latents=_noise(model.config, 5), num_inference_steps=4, guidance_scale=3.0, output_type="np")
    theirs = pipeline(PROMPTS, **asked).images
    assert images.std() > 10 and np.abs(np.round(theirs * 255) - images).max() <= 1

    out = tmp_path / "out"  # and the other way
    assert interop.main(["export", "--workdir", str(tmp_path / "workdir"), "--format", "diffusers", "--output",
                         str(out)]) == 0
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(out)(PROMPTS, **asked).images
    assert np.abs(np.round(theirs * 255) - images).max() <= 1


def test_half_precision_and_weights_in_several_parts(saved, tmp_path):
    pipeline, folder = saved("stable diffusion")
    _, params = ours.import_model(folder)
    pipeline.save_pretrained(tmp_path / "parts", max_shard_size="1MB")
    assert (tmp_path / "parts" / "unet" / "diffusion_pytorch_model.safetensors.index.json").exists()
    jax.tree.map(np.testing.assert_array_equal, ours.import_model(tmp_path / "parts")[1], params)
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    assert (tmp_path / "half" / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()
    jax.tree.map(np.testing.assert_array_equal, ours.import_model(tmp_path / "half")[1], params)


def test_mistakes_are_named(saved, tmp_path):
    with pytest.raises(UserError, match="model_index.json does not exist: no folder of a pipeline"):
        ours.import_model(tmp_path)
    _, folder = saved("ldm")
    config, params = ours.import_model(folder)
    with pytest.raises(UserError, match="saved exists and is not empty"):
        ours.export_model(config, params, folder)
    with config.unlocked():
        config.conditioning.update(dict(crossattn="class", num_classes=3))
    with pytest.raises(UserError, match="diffusers has no pipeline for a model conditioned by class"):
        ours.export_model(config, params, tmp_path / "out")
    assert not (tmp_path / "out").exists()
