"""What every tokenizer does with its pieces: a start and an end around them, padding, and a most number of tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from latent_diffusion.errors import UserError


def pieces(tokenizer: Any, captions: Sequence[str]) -> list[list[int]]:
    """The ids of the captions' pieces, by a tokenizer of the library `tokenizers`, without start and end."""
    encodings = tokenizer.encode_batch([str(caption) for caption in captions], add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def framed(
    rows: Sequence[Sequence[int]], max_length: int, ids: Mapping[str, int], start: str, end: str, padding: str
) -> Int[np.ndarray, "n max_length"]:
    """int32 (N, max_length): start, pieces, end, padding...; what does not fit is cut before the end."""
    if max_length < 2:
        raise UserError(f"conditioning.text.max_length={max_length}: at least 2 are needed for {start} and {end}")
    out = np.full((len(rows), max_length), ids[padding], np.int32)
    for tokens, row in zip(out, rows, strict=True):
        whole = [ids[start], *row[: max_length - 2], ids[end]]
        tokens[: len(whole)] = whole
    return out


def too_long(captions: Sequence[str], rows: Sequence[Sequence[int]], max_length: int) -> list[str]:
    """The captions whose pieces, `rows`, `framed` cuts."""
    return [caption for caption, row in zip(captions, rows, strict=True) if len(row) > max_length - 2]
