"""A model that was exported for latent-diffusion, read by diffusers' own converter of such files: the networks that
come of it compute what ours do, float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_models

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers.loaders import single_file_utils as converter  # noqa: E402

from latent_diffusion import models, tensor_files  # noqa: E402
from latent_diffusion.interop import compvis  # noqa: E402
from latent_diffusion.interop.compvis_description import to_description  # noqa: E402

ATOL = 5e-5


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(what was imported, the state dict out of an exported file, its description)."""
    params = dict(reference_models.MODELS["vectors"]["model"]["params"], use_ema=True)
    description = {"model": reference_models.MODELS["vectors"]["model"] | {"params": params}}
    imported = compvis.read_model(description, reference_models.state_of(description))
    path = tmp_path_factory.mktemp("files") / "model.ckpt"
    tensor_files.save_tensors(path, compvis.export_model(imported.config, imported.params, imported.ema_params))
    state = torch.load(path, weights_only=True)["state_dict"]
    return imported, state, to_description(imported.config)


def _nchw(x):
    return torch.tensor(np.array(x)).permute(0, 3, 1, 2)


def _nhwc(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("averaged", [False, True])
def test_unet(exported, averaged):
    imported, state, description = exported
    params = imported.ema_params if averaged else imported.params
    options = converter.create_unet_diffusers_config_from_ldm(description, state, image_size=8)
    theirs = diffusers.UNet2DConditionModel(**options).eval()
    converted = converter.convert_ldm_unet_checkpoint(state, options, extract_ema=averaged)
    theirs.load_state_dict(converted)  # strict: nothing is missing, nothing left over
    rng = np.random.default_rng(0)
    z, context = rng.standard_normal((2, 8, 8, 4), np.float32), rng.standard_normal((2, 3, 24), np.float32)
    t = np.array([3, 17], np.int32)
    with torch.no_grad():
        expected = _nhwc(theirs(_nchw(z), torch.tensor(t), encoder_hidden_states=torch.tensor(context)).sample)
    found = jax.jit(models.build(imported.config).unet.apply)({"params": params["unet"]}, z, t, context)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=ATOL * max(1, np.abs(expected).max()))


def test_first_stage(exported):
    imported, state, description = exported
    options = converter.create_vae_diffusers_config_from_ldm(description, state, image_size=16)
    theirs = diffusers.AutoencoderKL(**options).eval()
    theirs.load_state_dict(converter.convert_ldm_vae_checkpoint(state, options))
    x = np.random.default_rng(1).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    network = models.build(imported.config).first_stage

    def run(params, x):
        posterior = network.apply({"params": params}, x, method="encode")
        return posterior.mean, posterior.logvar, network.apply({"params": params}, posterior.mean, method="decode")

    with torch.no_grad():
        posterior = theirs.encode(_nchw(x)).latent_dist
        expected = posterior.mean, posterior.logvar, theirs.decode(posterior.mean).sample
    ours = jax.jit(run)(imported.params["first_stage"], jnp.asarray(x))
    for found, wanted in zip(ours, map(_nhwc, expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=ATOL * max(1, np.abs(wanted).max()))
