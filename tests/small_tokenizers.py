"""Tokenizers of four kinds, trained on a few lines: as different as those of the models, made in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

from cotune.inference import Codec
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<|end|>", "<|user|>"]
END = 1
CORPUS = [
    "Let us think step by step. There are 12 birds, and 7 of them fly away, so 5 remain.",
    "reasoning: She has 1,250 marbles and gives away 40.\nanswer: 1210",
    "The answer is yes.\n\nanswer: yes\nthe answer: no\nanswer: maybe, maybe not.\n",
    "Iris-setosa, Iris-versicolor or Iris-virginica? The petals are 1.4 cm long; the sepals 5.1 cm.",
    "Naïve café visitors paid 3.50 euros. Ünter äöü! 日本語 も 少し。",
    '{"name": "Ada", "age": 36, "tags": ["a", "b"]}',
] * 4


def byte_level() -> Tokenizer:
    """GPT-2's kind: bytes, merges inside words, a space in front of a word is part of it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=480, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return made


def merging_lines() -> Tokenizer:
    """Llama 3's kind: a full stop and the line breaks behind it are one token; up to three digits are."""
    made = Tokenizer(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=520, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return made


def digit_splitting() -> Tokenizer:
    """Qwen's kind: byte-level, each digit a token."""
    made = byte_level()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return made


def dummy_prefix() -> Tokenizer:
    """Llama 2's kind: SentencePiece BPE that puts a space before every text, with bytes to fall back on."""
    learnt = Tokenizer(models.BPE())
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learnt.normalizer = spaces
    learnt.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Split("\n", "isolated")]
    )
    learnt.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=220, limit_alphabet=60))
    model = json.loads(learnt.to_str())["model"]
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    merges = [tuple(merge) for merge in model["merges"]]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    made.normalizer = spaces
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def unigram() -> Tokenizer:
    """T5's kind: SentencePiece Unigram, with a space before every text and nothing to fall back on."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    alphabet = sorted({c for line in CORPUS for c in line} - {" "} | set("0123456789-.,<>/[]#{}"))
    made.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(vocab_size=260, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=alphabet),
    )
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    made.__name__: made for made in (byte_level, merging_lines, digit_splitting, dummy_prefix, unigram)
}


@cache
def codec(kind: str) -> Codec:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](), unk_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[1]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [SPECIAL[2]]})
    return Codec(tokenizer, end_ids=[END])
