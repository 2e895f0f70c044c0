"""Tokens and labels, against the published WordPiece and BPE examples."""

import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from latent_diffusion import conditions
from latent_diffusion.errors import UserError

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", "cafe", "red", "apple", ":", "flag")


@pytest.fixture
def vocabulary():
    return conditions.Vocabulary(WORDS)


def test_the_example_of_berts_tokenizer(vocabulary):
    # google-research/bert, tokenization.py, WordpieceTokenizer: "unaffable" -> ["un", "##aff", "##able"]
    np.testing.assert_array_equal(vocabulary.encode(["unaffable"], 6), [[2, 4, 5, 6, 3, 0]])


def test_case_accents_punctuation_and_unknown_words(vocabulary):
    tokens = vocabulary.encode(["Flag:  CAFÉ", "red zebra", ""], 6)
    np.testing.assert_array_equal(tokens, [[2, 11, 10, 7, 3, 0], [2, 8, 1, 3, 0, 0], [2, 3, 0, 0, 0, 0]])
    assert tokens.dtype == np.int32


def test_what_does_not_fit_is_cut_before_the_separator(vocabulary):
    np.testing.assert_array_equal(vocabulary.encode(["red apple red apple"], 4), [[2, 8, 9, 3]])
    np.testing.assert_array_equal(vocabulary.null(3), [[2, 3, 0]])
    with pytest.raises(UserError, match="max_length=1"):
        vocabulary.encode(["red"], 1)


def test_words_of_special_tokens_in_a_caption_are_not_special(vocabulary):
    assert conditions.CLS not in [WORDS[i] for i in vocabulary.encode(["[CLS]"], 6)[0, 1:]]


def test_saving_and_loading(vocabulary, tmp_path):
    vocabulary.save(tmp_path / "new")
    assert (tmp_path / "new" / "vocab.txt").read_text().splitlines() == list(WORDS)
    assert conditions.load_vocabulary(tmp_path / "new" / "vocab.txt") == vocabulary
    assert conditions.saved_tokenizer(tmp_path / "new", "bert") == vocabulary
    assert conditions.saved_tokenizer(tmp_path, "bert") is None
    assert pickle.loads(pickle.dumps(vocabulary)) == vocabulary
    with pytest.raises(UserError, match="no vocabulary at"):
        conditions.load_vocabulary(tmp_path / "none.txt")
    (tmp_path / "other.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"lacks \[PAD\]"):
        conditions.load_vocabulary(tmp_path / "other.txt")


def test_training_joins_pairs_as_published():
    # Sennrich et al. 2016, section 3.2 / Jurafsky and Martin 2.4.3: low 5, lowest 2, newer 6, wider 3, new 2; the first
    # joins are "er" (9 times), then "ne" and "new" (8), then "lo", "low" (7), "newer" (6). Their end-of-word
    # sign has its counterpart in WordPiece's sign for "not the first".
    counts = {"low": 5, "lowest": 2, "newer": 6, "wider": 3, "new": 2}
    captions = [word for word, count in counts.items() for _ in range(count)]
    letters = len(set("".join(counts))) * 2 + len(conditions.SPECIAL_TOKENS)
    vocabulary = conditions.train_vocabulary(captions, letters + 6)
    joined = vocabulary.tokens[letters:]
    assert joined[0] == "##er"
    assert set(joined[1:3]) <= {"ne", "##ew", "new"} and "new" in joined[:3]
    assert set(joined[3:5]) <= {"lo", "##ow", "low"} and "low" in joined[:5]
    assert joined[5] == "newer"


def test_training_gives_the_same_in_every_process_and_order():
    captions = [f"{a} {b}" for a in ("grinning", "smiling", "crying") for b in ("face", "cat", "flags", "face flags")]
    script = (
        "from latent_diffusion import conditions;"
        f"print('|'.join(conditions.train_vocabulary({captions[::-1]!r}, 60).tokens))"
    )
    root = str(pathlib.Path(conditions.__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": root, "PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert other.stdout.strip().split("|") == list(conditions.train_vocabulary(captions, 60).tokens)


def test_words_become_whole_where_the_size_allows():
    words = ["giraffe", "swan", "cockroach"]
    assert set(words) <= set(conditions.train_vocabulary(words, 1000).tokens)


def test_words_never_seen_are_spelt():
    vocabulary = conditions.train_vocabulary(["ab ba", "abba abba"], 50)
    assert vocabulary.ids[conditions.UNK] not in vocabulary.encode(["baab bbb aaab"], 30)


def test_training_errors():
    with pytest.raises(UserError, match="no captions"):
        conditions.train_vocabulary(["", " "], 100)
    with pytest.raises(UserError, match="vocab_size=5 is less than the 10"):
        conditions.train_vocabulary(["abc"], 5)


def test_labels_by_number_or_name():
    names = ("animals-and-nature", "Food-and-drink", "flags")
    np.testing.assert_array_equal(conditions.parse_labels("2, food-and-drink,0", names), [2, 1, 0])
    for wrong in ("3", "-1", "cars", "", "1,,2"):
        with pytest.raises(UserError, match="choose from: 0 animals-and-nature, 1 Food-and-drink, 2 flags"):
            conditions.parse_labels(wrong, names)
    # MNIST: the names are the numbers; shifted names win over numbers
    np.testing.assert_array_equal(conditions.parse_labels("1", ("1", "2")), [0])


def test_label_names_are_saved(tmp_path):
    names = ("a, b", "c\nd", "é")
    conditions.save_labels(tmp_path / "new" / "labels.json", names)
    assert conditions.load_labels(tmp_path / "new" / "labels.json") == names
    with pytest.raises(UserError, match="no class names"):
        conditions.load_labels(tmp_path / "none.json")


def test_empty_prompts_are_refused():
    assert conditions.check_prompts([" red apple "]) == ["red apple"]
    for prompts in ([], [""], ["red", "  "]):
        with pytest.raises(UserError, match="empty prompt"):
            conditions.check_prompts(prompts)


def test_captions_that_are_too_long_are_named():
    vocabulary = conditions.train_vocabulary(["red apple", "a b"], 100)
    assert vocabulary.too_long(["red apple", "red red apple"], 4) == ["red red apple"]
    assert vocabulary.too_long([], 4) == []
