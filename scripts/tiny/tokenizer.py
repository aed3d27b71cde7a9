"""The tiny model's tokenizer, learned from the words of its captions."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from scripts.tiny import data as tiny_data


def train_tokenizer(vocabulary: int) -> Tokenizer:
    """A byte-level BPE of Qwen's form. Its merges come from single words, so that no token spans
    two attributes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    english = {w for n in range(3000) for w in _english_words(np.random.default_rng([7, n]))}
    corpus = ["user\n", "assistant\n"] * 100 + sorted(english) * 50 + list(tiny_data.WORDS_ZH) * 50
    corpus += (
        list(tiny_data.GLYPHS) * 50 + [f" {w}" for w in ("left", "right", "top", "bottom")] * 50
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=10,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    return tokenizer


def _english_words(rng: np.random.Generator) -> Iterator[str]:
    scene = (
        replace(tiny_data.random_scene(rng), text="A")
        if rng.random() < 0.3
        else tiny_data.random_scene(rng)
    )
    if scene.kind == "text" and len(scene.text) > 1:
        return
    text = tiny_data.caption(scene, "en", rng)
    for i, word in enumerate(text.split(" ")):
        yield word if i == 0 else " " + word
        yield " " + word
