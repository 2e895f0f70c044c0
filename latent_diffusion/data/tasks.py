"""What a task adds to an example: the low-resolution picture, the mask, the semantic map, the layout.

All are made after the picture was cut and mirrored, or go through the same cut, with random numbers of the example's
own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from latent_diffusion import layouts
from latent_diffusion.data import degradations, masks, transforms
from latent_diffusion.errors import UserError

FIELDS = ("low_res", "mask", "segmentation", "layout")
EVALUATION = 0x5EED  # with the example's position, the seed of what is random in evaluation


@dataclass(frozen=True)
class Task:
    """Adds `fields` (of `FIELDS`) to examples; `options` is the config's `conditioning` as a dict."""

    fields: tuple[str, ...]
    options: dict[str, Any]
    transform: transforms.ImageTransform

    def __call__(
        self, source: dict[str, Any], image: np.ndarray, view: transforms.View, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """The wanted fields of one example.

        Args:
          source: the example as its source gave it.
          image: uint8 (size, size, c), as transformed.
          view: the transformation.
        """
        found: dict[str, np.ndarray] = {}
        if "low_res" in self.fields:
            options = self.options["low_res"]
            found["low_res"] = degradations.degrade(image, options["factor"], options["degradation"], rng)
        if "mask" in self.fields:
            found["mask"] = masks.random_mask(image.shape[0], self.options["inpainting"]["masks"], rng)
        if "segmentation" in self.fields:
            found["segmentation"] = self.transform.apply_to_map(source["segmentation"], view)
            largest, classes = int(found["segmentation"].max()), self.options["segmentation"]["num_classes"]
            if classes and largest >= classes:
                raise UserError(f"the map of picture {source['name']} has class {largest}, but "
                                f"conditioning.segmentation.num_classes={classes}")
        if "layout" in self.fields:
            crop = view.crop(*source["image"].shape[:2])
            found["layout"] = layouts.to_tokens(
                source["objects"], self.options["layout"], crop=crop, flip=view.flip, rng=rng)
        return found


def make_task(config: Any, fields: Sequence[str], transform: Any) -> Task | None:
    """The task of a config, None if it adds nothing."""
    wanted = tuple(field for field in fields if field in FIELDS)
    if not wanted:
        return None
    if not isinstance(transform, transforms.ImageTransform):
        raise ValueError(f"a latents cache has no pictures, of which {wanted} are made")
    return Task(wanted, config.conditioning.to_dict(), transform)


def collate(name: str, values: list[np.ndarray]) -> np.ndarray:
    """A batch of one field: low_res uint8 (B, h, w, c); mask float32 (B, H, W, 1), 1 = to be painted; segmentation
    int32 (B, H, W); layout int32 (B, l)."""
    return np.stack(values, dtype={"low_res": np.uint8, "mask": np.float32}.get(name, np.int32))
