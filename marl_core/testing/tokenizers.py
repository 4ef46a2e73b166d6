"""Small tokenizers built in code, one of each family that people's models bring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from marl_core.testing.tiny import tiny_tokenizer

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
WORDS = ["the", "movie", "was", "great", "very", "hello", "it", "hi"]
LETTERS = [*"abcdefghijklmnopqrstuvwxyz", ".", ",", "!", "?"]


def framed(tokenizer: Any, before: Sequence[str] = (), after: Sequence[str] = ()) -> Any:
    """The tokenizer, putting these special tokens around every text."""
    named = [(token, tokenizer.convert_tokens_to_ids(token)) for token in dict.fromkeys([*before, *after])]
    single = " ".join([*before, "$A", *after])
    made = processors.TemplateProcessing(single=single, special_tokens=named)
    inner = tokenizer.backend_tokenizer
    inner.post_processor = made if inner.post_processor is None else processors.Sequence([inner.post_processor, made])
    return tokenizer


def metaspace(scheme: str = "first", **options: Any) -> Any:
    """Unigram over sentencepiece's words, as T5, Gemma and XLM-R have it."""
    pieces = [*SPECIAL, *("▁" + word for word in WORDS), *LETTERS, "▁"]
    made = Tokenizer(models.Unigram([(piece, -1.0 if at > 3 else -10.0) for at, piece in enumerate(pieces)], unk_id=3))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return _wrapped(made, **options)


def byte_fallback() -> Any:
    """BPE with a byte for what it has no piece for, and the decoder of Llama 2 and Mistral."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS]
    vocabulary = {piece: at for at, piece in enumerate(pieces)}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for end in range(1, len(word) + 1):
            merged = "▁" + word[:end]
            if merged not in vocabulary:
                vocabulary[merged] = len(vocabulary)
                merges.append(("▁" + word[: end - 1], word[end - 1]))
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return framed(_wrapped(made), ["<bos>"])


def wordpiece() -> Any:
    """BERT's: words, their endings, and a decoder that closes up the space before punctuation."""
    pieces = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS, *LETTERS, *("##" + letter for letter in LETTERS)]
    made = Tokenizer(models.WordPiece({piece: at for at, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=True)
    words = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        clean_up_tokenization_spaces=True,
    )
    return framed(words, ["[CLS]"], ["[SEP]"])


def byte_level(**options: Any) -> Any:
    """GPT-2's: every byte a token; nothing is lost in decoding."""
    words = tiny_tokenizer()
    for name, value in options.items():
        setattr(words, name, value)
    return words


FAMILIES: dict[str, Callable[[], Any]] = {
    "metaspace-first": lambda: metaspace("first"),
    "metaspace-always": lambda: metaspace("always"),
    "metaspace-never": lambda: metaspace("never"),
    "metaspace-bos": lambda: framed(metaspace("first"), ["<bos>"]),
    "byte-fallback": byte_fallback,
    "wordpiece": wordpiece,
    "byte-level": byte_level,
    "byte-level-bos": lambda: framed(byte_level(), ["<bos>"]),
}
"""A maker for each, by name."""


def _wrapped(made: Tokenizer, **options: Any) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        **{"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", **options},
    )
