"""A cache of stage-1 latents on disk: written once by running the encoder over a set, read as a source of examples.

Layout: `metadata.json` (written last: a cache without it is incomplete), and per shard NAME-mean.npy and NAME-std.npy,
float16 (n, flips, h, w, c), and NAME.json with positions, labels and captions (written last of the shard).
"""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float
from tqdm import tqdm

from latent_diffusion import files
from latent_diffusion.data.transforms import View
from latent_diffusion.errors import UserError

METADATA, PLAN = "metadata.json", "plan.json"

Latents = Float[np.ndarray, "b i j k"]
Encode = Callable[[np.ndarray], tuple[Latents, Latents | None]]


def write_cache(
    path: epath.PathLike,
    batches: Any,
    encode_fn: Encode,
    metadata: Mapping[str, Any],
    *,
    flips: bool,
    process_index: int = 0,
    process_count: int = 1,
    barrier: Callable[[], Any] = lambda: None,
    batches_per_shard: int = 16,
) -> dict[str, Any]:
    """Encodes one pass over a set and writes the posteriors; what an interrupted run has written is kept and used.

    With several processes all call this, each with its own batches, and write their own shards.

    Args:
      path: the cache's folder, on a disk that all processes see.
      batches: `loader.batches(config, "train_once", ...)` with the field "image" and, if wanted, "label" and "caption".
      encode_fn: images (B, H, W, C), as `batches` has them -> posterior mean and standard deviation (B, h, w, c),
        unscaled latents; None for the deviation where the latents have none (VQ).
      metadata: JSON values that say what the cache is made of (digest of the first stage, the data's keys, ...), which
        a later `open_cache` may demand; label_names, if the set has labels.
      flips: also encodes mirrored images (a mirrored latent is not the latent of the mirrored image).
      barrier: waits for all processes.

    Returns:
      The metadata, to which this adds num_examples, flips, and latents_std, the standard deviation over all values of
      samples of the posteriors; and scale_factor = 1 / latents_std unless given.

    Raises UserError: a cache of something else is there; latents that are not finite in float16.
    """
    path = epath.Path(path)
    plan = {
        "metadata": json.loads(json.dumps(dict(metadata))),
        "flips": bool(flips),
        "process_count": process_count,
        "batches": len(batches),
        "batches_per_shard": batches_per_shard,
    }
    if (path / METADATA).exists():
        raise UserError(f"{path} is a complete cache already; remove it to write another")
    if process_index == 0:
        _start(path, plan)
    barrier()
    _write_shards(path, batches, encode_fn, flips, process_index, batches_per_shard)
    barrier()
    if process_index == 0:
        _write_json(path / METADATA, _summary(path, plan))
    barrier()
    return json.loads((path / METADATA).read_text())


def _start(path: epath.Path, plan: dict[str, Any]) -> None:
    """Keeps the shards of an interrupted run with the same plan; removes those of another."""
    path.mkdir(parents=True, exist_ok=True)
    old = json.loads((path / PLAN).read_text()) if (path / PLAN).exists() else None
    if old is None and any(path.iterdir()):
        raise UserError(f"first_stage.cache={path} is a folder with other files; choose a new one")
    if old != plan:
        for file in path.glob("shard-*"):
            file.unlink()
        _write_json(path / PLAN, plan)


def _write_shards(path, batches, encode_fn, flips: bool, process_index: int, batches_per_shard: int) -> None:
    done = len(list(path.glob(f"shard-{process_index:04d}-*.json")))
    total, start = len(batches), min(len(batches), done * batches_per_shard)
    batches.set_state({"next_index": start})
    progress = tqdm(total=total, initial=start, desc="encoding the set", unit="batch", disable=process_index != 0)
    pending: list[dict[str, Any]] = []
    for step in range(start + 1, total + 1):
        pending.append(_encode(next(batches), encode_fn, flips))
        progress.update()
        if len(pending) == batches_per_shard or step == total:
            number = (step - 1) // batches_per_shard
            _write_shard(path / f"shard-{process_index:04d}-{number:06d}", pending)
            pending = []
    progress.close()


def _encode(batch: dict[str, np.ndarray], encode_fn, flips: bool) -> dict[str, Any]:
    """One batch: arrays (n, flips, h, w, c) of its real examples, without the padding."""
    real = batch["valid"] == 1
    means, stds = [], []
    for image in [batch["image"], batch["image"][:, :, ::-1]] if flips else [batch["image"]]:
        mean, std = encode_fn(image)
        means.append(np.asarray(mean, np.float32)[real])
        stds.append(np.zeros_like(means[-1]) if std is None else np.asarray(std, np.float32)[real])
    return {
        "mean": np.stack(means, axis=1),
        "std": np.stack(stds, axis=1),
        "index": batch["index"][real].tolist(),
        "label": batch["label"][real].tolist() if "label" in batch else None,
        "caption": batch["caption"][real].tolist() if "caption" in batch else None,
    }


def _write_shard(path: epath.Path, pending: list[dict[str, Any]]) -> None:
    facts: dict[str, Any] = {}
    for key in ("index", "label", "caption"):
        parts = [part[key] for part in pending]
        facts[key] = None if parts[0] is None else sum(parts, [])
    for key in ("mean", "std"):
        exact = np.concatenate([part[key] for part in pending])
        with np.errstate(over="ignore"):  # an overflow is reported below
            half = exact.astype(np.float16)
        if not np.isfinite(half).all():
            raise UserError(f"the first stage's latents are not finite in float16 (largest: {np.abs(exact).max()})")
        buffer = io.BytesIO()
        np.save(buffer, half)
        files.write_whole(path.parent / f"{path.name}-{key}.npy", buffer.getvalue())
        facts[f"{key}_sum"] = float(np.sum(exact, dtype=np.float64))
        facts[f"{key}_square"] = float(np.sum(exact**2, dtype=np.float64))
        facts["values"] = exact.size
    _write_json(path.parent / f"{path.name}.json", facts)


def _summary(path: epath.Path, plan: dict[str, Any]) -> dict[str, Any]:
    shards = [json.loads(file.read_text()) for file in sorted(path.glob("shard-*.json"))]
    indices = sorted(index for shard in shards for index in shard["index"])
    if indices != list(range(len(indices))):
        raise RuntimeError(f"{path}: shards do not hold every example once")
    values = sum(shard["values"] for shard in shards)
    mean = sum(shard["mean_sum"] for shard in shards) / values
    square = sum(shard["mean_square"] + shard["std_square"] for shard in shards) / values  # E z^2 = mean^2 + std^2
    std = float(np.sqrt(max(square - mean**2, 0.0)))
    found = {"num_examples": len(indices), "flips": plan["flips"], "latents_mean": mean, "latents_std": std}
    return {**found, "scale_factor": 1.0 / std if std > 0 else 1.0, **plan["metadata"]}


def _write_json(path: epath.Path, value: Any) -> None:
    files.write_whole(path, json.dumps(value, ensure_ascii=False).encode())


def is_complete(path: epath.PathLike) -> bool:
    """Whether there is a cache that was written to its end."""
    return (epath.Path(path) / METADATA).exists()


def open_cache(path: epath.PathLike, *, expected: Mapping[str, Any] | None = None):
    """Opens a cache as a `sources.Source` for `loader.batches(source=...)`; its metadata are `.source.metadata`.

    Args:
      expected: metadata that the cache must have, such as the digest of the first stage.

    Raises UserError: no complete cache, or one made of something else (naming the key).
    """
    from latent_diffusion.data.sources import Source

    path = epath.Path(path)
    if not is_complete(path):
        raise UserError(f"first_stage.cache={path}: no complete latents cache")
    metadata = json.loads((path / METADATA).read_text())
    for key, value in (expected or {}).items():
        if metadata.get(key) != json.loads(json.dumps(value)):
            made = "by another first stage" if key == "digest" else f"with {key}={metadata.get(key)}, not {value}"
            raise UserError(f"first_stage.cache={path} was made {made}; remove it or choose another folder")
    examples = CachedLatents(path, metadata)
    return Source(examples, tuple(metadata.get("label_names", ())), examples.captions, f"latents cache {path}")


class CachedLatents:
    """Examples of a cache: `image` is a dict of latent_mean and latent_std, float16 (flips, h, w, c).

    Files on a local disk are mapped into memory and read piece by piece; those in a bucket are kept in memory whole.
    """

    def __init__(self, path: epath.Path, metadata: dict[str, Any]):
        self._path, self.metadata = path, metadata
        count = metadata["num_examples"]
        self._names: list[str] = []
        self._place = np.full((count, 2), -1)  # shard, row
        labels = np.zeros(count, np.int64)
        self._captions: list[str | tuple[str, ...]] = [""] * count
        shard: dict[str, Any] = {"label": None, "caption": None}
        for number, file in enumerate(sorted(path.glob("shard-*.json"))):
            shard = json.loads(file.read_text())
            self._names.append(file.stem)
            self._place[shard["index"]] = [(number, row) for row in range(len(shard["index"]))]
            if shard["label"] is not None:
                labels[shard["index"]] = shard["label"]
            for index, caption in zip(shard["index"], shard["caption"] or (), strict=bool(shard["caption"])):
                self._captions[index] = caption if isinstance(caption, str) else tuple(caption)
        there = {file.name for file in path.glob("shard-*.npy")}
        lost = [name for stem in self._names for key in ("mean", "std") if (name := f"{stem}-{key}.npy") not in there]
        if lost or (self._place < 0).any():
            raise UserError(f"first_stage.cache={path} is not whole, {lost[0] if lost else 'a shard'} is missing; copy "
                            "all of it, or remove it to write it anew")
        self._labels = labels if shard["label"] is not None else None
        self.captions: list[str] | None = None  # the first of each image
        if shard["caption"] is not None:
            self.captions = [x if isinstance(x, str) else next(iter(x), "") for x in self._captions]
        self._open: dict[str, np.ndarray] = {}

    def __getstate__(self):  # worker processes map the files themselves
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        return len(self._place)

    def __getitem__(self, index: int) -> dict:
        shard, row = self._place[index]
        mean, std = (np.array(self._array(f"{self._names[shard]}-{key}.npy")[row]) for key in ("mean", "std"))
        example = {"image": {"latent_mean": mean, "latent_std": std}, "name": str(index)}
        if self._labels is not None:
            example["label"] = int(self._labels[index])
        if self.captions is not None:
            example["caption"] = self._captions[index]
        return example

    def _array(self, name: str) -> np.ndarray:
        if name not in self._open:
            file = self._path / name
            local = "://" not in str(file)
            self._open[name] = np.load(file, mmap_mode="r") if local else np.load(io.BytesIO(file.read_bytes()))
        return self._open[name]


@dataclass(frozen=True)
class LatentTransform:
    """Chooses the latents of the image or of its mirror image."""

    flip: bool

    def draw(self, rng: np.random.Generator) -> View:
        return View(flip=bool(self.flip and rng.random() < 0.5))

    def apply(self, latents: dict[str, np.ndarray], view: View) -> dict[str, np.ndarray]:
        return {key: value[int(view.flip)] for key, value in latents.items()}


def make_transform(data, source) -> LatentTransform | None:
    """The transform of a cache's examples, None for other sources. Raises UserError where mirror images are missing."""
    if not isinstance(source.source, CachedLatents):
        return None
    if data.flip and not source.source.metadata["flips"]:
        raise UserError(f"data.flip=True, but the {source.where} holds no mirrored latents; remove it to write it anew")
    return LatentTransform(bool(data.flip))
