"""What a user says -> arrays: captions to tokens, label names to numbers. NumPy only; used by data and pipeline."""

import collections
import difflib
import functools
import heapq
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from etils import epath
from jaxtyping import Int

from latent_diffusion import clip_tokens, tokens
from latent_diffusion.errors import UserError, read_text

# conditioning.crossattn -> what a batch calls it
SEQUENCES = {"class": "label", "text": "tokens", "layout": "layout", "vectors": "vectors"}
MAPS = {"none": (), "segmentation": ("segmentation",), "low_res": ("low_res",), "inpainting": ("image", "mask")}
VOCABULARY = "vocab.txt"
PAD, UNK, CLS, SEP = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
SPECIAL_TOKENS = (PAD, UNK, CLS, SEP)


@dataclass(frozen=True)
class Vocabulary:
    """A WordPiece vocabulary, lower-cased and stripped of accents as bert-base-uncased.

    tokens: the entries; the position of an entry is its id. Must hold [PAD], [UNK], [CLS] and [SEP].
    """

    tokens: tuple[str, ...]

    def __post_init__(self):
        missing = [token for token in SPECIAL_TOKENS if token not in self.ids]
        if missing:
            raise UserError(f"vocabulary of {len(self.tokens)} entries lacks {', '.join(missing)}: no BERT vocab.txt")

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    @functools.cached_property
    def _tokenizer(self):
        return _bare_tokenizer(self.ids)

    def __reduce__(self):  # the worker processes of the loader build their own tokenizer
        return Vocabulary, (self.tokens,)

    def __eq__(self, other):
        return isinstance(other, Vocabulary) and self.tokens == other.tokens

    def __hash__(self):
        return hash(self.tokens)

    @property
    def size(self) -> int:
        return len(self.tokens)

    def encode(self, captions: Sequence[str], max_length: int) -> Int[np.ndarray, "n max_length"]:
        """Returns int32 (N, max_length): [CLS] ids [SEP] [PAD]...; what does not fit is cut before the [SEP]."""
        return tokens.framed(tokens.pieces(self._tokenizer, captions), max_length, self.ids, CLS, SEP, PAD)

    def too_long(self, captions: Sequence[str], max_length: int) -> list[str]:
        """The captions of which `encode` cuts something off."""
        return tokens.too_long(captions, tokens.pieces(self._tokenizer, captions), max_length)

    def null(self, max_length: int) -> Int[np.ndarray, "1 max_length"]:
        """The empty caption, which stands for "no condition" in classifier-free guidance: int32 (1, max_length)."""
        return self.encode([""], max_length)

    def save(self, folder: epath.PathLike) -> None:
        """Writes vocab.txt: one entry a line, in order of the ids."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / VOCABULARY).write_text("\n".join(self.tokens) + "\n")


Tokenizer = Vocabulary | clip_tokens.BytePairs


def _bare_tokenizer(ids: dict[str, int]):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=UNK, max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def train_vocabulary(captions: Iterable[str], size: int) -> Vocabulary:
    """Learns a WordPiece vocabulary of at most `size` entries from captions.

    The most frequent pair of neighboring pieces is joined until `size` is reached or every word is whole (Sennrich et
    al., ACL 2016, algorithm 1). Equal captions in any order give the same entries in every process: `tokenizers`' own
    trainer breaks ties differently in each. Every letter is an entry both as a first and as a later one, so that a word
    never seen can still be spelt.
    Raises UserError where there is no caption, or where `size` is too small for the letters that occur.
    """
    counts = _count_words(captions)
    if not counts:
        raise UserError("no captions to learn a vocabulary from: set data.caption_key or add a captions.jsonl")
    words = [[word[0], *(f"##{letter}" for letter in word[1:])] for word in counts]
    letters = sorted(form for letter in set("".join(counts)) for form in (letter, f"##{letter}"))
    if len(SPECIAL_TOKENS) + len(letters) > size:
        needed = len(SPECIAL_TOKENS) + len(letters)
        raise UserError(f"conditioning.text.vocab_size={size} is less than the {needed} special tokens and letters")
    entries = dict.fromkeys([*SPECIAL_TOKENS, *letters])
    for piece in _merges(words, list(counts.values())):
        if len(entries) >= size:
            break
        entries[piece] = None
    return Vocabulary(tuple(entries))


def _count_words(captions: Iterable[str]) -> dict[str, int]:
    tokenizer = _bare_tokenizer({token: i for i, token in enumerate(SPECIAL_TOKENS)})
    counts = collections.Counter()
    for caption in captions:
        normal = tokenizer.normalizer.normalize_str(str(caption))
        counts.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal))
    return dict(sorted(counts.items()))


def _merges(words: list[list[str]], counts: list[int]) -> Iterator[str]:
    """Joins, in place, the most frequent pair of pieces again and again; yields the new pieces."""
    pairs = collections.Counter()
    places = collections.defaultdict(set)
    for i, word in enumerate(words):
        for pair in itertools.pairwise(word):
            pairs[pair] += counts[i]
            places[pair].add(i)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    while heap:
        count, pair = heapq.heappop(heap)  # among equal counts the first by spelling
        if pairs[pair] != -count:
            continue  # counted anew since: another entry of the heap holds the right number
        if -count < 1:
            return
        joined = pair[0] + pair[1].removeprefix("##")
        touched = set()
        for i in places.pop(pair):
            for old in itertools.pairwise(words[i]):
                pairs[old] -= counts[i]
                touched.add(old)
            words[i] = _join(words[i], pair, joined)
            for new in itertools.pairwise(words[i]):
                pairs[new] += counts[i]
                places[new].add(i)
                touched.add(new)
        for changed in touched - {pair}:
            heapq.heappush(heap, (-pairs[changed], changed))
        yield joined


def _join(word: list[str], pair: tuple[str, str], joined: str) -> list[str]:
    out = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] = joined
        else:
            out.append(piece)
    return out


def load_vocabulary(path: epath.PathLike) -> Vocabulary:
    """Reads a vocab.txt that `Vocabulary.save` wrote, or a BERT model's (bert-base-uncased: 30,522 entries); ids are
    the line numbers. Raises UserError where there is none."""
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"no vocabulary at {path}")
    lines = read_text(path).split("\n")
    return Vocabulary(tuple(line.rstrip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)))


def saved_tokenizer(workdir: epath.PathLike, kind: str) -> Tokenizer | None:
    """What ``save`` of a tokenizer wrote into a workdir, or None. kind: ``conditioning.text.kind``."""
    file = epath.Path(workdir) / (clip_tokens.VOCABULARY if kind == "clip" else VOCABULARY)
    return TOKENIZERS[kind](file) if file.exists() else None


# Readers of the files that a text encoder comes with, by ``conditioning.text.kind``.
TOKENIZERS: dict[str, Callable[[epath.PathLike], Tokenizer]] = {"bert": load_vocabulary, "clip": clip_tokens.load}


def save_labels(path: epath.PathLike, names: Sequence[str]) -> None:
    """Writes the class names, in order of their numbers, as a JSON list."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(names), ensure_ascii=False, indent=0) + "\n")


def load_labels(path: epath.PathLike) -> tuple[str, ...]:
    """Reads what `save_labels` wrote. Raises UserError where there is none."""
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"no class names at {path}")
    return tuple(json.loads(path.read_text()))


def parse_labels(text: str, names: Sequence[str]) -> Int[np.ndarray, " n"]:
    """Turns "3,7,food-and-drink" into int32 class numbers.

    Each entry is a class name (upper and lower case alike), or else a number in [0, len(names)).
    Raises UserError for anything else, with the choices.
    """
    return np.asarray([parse_label(part, names) for part in text.split(",")], np.int32)


def parse_label(text: str, names: Sequence[str], where: str = "") -> int:
    """One entry of `parse_labels`; `where` begins the message."""
    by_name, entry = {name.lower(): i for i, name in enumerate(names)}, text.strip()
    if entry.lower() in by_name:
        return by_name[entry.lower()]
    if entry.isdecimal() and int(entry) < len(names):
        return int(entry)
    near = difflib.get_close_matches(entry.lower(), by_name, n=1)
    shown = ", ".join(f"{i} {name}" for i, name in enumerate(names[:50])) + (", ..." if len(names) > 50 else "")
    raise UserError(f"{where}unknown label {entry!r}" + (f" (perhaps {near[0]!r})" if near else "") +
                    f"; choose from: {shown}")


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """Returns the prompts without surrounding blanks. Raises UserError for none at all, an empty one, or one that is no
    text."""
    prompts = [prompt.strip() for prompt in prompts]
    if not prompts or not all(prompts):
        raise UserError("empty prompt: say what to draw, for example --prompt \"red apple\"")
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UserError(f"prompt {prompt!a} is not UTF-8 text") from None
    return prompts
