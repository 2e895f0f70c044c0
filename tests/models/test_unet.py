"""The UNet: published parameter counts, the reference's layout of blocks and heads, conditions, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.errors import UserError
from latent_diffusion.models.layers import keys_and_values
from latent_diffusion.models.unet import UNet

CROSS = {"use_spatial_transformer": True}
F4 = {"in_channels": 3, "out_channels": 3, "attention_resolutions": (8, 4, 2)}
F8 = {"in_channels": 4, "out_channels": 4, "attention_resolutions": (4, 2, 1)}
UPDOWN = {"resblock_updown": True}

# (settings, parameters of the released model), from its yaml file and from instantiating the reference.
RELEASED = {
    "celeba256": (F4 | {"model_channels": 224, "channel_mult": (1, 2, 3, 4), "num_head_channels": 32}, 274_056_163),
    "lsun_churches256": (
        F8
        | UPDOWN
        | {
            "model_channels": 192,
            "channel_mult": (1, 2, 2, 4, 4),
            "attention_resolutions": (1, 2, 4, 8),
            "num_heads": 8,
            "use_scale_shift_norm": True,
        },
        294_966_916,
    ),
    "cin256": (
        F8 | CROSS | {"model_channels": 256, "channel_mult": (1, 2, 4), "num_head_channels": 32, "context_dim": 512},
        394_984_196,
    ),
    "cin256-v2": (
        F4 | CROSS | {"model_channels": 192, "channel_mult": (1, 2, 3, 5), "num_heads": 1, "context_dim": 512},
        400_920_579,
    ),
    "text2img256": (
        F4 | CROSS | {"model_channels": 192, "channel_mult": (1, 2, 3, 5), "num_head_channels": 32, "context_dim": 640},
        403_623_939,
    ),
    "txt2img-1p4B": (
        F8
        | CROSS
        | {"model_channels": 320, "channel_mult": (1, 2, 4, 4), "num_heads": 8, "context_dim": 1280, "legacy": False},
        872_300_484,
    ),
    "layout2img": (
        F4
        | CROSS
        | {
            "model_channels": 128,
            "channel_mult": (1, 2, 3, 4),
            "num_head_channels": 32,
            "transformer_depth": 3,
            "context_dim": 512,
        },
        246_277_379,
    ),
    "bsr_sr": (
        F4
        | {
            "in_channels": 6,
            "model_channels": 160,
            "channel_mult": (1, 2, 2, 4),
            "attention_resolutions": (16, 8),  # 16 never occurs
            "num_head_channels": 32,
        },
        113_622_563,
    ),
    "inpainting_big": (
        F4 | UPDOWN | {"in_channels": 7, "model_channels": 256, "channel_mult": (1, 2, 3, 4), "num_heads": 8},
        387_245_827,
    ),
    "semantic_synthesis": (
        F4
        | {
            "in_channels": 6,
            "model_channels": 128,
            "channel_mult": (1, 4, 8),
            "attention_resolutions": (32, 16, 8),  # none occurs: attention in the middle only
            "num_heads": 8,
        },
        215_229_315,
    ),
    "rdm768": (
        CROSS
        | {
            "in_channels": 16,
            "out_channels": 16,
            "model_channels": 448,
            "channel_mult": (1, 2, 3, 4),
            "attention_resolutions": (4, 2, 1),
            "num_head_channels": 32,
            "context_dim": 768,
        },
        1_335_480_400,
    ),
    "stable-diffusion-v1": (
        F8
        | CROSS
        | {"model_channels": 320, "channel_mult": (1, 2, 4, 4), "num_heads": 8, "context_dim": 768, "legacy": False},
        859_520_964,
    ),
    "adm-imagenet-256": (  # Dhariwal & Nichol's pixel model, with classes and learned variance
        UPDOWN
        | {
            "in_channels": 3,
            "out_channels": 6,
            "model_channels": 256,
            "channel_mult": (1, 1, 2, 2, 4, 4),
            "attention_resolutions": (8, 16, 32),
            "num_head_channels": 64,
            "use_scale_shift_norm": True,
            "num_classes": 1000,
        },
        553_838_086,
    ),
    "ldm-1": (
        F4
        | {
            "model_channels": 192,
            "channel_mult": (1, 1, 2, 2, 4, 4),
            "attention_resolutions": (8, 16, 32),
            "num_head_channels": 32,
        },
        270_458_115,
    ),
}


def _inputs(net, batch=2, size=None, seed=0):
    size = size or 2 ** (len(net.channel_mult) - 1)
    rng = np.random.default_rng(seed)
    inputs = {
        "z_t": jnp.asarray(rng.normal(size=(batch, size, size, net.in_channels)), jnp.float32),
        "t": jnp.asarray(rng.integers(0, 1000, batch), jnp.int32),
    }
    if net.context_dim:
        inputs["context"] = jnp.asarray(rng.normal(size=(batch, 3, net.context_dim)), jnp.float32)
    if net.num_classes:
        inputs["label"] = jnp.asarray(rng.integers(0, net.num_classes, batch), jnp.int32)
    return inputs


def _shapes(net, **changes):
    return jax.eval_shape(lambda key: net.init(key, **(_inputs(net) | changes)), jax.random.key(0))["params"]


def _count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@functools.cache
def _released(name):
    return _shapes(UNet(num_res_blocks=2, **RELEASED[name][0]))


# The others are counted in test_published_models.py, from the configs that train them.
COUNTED_HERE = {"celeba256", "semantic_synthesis", "rdm768", "adm-imagenet-256"}


@pytest.mark.parametrize("name", [
    name if name in COUNTED_HERE else pytest.param(name, marks=pytest.mark.slow) for name in RELEASED])
def test_parameter_count_of_released_models(name):
    assert _count(_released(name)) == RELEASED[name][1]


# (released model, channels of the levels with attention, heads x channels per head there)
HEADS = {
    "celeba256": [(448, (14, 32)), (672, (21, 32)), (896, (28, 32))],
    "lsun_churches256": [(192, (8, 24)), (384, (8, 48)), (768, (8, 96))],
    "cin256": [(256, (8, 32)), (512, (16, 32)), (1024, (32, 32))],
    "cin256-v2": [(384, (1, 384)), (576, (1, 576)), (960, (1, 960))],
    "txt2img-1p4B": [(320, (8, 40)), (640, (8, 80)), (1280, (8, 160))],
    "inpainting_big": [(512, (8, 64)), (768, (8, 96)), (1024, (8, 128))],
    "semantic_synthesis": [(1024, (8, 128))],
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_released_models(name):
    net = UNet(**RELEASED[name][0])
    for channels, layout in HEADS[name]:
        assert net.head_layout(channels) == layout
        assert net.head_layout(channels, upsampling=True) == layout


@pytest.mark.parametrize(
    ("settings", "down", "up"),
    [  # worked out by hand from the reference's code, for 64 channels
        ({"num_heads": 4, "num_heads_upsample": 2}, (4, 16), (2, 32)),
        ({"num_heads": 4, "num_heads_upsample": 2, "legacy": False}, (4, 16), (4, 16)),
        ({"num_heads": 4, "num_heads_upsample": 2, "num_head_channels": 8}, (8, 8), (8, 8)),
        ({"num_heads": 4, "num_heads_upsample": 2, **CROSS}, (4, 16), (4, 16)),
        ({"num_head_channels": 48, **CROSS}, (1, 64), (1, 64)),
        ({"num_head_channels": 48, "legacy": False, **CROSS}, (1, 48), (1, 48)),
    ],
)
def test_legacy_quirk_of_heads(settings, down, up):
    net = UNet(**settings)
    assert net.head_layout(64) == down
    assert net.head_layout(64, upsampling=True) == up


def test_names_and_places_of_blocks():
    # The key layout of the released celeba256 checkpoint: downsamplers at 3, 6, 9; attention at factors 2, 4 and 8.
    tree = _released("celeba256")
    attention = {name for name in tree if "qkv" in tree[name]}
    assert attention == {
        *(f"input_blocks_{i}_1" for i in (4, 5, 7, 8, 10, 11)),
        "middle_block_1",
        *(f"output_blocks_{i}_1" for i in range(9)),
    }
    assert {name for name in tree if "op" in tree[name]} == {f"input_blocks_{i}_0" for i in (3, 6, 9)}
    upsample = {name for name in tree if name.startswith("output") and "conv" in tree[name]}
    assert upsample == {f"output_blocks_{i}_2" for i in (2, 5, 8)}
    assert tree["time_embed_0"]["kernel"].shape == (224, 896)
    assert tree["input_blocks_4_1"]["qkv"]["kernel"].shape == (1, 448, 3 * 448)
    assert tree["output_blocks_0_0"]["in_layers_2"]["kernel"].shape == (3, 3, 2 * 896, 896)
    assert tree["output_blocks_11_0"]["skip_connection"]["kernel"].shape == (1, 1, 448, 224)
    # Without attention in a level the upsampler comes second.
    tree = _released("semantic_synthesis")
    assert {name for name in tree if name.startswith("output") and "conv" in tree[name]} == {
        "output_blocks_2_1",
        "output_blocks_5_1",
    }


TINY = {
    "in_channels": 4,
    "out_channels": 3,
    "model_channels": 16,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "num_heads": 2,
}
TINY_CROSS = TINY | {"use_spatial_transformer": True, "context_dim": 6}
SMALL_CROSS = TINY_CROSS | {"channel_mult": (1,), "attention_resolutions": (1,), "num_res_blocks": 0}
SIZE = 4


def _jit(function):
    """Compiled without optimization, which for programs this small takes most of the time."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def _noise_params(net, inputs, seed=1):
    """Random parameters, those that start at zero included."""
    shapes = jax.eval_shape(lambda key: net.init(key, **inputs), jax.random.key(0))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32), shapes)


def test_initial_values():
    net = UNet(**SMALL_CROSS, num_classes=500)
    inputs = _inputs(net, size=SIZE)
    key = jax.random.key(0, impl="unsafe_rbg")  # compiles twice as fast
    params = _jit(net.init)(key, **inputs)["params"]
    zero = ("out_layers_3", "proj_out", "out_2")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [key.key for key in path]
        if names[-1] == "kernel":
            assert np.all(leaf == 0) == (names[-2] in zero), names
            # torch: U(-1/sqrt(fan_in), 1/sqrt(fan_in))
            assert np.abs(leaf).max() <= 1 / np.sqrt(leaf[..., 0].size) + 1e-7, names
        elif names[-1] == "bias" and names[-2] in zero:
            assert np.all(leaf == 0), names
    label = np.asarray(params["label_emb"]["embedding"])
    assert label.shape == (500, 64)
    assert abs(label.std() - 1) < 0.02 and abs(label.mean()) < 0.02  # N(0, 1): standard error 0.004, 0.006
    # The final convolution is zero, so a new network predicts zero.
    assert np.all(_jit(net.apply)({"params": params}, **inputs) == 0)


def test_remat_changes_memory_only():
    outputs, grads, saved = {}, {}, {}
    for remat in ("none", "dots", "full"):
        net = UNet(**SMALL_CROSS, remat=remat)
        inputs = _inputs(net, size=SIZE)
        params = _noise_params(net, inputs)

        def loss(params, net=net, inputs=inputs):
            return jnp.sum(jnp.sin(net.apply({"params": params}, **inputs)))

        if remat != "dots":
            outputs[remat], grads[remat] = _jit(jax.value_and_grad(loss))(params)
        residuals = jax.eval_shape(lambda params, loss=loss: jax.vjp(loss, params)[1], params)
        saved[remat] = _count(residuals)
    assert saved["full"] < saved["dots"] < saved["none"]
    np.testing.assert_allclose(outputs["full"], outputs["none"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads["full"], grads["none"])


def test_bfloat16_computes_in_bfloat16_only_where_it_should():
    net, half = UNet(**SMALL_CROSS), UNet(**SMALL_CROSS, dtype="bfloat16")
    inputs = _inputs(net, size=SIZE)
    params = _noise_params(net, inputs)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(_shapes(half)))

    def forward(net):
        return _jit(lambda params, inputs: net.apply({"params": params}, **inputs))

    expected, actual = forward(net)(params, inputs), forward(half)(params, inputs)
    assert actual.dtype == jnp.float32
    assert np.abs(actual - expected).max() < 0.05 * np.abs(expected).max()
    assert jnp.linalg.norm(actual - expected) < 2e-2 * jnp.linalg.norm(expected)  # bfloat16 has 8 bits

    def operations(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for value in equation.params.values():
                if hasattr(value, "jaxpr"):
                    yield from operations(value.jaxpr)

    jaxpr = jax.make_jaxpr(lambda params: half.apply({"params": params}, **inputs))(params).jaxpr
    products = [e for e in operations(jaxpr) if e.primitive.name in ("dot_general", "conv_general_dilated")]
    assert len(products) > 30
    assert all(variable.aval.dtype == jnp.bfloat16 for e in products for variable in e.invars)
    exponentials = [e for e in operations(jaxpr) if e.primitive.name in ("exp", "rsqrt")]  # softmax, norms
    assert exponentials and all(e.invars[0].aval.dtype == jnp.float32 for e in exponentials)


def test_keys_and_values_that_are_given_are_used():
    """As a sampler gives them: the kernels that made them are not looked at again."""
    net = UNet(**SMALL_CROSS)
    inputs = _inputs(net, size=SIZE)
    params = _noise_params(net, inputs)
    given = keys_and_values(params, inputs["context"], jnp.float32)
    spoilt = jax.tree.map_with_path(
        lambda path, x: x * jnp.nan if "to_k" in str(path[-2]) and "attn2" in str(path[-3]) else x, params)
    apply = _jit(lambda variables: net.apply(variables, **inputs))
    expected = apply({"params": params, "context": {}})
    assert not jnp.isfinite(apply({"params": spoilt, "context": {}})).all()
    found = apply({"params": spoilt, "context": given})
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * float(jnp.abs(expected).max()))


def test_label_is_added_to_the_time_embedding():
    plain, labelled = UNet(**TINY), UNet(**TINY, num_classes=5)
    inputs = _inputs(plain, batch=1, size=SIZE)
    params = _noise_params(labelled, inputs | {"label": jnp.asarray([3])})
    actual = _jit(labelled.apply)({"params": params}, **inputs, label=jnp.asarray([3]))
    row = params.pop("label_emb")["embedding"][3]
    time = params["time_embed_2"]
    params["time_embed_2"] = time | {"bias": time["bias"] + row}
    expected = _jit(plain.apply)({"params": params}, **inputs)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_dropout_acts_in_training_only():
    net = UNet(**TINY, dropout=0.5)
    inputs, rng = _inputs(net, size=SIZE), jax.random.key(0)
    params = _shapes(net)
    apply = jax.eval_shape
    apply(lambda p: net.apply({"params": p}, **inputs), params)  # needs no random numbers
    apply(lambda p: net.apply({"params": p}, **inputs, train=True, rngs={"dropout": rng}), params)
    with pytest.raises(Exception, match="dropout"):
        apply(lambda p: net.apply({"params": p}, **inputs, train=True), params)


def test_transformer_without_context_attends_to_itself():
    tree = _shapes(UNet(**TINY, use_spatial_transformer=True, transformer_depth=2))
    block = tree["middle_block_1"]["transformer_blocks_1"]
    assert block["attn2"]["to_k"]["kernel"].shape == block["attn1"]["to_k"]["kernel"].shape == (32, 32)
    assert "bias" not in block["attn2"]["to_k"] and "bias" in block["attn2"]["to_out_0"]
    assert block["ff"]["net_0_proj"]["kernel"].shape == (32, 2 * 4 * 32)


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({}, {"z_t": jnp.zeros((2, 6, 5, 4))}, "6x5 is not a multiple of 2"),
        ({}, {"concat": jnp.zeros((2, 2, 2, 1))}, "5 channels, model.in_channels is 4"),
        ({}, {"context": jnp.zeros((2, 1, 6))}, "context has width 6, model.context_dim is None"),
        ({}, {"label": jnp.zeros(2, jnp.int32)}, "label is given, num_classes is 0"),
        ({"num_classes": 3}, {"label": None}, "label is not given, num_classes is 3"),
        ({"context_dim": 6}, {}, "needs model.use_spatial_transformer"),
        ({"context_dim": 6, **CROSS}, {"context": None}, "context has width None"),
        ({"num_heads": 5}, {}, "32 channels cannot be divided into 5"),
        ({"num_heads": -1}, {}, "set num_heads or num_head_channels"),
        ({"num_head_channels": 12}, {}, "num_head_channels is 12"),
        ({"remat": "some"}, {}, "choose from none, dots, full"),
        ({"dtype": "float16"}, {}, "choose from float32, bfloat16"),
    ],
)
def test_mistakes_are_named(settings, changes, message):
    with pytest.raises(UserError, match=message):
        _shapes(UNet(**(TINY | settings)), **changes)
