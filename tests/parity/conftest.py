"""Parameters of torch models as trees of ours, for comparison on shared random weights."""

import pathlib
import re

import jax
import numpy as np
import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if pathlib.Path(__file__).parent in item.path.parents:
            item.add_marker("parity")


def _flatten(tree):
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _to_tree(named, rules, template):
    """A tree like `template` from torch arrays: names are rewritten by `rules` (regex, replacement), axes reversed.

    Every leaf of the template must be given exactly once, and every array must have a place.
    """
    shapes = {path: leaf.shape for path, leaf in _flatten(template).items()}
    found = {}
    for name, value in named.items():
        module, leaf = name.rsplit(".", 1)
        for pattern, replacement in rules:
            module = re.sub(pattern, replacement, module)
        module = module.replace(".", "/")
        names = {"weight": ("kernel", "scale", "embedding"), "bias": ("bias",)}[leaf]
        (path,) = [f"{module}/{leaf}" for leaf in names if f"{module}/{leaf}" in shapes] or [f"{module}?"]
        assert path in shapes, f"no place for {name}"
        assert path not in found, f"two values for {path}"
        value = np.asarray(value)
        order = {4: (2, 3, 1, 0), 3: (2, 1, 0), 2: (1, 0), 1: (0,)}[value.ndim]
        value = value if path.endswith("embedding") else value.transpose(order)
        assert [n for n in value.shape if n > 1] == [n for n in shapes[path] if n > 1], path  # linear against 1x1 conv
        found[path] = value.reshape(shapes[path])
    assert found.keys() == shapes.keys(), shapes.keys() - found.keys()
    leaves, structure = jax.tree_util.tree_flatten_with_path(template)
    return structure.unflatten([found["/".join(key.key for key in path)] for path, _ in leaves])


@pytest.fixture(scope="session")
def to_tree():
    return _to_tree


def _randomize(model, seed):
    """Random values also where torch starts with ones and zeros, so that no parameter is without effect."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.data = center + 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def randomize():
    return _randomize


def _assert_trees_close(actual, expected, atol):
    """Leaf by leaf: |actual - expected| <= atol * max(1, largest entry of that leaf). The losses are sums, so that
    gradients are of order 1."""
    actual, expected = _flatten(actual), _flatten(expected)
    assert actual.keys() == expected.keys()
    assert np.median([np.abs(value).max() for value in expected.values()]) > 0.3
    for path, value in expected.items():
        bound = atol * max(1, np.abs(value).max())
        np.testing.assert_allclose(np.asarray(actual[path]), value, rtol=0, atol=bound, err_msg=path)


@pytest.fixture(scope="session")
def assert_trees_close():
    return _assert_trees_close


def _assert_near_in_bfloat16(actual, expected, tolerance=2e-2):
    """All leaves together, within 2e-2 of the expected ones' Euclidean norm: bfloat16 has 8 bits."""
    def norm(tree):
        return sum(float(np.sum(np.square(x))) for x in jax.tree.leaves(tree)) ** 0.5

    error = norm(jax.tree.map(lambda x, y: np.asarray(x, np.float32) - np.asarray(y), actual, expected))
    assert 0 < error < tolerance * norm(expected)


@pytest.fixture(scope="session")
def assert_near_in_bfloat16():
    return _assert_near_in_bfloat16
