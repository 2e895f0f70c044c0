"""Trajectories whose ends are compared with those of CompVis' own samplers, and the numbers that theirs gave.

The numbers lie in reference_cases.json: {name: [24 floats]}, of latent-diffusion at commit a506df5 and, of those with
a strength and of dpmpp_2m, stable-diffusion at 21f890f, run on CPU by torch 2.13. To write them again from checkouts:

    PYTHONPATH=. python tests/reference_cases.py LATENT_DIFFUSION STABLE_DIFFUSION
"""

import contextlib
import functools
import importlib
import io
import json
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion.diffusion import samplers

PATH = pathlib.Path(__file__).with_suffix(".json")
KEY = jax.random.key(3)
SHAPE = (2, 2, 3, 2)
BETAS = dict(linear_start=0.0015, linear_end=0.0195)
KNOWN = np.asarray(jax.random.normal(jax.random.key(9), SHAPE))
KEEP = np.asarray(jax.random.bernoulli(jax.random.key(8), 0.5, (*SHAPE[:3], 1)), np.float32)

# mask: with KNOWN and KEEP. quantized: x0 goes through `quantized`. strength: image-to-image from KNOWN.
CASES = [
    *[dict(method="ddim", steps=steps, eta=eta) for steps in (50, 8, 7) for eta in (0.0, 0.6)],
    dict(method="ddim", steps=20, eta=1.0, spacing="reference_quad"),
    dict(method="ddim", steps=20, eta=1.0, temperature=0.6),
    dict(method="ddim", steps=20, eta=0.5, mask=True),
    dict(method="ddim", steps=20, eta=0.5, quantized=True),
    *[dict(method="plms", steps=steps) for steps in (1, 2, 8, 50)],
    dict(method="plms", steps=8, mask=True),
    *[dict(method="ddpm", steps=100, v_posterior=v) for v in (0.0, 0.3)],
    dict(method="ddpm", steps=100, mask=True),
    dict(method="ddpm", steps=100, quantized=True),
    dict(method="ddpm", steps=100, temperature=0.6),
    dict(method="ddpm", steps=100, clip_x0=True),
    *[dict(method="ddim", steps=20, strength=strength) for strength in (0.3, 0.75)],
    *[dict(method="dpmpp_2m", steps=steps) for steps in (2, 5, 10, 20)],
]


def name_of(case):
    return " ".join("=".join(map(str, item)) for item in case.items())


def network(z, t, library):
    return 0.4 * z + 0.3 * library.sin(1.7 * z) + 0.1 * library.cos(t / 300)


def quantized(x0, library):
    """Stands for the nearest entries of a codebook, but smooth: a jump would make the comparison one of rounding."""
    return 0.7 * library.tanh(x0)


def noise(counter):
    """What our samplers add at a call: (B, h, w, c)."""
    def draw(index):
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(KEY, index), counter), SHAPE[1:])

    return np.array(jax.vmap(draw)(jnp.arange(SHAPE[0])))


# --- the reference, run without what it imports and the samplers do not use ------------------------------------------


class _Anything(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        return type(name, (sys.modules["torch"].nn.Module,), {})


def _load(root):
    for name in [name for name in sys.modules if name.split(".")[0] == "ldm"]:
        del sys.modules[name]
    for name in ("pytorch_lightning", "pytorch_lightning.utilities", "pytorch_lightning.utilities.distributed",
                 "torchvision", "torchvision.utils", "ldm.models.autoencoder"):
        sys.modules[name] = _Anything(name)
    sys.modules["pytorch_lightning.utilities.distributed"].rank_zero_only = lambda function: function
    sys.path.insert(0, root)
    try:
        names = ["ddpm", "ddim", "plms"] + ["dpm_solver.sampler"] * pathlib.Path(
            root, "ldm/models/diffusion/dpm_solver").exists()
        return {name: importlib.import_module(f"ldm.models.diffusion.{name}") for name in names}
    finally:
        sys.path.remove(root)


def _model(modules, torch, timesteps, v_posterior, clip_x0):
    cls = modules["ddpm"].LatentDiffusion
    model = cls.__new__(cls)
    torch.nn.Module.__init__(model)
    for name, value in dict(
        v_posterior=v_posterior, parameterization="eps", clip_denoised=clip_x0, shorten_cond_schedule=False,
        log_every_t=10**9, device=torch.device("cpu"), learn_logvar=False, num_timesteps_cond=1,
        first_stage_model=types.SimpleNamespace(quantize=lambda x: (quantized(x, torch), None, [None] * 3)),
        apply_model=lambda x, t, c, **options: network(x, t[0].double(), torch).float(),
    ).items():
        object.__setattr__(model, name, value)
    modules["ddpm"].DDPM.register_schedule(model, beta_schedule="linear", timesteps=timesteps, **BETAS)
    return model


def _sampler(cls, model):
    """Without its move of everything to a GPU."""
    sampler = cls.__new__(type(cls.__name__, (cls,), {"register_buffer": lambda self, *item: setattr(self, *item)}))
    sampler.__init__(model)
    return sampler


def _theirs(modules, torch, method, steps, eta=0.0, temperature=1.0, mask=False, quantized=False, strength=None,
            spacing="reference", v_posterior=0.0, clip_x0=False):
    def nchw(x):
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))

    # The first step of plms calls the network twice, and our noise is numbered by calls.
    calls, masked = iter(range(1, 10**4)), iter([1, *range(2 + (method == "plms"), 10**4)])
    for module in modules.values():
        module.noise_like = lambda *args: nchw(noise(next(calls)))
    torch.randn_like = lambda x: nchw(noise(samplers.MASK_NOISE + next(masked)))

    model = _model(modules, torch, 100 if method == "ddpm" else 1000, v_posterior, clip_x0)
    condition, x_T = torch.zeros(SHAPE[0], 1), nchw(noise(0))
    held = dict(mask=nchw(KEEP), x0=nchw(KNOWN)) if mask else {}
    shape = (SHAPE[-1], *SHAPE[1:3])
    if method == "ddpm":
        z_0, _ = model.progressive_denoising(condition, (SHAPE[0], *shape), x_T=x_T, verbose=False,
                                             temperature=temperature, quantize_denoised=quantized, **held)
    elif strength is not None:
        sampler, first = _sampler(modules["ddim"].DDIMSampler, model), int(strength * steps)
        sampler.make_schedule(steps, ddim_eta=eta, verbose=False)
        z = sampler.stochastic_encode(nchw(KNOWN), torch.full(SHAPE[:1], first), noise=x_T)
        z_0 = sampler.decode(z, condition, first)
    else:
        cls = {"ddim": "DDIMSampler", "plms": "PLMSSampler", "dpmpp_2m": "DPMSolverSampler"}[method]
        module = modules["dpm_solver.sampler" if method == "dpmpp_2m" else method]
        sampler = _sampler(getattr(module, cls), model)
        if spacing == "reference_quad":
            sampler.make_schedule = functools.partial(sampler.make_schedule, ddim_discretize="quad")
        z_0, _ = sampler.sample(S=steps, batch_size=SHAPE[0], shape=shape, conditioning=condition, x_T=x_T, eta=eta,
                                temperature=temperature, quantize_x0=quantized, verbose=False, **held)
    return np.moveaxis(z_0.numpy(), 1, -1)


def main(latent_diffusion, stable_diffusion):
    import torch

    torch.Tensor.cuda = lambda self, *args: self
    newer = [case for case in CASES if "strength" in case or case["method"] == "dpmpp_2m"]
    found = {}
    for root, of_root in ((latent_diffusion, [c for c in CASES if c not in newer]), (stable_diffusion, newer)):
        modules = _load(root)
        for case in of_root:
            with contextlib.redirect_stdout(io.StringIO()):
                z_0 = _theirs(modules, torch, **case)
            found[name_of(case)] = [float(f"{value:.8g}") for value in z_0.ravel()]
    lines = [f'  {json.dumps(name_of(case))}: {json.dumps(found[name_of(case)])}' for case in CASES]
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
