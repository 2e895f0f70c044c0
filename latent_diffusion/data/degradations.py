"""High resolution -> low resolution: bicubic, and the random degradations of BSRGAN (Zhang et al., ICCV 2021; paper
section 4.4 and appendix D.5), in the two strengths that the released super-resolution models were trained with, and in
the longer chain that the reference has but does not use.

The steps and numbers are those of the reference (ldm/modules/image_degradation: `bsrgan` and `bsrgan_light` are the
variants that its data loader uses, `bsrgan_plus` is without the sharpening of the large picture); the draws of random
numbers are our own.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from latent_diffusion.errors import UserError, choose

Picture = Float[np.ndarray, "h w c"]  # float32 in [0, 1]


@dataclass(frozen=True)
class Strength:
    """What tells `bsrgan` from `bsrgan_light`. Noise in levels of 255; kernel sides as (smallest, largest)."""

    blurs: int
    width_scale: float  # of all blurs
    anisotropic_sides: tuple[int, ...]
    isotropic_sides: tuple[int, ...]
    resize_chance: float  # else: blurred by a shifted kernel and picked
    noise: tuple[int, int]
    quality: tuple[int, int]  # of JPEG


STRENGTHS = {
    "bsrgan": Strength(2, 1.0, tuple(range(7, 26, 2)), tuple(range(7, 26, 2)), 0.75, (2, 25), (30, 95)),
    "bsrgan_light": Strength(1, 0.25, tuple(range(5, 15)), (5, 6, 7), 0.8, (1, 2), (80, 95)),
}
HALVE_FIRST = 0.25  # chances
JPEG_CHANCE = 0.9
RARE_NOISE_CHANCE = 0.1  # of Poisson noise and of speckle noise, each


def degrade(
    image: UInt8[np.ndarray, "h w c"], factor: int, kind: str, rng: np.random.Generator
) -> UInt8[np.ndarray, "h2 w2 c"]:
    """A picture `factor` times smaller.

    kind: "bicubic" (Pillow's, with antialiasing; nothing random), "bsrgan", "bsrgan_light" or "bsrgan_plus".
    Raises UserError for another kind, or sides that are not multiples of the factor.
    """
    height, width, channels = image.shape
    if height % factor or width % factor:
        raise UserError(f"a picture of {height}x{width} pixels cannot become {factor} times smaller")
    if kind == "bicubic":
        small = Image.fromarray(image[..., 0] if channels == 1 else image).resize(
            (width // factor, height // factor), Image.Resampling.BICUBIC)
        return np.asarray(small).reshape(height // factor, width // factor, channels)
    chain, strength = choose({"bicubic": None, **CHAINS}, kind, "conditioning.low_res.degradation")
    small = chain(image.astype(np.float32) / 255, factor, strength, rng)
    return np.round(small * 255).astype(np.uint8)


def _bsrgan(x: Picture, factor: int, strength: Strength, rng: np.random.Generator) -> Picture:
    """Blurs, two downsamplings, noise and JPEG in random order (the second downsampling after the first), then JPEG."""
    height, width = (side // factor for side in x.shape[:2])
    if factor == 4 and rng.random() < HALVE_FIRST:
        half = (x.shape[0] // 2, x.shape[1] // 2)
        x, factor = _resize(x, *half, rng) if rng.random() < 0.5 else _shrink_smoothly(x, *half), 2
    steps = [*["blur"] * strength.blurs, "shrink", "fit", "noise", "jpeg"]
    order = list(rng.permutation(len(steps)))
    first, second = order.index(steps.index("shrink")), order.index(steps.index("fit"))
    if first > second:
        order[first], order[second] = order[second], order[first]
    for step in (steps[i] for i in order):
        if step == "blur":
            x = _blur(x, factor, strength, rng)
        elif step == "shrink":
            x = _shrink(x, factor, strength, rng)
        elif step == "fit":
            x = _resize(x, height, width, rng)
        elif step == "noise":
            x = _add_noise(x, strength, rng)
        elif rng.random() < JPEG_CHANCE:
            x = _jpeg(x, strength, rng)
    return _jpeg(x, strength, rng)


def _bsrgan_plus(x: Picture, factor: int, strength: Strength, rng: np.random.Generator) -> Picture:
    """Twice blur, resizing and three kinds of noise, JPEG between and after them; half of the time in any order."""
    height, width = (side // factor for side in x.shape[:2])
    noises = ["noise", "poisson", "speckle"]
    order = ["blur", "resize", *rng.permutation(noises), "jpeg", "blur", "resize", *rng.permutation(noises)]
    if rng.random() < 0.5:
        order = rng.permutation(order)
    for step in order:
        if step == "blur":
            x = _blur(x, factor, strength, rng)
        elif step == "resize":
            x = _rescale(x, factor, rng)
        elif step == "noise":
            x = _add_noise(x, strength, rng)
        elif step == "jpeg":
            x = _jpeg(x, strength, rng)
        elif rng.random() < RARE_NOISE_CHANCE:
            x = _add_poisson_noise(x, rng) if step == "poisson" else _add_speckle_noise(x, strength, rng)
    return _jpeg(_resize(x, height, width, rng), strength, rng)


CHAINS = {
    "bsrgan": (_bsrgan, STRENGTHS["bsrgan"]),
    "bsrgan_light": (_bsrgan, STRENGTHS["bsrgan_light"]),
    "bsrgan_plus": (_bsrgan_plus, STRENGTHS["bsrgan"]),
}
KINDS = ("bicubic", *CHAINS)


def _rescale(x: Picture, factor: int, rng: np.random.Generator) -> Picture:
    """Up to twice as large (0.2), down to half a `factor`-th (0.7), or as it is."""
    which = rng.random()
    by = rng.uniform(1, 2) if which > 0.8 else rng.uniform(0.5 / factor, 1) if which < 0.7 else 1.0
    return _resize(x, max(1, int(by * x.shape[0])), max(1, int(by * x.shape[1])), rng)


def _resize(x: Picture, height: int, width: int, rng: np.random.Generator) -> Picture:
    """Bilinear, bicubic or area, the first two without antialiasing, as OpenCV does it."""
    cv2 = _cv2()
    how = (cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA)[rng.integers(3)]
    return np.clip(cv2.resize(x, (width, height), interpolation=how), 0, 1).reshape(height, width, x.shape[2])


def _shrink_smoothly(x: Picture, height: int, width: int) -> Picture:
    """Bicubic with antialiasing."""
    channels = [np.asarray(Image.fromarray(x[..., i]).resize((width, height), Image.Resampling.BICUBIC))
                for i in range(x.shape[2])]
    return np.clip(np.stack(channels, axis=-1), 0, 1)


def _shrink(x: Picture, factor: int, strength: Strength, rng: np.random.Generator) -> Picture:
    if rng.random() < strength.resize_chance:
        by = rng.uniform(1, 2 * factor)
        return _resize(x, max(1, int(x.shape[0] / by)), max(1, int(x.shape[1] / by)), rng)
    kernel = gaussian_kernel(25, rng.uniform(0.1, 0.6 * factor), center=(25 - 1) / 2 - (factor - 1) / 2)
    return np.clip(_convolve(x, kernel)[::factor, ::factor], 0, 1)


def _blur(x: Picture, factor: int, strength: Strength, rng: np.random.Generator) -> Picture:
    if rng.random() < 0.5:
        side = int(rng.choice(strength.anisotropic_sides))
        largest = strength.width_scale * (4 + factor)
        variances = np.maximum(largest * rng.random(2), 1e-3)
        kernel = anisotropic_kernel(side, rng.random() * np.pi, *variances)
    else:
        side = int(rng.choice(strength.isotropic_sides))
        kernel = gaussian_kernel(side, strength.width_scale * (2 + 0.2 * factor) * rng.random())
    return np.clip(_convolve(x, kernel), 0, 1)


def gaussian_kernel(side: int, std: float, center: float | None = None) -> Float[np.ndarray, "side side"]:
    """An isotropic Gaussian of sum 1, around the middle unless a `center` (in pixels, for both axes) is given."""
    square = (np.arange(side) - ((side - 1) / 2 if center is None else center)) ** 2
    line = np.exp(-0.5 * (square - square.min()) / max(std, 1e-3) ** 2)
    kernel = np.outer(line, line)
    return kernel / kernel.sum()


def anisotropic_kernel(side: int, angle: float, first: float, second: float) -> Float[np.ndarray, "side side"]:
    """A Gaussian of sum 1 with variances `first` along `angle` and `second` across it."""
    along = np.array([np.cos(angle), np.sin(angle)])
    across = np.array([-along[1], along[0]])
    offset = np.arange(side) - (side - 1) / 2
    x, y = np.meshgrid(offset, offset)
    square = (x * along[0] + y * along[1]) ** 2 / first + (x * across[0] + y * across[1]) ** 2 / second
    kernel = np.exp(-0.5 * (square - square.min()))
    return kernel / kernel.sum()


def _convolve(x: Picture, kernel: Float[np.ndarray, "k k"]) -> Picture:
    """The same size; the picture is mirrored at its border."""
    cv2 = _cv2()
    flipped = np.ascontiguousarray(kernel[::-1, ::-1])  # OpenCV correlates
    anchor = ((kernel.shape[1] - 1) // 2, (kernel.shape[0] - 1) // 2)
    return cv2.filter2D(x, -1, flipped, anchor=anchor, borderType=cv2.BORDER_REFLECT_101).reshape(x.shape)


def _add_noise(x: Picture, strength: Strength, rng: np.random.Generator) -> Picture:
    return np.clip(x + _gaussian_noise(x, strength, rng), 0, 1).astype(np.float32)


def _add_speckle_noise(x: Picture, strength: Strength, rng: np.random.Generator) -> Picture:
    """Noise in proportion to the picture."""
    return np.clip(x + x * _gaussian_noise(x, strength, rng), 0, 1).astype(np.float32)


def _add_poisson_noise(x: Picture, rng: np.random.Generator) -> Picture:
    """Photons counted in each channel, or in the grey picture and added to all channels; 100 to 10,000 of them at 1."""
    x, photons = np.round(x * 255) / 255, 10 ** rng.uniform(2, 4)
    if rng.random() < 0.5:
        return np.clip(rng.poisson(x * photons) / photons, 0, 1).astype(np.float32)
    grey = x @ np.array([0.299, 0.587, 0.114]) if x.shape[2] == 3 else x[..., 0]
    grey = np.round(grey * 255) / 255
    return np.clip(x + (rng.poisson(grey * photons) / photons - grey)[..., None], 0, 1).astype(np.float32)


def _gaussian_noise(x: Picture, strength: Strength, rng: np.random.Generator) -> Float[np.ndarray, "h w #c"]:
    """Of each channel (0.4), of all channels alike (0.4), or correlated between channels (0.2)."""
    level = rng.integers(strength.noise[0], strength.noise[1] + 1) / 255
    which, channels = rng.random(), x.shape[2]
    if which < 0.4 or channels == 1:
        return rng.normal(0, level, (*x.shape[:2], 1))
    if which > 0.6:
        return rng.normal(0, level, x.shape)
    basis, _ = np.linalg.qr(rng.random((channels, channels)))
    covariance = (strength.noise[1] / 255) ** 2 * np.abs(basis.T @ np.diag(rng.random(channels)) @ basis)
    return rng.multivariate_normal(np.zeros(channels), covariance, x.shape[:2], check_valid="ignore")


def _jpeg(x: Picture, strength: Strength, rng: np.random.Generator) -> Picture:
    cv2 = _cv2()
    quality = int(rng.integers(strength.quality[0], strength.quality[1] + 1))
    pixels, color = np.round(x * 255).astype(np.uint8), x.shape[2] == 3
    _, code = cv2.imencode(".jpg", pixels[..., ::-1] if color else pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = cv2.imdecode(code, cv2.IMREAD_COLOR if color else cv2.IMREAD_GRAYSCALE)
    decoded = decoded[..., ::-1] if color else decoded[..., None]
    return decoded.astype(np.float32) / 255


def _cv2():
    try:
        import cv2
    except ImportError as error:
        raise UserError("the degradations bsrgan, bsrgan_light and bsrgan_plus need OpenCV: pip install "
                        "opencv-python-headless") from error
    cv2.setNumThreads(1)  # the loader has threads of its own
    return cv2
