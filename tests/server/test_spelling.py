"""Tokens in bytes: joined they are the text, whatever the kind of the tokenizer."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from edgelab.deployments.hybrid.server.replies import Reply, Written
from edgelab.deployments.hybrid.server.spelling import Spelling
from edgelab.deployments.hybrid.server.writing import TextSoFar, Token
from edgelab.reference import load_tokenizer, resolve

TEXTS = ["a b", "The gulls; é, ±, 鷗 and 🙂🙃!", " leading", "鷗", "tab\tand\nline", "a<s>b"]
LETTERS = "abdeghlnstuT"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece(*decoding, prefix):
    """Letters, their words behind a space, and bytes for all other characters."""
    tokens = ["<unk>", "<s>", *BYTES, "▁", *LETTERS, "▁a", "▁b"]
    vocab = {token: number for number, token in enumerate(tokens)}
    made = Tokenizer(
        models.BPE(vocab, [("▁", "a"), ("▁", "b")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    steps = [normalizers.Prepend("▁")] if prefix else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(list(decoding))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")


KINDS = {
    "Llama 2": lambda: sentencepiece(
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
        prefix=True,
    ),
    "Gemma": lambda: sentencepiece(
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), prefix=False
    ),
    "Metaspace": lambda: sentencepiece(decoders.ByteFallback(), decoders.Metaspace(), prefix=True),
}  # fmt: skip


@pytest.fixture(params=["bytes", *KINDS])
def tokenizer(request, byte_tokenizer):
    return byte_tokenizer if request.param == "bytes" else KINDS[request.param]()


def written(tokenizer, ids):
    """An answer of these tokens, each its own only alternative."""
    text, whole, begins = TextSoFar(tokenizer, []), Written(finish="length"), True
    for token in ids:
        added = text.add(token)
        whole += Written(added, [Token(token, -1.0, ((token, -1.0),))], [text.offset], [begins])
        begins = begins and token in tokenizer.all_special_ids
    whole += Written(text.rest())
    return whole


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_a_chat_are_its_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = written(tokenizer, ids)
    told = Reply(Spelling(tokenizer), "tiny", True).chat(whole).choices[0]
    content = told.logprobs.content
    assert b"".join(bytes(one.bytes or []) for one in content).decode() == told.message.content
    assert told.message.content == tokenizer.decode(ids, skip_special_tokens=True)
    assert [one.top_logprobs[0].bytes for one in content] == [one.bytes for one in content]
    assert [one.bytes is None for one in content] == [one.id == tokenizer.bos_token_id for one in content]


def test_parts_of_a_character_have_names_of_their_own(tokenizer):
    spelling = Spelling(tokenizer)
    ids = tokenizer("🙂", add_special_tokens=False)["input_ids"][-4:]
    assert [spelling.bytes_of(token) for token in ids] == [b"\xf0", b"\x9f", b"\x99", b"\x82"]
    told = Reply(spelling, "tiny", True).completion(written(tokenizer, ids)).choices[0]
    names = [rf"bytes:\x{byte:02x}" for byte in "🙂".encode()]
    assert told.logprobs.tokens == names
    assert told.logprobs.top_logprobs == [{name: -1.0} for name in names]
    assert told.text == "🙂"


def test_a_space_belongs_to_its_token():
    tokenizer = KINDS["Llama 2"]()
    spelling = Spelling(tokenizer)
    token = tokenizer.convert_tokens_to_ids("▁a")
    assert (spelling.name(token), spelling.name(token, begins=True)) == (" a", "a")
    assert spelling.name(tokenizer.convert_tokens_to_ids("<s>")) == "<s>"


def test_what_no_decoder_tells_is_unknown():
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "sh": 1, "##ips": 2}, unk_token="[UNK]"))
    made.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    told = Reply(Spelling(tokenizer), "tiny", True).chat(written(tokenizer, [1, 2])).choices[0]
    assert [one.bytes for one in told.logprobs.content] == [None, None]
    assert told.logprobs.content[0].token == "sh"
    made.decoder = None
    assert Spelling(PreTrainedTokenizerFast(tokenizer_object=made)).bytes_of(1) is None


def test_a_row_of_the_head_without_a_token_has_no_bytes(byte_tokenizer):
    assert Spelling(byte_tokenizer).bytes_of(len(byte_tokenizer) + 3) is None
    assert Spelling(byte_tokenizer).name(len(byte_tokenizer) + 3) == ""


@pytest.mark.embedded
@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_the_embedded_tokenizer(text):
    tokenizer = load_tokenizer(resolve())
    spelling = Spelling(tokenizer)
    assert b"".join(map(spelling.bytes_of, tokenizer(text.replace("<s>", ""))["input_ids"])).decode() == (
        text.replace("<s>", "")
    )
