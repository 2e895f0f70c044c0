"""The pictures that a stage-2 run logs: what is asked of the model, and its answers beside their conditions."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from latent_diffusion import images, layouts, pipeline, request


@dataclasses.dataclass(frozen=True)
class Pictures:
    """images (n, h, w, c), and scores of them by name."""

    images: UInt8[np.ndarray, "n h w c"]
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)


def conditions_to_draw(config: Any, source: Any) -> dict[str, Any]:
    """Prompts and labels of the logged grid: the config's, or the first captions (for text models) or all classes
    (for models without text) of the data."""
    options, n, fields = config.sampling, config.evaluation.num_images, request.condition_fields(config)
    chosen: dict[str, Any] = {"num_samples": n, "seed": config.seed}
    if "tokens" in fields:
        first = (source.captions[i] for i in range(min(len(source.captions), 20 * n)))
        if prompts := tuple(options.prompts) or tuple(itertools.islice(dict.fromkeys(filter(None, first)), n)):
            chosen["prompts"] = repeat(prompts, n)
    if "label" in fields:
        labels = tuple(options.labels)
        droppable = config.conditioning.dropout > 0 or config.conditioning.label_dropout > 0
        if not labels and not ("tokens" in fields and droppable):
            labels = tuple(range(config.conditioning.num_classes))
        if labels:
            chosen["labels"] = repeat(labels, n)
    return chosen


def repeat(items: tuple, number: int) -> list:
    """`number` items, in turn."""
    return [items[i % len(items)] for i in range(number)]


def draw(model: pipeline.LatentDiffusion, asked: Mapping[str, Any], held_out: Mapping[str, np.ndarray]) -> Pictures:
    """Samples of what is asked; of a model for layouts or maps, each between its condition and the held-out picture
    (with its boxes on it).

    Args:
      asked: from `conditions_to_draw`.
      held_out: a batch of held-out examples, {} for other models.
    """
    if not held_out:
        return Pictures(model.sample(**asked).images)
    options, original = model.config.conditioning, images.to_uint8(held_out["image"])
    maps = request.map_fields(model.config)
    samples = model.sample_arrays(
        {name: held_out[name] for name in (*request.condition_fields(model.config), *maps)}, seed=asked["seed"]).images
    given: dict[str, Any] = {
        name: images.to_uint8(held_out[name]) if name in ("image", "low_res") else held_out[name] for name in maps}
    if "layout" in held_out:
        found = [layouts.from_tokens(tokens, options.layout) for tokens in held_out["layout"]]
        given["layouts"] = [layouts.within(objects, crop) for objects, crop in found]
    shown = [images.condition(given, i, original.shape[1:], model.object_names) for i in range(len(original))]
    if "layouts" in given:
        original = np.stack([images.draw_objects(objects, model.object_names, picture)
                             for objects, picture in zip(given["layouts"], original, strict=True)])
    triples = np.concatenate([np.stack(shown), samples, original], axis=2)
    return Pictures(triples, scores(given, samples, original))


def scores(
    given: Mapping[str, Any], samples: UInt8[np.ndarray, "n h w c"], original: UInt8[np.ndarray, "n h w c"]
) -> dict[str, float]:
    """PSNR in dB of super-resolved and inpainted pictures, and of what needs no model: bicubic enlargement, and the
    mean of the known pixels."""
    if "low_res" in given:
        name, plain = "bicubic", [images.enlarge(x, original.shape[1:3], smooth=True) for x in given["low_res"]]
    elif "mask" in given:
        name, plain = "mean-fill", [images.fill(*pair) for pair in zip(given["image"], given["mask"], strict=True)]
    else:
        return {}
    return {"PSNR": images.psnr(samples, original), f"PSNR of {name}": images.psnr(np.stack(plain), original)}
