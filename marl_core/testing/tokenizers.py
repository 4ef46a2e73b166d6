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
    special_ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in dict.fromkeys([*before, *after])]
    single = " ".join([*before, "$A", *after])
    template = processors.TemplateProcessing(single=single, special_tokens=special_ids)
    inner = tokenizer.backend_tokenizer
    inner.post_processor = (
        template if inner.post_processor is None else processors.Sequence([inner.post_processor, template])
    )
    return tokenizer


def metaspace(scheme: str = "first", **options: Any) -> Any:
    """Unigram over sentencepiece's words, as T5, Gemma and XLM-R have it."""
    pieces = [*SPECIAL, *("▁" + word for word in WORDS), *LETTERS, "▁"]
    backend = Tokenizer(
        models.Unigram([(piece, -1.0 if index > 3 else -10.0) for index, piece in enumerate(pieces)], unk_id=3)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return _wrapped(backend, **options)


def byte_fallback() -> Any:
    """BPE with a byte for what it has no piece for, and the decoder of Llama 2 and Mistral."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for end in range(1, len(word) + 1):
            merged = "▁" + word[:end]
            if merged not in vocabulary:
                vocabulary[merged] = len(vocabulary)
                merges.append(("▁" + word[: end - 1], word[end - 1]))
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return framed(_wrapped(backend), ["<bos>"])


def wordpiece() -> Any:
    """BERT's: words, their endings, and a decoder that closes up the space before punctuation."""
    pieces = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS, *LETTERS, *("##" + letter for letter in LETTERS)]
    backend = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        clean_up_tokenization_spaces=True,
    )
    return framed(tokenizer, ["[CLS]"], ["[SEP]"])


def byte_level(**options: Any) -> Any:
    """GPT-2's: every byte a token; nothing is lost in decoding."""
    tokenizer = tiny_tokenizer()
    for name, value in options.items():
        setattr(tokenizer, name, value)
    return tokenizer


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


def _wrapped(backend: Tokenizer, **options: Any) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", **options},
    )
