"""CLIP's tokenizer: byte-pair encoding (Radford et al. 2021, section 2.4) from the files that come with CLIP's weights.

The files stay the user's; the package ships none.
"""

import functools
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from etils import epath
from jaxtyping import Int

from latent_diffusion import tokens
from latent_diffusion.errors import UserError, read_text

START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY, MERGES = "vocab.json", "merges.txt"
_WORD_END = "</w>"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_OPENAI_MERGES = 49152 - 256 - 2  # of the 262,144 in OpenAI's file


@dataclass(frozen=True)
class BytePairs:
    """A byte-pair vocabulary, lower-cased, with CLIP's way of splitting text into words.

    tokens: the entries; the position of an entry is its id. merges: the pairs that are joined, first ones first.
    """

    tokens: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]

    def __post_init__(self):
        missing = [token for token in (START, END) if token not in self.ids]
        if missing:
            raise UserError(f"vocabulary of {len(self.tokens)} entries lacks {', '.join(missing)}: not CLIP's")

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    @functools.cached_property
    def _tokenizer(self):
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

        tokenizer = Tokenizer(models.BPE(
            self.ids, list(self.merges), unk_token=END, continuing_subword_prefix="", end_of_word_suffix=_WORD_END))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False)])
        tokenizer.add_special_tokens([START, END])
        return tokenizer

    def __reduce__(self):  # the worker processes of the loader build their own tokenizer
        return BytePairs, (self.tokens, self.merges)

    @property
    def size(self) -> int:
        return len(self.tokens)

    def encode(self, captions: Sequence[str], max_length: int) -> Int[np.ndarray, "n max_length"]:
        """Returns int32 (N, max_length): start, ids, end, end...; what does not fit is cut before the last end."""
        return tokens.framed(tokens.pieces(self._tokenizer, captions), max_length, self.ids, START, END, padding=END)

    def too_long(self, captions: Sequence[str], max_length: int) -> list[str]:
        """The captions of which `encode` cuts something off."""
        return tokens.too_long(captions, tokens.pieces(self._tokenizer, captions), max_length)

    def null(self, max_length: int) -> Int[np.ndarray, "1 max_length"]:
        """The empty caption, which stands for "no condition" in classifier-free guidance: int32 (1, max_length)."""
        return self.encode([""], max_length)

    def save(self, folder: epath.PathLike) -> None:
        """Writes vocab.json and merges.txt, which `load` and other people's tokenizers read."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / VOCABULARY).write_text(json.dumps(self.ids, ensure_ascii=False))
        (folder / MERGES).write_text("\n".join(["#version: 0.2", *map(" ".join, self.merges)]) + "\n")


def load(path: epath.PathLike) -> BytePairs:
    """Reads a folder with vocab.json and merges.txt, a vocab.json beside its merges.txt, or the file
    bpe_simple_vocab_16e6.txt.gz of OpenAI's and OpenCLIP's packages.

    Raises UserError for anything else.
    """
    path = epath.Path(path)
    path = path / VOCABULARY if path.is_dir() else path
    merges = path if path.name.endswith(".gz") else path.parent / MERGES
    for file in (path, merges):
        if not file.is_file():
            raise UserError(f"{file} does not exist; CLIP's tokenizer is a folder with {VOCABULARY} and {MERGES}, or "
                            "bpe_simple_vocab_16e6.txt.gz")
    try:
        if merges == path:
            lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : 1 + _OPENAI_MERGES]
            return from_merges(_pairs(lines))
        ids = json.loads(read_text(path))
        if sorted(ids.values()) != list(range(len(ids))):
            raise ValueError("its ids are not 0, 1, 2, ...")
        lines = [line for line in read_text(merges).split("\n") if line and not line.startswith("#version")]
        return BytePairs(tuple(sorted(ids, key=ids.get)), _pairs(lines))
    except (OSError, EOFError, ValueError, AttributeError, TypeError) as error:  # JSON's and Unicode's are ValueErrors
        raise UserError(f"{path} cannot be read as CLIP's tokenizer: {error}") from error


def from_merges(merges: Sequence[tuple[str, str]]) -> BytePairs:
    """CLIP's own numbering: every byte, every byte at the end of a word, the merges in their order, start and end."""
    letters = _byte_letters()
    entries = (*letters, *(letter + _WORD_END for letter in letters), *map("".join, merges), START, END)
    return BytePairs(entries, tuple(merges))


def _pairs(lines: Sequence[str]) -> tuple[tuple[str, str], ...]:
    pairs = tuple(tuple(line.rstrip("\r").split(" ")) for line in lines)
    if bad := [" ".join(pair) for pair in pairs if len(pair) != 2]:
        raise ValueError(f"merge {bad[0]!r} is not a pair")
    return pairs


def _byte_letters() -> list[str]:
    """A visible letter for each byte, in the order of CLIP's ids: printable ones, which stand for themselves, first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]
