"""Both autoencoders against diffusers: outputs and the gradients of every parameter, float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from latent_diffusion.models.autoencoder import AutoencoderKL, AutoencoderVQ  # noqa: E402

ATOL = 5e-5
QUICK_COMPILE = {"xla_backend_optimization_level": 0}
SIZE = 8
RULES = [
    (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down_\1_block_\2"),
    (r"down_blocks\.(\d+)\.attentions\.(\d+)", r"down_\1_attn_\2"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down_\1_downsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid_block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid_attn_1"),
    # Two levels: diffusers counts the decoder's in order of execution, the reference from the highest resolution.
    (r"up_blocks\.(\d)\.resnets\.(\d+)", lambda m: f"up_{1 - int(m[1])}_block_{m[2]}"),
    (r"up_blocks\.(\d)\.attentions\.(\d+)", lambda m: f"up_{1 - int(m[1])}_attn_{m[2]}"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up_{1 - int(m[1])}_upsample"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"group_norm", "norm"),
    (r"to_([qkv])$", r"\1"),
    (r"to_out\.0", "proj_out"),
    (r"quantize\.embedding", "quantize"),
]
TRUNK = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (64, 128),
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 32,
}
OURS = {
    "ch": 64,
    "ch_mult": (1, 2),
    "num_res_blocks": 1,
    "attn_resolutions": (SIZE // 2,),
    "resolution": SIZE,
    "z_channels": 4,
}


def _nhwc(x):
    return np.ascontiguousarray(x.detach().numpy().transpose(0, 2, 3, 1))


def _arrays(model, attribute):
    return {name: getattr(p, attribute).detach().numpy() for name, p in model.named_parameters()}


def _inputs():
    x = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)).requires_grad_()
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    return x, cotangent


def test_kl(to_tree, randomize, assert_trees_close, assert_near_in_bfloat16):
    torch.manual_seed(0)
    theirs = randomize(diffusers.AutoencoderKL(latent_channels=4, **TRUNK), 3)
    x, cotangent = _inputs()
    posterior = theirs.encode(x).latent_dist
    rec = theirs.decode(posterior.mode()).sample
    (torch.sum(rec * cotangent) + 1e-2 * torch.mean(posterior.kl())).backward()

    ours = AutoencoderKL(embed_dim=4, **OURS)
    x_ours, cotangent = jnp.asarray(_nhwc(x)), jnp.asarray(_nhwc(cotangent))
    template = jax.eval_shape(ours.init, jax.random.key(0), x_ours)["params"]
    params = to_tree(_arrays(theirs, "data"), RULES, template)

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def run(params, x):
        def loss(params, x):
            rec, q = ours.apply({"params": params}, x)
            return jnp.sum(rec * cotangent) + 1e-2 * jnp.mean(q.kl()), (rec, q)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (grad_params, grad_x), (rec_ours, q) = run(params, x_ours)
    np.testing.assert_allclose(rec_ours, _nhwc(rec), rtol=0, atol=ATOL)
    np.testing.assert_allclose(q.mean, _nhwc(posterior.mean), rtol=0, atol=ATOL)
    np.testing.assert_allclose(q.logvar, _nhwc(posterior.logvar), rtol=0, atol=ATOL)
    np.testing.assert_allclose(q.std, _nhwc(posterior.std), rtol=0, atol=ATOL)
    np.testing.assert_allclose(q.kl(), posterior.kl().detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(grad_x, _nhwc(x.grad), rtol=0, atol=ATOL * float(jnp.abs(grad_x).max()))
    assert_trees_close(grad_params, to_tree(_arrays(theirs, "grad"), RULES, template), ATOL)

    half, _ = jax.jit(lambda params: ours.clone(dtype="bfloat16").apply({"params": params}, x_ours))(params)
    assert_near_in_bfloat16(half, _nhwc(rec))


def test_vq(to_tree, randomize, assert_trees_close):
    torch.manual_seed(0)
    theirs = randomize(diffusers.VQModel(latent_channels=4, vq_embed_dim=3, num_vq_embeddings=64, **TRUNK), 3)
    theirs.quantize.embedding.weight.data = 0.5 * torch.randn(64, 3, generator=torch.Generator().manual_seed(4))
    x, cotangent = _inputs()
    z = theirs.encode(x).latents
    z_q, codebook_loss, (_, _, indices) = theirs.quantize(z)
    rec = theirs.decode(z_q, force_not_quantize=True).sample
    (torch.sum(rec * cotangent) + codebook_loss).backward()

    ours = AutoencoderVQ(embed_dim=3, n_embed=64, **OURS)
    x_ours, cotangent = jnp.asarray(_nhwc(x)), jnp.asarray(_nhwc(cotangent))
    template = jax.eval_shape(ours.init, jax.random.key(0), x_ours)["params"]
    params = to_tree(_arrays(theirs, "data"), RULES, template)

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def run(params, x):
        def loss(params, x):
            rec, indices, codebook_loss = ours.apply({"params": params}, x)
            return jnp.sum(rec * cotangent) + codebook_loss, (rec, indices, codebook_loss)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (grad_params, grad_x), (rec_ours, indices_ours, loss_ours) = run(params, x_ours)
    assert np.unique(indices_ours).size > 3
    np.testing.assert_array_equal(indices_ours.reshape(-1), indices.numpy().reshape(-1))
    np.testing.assert_allclose(loss_ours, codebook_loss.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(rec_ours, _nhwc(rec), rtol=0, atol=ATOL)
    np.testing.assert_allclose(grad_x, _nhwc(x.grad), rtol=0, atol=ATOL * float(jnp.abs(grad_x).max()))
    assert_trees_close(grad_params, to_tree(_arrays(theirs, "grad"), RULES, template), ATOL)
