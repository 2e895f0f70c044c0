"""The UNet without cross-attention against diffusers' UNet2DModel: output, gradients of every parameter, float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from latent_diffusion.models.unet import UNet  # noqa: E402

ATOL = 5e-5
QUICK_COMPILE = {"xla_backend_optimization_level": 0}
BLOCKS, HEAD = 1, 16


def _input_block(m):
    return f"input_blocks_{1 + int(m[1]) * (BLOCKS + 1) + int(m[2])}"


def _output_block(m):
    return f"output_blocks_{int(m[1]) * (BLOCKS + 1) + int(m[2])}"


# Attention is in the second level only, whose upsampler (in up_blocks.0, executed first) comes after it, at .2.
RULES = [
    (r"time_embedding\.linear_1", "time_embed_0"),
    (r"time_embedding\.linear_2", "time_embed_2"),
    (r"class_embedding", "label_emb"),
    (r"^conv_in", "input_blocks_0_0"),
    (r"^conv_norm_out", "out_0"),
    (r"^conv_out", "out_2"),
    (r"down_blocks\.(\d)\.resnets\.(\d)", lambda m: _input_block(m) + "_0"),
    (r"down_blocks\.(\d)\.attentions\.(\d)", lambda m: _input_block(m) + "_1"),
    (r"down_blocks\.0\.downsamplers\.0\.conv$", f"input_blocks_{1 + BLOCKS}_0.op"),
    (r"down_blocks\.0\.downsamplers\.0", f"input_blocks_{1 + BLOCKS}_0"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"middle_block_{2 * int(m[1])}"),
    (r"mid_block\.attentions\.0", "middle_block_1"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: _output_block(m) + "_0"),
    (r"up_blocks\.(\d)\.attentions\.(\d)", lambda m: _output_block(m) + "_1"),
    (r"up_blocks\.0\.upsamplers\.0", f"output_blocks_{BLOCKS}_2"),
    (r"norm1$", "in_layers_0"),
    (r"conv1$", "in_layers_2"),
    (r"time_emb_proj", "emb_layers_1"),
    (r"norm2$", "out_layers_0"),
    (r"conv2$", "out_layers_3"),
    (r"conv_shortcut", "skip_connection"),
    (r"group_norm", "norm"),
    (r"to_out\.0", "proj_out"),
]


def _nhwc(x):
    return np.ascontiguousarray(x.detach().numpy().transpose(0, 2, 3, 1))


def _arrays(model, attribute):
    """Named parameters, with q, k and v merged in the older order [head][q, k, v]."""
    arrays = {name: getattr(p, attribute).detach().numpy() for name, p in model.named_parameters()}
    for name in [name for name in arrays if ".to_q." in name]:
        parts = [arrays.pop(name.replace("to_q", part)) for part in ("to_q", "to_k", "to_v")]
        parts = [part.reshape(-1, HEAD, *part.shape[1:]) for part in parts]
        merged = np.stack(parts, axis=1)
        arrays[name.replace("to_q", "qkv")] = merged.reshape(-1, *merged.shape[3:])
    return arrays


@pytest.mark.parametrize("variant", ["plain", "resblock_updown"])
def test_unet(variant, to_tree, randomize, assert_trees_close):
    updown = variant == "resblock_updown"
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(
        in_channels=4,
        out_channels=3,
        block_out_channels=(64, 128),
        layers_per_block=BLOCKS,
        down_block_types=("ResnetDownsampleBlock2D" if updown else "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D" if updown else "UpBlock2D"),
        attention_head_dim=HEAD,
        norm_num_groups=32,
        attn_norm_num_groups=32,
        norm_eps=1e-5,
        flip_sin_to_cos=True,
        freq_shift=0,
        downsample_type="resnet" if updown else "conv",
        upsample_type="resnet" if updown else "conv",
        resnet_time_scale_shift="scale_shift" if updown else "default",
        num_class_embeds=7 if updown else None,
    )
    theirs = randomize(theirs, 3)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 8, generator=generator).requires_grad_()
    cotangent = torch.randn(2, 3, 8, 8, generator=generator)
    t, label = torch.tensor([3, 740]), torch.tensor([6, 2]) if updown else None
    out = theirs(x, t, class_labels=label).sample
    torch.sum(out * cotangent).backward()

    ours = UNet(
        in_channels=4,
        out_channels=3,
        model_channels=64,
        channel_mult=(1, 2),
        num_res_blocks=BLOCKS,
        attention_resolutions=(2,),
        num_head_channels=HEAD,
        resblock_updown=updown,
        use_scale_shift_norm=updown,
        num_classes=7 if updown else 0,
    )
    inputs = {"z_t": _nhwc(x), "concat": None, "t": t.numpy().astype(np.int32)}
    if updown:
        inputs["label"] = label.numpy().astype(np.int32)
    else:  # half of the channels through `concat`
        inputs["z_t"], inputs["concat"] = inputs["z_t"][..., :3], inputs["z_t"][..., 3:]
    inputs = jax.tree.map(jnp.asarray, inputs)
    template = jax.eval_shape(lambda key: ours.init(key, **inputs), jax.random.key(0))["params"]
    params = to_tree(_arrays(theirs, "data"), RULES, template)
    cotangent = jnp.asarray(_nhwc(cotangent))

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def run(params, z_t, inputs):
        def loss(params, z_t):
            out = ours.apply({"params": params}, **(inputs | {"z_t": z_t}))
            return jnp.sum(out * cotangent), out

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, z_t)

    (grad_params, grad_z), out_ours = run(params, inputs["z_t"], inputs)
    np.testing.assert_allclose(out_ours, _nhwc(out), rtol=0, atol=ATOL)
    np.testing.assert_allclose(
        grad_z, _nhwc(x.grad)[..., : grad_z.shape[-1]], rtol=0, atol=ATOL * float(jnp.abs(grad_z).max())
    )
    assert_trees_close(grad_params, to_tree(_arrays(theirs, "grad"), RULES, template), ATOL)
