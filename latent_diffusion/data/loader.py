"""Batches from sources: order, shares of the processes, augmentation, tokens; resumed exactly at any step."""

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from latent_diffusion.conditions import Tokenizer
from latent_diffusion.data import latents, sources, tasks, transforms
from latent_diffusion.errors import UserError

FIELDS = ("image", "label", "tokens", "caption", *tasks.FIELDS)


def batches(
    config,
    split: str,
    *,
    process_index: int = 0,
    process_count: int = 1,
    start_step: int = 0,
    vocabulary: Tokenizer | None = None,
    fields: Sequence[str] = ("image",),
    source: sources.Source | None = None,
    batch_size: int | None = None,
    compact: bool = False,
) -> "Batches":
    """The batches of one process.

    split "train": endless; every epoch is a new permutation of the set; augmented. An example's place in the stream,
    its augmentation and `index` depend on config.seed and its position alone, not on processes, threads or workers:
    process p of n gets positions p, p + n, p + 2n ... of each global batch.
    split "eval": one pass in the set's order, nothing random; the last batch is filled up by repeating from the start,
    with 0 in `valid`.
    split "train_once": one such pass over the training part (for the latents cache).

    Args:
      config: needs data, seed, training.batch_size; conditioning for tokens and what `tasks` adds.
      start_step: the batch to begin with.
      vocabulary: needed for the field "tokens".
      fields: of "image", "label", "tokens", "caption" and `tasks.FIELDS`. Where the source is a latents cache, "image"
        stands for its latents.
      source: an opened source; opened from config.data if None.
      batch_size: global; config.training.batch_size if None.
      compact: pictures (image, low_res) stay uint8 and cached latents float16, a quarter and half of the bytes to hand
        from workers and to send to devices; `training.batch.as_floats` makes of them what is given otherwise.

    Returns:
      An iterator of dicts of arrays, B = batch_size / process_count:
        image        float32 (B, H, W, C) in [-1, 1]; or latent_mean, latent_std  float32 (B, h, w, c)
        label        int32 (B,)
        tokens       int32 (B, max_length)
        caption      str (B,); for "train_once", where images have several captions, an object array of tuples
        low_res      float32 (B, h, w, C) in [-1, 1]
        mask, segmentation, layout  see `tasks.collate`
        index        int32 (B,)  position in the global stream, counted over epochs (modulo 2^31)
        valid        float32 (B,)  not for "train"
      with get_state() and set_state().

    Raises UserError: a batch that processes do not divide, fewer images than a batch, a field that the set lacks.
    """
    if split not in ("train", "eval", "train_once"):
        raise ValueError(f"split {split!r}: 'train', 'eval' or 'train_once'")
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise ValueError(f"fields {unknown}: of {FIELDS}")
    batch_size = batch_size or config.training.batch_size
    if batch_size % process_count:
        raise UserError(f"training.batch_size={batch_size} does not divide among {process_count} processes")
    if source is None:
        source = sources.open_source(config, "eval" if split == "eval" else "train", fields=fields)
    _check_fields(source, fields, vocabulary)
    if split == "train" and len(source.source) < batch_size:
        raise UserError(
            f"{source.where} has {len(source.source)} images, fewer than one batch (training.batch_size={batch_size})"
        )
    if not len(source.source):
        raise UserError(f"{source.where} is empty")
    stream = _stream(config, source, fields, split, batch_size, process_index, process_count)
    max_length = config.conditioning.text.max_length if "tokens" in fields else 0
    stream = stream.map(_Collate(tuple(fields), vocabulary if "tokens" in fields else None, max_length, compact))
    return Batches(stream, start_step, threads=config.data.threads, workers=config.data.workers)


def _check_fields(source: sources.Source, fields: Sequence[str], vocabulary: Tokenizer | None) -> None:
    if "label" in fields and not source.label_names:
        raise UserError(
            f"{source.where} has no labels: set data.label_key, or sort the images into one sub-folder for each class"
        )
    if {"tokens", "caption"} & set(fields) and source.captions is None:
        raise UserError(f"{source.where} has no captions: set data.caption_key, or add captions.jsonl to the folder")
    if "segmentation" in fields and not source.map_names:
        raise UserError(f"{source.where} has no semantic maps: set data.map_key, or name a map for each image in "
                        "captions.jsonl")
    if "layout" in fields and not source.object_names:
        raise UserError(f"{source.where} has no objects with boxes: set data.objects_key, or list those of each image "
                        "in captions.jsonl")
    if "tokens" in fields and vocabulary is None:
        raise ValueError("tokens need a vocabulary")


def _stream(
    config, source, fields: Sequence[str], split: str, batch_size: int, process_index: int, process_count: int
) -> grain.MapDataset:
    """Batched examples, before they are collated."""
    examples = grain.MapDataset.source(source.source).seed(config.seed)
    count = len(source.source)
    if split == "train":
        examples = examples.shuffle()
    # Augmentation comes before the process takes its share, so that its random numbers belong to the global position.
    stream = examples.repeat(None).map_with_index(_Position(count if split != "train" else None))
    transform = latents.make_transform(config.data, source) or transforms.ImageTransform.from_config(config.data)
    task = tasks.make_task(config, fields, transform)
    stream = stream.random_map(_Augment(transform, task)) if split == "train" else stream.map(
        _Evaluate(transform, task, config.seed, all_captions=split == "train_once"))
    stream = stream[process_index::process_count].batch(
        batch_size // process_count, drop_remainder=True, batch_fn=list
    )
    return stream if split == "train" else stream[: -(-count // batch_size)]


class Batches(Iterator[dict[str, np.ndarray]]):
    """An iterator whose state is one number: how many batches were taken."""

    def __init__(self, stream: grain.MapDataset, start_step: int = 0, *, threads: int = 4, workers: int = 0):
        self._stream, self._threads, self._workers = stream, max(1, threads), workers
        self.set_state({"next_index": start_step})

    def __len__(self) -> int:
        """Batches of one pass from the first on (sys.maxsize for the endless training stream)."""
        return len(self._stream)

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._iterator)
        self._next_index += 1
        return batch

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._next_index}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to the batch that `get_state` named; the number of workers may be another one than then."""
        self._next_index = int(state["next_index"])
        rest = self._stream[self._next_index :]
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=2 * self._threads)
        iterable = rest.to_iter_dataset(options)
        if self._workers:
            iterable = iterable.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2)
            )
        self._iterator = iter(iterable)


# Transformations are classes, not closures, so that worker processes can unpickle them.


class _Position:
    """Adds the position in the stream; and, for one pass over `count` examples, whether it is within it."""

    def __init__(self, count: int | None):
        self._count = count

    def __call__(self, index: int, example: dict[str, Any]) -> dict[str, Any]:
        example = {**example, "index": np.int32(index % 2**31)}
        if self._count is not None:
            example["valid"] = np.float32(index < self._count)
        return example


class _Augment(grain.transforms.RandomMap):
    def __init__(self, transform, task: tasks.Task | None):
        self._transform, self._task = transform, task

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        if isinstance(element.get("caption"), tuple):  # several captions: one at random
            captions = element["caption"] or ("",)
            element = {**element, "caption": captions[rng.integers(len(captions))]}
        return _transformed(element, self._transform, self._transform.draw(rng), self._task, rng)


class _Evaluate(grain.transforms.Map):
    def __init__(self, transform, task: tasks.Task | None, seed: int, *, all_captions: bool):
        self._transform, self._task, self._seed, self._all_captions = transform, task, seed, all_captions

    def map(self, element: dict[str, Any]) -> dict[str, Any]:
        if isinstance(element.get("caption"), tuple) and not self._all_captions:
            element = {**element, "caption": (element["caption"] or ("",))[0]}
        rng = np.random.default_rng((tasks.EVALUATION, self._seed, int(element["index"])))
        return _transformed(element, self._transform, transforms.CENTER, self._task, rng)


def _transformed(element: dict[str, Any], transform, view: transforms.View, task, rng) -> dict[str, Any]:
    image = transform.apply(element["image"], view)
    return {**element, "image": image} | (task(element, image, view, rng) if task else {})


class _Collate(grain.transforms.Map):
    """List of examples -> dict of arrays with the wanted fields."""

    def __init__(self, fields: tuple[str, ...], vocabulary: Tokenizer | None, max_length: int, compact: bool):
        self._fields, self._vocabulary, self._max_length, self._compact = fields, vocabulary, max_length, compact

    def map(self, element: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        def column(key):
            return [example[key] for example in element]

        batch = {"index": np.asarray(column("index"), np.int32)}
        if "valid" in element[0]:
            batch["valid"] = np.asarray(column("valid"), np.float32)
        if "image" in self._fields:
            images = column("image")
            if isinstance(images[0], dict):  # latents
                batch |= {key: np.stack([image[key] for image in images]) for key in images[0]}
            else:
                batch["image"] = np.stack(images)
        if "label" in self._fields:
            batch["label"] = np.asarray(column("label"), np.int32)
        if "tokens" in self._fields:
            batch["tokens"] = self._vocabulary.encode(column("caption"), self._max_length)
        if "caption" in self._fields:
            captions = column("caption")
            batch["caption"] = np.empty(len(captions), object)
            batch["caption"][:] = captions
            if isinstance(captions[0], str):
                batch["caption"] = batch["caption"].astype(str)
        batch |= {key: tasks.collate(key, column(key)) for key in self._fields if key in tasks.FIELDS}
        return batch if self._compact else {key: _full(x) for key, x in batch.items()}


def _full(x: np.ndarray) -> np.ndarray:
    if x.dtype == np.uint8:
        return transforms.to_float(x)
    return x.astype(np.float32) if x.dtype == np.float16 else x
