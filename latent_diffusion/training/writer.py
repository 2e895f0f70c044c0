"""Metrics and pictures for TensorBoard: event files with or without TensorFlow.

clu's writers are used where TensorFlow is installed, tensorboard's own event-file writer elsewhere. Both get the same
tags and the same pictures; clu stores scalars and pictures as tensors (`EventAccumulator.Tensors`), the other one
plainly (`.Scalars`, `.Images`), which TensorBoard shows alike. Create one in process 0 only.
"""

import importlib.util
import io
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

GRID_PADDING = 2  # pixels between the pictures of a grid


class Writer:
    """Writes scalars, pictures, text and hyperparameters of one run. Usable as a context manager that closes it.

    A remote `logdir` (such as `gs://bucket/run`) is written in a temporary folder and copied at every `flush`.
    """

    def __init__(self, logdir: epath.PathLike):
        self._remote: epath.Path | None = None
        self._temporary: tempfile.TemporaryDirectory | None = None
        if _is_remote(logdir):
            self._remote = epath.Path(logdir)
            self._temporary = tempfile.TemporaryDirectory(prefix="events-")
            logdir = self._temporary.name
        self._local = epath.Path(logdir)
        self._local.mkdir(parents=True, exist_ok=True)
        self._copied: dict[str, int] = {}  # file name -> bytes copied
        self._backend = _open_backend(str(self._local))

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes numbers: Python or numpy scalars, bools, or arrays with one element.

        Raises:
          ValueError: a value is not one number.
        """
        self._backend.write_scalars(int(step), {tag: _to_float(tag, value) for tag, value in scalars.items()})

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Writes, for each tag, a batch (N, H, W, C) as one grid, see `image_grid`."""
        self._backend.write_images(int(step), {tag: image_grid(batch)[None] for tag, batch in images.items()})

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes Markdown texts."""
        self._backend.write_texts(int(step), dict(texts))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes a (nested) config: keys joined by dots for the HPARAMS tab, and the whole as a text named "config"."""
        self._backend.write_hparams(dict(_flatten("", hparams)))
        text = json.dumps(hparams, indent=2, default=str)
        self.write_texts(0, {"config": "\n".join("    " + line for line in text.splitlines())})  # a Markdown code block

    def flush(self) -> None:
        """Brings everything written so far to disk, and to the bucket if `logdir` is remote."""
        self._backend.flush()
        if self._remote is None:
            return
        self._remote.mkdir(parents=True, exist_ok=True)
        for path in self._local.iterdir():
            size = path.stat().length
            if self._copied.get(path.name) != size:  # event files only grow
                path.copy(self._remote / path.name, overwrite=True)
                self._copied[path.name] = size

    def close(self) -> None:
        """Flushes and closes; nothing can be written afterwards."""
        self.flush()
        self._backend.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def create_writer(logdir: epath.PathLike) -> Writer:
    """Opens a new event file in `logdir`, a local or remote folder, made if missing. Call it in process 0 only."""
    return Writer(logdir)


def image_grid(images: Any, columns: int | None = None) -> np.ndarray:
    """Lays pictures out row by row, with white lines between them.

    Args:
      images: (N, H, W, C), floats in [0, 1] (values outside are clipped) or uint8, with 1, 3 or 4 channels.
      columns: pictures per row; by default the smallest number that makes the grid no higher than wide.

    Returns:
      uint8 (H', W', C).

    Raises:
      ValueError: another shape.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[0] == 0 or images.shape[-1] not in (1, 3, 4):
        raise ValueError(f"images must be (N, H, W, C) with N > 0 and C in 1, 3, 4; got shape {images.shape}")
    if images.dtype != np.uint8:
        images = np.round(np.clip(np.nan_to_num(images.astype(np.float32)), 0, 1) * 255).astype(np.uint8)
    n, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    pitch_y, pitch_x = height + GRID_PADDING, width + GRID_PADDING
    grid = np.full((rows * pitch_y - GRID_PADDING, columns * pitch_x - GRID_PADDING, channels), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * pitch_y, i % columns * pitch_x
        grid[y : y + height, x : x + width] = image
    return grid


def _open_backend(logdir: str) -> Any:
    """clu's summary writer if TensorFlow can be imported, else ours with the same methods."""
    if importlib.util.find_spec("tensorflow") is not None:
        from clu import metric_writers  # takes TensorFlow along: seconds and half a gigabyte

        return metric_writers.SummaryWriter(logdir)
    return _EventFiles(logdir)


class _EventFiles:
    """clu's writer interface over tensorboard's event-file writer, which needs no TensorFlow."""

    def __init__(self, logdir: str):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._events = EventFileWriter(logdir)

    def _add(self, step: int, summary: Any) -> None:
        from tensorboard.compat.proto import event_pb2

        self._events.add_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._add(step, Summary(value=values))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Each a batch of one: uint8 (1, H, W, C)."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for tag, (image,) in images.items():
            height, width, channels = image.shape
            encoded = io.BytesIO()
            Image.fromarray(image[..., 0] if channels == 1 else image).save(encoded, "PNG")
            picture = Summary.Image(
                height=height, width=width, colorspace=channels, encoded_image_string=encoded.getvalue()
            )
            self._add(step, Summary(value=[Summary.Value(tag=tag, image=picture)]))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.text.metadata import create_summary_metadata
        from tensorboard.util.tensor_util import make_tensor_proto

        for tag, text in texts.items():
            metadata = create_summary_metadata(display_name=tag, description="")
            value = Summary.Value(tag=tag, metadata=metadata, tensor=make_tensor_proto(text.encode()))
            self._add(step, Summary(value=[value]))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        self._add(0, hparams_pb(hparams))

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()


def _is_remote(path: epath.PathLike) -> bool:
    return "://" in str(path)


def _to_float(tag: str, value: Any) -> float:
    array = np.asarray(value)
    if array.size != 1:
        raise ValueError(f"scalar {tag!r} has shape {array.shape}")
    return float(array.reshape(()))


def _flatten(prefix: str, tree: Mapping[str, Any]) -> Iterator[tuple[str, bool | int | float | str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(f"{prefix}{key}.", value)
        else:
            value = value.item() if isinstance(value, np.generic) else value
            yield f"{prefix}{key}", value if isinstance(value, bool | int | float | str) else str(value)
