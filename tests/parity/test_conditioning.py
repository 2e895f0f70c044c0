"""The text transformer against diffusers' LDMBertModel, which is the reference's: output and all gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
ldm = pytest.importorskip("diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion")

from latent_diffusion.models.conditioning import TextTransformer  # noqa: E402

ATOL = 5e-5
QUICK_COMPILE = {"xla_backend_optimization_level": 0}
RULES = [
    (r"^model\.", ""),
    (r"embed_tokens", "token_emb"),
    (r"^layer_norm", "norm"),
    (r"layers\.(\d+)\.self_attn_layer_norm", lambda m: f"layers_{2 * int(m[1])}_0"),
    (r"layers\.(\d+)\.self_attn\.([qkv])_proj", lambda m: f"layers_{2 * int(m[1])}_1.to_{m[2]}"),
    (r"layers\.(\d+)\.self_attn\.out_proj", lambda m: f"layers_{2 * int(m[1])}_1.to_out"),
    (r"layers\.(\d+)\.final_layer_norm", lambda m: f"layers_{2 * int(m[1]) + 1}_0"),
    (r"layers\.(\d+)\.fc1", lambda m: f"layers_{2 * int(m[1]) + 1}_1.net_0_0"),
    (r"layers\.(\d+)\.fc2", lambda m: f"layers_{2 * int(m[1]) + 1}_1.net_2"),
]


def _tree(model, attribute, to_tree, template):
    named = {name: getattr(p, attribute) for name, p in model.named_parameters() if not name.startswith("to_logits")}
    named = {name: value.detach().numpy() for name, value in named.items()}
    positions = named.pop("model.embed_positions.weight")
    template = {name: value for name, value in template.items() if name != "pos_emb"}
    return {**to_tree(named, RULES, template), "pos_emb": positions}


def test_text_transformer(to_tree, randomize, assert_trees_close, assert_near_in_bfloat16):
    torch.manual_seed(0)
    config = ldm.LDMBertConfig(
        vocab_size=50,
        max_position_embeddings=7,
        encoder_layers=2,
        encoder_ffn_dim=96,
        encoder_attention_heads=2,
        head_dim=8,
        d_model=24,
        dropout=0.0,
    )
    theirs = randomize(ldm.LDMBertModel(config), 3)
    for parameter in theirs.model.parameters():
        if parameter.ndim == 2:  # their standard deviation of 0.02 makes a network that is almost linear
            parameter.data = 10 * parameter.data
    tokens = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(1))
    cotangent = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(2))
    out = theirs.model(tokens)[0]
    torch.sum(out * cotangent).backward()

    ours = TextTransformer(vocab_size=50, max_length=7, width=24, layers=2, heads=2, head_dim=8)
    tokens, cotangent = jnp.asarray(tokens.numpy(), jnp.int32), jnp.asarray(cotangent.numpy())
    template = jax.eval_shape(ours.init, jax.random.key(0), tokens)["params"]
    params = _tree(theirs, "data", to_tree, template)

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def run(params):
        def loss(params):
            out = ours.apply({"params": params}, tokens)
            return jnp.sum(out * cotangent), out

        return jax.grad(loss, has_aux=True)(params)

    grads, out_ours = run(params)
    np.testing.assert_allclose(out_ours, out.detach().numpy(), rtol=0, atol=ATOL)
    assert_trees_close(grads, _tree(theirs, "grad", to_tree, template), ATOL)
    half = jax.jit(lambda params: ours.clone(dtype="bfloat16").apply({"params": params}, tokens))(params)
    assert_near_in_bfloat16(half, out.detach().numpy())
