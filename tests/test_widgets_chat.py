"""Streaming text and the chat box: characters of several bytes come whole, the answer ends, the rate is shown."""

import pytest

from edgelab.recipes import Context, parse
from edgelab.runtimes import load
from edgelab.runtimes.streaming import conversation_ids, stream
from edgelab.storage import variants
from edgelab.widgets.chat import chat_box, conversation_html, rate_text

HELLO = [{"role": "user", "content": "Hello"}]


class Scripted:
    """A runtime that says the given tokens, whatever it is asked."""

    vocabulary = 300

    def __init__(self, tokens):
        self.tokens = iter(tokens)

    def prefill(self, ids):
        self.asked = ids
        return next(self.tokens)

    def decode(self, token):
        return next(self.tokens)


def test_a_character_of_three_bytes_appears_when_it_is_whole(byte_tokenizer):
    ids = byte_tokenizer("a€")["input_ids"]
    assert len(ids) == 4
    pieces = list(stream(Scripted([*ids, byte_tokenizer.eos_token_id]), byte_tokenizer, HELLO))
    assert [piece.text for piece in pieces] == ["a", "", "", "€"]
    assert [piece.tokens for piece in pieces] == [1, 2, 3, 4]
    assert pieces[0].tok_s is None and all(piece.tok_s > 0 for piece in pieces[1:])


def test_an_answer_ends_at_its_limit_and_asks_for_no_token_more(byte_tokenizer):
    (letter,) = byte_tokenizer("x")["input_ids"]
    pieces = list(stream(Scripted([letter] * 3), byte_tokenizer, HELLO, limit=3))
    assert "".join(piece.text for piece in pieces) == "xxx"


def test_a_chat_template_is_used_where_there_is_one(byte_tokenizer, monkeypatch):
    assert byte_tokenizer.decode(conversation_ids(byte_tokenizer, HELLO)) == "Hello\n"
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[model]"
    monkeypatch.setattr(byte_tokenizer, "chat_template", template)
    assert byte_tokenizer.decode(conversation_ids(byte_tokenizer, HELLO)) == "[user]Hello[model]"


def test_the_box_answers_as_the_runtime_does_and_starts_anew_with_another_recipe(tiny, tiny_reference):
    box = chat_box(["none", "quantize.rtn:bits=8,group_size=0"], model=str(tiny))
    recipe, talk, line, (send, rate) = (*box.children[:3], box.children[3].children)
    line.value = "Hello <b>"
    send.click()
    assert "Hello &lt;b&gt;" in talk.value and "tokens/s · float32 linear" in rate.value
    assert not send.disabled and line.value == ""
    recipe.value = "quantize.rtn:bits=8,group_size=0"
    assert talk.value == rate.value == ""
    line.value = "Hello"
    send.click()
    assert "int8" in rate.value


def test_what_cannot_run_is_said_and_the_box_stays_usable(tiny):
    box = chat_box(["native.int8 @ torch", "none"], model=str(tiny))
    _, talk, line, (send, rate) = (*box.children[:3], box.children[3].children)
    line.value = "Hello"
    send.click()
    assert "rounded by an engine itself" in rate.value and not send.disabled and talk.value == ""


def test_texts_of_the_box():
    assert rate_text("int4", 1, None) == "1 tokens · int4"
    assert rate_text("int4", 5, 12.34) == "5 tokens, 12.3 tokens/s · int4"
    assert conversation_html([{"role": "assistant", "content": "a\nb"}]) == "<p><b>Model</b><br>a<br>b</p>"


@pytest.mark.parametrize("recipe", ["none", "quantize.rtn:bits=4,group_size=32"])
def test_streamed_tokens_are_the_greedy_ones(tiny_reference, byte_tokenizer, tmp_path, recipe):
    model = tiny_reference.model
    for technique in parse(recipe).techniques:
        model = technique.apply(model, Context())
    variants.save(model, tmp_path / "variant", {"recipe": recipe})
    runtime = load("torch", tmp_path / "variant")
    ids = conversation_ids(byte_tokenizer, HELLO)
    expected = [runtime.prefill(ids)]
    while len(expected) < 5:
        expected.append(runtime.decode(expected[-1]))
    pieces = list(stream(runtime, byte_tokenizer, HELLO, limit=5))
    if byte_tokenizer.eos_token_id not in expected:
        assert "".join(p.text for p in pieces) == byte_tokenizer.decode(expected, skip_special_tokens=True)
    assert len(pieces) <= 5
