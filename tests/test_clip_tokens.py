"""CLIP's tokenizer; tests/parity compares it with transformers'."""

import gzip
import pickle

import numpy as np
import pytest

from latent_diffusion import clip_tokens
from latent_diffusion.errors import UserError

MERGES = (("c", "a"), ("ca", "t</w>"), ("o", "f</w>"), ("p", "h"))


@pytest.fixture
def tokenizer():
    return clip_tokens.from_merges(MERGES)


def test_numbers_are_those_of_clip(tokenizer):
    # 256 bytes, 256 bytes at the end of a word, the merges, start and end; in CLIP's own vocabulary "!" is 0, "a</w>"
    # is 320, "<|startoftext|>" 49406 and "<|endoftext|>" 49407 = 512 + 48,894 + 1
    assert tokenizer.size == 512 + len(MERGES) + 2
    assert [tokenizer.ids[token] for token in ("!", "a</w>", "cat</w>")] == [0, 320, 513]
    assert (tokenizer.ids["<|startoftext|>"], tokenizer.ids["<|endoftext|>"]) == (516, 517)
    assert clip_tokens._OPENAI_MERGES == 48_894


def test_pairs_are_joined_in_their_order_and_the_end_is_the_padding(tokenizer):
    tokens = tokenizer.encode(["A  CAT\tof", "", "cph"], 7)
    named = [[tokenizer.tokens[i] for i in row] for row in tokens]
    end = "<|endoftext|>"
    assert named == [["<|startoftext|>", "a</w>", "cat</w>", "of</w>", end, end, end], ["<|startoftext|>"] + 6 * [end],
                     ["<|startoftext|>", "c", "p", "h</w>", end, end, end]]
    assert tokens.dtype == np.int32


def test_what_does_not_fit_is_cut_before_the_last_end(tokenizer):
    assert tokenizer.encode(["cat of cat"], 4).tolist() == [[516, 513, 514, 517]]
    assert tokenizer.too_long(["cat of", "cat of cat"], 4) == ["cat of cat"]
    assert tokenizer.null(3).tolist() == [[516, 517, 517]]
    with pytest.raises(UserError, match="max_length=1"):
        tokenizer.encode(["cat"], 1)


def test_all_bytes_can_be_written(tokenizer):
    text = "".join(map(chr, range(33, 1000))).replace("\x85", "").lower()
    assert tokenizer.ids["<|endoftext|>"] not in tokenizer.encode([text], 4000)[0, 1:600]


def test_saving_and_loading(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new")
    for path in (tmp_path / "new", tmp_path / "new" / "vocab.json"):
        assert clip_tokens.load(path) == tokenizer
    assert pickle.loads(pickle.dumps(tokenizer)) == tokenizer
    # as OpenAI's file: a line of comment, and more merges than CLIP uses
    lines = ["#version", *("a b" for _ in range(clip_tokens._OPENAI_MERGES)), "unused merge"]
    (tmp_path / "bpe.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    assert clip_tokens.load(tmp_path / "bpe.txt.gz").merges[-1] == ("a", "b")


@pytest.mark.parametrize("message, files", [
    ("vocab.json does not exist; CLIP's tokenizer is a folder with", {}),
    ("merges.txt does not exist", {"vocab.json": "{}"}),
    ("cannot be read as CLIP's tokenizer", {"vocab.json": "{", "merges.txt": ""}),
    ("cannot be read as CLIP's tokenizer", {"vocab.json": "[]", "merges.txt": ""}),
    ("its ids are not 0, 1, 2", {"vocab.json": '{"a": 1}', "merges.txt": ""}),
    ("merge 'a b c' is not a pair", {"vocab.json": '{"a": 0}', "merges.txt": "a b c"}),
    (r"lacks <\|startoftext\|>", {"vocab.json": '{"a": 0}', "merges.txt": ""}),
])
def test_files_that_are_none(tmp_path, message, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        clip_tokens.load(tmp_path)


def test_compressed_file_that_is_damaged(tmp_path):
    (tmp_path / "bpe.txt.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="cannot be read"):
        clip_tokens.load(tmp_path / "bpe.txt.gz")
