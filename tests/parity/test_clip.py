"""CLIP's text encoder and tokenizer against transformers', through the files that it writes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers  # noqa: E402

from latent_diffusion import clip_tokens, weights  # noqa: E402
from latent_diffusion.models.clip import CLIPTextTransformer  # noqa: E402

TEXTS = ["a photo of a cat", "  A  Photo\nof a CAT!! it's 12 o'clock, I'll say we've", "", "café crème, naïve",
         "苹果 яблоко 🍎🍏", "<|endoftext|> in a caption", "don't_stop-me now...", "x" * 60 + " " + "a b " * 20]


@pytest.mark.parametrize("kind", [transformers.CLIPTextModel, transformers.CLIPModel])
def test_text_encoder(kind, randomize, tmp_path):
    torch.manual_seed(0)
    text = dict(vocab_size=50, hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                max_position_embeddings=9, bos_token_id=48, eos_token_id=49, pad_token_id=49)
    vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8,
                  patch_size=4)
    config = transformers.CLIPTextConfig(**text) if kind is transformers.CLIPTextModel else transformers.CLIPConfig(
        text_config=text, vision_config=vision)
    theirs = randomize(kind(config), 3)
    for name, parameter in theirs.named_parameters():
        if parameter.ndim == 2:  # their standard deviations make a network that is almost linear
            parameter.data = parameter.data * (30 if "embedding" in name else 10)
    tokens = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = getattr(theirs, "text_model", theirs)(tokens).last_hidden_state.numpy()
    theirs.save_pretrained(tmp_path)

    ours = CLIPTextTransformer(vocab_size=50, max_length=9, width=32, layers=3, heads=4, head_dim=8)
    ids = jnp.asarray(tokens.numpy(), jnp.int32)
    shapes = jax.eval_shape(ours.init, jax.random.key(0), ids)["params"]
    params = weights.load_clip_text(tmp_path / "model.safetensors", shapes)
    actual = jax.jit(lambda params: ours.apply({"params": params}, ids))(params)
    assert np.abs(expected).max() > 1 and np.abs(expected[0, 1] - expected[0, 2]).max() > 0.3
    np.testing.assert_allclose(actual, expected, rtol=0, atol=5e-5)


def test_tokenizer(tmp_path):
    learned = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learned.normalizer = normalizers.Lowercase()
    learned.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    learned.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=700, end_of_word_suffix="</w>"))
    learned.model.save(str(tmp_path))  # vocab.json and merges.txt
    lines = (tmp_path / "merges.txt").read_text().split("\n")[1:-1]
    merges = [tuple(line.split(" ")) for line in lines]
    assert len(merges) > 50
    ours = clip_tokens.from_merges(merges)
    ours.save(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == ours.size == 512 + len(merges) + 2
    for length in (77, 12):
        expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=length)["input_ids"]
        np.testing.assert_array_equal(ours.encode(TEXTS, length), expected)
        longer = [text for text, ids in zip(TEXTS, theirs(TEXTS)["input_ids"], strict=True) if len(ids) > length]
        assert ours.too_long(TEXTS, length) == longer
    (short,) = ours.encode(["photo caption"], 6).tolist()
    assert [ours.tokens[i] for i in short[1:3]] == ["photo</w>", "caption</w>"]  # merges are used
