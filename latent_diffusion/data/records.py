"""Records of TFDS sets as examples: pictures, labels, captions, semantic maps, objects."""

from collections.abc import Sequence

import numpy as np
from absl import logging

from latent_diffusion import layouts
from latent_diffusion.data import transforms
from latent_diffusion.errors import UserError


class Records:
    """Examples of a TFDS data source. Images are decoded here: TFDS's own decoding knows no CMYK and no palettes."""

    def __init__(
        self, records, image_key: str, label_key: str, caption_path: tuple[str, ...], map_key: str, objects_key: str,
        on_corrupt: str, where: str
    ):
        self._records, self._image_key, self._label_key = records, image_key, label_key
        self._map_key, self._objects_key = map_key, objects_key
        self._on_corrupt, self._where = on_corrupt, where
        self.caption_path = caption_path

    def __len__(self) -> int:
        return len(self._records)

    def facts(self, index: int) -> dict:
        """All features, images undecoded."""
        return self._records[index]

    def __getitem__(self, index: int) -> dict:
        for i in (*range(index, len(self)), *range(index)):
            try:
                return self._example(i)
            except UserError:
                raise
            except Exception as error:  # Pillow's decoders raise many types
                if self._on_corrupt != "skip":
                    reason = str(error) or type(error).__name__
                    raise UserError(f"corrupt image: record {i} of {self._where}: {reason}; set data.on_corrupt=skip "
                                    "to leave it out") from error
                logging.log_first_n(logging.WARNING, "skipping record %d of %s: %s", 20, i, self._where, error)
        raise UserError(f"no readable image in {self._where}")

    def _example(self, index: int) -> dict:
        record = self._records[index]
        example = {"image": _to_pixels(record[self._image_key], index), "name": str(index)}
        if self._label_key:
            example["label"] = int(record[self._label_key])
        if self.caption_path:
            example["caption"] = captions_of(record, self.caption_path)
        if self._map_key:
            classes = record[self._map_key]
            example["segmentation"] = classes[..., 0].astype(np.int32) if isinstance(classes, np.ndarray) and (
                classes.ndim == 3) else transforms.decode_map(bytes(classes))
        if self._objects_key:
            example["objects"] = objects_of(record[self._objects_key])
        return example


def objects_of(record: dict) -> layouts.Objects:
    """Objects as COCO, OpenImages and Pascal VOC call them in TFDS: boxes are (top, left, bottom, right)."""
    boxes = np.asarray(record["bbox"], np.float64).reshape(-1, 4)
    flags = np.zeros((len(boxes), len(layouts.FLAGS)), bool)
    for column, names in enumerate((("is_group_of", "is_crowd"), ("is_occluded",), ("is_depiction",), ("is_inside",))):
        for name in names:
            if name in record:
                flags[:, column] |= np.asarray(record[name]) == 1  # OpenImages has -1 for "unknown"
    top_left = boxes[:, [1, 0]]
    return layouts.Objects(np.asarray(record["label"], np.int64).reshape(-1),
                           np.concatenate([top_left, boxes[:, [3, 2]] - top_left], axis=1), flags)


def _to_pixels(value, index: int) -> np.ndarray:
    if isinstance(value, np.ndarray) and value.ndim == 3:
        if value.dtype != np.uint8:
            raise UserError(f"images of type {value.dtype} are not supported, only 8-bit ones (record {index})")
        return value
    return transforms.decode(value if isinstance(value, bytes) else bytes(value))


def captions_of(record: dict, path: tuple[str, ...]) -> str | tuple[str, ...]:
    """The caption, or all captions where a record has several ("captions/text" in coco_captions)."""
    for key in path:
        record = record[key]
    if isinstance(record, bytes | str):
        return record.decode() if isinstance(record, bytes) else record
    return tuple(item.decode() if isinstance(item, bytes) else str(item) for item in np.asarray(record).ravel())


class Captions(Sequence):
    """The first caption of each example, read when asked for."""

    def __init__(self, examples: Records):
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        captions = captions_of(self._examples.facts(range(len(self))[index]), self._examples.caption_path)
        return captions if isinstance(captions, str) else (captions[0] if captions else "")
