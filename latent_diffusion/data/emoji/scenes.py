"""Scenes of emoji with exact semantic maps, boxes and captions, for layout- and map-conditioned models; and their TFDS
builder `emoji_scenes`. The number of a scene decides all of it."""

import functools
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int, UInt8
from PIL import Image
from tqdm import tqdm

from latent_diffusion.data.emoji import catalogue, drawing
from latent_diffusion.data.emoji.emoji import RESOLUTIONS

SPLITS = {"train": 4000, "validation": 400, "test": 400}  # scenes; numbered through
SKIES = {  # name -> colors above and at the horizon
    "day sky": ((90, 170, 235), (205, 232, 250)), "evening sky": ((120, 80, 150), (250, 170, 110)),
    "night sky": ((15, 20, 55), (60, 70, 120))}
GROUNDS = {  # name -> colors at the horizon and below
    "grass": ((150, 200, 90), (70, 140, 50)), "sand": ((245, 225, 165), (215, 180, 110)),
    "water": ((110, 180, 215), (35, 95, 160)), "snow": ((252, 252, 255), (205, 218, 235))}
THINGS = (
    "red apple", "banana", "watermelon", "carrot", "lemon", "mushroom", "red heart", "blue heart", "sun", "cloud",
    "dog face", "cat face", "frog", "tropical fish", "butterfly", "turtle", "deciduous tree", "cactus", "sunflower",
    "automobile", "house", "sailboat", "rocket", "soccer ball", "three o’clock", "grinning face", "ghost", "robot")
MAP_NAMES = (*SKIES, *GROUNDS, *THINGS)  # classes of the semantic map
MOST_THINGS = 4
SIDES = (0.25, 0.5)  # of a thing, relative to the scene
MIN_VISIBLE = 0.6  # of a thing, after others were put in front of it
OCCLUDED = 0.9  # a thing of which less is visible is marked
ARRANGED = 64  # pixels; where scenes of all sizes are arranged
TRIES = 20  # to find a place for a thing

_DESCRIPTION = """Pictures of one to four emoji (Twemoji) on plain landscapes, with a semantic map, boxes and a caption,
exact because they are drawn. The same 28 things occur in all splits; the scenes differ."""
_LICENSE = "Twemoji graphics: (c) Twitter, Inc and other contributors, CC-BY 4.0."


@dataclass(frozen=True)
class Scene:
    """image uint8 (s, s, 3); segmentation: positions in `MAP_NAMES` (s, s); labels: positions in `THINGS`; boxes (left,
    top, right, bottom) in [0, 1] around all of a thing; visible: how much of each can be seen."""

    image: UInt8[np.ndarray, "s s 3"]
    segmentation: Int[np.ndarray, "s s"]
    labels: list[int]
    boxes: list[tuple[float, float, float, float]]
    visible: list[float]
    caption: str


class Sprites:
    """The things' pictures with alpha, at any size."""

    def __init__(self):
        by_caption = {name.caption: name for name in catalogue.names()}
        wanted = [by_caption[thing] for thing in THINGS]
        svgs = catalogue.drawings("twemoji", wanted)
        self._drawings = [drawing.probe(svgs[name.slug], "twemoji")[0] for name in wanted]
        self.draw = functools.lru_cache(maxsize=None)(self._draw)

    def _draw(self, thing: int, side: int) -> UInt8[np.ndarray, "side side 4"]:
        return self._drawings[thing].pixels(side)


def make_scene(number: int, size: int, sprites: Sprites) -> Scene:
    """Scene `number` at `size` x `size` pixels; the same in all sizes, but for rounding."""
    rng = np.random.default_rng((0x5CE7E, number))
    sky, ground = rng.integers(len(SKIES)), rng.integers(len(GROUNDS))
    horizon = rng.uniform(0.35, 0.75)
    places = _arrange(rng, sprites)  # nothing is drawn from rng below, so the size changes nothing
    canvas, segmentation = _landscape(sky, ground, horizon, size)
    owner = np.full((size, size), -1)  # which thing is seen
    labels, boxes, areas = [], [], []
    for thing, place in places:
        sprite, left, top, solid = _put(thing, place, size, sprites)
        _paste(canvas, sprite, left, top)
        owner[solid] = len(labels)
        segmentation[solid] = len(SKIES) + len(GROUNDS) + thing
        rows, columns = np.nonzero(solid)
        labels.append(thing)
        areas.append(int(solid.sum()))
        boxes.append((columns.min() / size, rows.min() / size, (columns.max() + 1) / size, (rows.max() + 1) / size))
    visible = [float(np.sum(owner == i) / area) for i, area in enumerate(areas)]
    caption = _caption([THINGS[i] for i in labels], list(SKIES)[sky], list(GROUNDS)[ground])
    return Scene(np.rint(canvas).astype(np.uint8), segmentation, labels, boxes, visible, caption)


def _arrange(rng: np.random.Generator, sprites: Sprites) -> list[tuple[int, tuple[float, float, float]]]:
    """Things with their places (side, left, top, all relative), chosen on a canvas of `ARRANGED` pixels."""
    owner, areas, chosen = np.full((ARRANGED, ARRANGED), -1), [], []
    for _ in range(rng.integers(1, MOST_THINGS + 1)):
        thing = int(rng.integers(len(THINGS)))
        for _ in range(TRIES):
            place = (rng.uniform(*SIDES), rng.random(), rng.random())
            solid = _put(thing, place, ARRANGED, sprites)[-1]
            if all(np.sum((owner == i) & ~solid) / area >= MIN_VISIBLE for i, area in enumerate(areas)):
                owner[solid] = len(areas)
                areas.append(int(solid.sum()))
                chosen.append((thing, place))
                break
    return chosen


def _put(thing: int, place: tuple[float, float, float], size: int, sprites: Sprites):
    sprite = sprites.draw(thing, max(4, round(place[0] * size)))
    left, top = (round(part * (size - len(sprite))) for part in place[1:])
    solid = np.zeros((size, size), bool)
    solid[top : top + len(sprite), left : left + len(sprite)] = sprite[..., 3] >= 128
    return sprite, left, top, solid


def _landscape(sky: int, ground: int, horizon: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Two vertical gradients: float32 (s, s, 3), and the map."""
    y = (np.arange(size) + 0.5)[:, None] / size
    above, below = (np.asarray(colors[i], np.float32) for colors, i in (
        (list(SKIES.values()), sky), (list(GROUNDS.values()), ground)))
    up, down = y / horizon, (y - horizon) / (1 - horizon)
    column = np.where(y < horizon, above[0] + (above[1] - above[0]) * up, below[0] + (below[1] - below[0]) * down)
    classes = np.where(y < horizon, sky, len(SKIES) + ground)
    return (np.repeat(column[:, None].astype(np.float32), size, axis=1),
            np.repeat(classes, size, axis=1).astype(np.int32))


def _paste(canvas: np.ndarray, sprite: np.ndarray, left: int, top: int) -> None:
    area = (slice(top, top + len(sprite)), slice(left, left + len(sprite)))
    alpha = sprite[..., 3:].astype(np.float32) / 255
    canvas[area] = canvas[area] * (1 - alpha) + sprite[..., :3] * alpha


def _caption(things: list[str], sky: str, ground: str) -> str:
    *names, sky = (f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in (*things, sky))
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return f"{listed} on {ground} under {sky}"


class EmojiScenes(tfds.core.GeneratorBasedBuilder):
    """`EmojiScenes(config="64", data_dir=...)`; `limit` makes only that many scenes of each split (for tests)."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name=str(size), description=f"{size}x{size}") for size in RESOLUTIONS
    ]

    def __init__(self, *, limit: int | None = None, **kwargs):
        self._limit = limit
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        size = int(self.builder_config.name)
        features = tfds.features.FeaturesDict({
            "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
            "segmentation": tfds.features.LabeledImage(labels=list(MAP_NAMES), shape=(size, size, 1)),
            "objects": tfds.features.Sequence({
                "bbox": tfds.features.BBoxFeature(),
                "label": tfds.features.ClassLabel(names=list(THINGS)),
                "is_occluded": np.bool_,
            }),
            "caption": tfds.features.Text(),
        })
        return tfds.core.DatasetInfo(
            builder=self, description=_DESCRIPTION, features=features, license=_LICENSE,
            homepage="https://github.com/jdecked/twemoji")

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download: the package is on disk
        counts = {split: min(count, self._limit or count) for split, count in SPLITS.items()}
        title = f"drawing scenes at {self.builder_config.name} px"
        self._progress = tqdm(total=sum(counts.values()), desc=title, unit="", mininterval=0.5)
        self._sprites, starts = Sprites(), dict(zip(SPLITS, np.cumsum([0, *SPLITS.values()]).tolist(), strict=False))
        return {split: self._generate_examples(starts[split], count) for split, count in counts.items()}

    def _generate_examples(self, start: int, count: int):
        size = int(self.builder_config.name)
        for number in range(start, start + count):
            self._progress.update()
            scene = make_scene(number, size, self._sprites)
            yield number, {
                "image": _png(scene.image),
                "segmentation": _png(scene.segmentation.astype(np.uint8)),
                "objects": [_object(*thing) for thing in zip(scene.labels, scene.boxes, scene.visible, strict=True)],
                "caption": scene.caption,
            }


def _object(label: int, box: tuple[float, float, float, float], visible: float) -> dict[str, Any]:
    left, top, right, bottom = box
    return {"bbox": tfds.features.BBox(ymin=top, xmin=left, ymax=bottom, xmax=right), "label": label,
            "is_occluded": visible < OCCLUDED}


def _png(pixels: np.ndarray) -> io.BytesIO:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "png")
    data.seek(0)
    return data
