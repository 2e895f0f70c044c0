"""A folder of images: with captions from captions.jsonl, labels from it or from sub-folders, and a held-out part."""

import collections
import concurrent.futures
import io
import json
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging
from etils import epath
from PIL import Image
from tqdm import tqdm

from latent_diffusion import layouts
from latent_diffusion.data import transforms
from latent_diffusion.errors import UserError, read_text

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
HELD_OUT_FOLDERS = ("validation", "val", "test")
CAPTIONS = "captions.jsonl"


class FolderExamples:
    """Image files with random access.

    label_names is empty without labels, captions None without captions, map_names and object_names are empty without
    semantic maps and objects. corrupt: the names of files left out.
    """

    def __init__(
        self, root: epath.Path, names: list[str], *, labels, label_names, captions, maps, map_names, objects,
        object_names, on_corrupt: str, corrupt
    ):
        self._root, self.names, self._labels, self._on_corrupt = root, names, labels, on_corrupt
        self._maps, self._objects = maps, objects
        self.label_names: tuple[str, ...] = label_names
        self.captions: list[str] | None = captions
        self.map_names: tuple[str, ...] = map_names
        self.object_names: tuple[str, ...] = object_names
        self.corrupt: list[str] = corrupt

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        for i in (*range(index, len(self)), *range(index)):
            try:
                image = transforms.decode((self._root / self.names[i]).read_bytes())
                break
            except Exception as error:  # Pillow's decoders raise many types
                if self._on_corrupt != "skip":
                    raise _corrupt(self._root / self.names[i], error) from error
                # The check on opening is quick and lets some damage pass. The next picture stands in, always the same.
                logging.log_first_n(logging.WARNING, "skipping %s: %s", 20, self._root / self.names[i], error)
        else:
            raise UserError(f"no readable image is left in {self._root}")
        example = {"image": image, "name": self.names[i]}
        if self.label_names:
            example["label"] = self._labels[i]
        if self.captions is not None:
            example["caption"] = self.captions[i]
        if self.map_names:
            example["segmentation"] = _read_map(self._maps[i])
            if example["segmentation"].shape != image.shape[:2]:
                raise UserError(f"the map {self._maps[i]} has another size than {self._root / self.names[i]}")
        if self.object_names:
            example["objects"] = self._objects[i]
        return example


def open_folder(
    path: epath.Path | None, split: str, *, holdout: float, on_corrupt: str, with_maps: bool = True,
    with_objects: bool = True,
) -> FolderExamples:
    """Opens the "train" or "eval" part of a folder of images, found at any depth.

    The parts are the sub-folders train/ and validation/ (or val/, test/) where both exist; else a file is held out when
    the hash of its relative path says so (a share of `holdout`; at least one file), so adding files moves none.
    Labels: "label" (a name or a number) in captions.jsonl, else the first sub-folder, where there are two or more.
    Semantic maps and objects: "map" (a file beside captions.jsonl) and "objects" (as in `layouts.read`) there; they are
    looked at if asked for: maps are all read, for the number of classes.
    Every file is checked (header and end; PNG checksums) before this returns.

    Raises UserError: no folder, no images, a bad line in captions.jsonl, an image without a line there, nothing held
    out, a corrupt image (with on_corrupt="skip" these are left out and counted in the log).
    """
    if path is None or not path.exists():
        raise UserError(f"data.path={str(path or '')!r}: no such folder")
    if not path.is_dir():
        raise UserError(f"data.path={str(path)!r} is a file, not a folder of images")
    if on_corrupt not in ("error", "skip"):
        raise UserError(f"data.on_corrupt={on_corrupt!r}: choose from error, skip")
    if not 0.0 <= holdout < 1.0:
        raise UserError(f"data.holdout={holdout}: must be in [0, 1)")
    roots = _roots(path)
    tables = {root: {**_read_captions(path, root), **(_read_captions(root, root) if root != path else {})}
              for root in set(roots.values())}
    every = [row for table in tables.values() for row in table.values()]  # classes are counted over both parts
    root, names, all_names = _choose(path, roots, split, holdout, {row["map"] for row in every})
    table = tables[root]
    names, corrupt = _check(root, names, on_corrupt)
    maps, map_names = _maps(root, names, table, every) if with_maps else ([], ())
    objects, object_names = _objects(names, table, every) if with_objects else ([], ())
    captions = _captions(root, names, table)
    labels, label_names = _labels(names, all_names, table, every)
    return FolderExamples(
        root, names, labels=labels, label_names=label_names, captions=captions, maps=maps, map_names=map_names,
        objects=objects, object_names=object_names, on_corrupt=on_corrupt, corrupt=corrupt)


def _roots(path: epath.Path) -> dict[str, epath.Path]:
    """split -> the folder of its images: one folder for both, unless there are train/ and validation/."""
    evaluation = next((path / name for name in HELD_OUT_FOLDERS if (path / name).is_dir()), None)
    parts = (path / "train").is_dir() and evaluation is not None
    return {"train": path / "train", "eval": evaluation} if parts else {"train": path, "eval": path}


def _choose(
    path: epath.Path, roots: dict[str, epath.Path], split: str, holdout: float, maps: set[epath.Path | None]
) -> tuple[epath.Path, list[str], list[str]]:
    """Returns the folder that names are relative to, the names of the split, and those of both splits."""
    found = {root: sorted(name for name in _images(root) if root / name not in maps)
             for root in set(roots.values())}
    root = roots[split]
    if root != path:
        names = found[root]
        if not names:
            raise UserError(f"no images in {root} (looked for {', '.join(SUFFIXES)}, in sub-folders too)")
        return root, names, sorted(set().union(*found.values()))
    names = found[path]
    if not names:
        raise UserError(f"no images in {path} (looked for {', '.join(SUFFIXES)}, in sub-folders too)")
    hashes = {name: zlib.crc32(name.encode()) / 2**32 for name in names}
    held_out = {name for name in names if hashes[name] < holdout}
    if holdout > 0 and not held_out and len(names) > 1:
        held_out = {min(names, key=hashes.get)}
    chosen = [name for name in names if (name in held_out) == (split == "eval")]
    if not chosen:
        cure = "set data.holdout above 0" if split == "eval" and not holdout else "add images or change data.holdout"
        raise UserError(f"{path}: none of its {len(names)} images is in the {split} part (holdout {holdout}); {cure}")
    return path, chosen, names


def _images(root: epath.Path) -> Iterator[str]:
    """Relative names, with "/". Hidden files and folders are passed over."""
    folders = collections.deque([(root, "")])
    while folders:
        folder, prefix = folders.popleft()
        for child in folder.iterdir():
            if child.name.startswith("."):
                continue
            if child.suffix.lower() in SUFFIXES:
                yield prefix + child.name
            elif child.is_dir():
                folders.append((child, f"{prefix}{child.name}/"))


def _check(root: epath.Path, names: list[str], on_corrupt: str) -> tuple[list[str], list[str]]:
    corrupt = []
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        problems = pool.map(lambda name: _problem(root / name), names)
        for name, problem in zip(names, tqdm(problems, "checking images", len(names), delay=2), strict=True):
            if problem is not None and on_corrupt == "error":
                pool.shutdown(cancel_futures=True)
                raise _corrupt(root / name, problem)
            if problem is not None:
                corrupt.append(name)
    if corrupt:
        logging.warning("%s: skipping %d corrupt images of %d: %s", root, len(corrupt), len(names), corrupt[:20])
    bad = set(corrupt)
    good = [name for name in names if name not in bad]
    if not good:
        raise UserError(f"all {len(names)} images in {root} are corrupt; the first is {names[0]}")
    return good, corrupt


def _problem(path: epath.Path) -> Exception | None:
    """What is wrong with an image file, as far as can be told without decoding it."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            ends = image.format == "JPEG" and b"\xff\xd9" in content[-64:]
            if image.format == "PNG":
                image.verify()  # all checksums
            elif not ends:  # for others, and a JPEG without its end mark, there is nothing quicker than decoding
                image.load()
    except Exception as error:  # Pillow raises many types
        return error
    return None


def _corrupt(path: epath.Path, error: Exception) -> UserError:
    return UserError(f"corrupt image {path}: {transforms.why(error)}; remove it, or set data.on_corrupt=skip")


def _read_captions(folder: epath.Path, root: epath.Path) -> dict[str, dict]:
    """The lines of folder/captions.jsonl, by file name relative to `root`."""
    path = folder / CAPTIONS
    if not path.exists():
        return {}
    prefix = "" if folder == root else f"{root.name}/"
    table = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            file, caption, label = row["file"], row.get("caption", ""), row.get("label")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            wanted = '{"file": "a.png", "caption": "..."}'
            raise UserError(f"{path}, line {number}: not like {wanted}: {line[:80]}") from error
        if not isinstance(file, str) or not isinstance(caption, str) or isinstance(label, bool | float | list | dict):
            raise UserError(f"{path}, line {number}: file and caption must be strings, label a string or an integer")
        if file.startswith(prefix):
            place = folder / row["map"] if isinstance(row.get("map"), str) else None
            table[file.removeprefix(prefix)] = {"caption": caption, "label": label, "map": place,
                                                "objects": row.get("objects"), "where": f"{path}, line {number}"}
    return table


def _maps(
    root: epath.Path, names: Sequence[str], table: dict[str, dict], every
) -> tuple[list[epath.Path], tuple[str, ...]]:
    """The map of each image, which has its size, and the numbers of the classes up to the last in maps of both
    splits."""
    places = {name: row["map"] for name, row in table.items() if row["map"] is not None}
    if not places:
        return [], ()
    missing = [name for name in names if name not in places]
    if missing:
        raise UserError(f"{CAPTIONS}: {len(missing)} of {len(names)} images lack a map; the first is {missing[0]}")
    picture_of = {row["map"]: None for row in every} | {places[name]: root / name for name in names}
    picture_of.pop(None, None)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = set().union(*tqdm(pool.map(_classes_of, picture_of, picture_of.values()), "reading maps",
                                  len(picture_of), delay=2))
    classes = 1 + max(found)
    if classes == 256 and 254 not in found:
        rest = found - {255} or found
        logging.warning("the maps have the classes %d to %d, and 255, which counts as a class like the others: if it "
                        'stands for "no class", number it after the last one', min(rest), max(rest))
    return [places[name] for name in names], tuple(map(str, range(classes)))


def _classes_of(place: epath.Path, picture: epath.Path | None) -> set[int]:
    """The class numbers in a map, which must have the size of its picture."""
    classes = _read_map(place)
    if picture is not None:
        with Image.open(io.BytesIO(picture.read_bytes())) as image:
            width, height = image.size
        if (height, width) != classes.shape and transforms.decode(picture.read_bytes()).shape[:2] != classes.shape:
            raise UserError(f"the map {place} has another size than {picture}")
    return set(np.unique(classes).tolist())


def _read_map(path: epath.Path) -> np.ndarray:
    try:
        return transforms.decode_map(path.read_bytes())
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # Pillow raises many types
        raise UserError(f"the map {path} cannot be read: {transforms.why(error)}") from error


def _objects(names: Sequence[str], table: dict[str, dict], every) -> tuple[list[layouts.Objects], tuple[str, ...]]:
    """The objects of each image, and the names of their classes in both splits."""
    rows = {name: row for name, row in table.items() if row["objects"] is not None}
    if not rows:
        return [], ()
    missing = [name for name in names if name not in rows]
    if missing:
        raise UserError(f"{CAPTIONS}: {len(missing)} of {len(names)} images lack objects; the first is {missing[0]}")
    object_names = _class_names({
        thing["label"] for row in every if isinstance(row["objects"], list)
        for thing in row["objects"] if isinstance(thing, dict) and isinstance(thing.get("label"), str | int)})
    parsed = {name: layouts.from_rows(row["objects"], object_names, row["where"]) for name, row in rows.items()}
    return [parsed[name] for name in names], object_names


def _class_names(labels: set[str | int]) -> tuple[str, ...]:
    """The names of classes in order of their numbers: labels that are all numbers keep them, others are sorted."""
    if labels and all(isinstance(label, int) for label in labels):
        if min(labels) < 0:
            raise UserError(f"{CAPTIONS}: label {min(labels)} is negative")
        return tuple(map(str, range(max(labels) + 1)))
    return tuple(sorted(map(str, labels)))


def _captions(root: epath.Path, names: Sequence[str], table: dict[str, dict]) -> list[str] | None:
    if not any(row["caption"] for row in table.values()):
        return None
    missing = [name for name in names if not table.get(name, {}).get("caption")]
    if missing:
        raise UserError(
            f"{CAPTIONS}: {len(missing)} of {len(names)} images in {root} have no caption; the first is {missing[0]}"
        )
    return [table[name]["caption"] for name in names]


def _labels(names: list[str], all_names: list[str], table: dict[str, dict], every) -> tuple[list[int], tuple[str, ...]]:
    """Class numbers of `names`, and the names of the classes of both splits."""
    given = {name: row["label"] for name, row in table.items() if row["label"] is not None}
    if given:
        missing = [name for name in names if name not in given]
        if missing:
            raise UserError(f"{CAPTIONS}: {len(missing)} of {len(names)} images lack a label, first {missing[0]}")
        label_names = _class_names({row["label"] for row in every} - {None})
        return [label_names.index(str(given[name])) for name in names], label_names
    folders = sorted({name.split("/")[0] if "/" in name else "" for name in all_names})
    if "" in folders or len(folders) < 2:
        return [], ()
    return [folders.index(name.split("/")[0]) for name in names], tuple(folders)
