"""Opens what the config's `data` section names: random access to single examples, before any augmentation."""

import contextlib
import difflib
import fcntl
import hashlib
import io
import os
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from etils import epath

from latent_diffusion.data import records as records_lib
from latent_diffusion.errors import UserError


@runtime_checkable
class Examples(Protocol):
    """Random access to dicts: image uint8 (H, W, C), name str; where there are, label int, caption (str or tuple),
    segmentation int (H, W) and objects (`layouts.Objects`)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Source:
    """One split of a set.

    source: the examples. label_names: one per class, empty where examples have no label.
    captions: one per example (lazy where reading all takes long), None where examples have none.
    where: the set's name in messages. map_names: one per class of the semantic maps, object_names: one per class of the
    objects in pictures, empty where examples have none.
    """

    source: Examples
    label_names: tuple[str, ...] = ()
    captions: Sequence[str] | None = None
    where: str = ""
    map_names: tuple[str, ...] = ()
    object_names: tuple[str, ...] = ()


def open_source(config, split: str, *, fields: Collection[str] = ("segmentation", "layout")) -> Source:
    """Opens the training or the held-out part of the set that config.data describes.

    Args:
      config: needs `data` only.
      split: "train" or "eval".
      fields: of a batch, see `loader.batches`; without "segmentation" no semantic map is read, without "layout" no
        boxes.

    Raises UserError: unknown source, or anything wrong with the set (missing, not prepared, empty, ...).
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split {split!r}: 'train' or 'eval'")
    openers = {"emoji": _open_emoji, "emoji_scenes": _open_scenes, "tfds": _open_tfds, "folder": _open_folder,
               "memory": _open_memory}
    if config.data.source not in openers:
        raise UserError(f"data.source={config.data.source!r}: choose from {', '.join(openers)}")
    data = config.data.copy_and_resolve_references()
    with data.unlocked():
        for key, field in (("map_key", "segmentation"), ("objects_key", "layout")):
            data[key] = data[key] if field in fields else ""
    return openers[data.source](data, split)


def prepare(config) -> None:
    """Makes a built-in set on disk if it is not there yet (20 s, once). Nothing to do for other sources.

    Any number of processes may call this at once: on one machine one of them works and the others wait; on several with
    a shared disk each works in a directory of its own and the first to finish wins.
    """
    if config.data.source not in ("emoji", "emoji_scenes"):
        return
    builder = _builder_of(config.data)
    if builder.data_path.exists():
        return
    key = hashlib.sha256(os.fspath(builder.data_path).encode()).hexdigest()[:16]
    # A lock is a matter of this machine alone, so this is not one of our paths, and no leftover of it can block anyone.
    lock = os.open(os.path.join(tempfile.gettempdir(), f"emoji-{os.getuid()}-{key}.lock"), os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not builder.data_path.exists():
            _build(builder)
    finally:
        os.close(lock)


def _build(builder) -> None:
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()  # the builder shows its own; and TFDS would print that it downloads, which it does not
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(file_format="array_record")
    except OSError as error:
        if not builder.data_path.exists():  # else: another machine renamed its copy into place first
            raise UserError(f"cannot make the set in {builder.data_path} ({error}); set data.data_dir") from error
    finally:
        tfds.enable_progress_bar()


# --- built-in emoji ---------------------------------------------------------------------------------------------------


def _builder_of(data):
    from latent_diffusion.data.emoji import RESOLUTIONS, Emoji, EmojiScenes

    resolution = next((size for size in RESOLUTIONS if size >= data.image_size), RESOLUTIONS[-1])
    _refuse_bucket(data.data_dir)
    made = {"emoji": Emoji, "emoji_scenes": EmojiScenes}[data.source]
    return made(config=str(resolution), data_dir=data.data_dir or None)


def _built(data):
    """The builder of a built-in set, which is made if it is not there."""
    builder = _builder_of(data)
    if builder.data_path.exists():
        return builder
    prepare(_Section(data))
    return _builder_of(data)  # the sizes of the splits are read anew


def _open_scenes(data, split: str) -> Source:
    examples, features, where = _read(_built(data), data, split)
    captions = [examples.facts(i)["caption"].decode() for i in range(len(examples))]
    return Source(examples, (), captions, where, **_names_of_things(features, data))


def _open_emoji(data, split: str) -> Source:
    from latent_diffusion.data.emoji.catalogue import STYLES

    unknown = sorted(set(data.styles) - set(STYLES))
    if unknown or not data.styles:
        raise UserError(f"data.styles={tuple(data.styles)}: choose from {', '.join(STYLES)}")

    examples, features, where = _read(_built(data), data, split)
    styles, groups, subgroups = (features[key].names for key in ("style", "label", "sublabel"))
    unknown = sorted(set(data.groups) - {*groups, *subgroups})
    if unknown:
        raise UserError(f"data.groups={tuple(data.groups)}: there is no {unknown[0]!r}; choose from the groups "
                        f"{', '.join(groups)} and the subgroups {', '.join(subgroups)}")
    keep, captions = [], []
    for i in range(len(examples)):
        facts = examples.facts(i)
        if (
            (data.skin_tones or not facts["skin_tone"])
            and (data.duplicates or not facts["duplicate"])
            and styles[facts["style"]] in data.styles
            and (not data.groups or {groups[facts["label"]], subgroups[facts["sublabel"]]} & set(data.groups))
        ):
            keep.append(i)
            captions.append(_prefixed(facts["caption"].decode(), styles[facts["style"]], data.style_prefix))
    return Source(_Subset(examples, keep, captions), _label_names(features, data), captions, where)


def _prefixed(caption: str, style: str, wanted: bool) -> str:
    return f"{'an' if style[0] in 'aeiou' else 'a'} {style} emoji of {caption}" if wanted else caption


@dataclass(frozen=True)
class _Section:
    data: Any


@dataclass(frozen=True)
class _Subset:
    """Some examples of a set, with captions of our own."""

    source: Examples
    indices: list[int]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        return {**self.source[self.indices[index]], "caption": self.captions[index]}


# --- TFDS by name -----------------------------------------------------------------------------------------------------


def _open_tfds(data, split: str) -> Source:
    import tensorflow_datasets as tfds

    if not data.name:
        raise UserError("data.source='tfds' needs data.name, the name of a TFDS set")
    _refuse_bucket(data.data_dir)
    try:
        builder = tfds.builder(data.name, data_dir=data.data_dir or None)
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(data.name.split("/")[0], known, n=5, cutoff=0.5)
        raise UserError(
            f"data.name={data.name!r}: TFDS knows no such set"
            + (f" and {data.data_dir} holds none" if data.data_dir else "")
            + (f"; similar: {', '.join(close)}" if close else "")
        ) from None
    except ImportError as error:
        missing = error.name or "TensorFlow"
        raise UserError(f"data.name={data.name!r}: TFDS cannot describe this set without {missing}") from error
    except ValueError as error:
        name, _, chosen = data.name.partition("/")
        configs = list(tfds.builder_cls(name).builder_configs)
        if configs and chosen.split(":")[0] not in configs:
            raise UserError(f"{name} has no config {chosen!r}; choose from {', '.join(configs)}") from error
        raise UserError(f"data.name={data.name!r}: {' '.join(str(error).split())}") from error
    examples, features, where = _read(builder, data, split)
    captions = records_lib.Captions(examples) if examples.caption_path else None
    return Source(examples, _label_names(features, data), captions, where, **_names_of_things(features, data))


def _read(builder, data, split: str):
    """Returns the examples of a prepared set, its features, and its name for messages."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    if not isinstance(features, dict | tfds.features.FeaturesDict) or data.image_key not in features:
        raise UserError(
            f"data.image_key={data.image_key!r}: {builder.name} has no such feature; it has {', '.join(features)}"
        )
    name = data.split if split == "train" else data.eval_split
    try:
        records = builder.as_data_source(split=name)
    except Exception as error:
        raise _explain(builder, data, name, error) from error
    # Set here, not passed above: with decoders in the call, `tfds.testing.mock_data` needs TensorFlow.
    records.decoders = {key: tfds.decode.SkipDecoding() for key, feature in features.items() if _is_picture(feature)}
    caption_path = tuple(data.caption_key.split("/")) if data.caption_key.split("/")[0] in features else ()
    label_key = data.label_key if _label_names(features, data) else ""
    where = f"the {name!r} split of {builder.name} (features: {', '.join(features)})"
    map_key = data.map_key if data.map_key in features else ""
    objects_key = data.objects_key if _has_boxes(features, data.objects_key) else ""
    examples = records_lib.Records(
        records, data.image_key, label_key, caption_path, map_key, objects_key, data.on_corrupt, where)
    return examples, features, where


def _label_names(features, data) -> tuple[str, ...]:
    return tuple(getattr(features[data.label_key], "names", None) or ()) if data.label_key in features else ()


def _names_of_things(features, data) -> dict[str, tuple[str, ...]]:
    """Names of the classes of semantic maps and of objects; numbers where the set does not name them."""
    found = {}
    if data.map_key in features:
        feature = features[data.map_key]
        classes = getattr(feature, "num_classes", None) or 256  # what fits into a byte
        found["map_names"] = tuple(getattr(feature, "names", None) or map(str, range(classes)))
    if _has_boxes(features, data.objects_key):
        label = features[data.objects_key].feature["label"]
        found["object_names"] = tuple(label.names or map(str, range(label.num_classes)))
    return found


def _has_boxes(features, key: str) -> bool:
    """Many sets call something else "objects": labels of whole images, things without a class."""
    return key in features and {"bbox", "label"} <= set(getattr(features[key], "feature", None) or ())


def _is_picture(feature) -> bool:
    import tensorflow_datasets as tfds

    return type(feature) in (tfds.features.Image, tfds.features.LabeledImage, tfds.features.Video)


def _explain(builder, data, split: str, error: Exception) -> Exception:
    """The UserError that says why a TFDS set cannot be read, or `error` itself where it is not the user's to cure."""
    folder = f", data_dir={data.data_dir!r}" if data.data_dir else ""
    command = (
        f"python -c \"import tensorflow_datasets as tfds; tfds.builder({data.name!r}{folder})"
        ".download_and_prepare(file_format='array_record')\""
    )
    if not builder.data_path.exists():
        manual = getattr(builder, "MANUAL_DOWNLOAD_INSTRUCTIONS", None)
        if manual:
            place = os.path.join(builder.data_dir_root, "downloads", "manual")
            return UserError(
                f"{data.name} is not prepared in {builder.data_path} and needs a manual download into {place} "
                f"({' '.join(manual.split())}); then: {command}"
            )
        return UserError(
            f"{data.name} is not prepared in {builder.data_path}; prepare it (many sets need TensorFlow for that, but "
            f"not for training) with: {command}"
        )
    if isinstance(error, NotImplementedError):
        return UserError(
            f"{data.name} in {builder.data_path} is prepared as {builder.info.file_format.value}, which has no random "
            f"access; move it away or choose another data.data_dir, then prepare it again with: {command}"
        )
    known = sorted(builder.info.splits)
    if known and isinstance(error, ValueError | KeyError):
        return UserError(f"{data.name} has no split {split!r}; choose from {', '.join(known)}, or a part, train[:90%]")
    return error


def _refuse_bucket(data_dir: str) -> None:
    if "://" in str(data_dir):
        raise UserError(
            f"data.data_dir={data_dir}: array_record files in a bucket are read through a mount (for example gcsfuse); "
            "give the mounted path"
        )


# --- others -----------------------------------------------------------------------------------------------------------


def _open_folder(data, split: str) -> Source:
    from latent_diffusion.data import folder

    path = epath.Path(data.path).expanduser() if data.path else None
    examples = folder.open_folder(path, split, holdout=data.holdout, on_corrupt=data.on_corrupt,
                                  with_maps=bool(data.map_key), with_objects=bool(data.objects_key))
    return Source(examples, examples.label_names, examples.captions, f"folder {data.path}", examples.map_names,
                  examples.object_names)


def _open_memory(data, split: str) -> Source:
    from latent_diffusion.data import shapes

    held_out = max(1, data.num_examples // 4)
    start, count = (0, data.num_examples) if split == "train" else (data.num_examples, held_out)
    examples = shapes.Shapes(start, count, data.image_size)
    captions = [examples.caption(i) for i in range(count)]
    return Source(examples, shapes.SHAPES, captions, "the set of drawn shapes", shapes.MAP_NAMES, shapes.SHAPES)
