"""Tokenizers of the two kinds that GGUF files hold, learned from texts."""

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as splits

from edgelab.gguf_files.tokenizer_kinds import SPACE

SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level(texts: Iterable[str], rows: int, steps: Sequence[Any] = (), by_gpt2: bool = True) -> Tokenizer:
    """A byte-level BPE of so many tokens. steps: how texts are split first; by_gpt2: then by GPT-2's pattern."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = splits.Sequence(
        [*steps, splits.ByteLevel(add_prefix_space=False, use_regex=by_gpt2)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=rows,
        special_tokens=SPECIAL,
        initial_alphabet=splits.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def learned_pieces(texts: Iterable[str], count: int, letters: int) -> list[str]:
    """Frequent characters, `letters` of them, and words and parts of words, in the order in which they were learned."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = splits.Metaspace(prepend_scheme="always")
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=count, limit_alphabet=letters, show_progress=False)
    )
    numbers = backend.get_vocab()
    return sorted(numbers, key=numbers.__getitem__)


def sentencepiece(pieces: Sequence[str]) -> Tokenizer:
    """A BPE of SentencePiece's kind: bytes, and pieces, the earlier ones merged first.

    SentencePiece merges any two neighbours that are a token, so the merges are all pairs of pieces that make one.
    """
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(len(piece) - 1, 0, -1)
        if {piece[:cut], piece[cut:]} <= set(pieces)
    ]
    backend = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend
