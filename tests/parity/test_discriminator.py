"""The PatchGAN against torch layers with the same weights: outputs, gradients, running statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from latent_diffusion.models.discriminator import PatchDiscriminator  # noqa: E402

NDF, LAYERS = 4, 3


class TorchActNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))

    def initialize(self, x):
        flat = x.detach().permute(1, 0, 2, 3).reshape(x.shape[1], -1)
        self.loc.data = -flat.mean(1).reshape(1, -1, 1, 1)
        self.scale.data = 1 / (flat.std(1).reshape(1, -1, 1, 1) + 1e-6)

    def forward(self, x):
        return self.scale * (x + self.loc)


def torch_network(norm):
    make, bias = {"batch": (nn.BatchNorm2d, False), "actnorm": (TorchActNorm, True)}[norm]
    layers, channels = [nn.Conv2d(3, NDF, 4, 2, 1), nn.LeakyReLU(0.2)], NDF
    for i in range(1, LAYERS + 1):
        features = NDF * min(2**i, 8)
        layers += [nn.Conv2d(channels, features, 4, 2 if i < LAYERS else 1, 1, bias=bias), make(features)]
        layers += [nn.LeakyReLU(0.2)]
        channels = features
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, 1, 1))


def copy_to_torch(params, network):
    with torch.no_grad():
        for name, values in params.items():
            layer = network[int(name.removeprefix("main_"))]
            for key, value in values.items():
                value = torch.from_numpy(np.array(value))
                if key == "kernel":
                    layer.weight.copy_(value.permute(3, 2, 0, 1))
                elif isinstance(layer, nn.BatchNorm2d):
                    getattr(layer, {"scale": "weight", "bias": "bias"}[key]).copy_(value)
                else:
                    parameter = getattr(layer, key)
                    parameter.copy_(value.reshape(parameter.shape))


def gradient_of(layer, key):
    if key == "kernel":
        return layer.weight.grad.permute(2, 3, 1, 0)
    if isinstance(layer, nn.BatchNorm2d) and key == "scale":
        return layer.weight.grad
    return getattr(layer, key).grad.reshape(-1)


@pytest.fixture(scope="module", params=["batch", "actnorm"])
def both(request):
    rng = np.random.default_rng(0)
    x = rng.normal(0.3, 1.5, (3, 32, 32, 3)).astype(np.float32)
    ours = PatchDiscriminator(NDF, LAYERS, request.param)
    variables = jax.jit(lambda: ours.init(jax.random.key(0, impl="unsafe_rbg"), jnp.asarray(x), train=True))()
    params = variables["params"]
    theirs = torch_network(request.param)
    copy_to_torch(params, theirs)
    return ours, params, variables["batch_stats"], theirs, x


def to_torch(x):
    return torch.from_numpy(x).permute(0, 3, 1, 2)


def test_training_outputs_gradients_and_running_statistics(both):
    ours, params, stats, theirs, x = both
    theirs.train()
    theirs.zero_grad()

    def loss(params, x, stats):
        logits, updated = ours.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
        return jnp.mean(jax.nn.relu(1 - logits)), (logits, updated["batch_stats"])

    step = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    for _ in range(2):  # twice, so that the running statistics do not start from zero and one
        theirs.zero_grad()
        x_torch = to_torch(x).requires_grad_()
        expected = theirs(x_torch)
        torch.relu(1 - expected).mean().backward()
        (gradients, x_gradient), (logits, stats) = step(params, jnp.asarray(x), stats)

    np.testing.assert_allclose(logits, expected.detach().permute(0, 2, 3, 1), atol=5e-5)
    np.testing.assert_allclose(x_gradient, x_torch.grad.permute(0, 2, 3, 1), atol=5e-5)
    for name, values in gradients.items():
        layer = theirs[int(name.removeprefix("main_"))]
        for key, gradient in values.items():
            np.testing.assert_allclose(gradient, gradient_of(layer, key), atol=5e-5, rtol=1e-4, err_msg=f"{name} {key}")
        if isinstance(layer, nn.BatchNorm2d):
            np.testing.assert_allclose(stats[name]["mean"], layer.running_mean, atol=5e-5)
            np.testing.assert_allclose(stats[name]["var"], layer.running_var, rtol=1e-4)

    theirs.eval()
    with torch.no_grad():
        expected = theirs(to_torch(x)).permute(0, 2, 3, 1)
    logits = ours.apply({"params": params, "batch_stats": stats}, jnp.asarray(x), train=False)
    np.testing.assert_allclose(logits, expected, atol=5e-5)


def test_data_dependent_initialization_of_actnorm():
    x = np.random.default_rng(1).normal(0.5, 2.0, (3, 32, 32, 3)).astype(np.float32)
    network = PatchDiscriminator(NDF, LAYERS, "actnorm")
    params = jax.jit(lambda: network.init(jax.random.key(0, impl="unsafe_rbg"), jnp.asarray(x), train=True))()["params"]
    theirs = torch_network("actnorm")
    copy_to_torch({k: v for k, v in params.items() if "kernel" in v}, theirs)
    activation = to_torch(x)
    with torch.no_grad():
        for i, layer in enumerate(theirs):
            if isinstance(layer, TorchActNorm):
                layer.initialize(activation)
                np.testing.assert_allclose(params[f"main_{i}"]["loc"], layer.loc.reshape(-1), atol=5e-5)
                np.testing.assert_allclose(params[f"main_{i}"]["scale"], layer.scale.reshape(-1), rtol=1e-4)
            activation = layer(activation)
