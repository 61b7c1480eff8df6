"""Each protocol against an independent, deliberately naive computation; slices; bits per byte; bad input."""

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from edgelab import corpora, reference
from edgelab.corpora import CorpusError, TokenizedText, tokenize_text
from edgelab.measure.isolation import Isolated
from edgelab.measure.perplexity import Perplexity, Window, evaluate, slices, windows
from edgelab.measure.protocols import PROTOCOLS, ProtocolError, protocol
from edgelab.model.logits import SLICE

IDENTITY = {
    "edgelab-512": (512, "all"),
    "gptq-2048": (2048, "all"),
    "llamacpp-512": (512, "half"),
    "lm-eval-word": (2048, "rolling"),
}


def log_probabilities(model, ids: list[int]) -> Tensor:
    """(time, vocabulary) float64, from the model's own float32 logits of all positions at once."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids]), use_cache=False).logits[0].double(), -1)


def naive_all(model, ids: list[int], size: int, bos: int) -> tuple[float, int]:
    """GPTQ's loop: windows side by side, every token of a window predicted from those before it in the window."""
    total, count = 0.0, 0
    for window in range(len(ids) // size):
        part = ids[window * size : (window + 1) * size]
        logp = log_probabilities(model, part)
        for position in range(size - 1):
            total -= logp[position, part[position + 1]].item()
            count += 1
    return total, count


def naive_half(model, ids: list[int], size: int, bos: int | None) -> tuple[float, int]:
    """llama.cpp's loop: BOS, if any, replaces the first token; only what follows the middle of the window counts."""
    total, count = 0.0, 0
    for window in range(len(ids) // size):
        part = ids[window * size : (window + 1) * size]
        logp = log_probabilities(model, part if bos is None else [bos, *part[1:]])
        for position in range(size // 2, size - 1):
            total -= logp[position, part[position + 1]].item()
            count += 1
    return total, count


def rolling_windows(tokens: list[int], prefix: int, size: int) -> Iterator[tuple[list[int], list[int]]]:
    """lm-eval's get_rolling_token_windows with a context of one, followed by its make_disjoint_window."""
    first = min(size, len(tokens))
    yield [prefix], tokens[:first]
    predicted = first
    while predicted < len(tokens):
        more = min(len(tokens) - predicted, size)
        end = predicted + more
        context = tokens[end - size - 1 : end - 1]
        yield context[: len(context) - (more - 1)], tokens[end - more : end]
        predicted += more


def naive_rolling(model, ids: list[int], size: int, bos: int) -> tuple[float, int]:
    total, count = 0.0, 0
    for context, continuation in rolling_windows(ids, bos, size):
        logp = log_probabilities(model, (context + continuation)[:-1])[-len(continuation) :]
        total -= sum(logp[position, token].item() for position, token in enumerate(continuation))
        count += len(continuation)
    return total, count


NAIVE = {"all": naive_all, "half": naive_half, "rolling": naive_rolling}


def head_of(text: TokenizedText, tokens: int) -> TokenizedText:
    return TokenizedText(text.name, text.characters(0, tokens), text.ids[:tokens], text.ends[:tokens])


@pytest.mark.parametrize("size", [None, 32, 33, SLICE + 1, 3 * SLICE + 7])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocol_equals_the_naive_loop(name, size, tiny_reference, story):
    one = PROTOCOLS[name]
    assert (one.window, one.scored) == IDENTITY[name]
    one = replace(one, window=size or one.window)
    text = head_of(story, 2 * one.window + one.window // 3)  # the rest is no window, except for lm-eval
    found = evaluate(tiny_reference.model, tiny_reference.tokenizer, text, one)
    bos = 0 if one.bos == "always" else None  # this tokenizer adds none itself
    total, count = NAIVE[one.scored](tiny_reference.model, text.ids.tolist(), one.window, bos)
    assert found.n_tokens == count
    assert found.nll_sum == pytest.approx(total, rel=1e-6)
    divisor = len(re.split(r"\s+", text.text)) if name == "lm-eval-word" else count
    assert found.ppl == pytest.approx(math.exp(total / divisor), rel=1e-4)


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 64, 65, 100])
def test_rolling_windows_score_every_token_once(tokens, tiny_reference, story):
    one = replace(PROTOCOLS["lm-eval-word"], window=32)
    text = head_of(story, tokens)
    cut = windows(text, one, tiny_reference.tokenizer)
    theirs = [
        (context + continuation, len(continuation))
        for context, continuation in rolling_windows(text.ids.tolist(), 0, 32)
    ]
    assert [(window.ids.tolist(), window.scored) for window in cut] == theirs
    covered = [token for window in cut for token in range(window.first, window.first + window.scored)]
    assert covered == list(range(tokens))


def test_windows_by_hand(tiny_reference):
    text = TokenizedText("text", "abcdefghijk", torch.arange(10, 21), torch.arange(1, 12))
    every = windows(text, replace(PROTOCOLS["edgelab-512"], window=5), tiny_reference.tokenizer)
    assert [(w.ids.tolist(), w.first, w.scored) for w in every] == [
        ([10, 11, 12, 13, 14], 1, 4),
        ([15, 16, 17, 18, 19], 6, 4),
    ]
    half = windows(text, replace(PROTOCOLS["llamacpp-512"], window=6), tiny_reference.tokenizer)
    assert [(w.ids.tolist(), w.first, w.scored) for w in half] == [([10, 11, 12, 13, 14, 15], 4, 2)]
    adding = windows(text, replace(PROTOCOLS["llamacpp-512"], window=6), adding_bos(tiny_reference.tokenizer))
    assert [(w.ids.tolist(), w.first, w.scored) for w in adding] == [([0, 11, 12, 13, 14, 15], 4, 2)]
    assert (
        len(windows(text, replace(PROTOCOLS["edgelab-512"], window=2), tiny_reference.tokenizer, limit=3))
        == 3
    )


def test_limit_takes_the_first_windows(tiny_reference, story):
    one = replace(PROTOCOLS["edgelab-512"], window=40)
    whole = evaluate(tiny_reference.model, tiny_reference.tokenizer, head_of(story, 400), one)
    part = evaluate(tiny_reference.model, tiny_reference.tokenizer, head_of(story, 400), one, limit=3)
    assert part.nll_per_window == whole.nll_per_window[:3]
    assert len(whole.nll_per_window) == 10


@pytest.mark.parametrize("name", ["edgelab-512", "llamacpp-512", "gptq-2048"])
def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(
    name, new_model, tiny_reference, story
):
    model = new_model("stablelm")
    model.lm_head.weight.data.zero_()
    found = evaluate(model, tiny_reference.tokenizer, story, replace(PROTOCOLS[name], window=48), limit=4)
    assert found.ppl == pytest.approx(300, rel=1e-6)
    assert found.nll_sum == pytest.approx(found.n_tokens * math.log(300), rel=1e-6)


def test_arithmetic_of_the_result_by_hand():
    found = Perplexity([8 * math.log(2), 4 * math.log(2)], [4, 2], n_words=3, n_bytes=24)
    assert (found.n_tokens, found.nll_sum) == (6, 12 * math.log(2))
    assert found.ppl == pytest.approx(4)
    assert found.bits_per_byte == pytest.approx(0.5)
    assert replace(found, unit="word").ppl == pytest.approx(16)
    assert Perplexity([1e6], [1]).ppl == math.inf


@pytest.mark.parametrize("name", PROTOCOLS)
def test_bits_per_byte_counts_the_bytes_of_the_scored_tokens(name, tiny_reference, story):
    one = replace(PROTOCOLS[name], window=64)
    found = evaluate(tiny_reference.model, tiny_reference.tokenizer, story, one, limit=5)
    ids, n_bytes = story.ids.tolist(), 0
    for window in windows(story, one, tiny_reference.tokenizer, 5):
        # The bytes behind a token of a byte-level tokenizer: as many as its piece has characters.
        scored = ids[window.first : window.first + window.scored]
        n_bytes += sum(len(piece) for piece in tiny_reference.tokenizer.convert_ids_to_tokens(scored))
    assert found.bits_per_byte == pytest.approx(
        found.nll_sum / math.log(2) / n_bytes, rel=0.01
    )  # split characters
    if name == "lm-eval-word":
        assert found.n_bytes == len(story.characters(0, 5 * 64).encode())
        assert found.n_words == len(re.split(r"\s+", story.characters(0, 5 * 64)))


def test_slices_equal_the_logits_of_the_whole(layout, folder_of, story):
    model = reference.load(str(folder_of(layout))).model
    one = replace(PROTOCOLS["llamacpp-512"], window=3 * SLICE)
    cut = windows(story, one, reference.load(str(folder_of(layout))).tokenizer, 2)
    pieces = list(slices(model, cut))
    assert max(len(piece.targets) for piece in pieces) == SLICE
    for index, window in enumerate(cut):
        mine = [piece for piece in pieces if piece.window == index]
        with torch.no_grad():
            answer = model(window.ids[None], output_hidden_states=True)
        ours = torch.cat([piece.logits for piece in mine])
        torch.testing.assert_close(ours, answer.logits[0, -window.scored - 1 : -1], rtol=1e-4, atol=1e-4)
        hidden = torch.cat([piece.hidden for piece in mine])
        torch.testing.assert_close(
            hidden, answer.hidden_states[-1][0, -window.scored - 1 : -1], rtol=1e-4, atol=1e-4
        )
        assert torch.equal(torch.cat([piece.targets for piece in mine]), window.ids[-window.scored :])
        assert ours.dtype == torch.float32


def test_further_accumulators_see_every_slice(tiny_reference, story):
    seen = []
    one = replace(PROTOCOLS["edgelab-512"], window=100)
    evaluate(
        tiny_reference.model,
        tiny_reference.tokenizer,
        story,
        one,
        2,
        track=[SimpleNamespace(add=seen.append)],
    )
    assert [(piece.window, len(piece.targets)) for piece in seen] == [(0, 64), (0, 35), (1, 64), (1, 35)]


def test_sixteen_bit_models_give_float32_logits(folder_of, story):
    half = reference.load(str(folder_of("llama")), torch.bfloat16)
    whole = reference.load(str(folder_of("llama")))
    one = replace(PROTOCOLS["edgelab-512"], window=64)
    [piece] = slices(half.model, windows(story, one, half.tokenizer, 1))
    assert piece.logits.dtype == torch.float32
    perplexities = [evaluate(r.model, r.tokenizer, story, one, 8).ppl for r in (half, whole)]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=0.02)


def test_no_gradients_are_kept(tiny_reference, story):
    one = replace(PROTOCOLS["edgelab-512"], window=64)
    [piece] = slices(tiny_reference.model, windows(story, one, tiny_reference.tokenizer, 1))
    assert not piece.logits.requires_grad and not piece.hidden.requires_grad


def test_text_shorter_than_a_window(tiny_reference, story):
    text = head_of(story, 511)
    with pytest.raises(
        CorpusError, match=r"'story' has 511 tokens, fewer than one window of edgelab-512 \(512\)"
    ):
        evaluate(tiny_reference.model, tiny_reference.tokenizer, text)
    found = evaluate(tiny_reference.model, tiny_reference.tokenizer, text, PROTOCOLS["lm-eval-word"])
    assert found.n_tokens == 511


@pytest.mark.parametrize("name", PROTOCOLS)
def test_empty_text(name, tiny_reference):
    with pytest.raises(CorpusError):
        evaluate(
            tiny_reference.model,
            tiny_reference.tokenizer,
            tokenize_text("", tiny_reference.tokenizer),
            PROTOCOLS[name],
        )


def test_eos_stands_in_for_a_missing_bos(story):
    one = replace(PROTOCOLS["lm-eval-word"], window=16)
    assert windows(story, one, SimpleNamespace(bos_token_id=None, eos_token_id=1), 1)[0].ids[0] == 1
    with pytest.raises(ProtocolError, match=r"^lm-eval-word needs a BOS token, .*use edgelab-512\.$"):
        windows(story, one, SimpleNamespace(bos_token_id=None, eos_token_id=None))


def adding_bos(tokenizer):
    """The same tokenizer with a template that puts BOS first, as Llama's has."""
    adding = copy.deepcopy(tokenizer)
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", adding.bos_token_id)]
    )
    return adding


@pytest.mark.parametrize("adds", [True, False])
def test_llamacpp_puts_bos_where_the_tokenizer_does(adds, new_model, byte_tokenizer, story):
    """A model that attends strongly to BOS: with it and without, perplexity differs, and both are the naive loop's."""
    tokenizer = adding_bos(byte_tokenizer) if adds else byte_tokenizer
    model = new_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] *= 30
    one = replace(PROTOCOLS["llamacpp-512"], window=64)
    text = head_of(story, 256)
    with_bos, without = (naive_half(model, text.ids.tolist(), 64, bos)[0] for bos in (0, None))
    assert abs(with_bos - without) > 0.01 * without
    found = evaluate(model, tokenizer, text, one).nll_sum
    assert found == pytest.approx(with_bos if adds else without, rel=1e-6)


def test_unknown_protocol():
    assert protocol("gptq-2048") is PROTOCOLS["gptq-2048"]
    with pytest.raises(
        ProtocolError, match="no protocol 'gptq'; use one of edgelab-512, gptq-2048, llamacpp-512"
    ):
        protocol("gptq")


SUBJECT = """
import torch
from edgelab import reference
from edgelab.corpora import TokenizedText
from edgelab.measure.memory import peak_rss_mb
from edgelab.measure.perplexity import evaluate

class Keeper(list):
    add = list.append

class Subject:
    def __init__(self, folder):
        self.reference = reference.load(folder)
        ids = torch.randint(2, 300, (100 * 512,), generator=torch.Generator().manual_seed(0))
        self.text = TokenizedText("noise", "x" * len(ids), ids, torch.arange(1, len(ids) + 1))

    def peak(self, windows, keep=False):
        track = [Keeper()] if keep else []
        evaluate(self.reference.model, self.reference.tokenizer, self.text, limit=windows, track=track)
        return peak_rss_mb()
"""


def test_peak_memory_does_not_grow_with_the_number_of_windows(tiny, tmp_path, monkeypatch):
    """Logits of 100 windows take 61 MB and hidden states 13 MB: neither may be there at the end, nor gradients."""
    (tmp_path / "subject_of_memory.py").write_text(SUBJECT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Isolated("subject_of_memory:Subject", threads=1, timeout_s=120, folder=str(tiny)) as process:
        few = process.call("peak", windows=4)
        many = process.call("peak", windows=100)
        kept = process.call("peak", windows=100, keep=True)
    assert many - few < 6
    assert kept - many > 50  # the measurement would notice


@pytest.fixture(scope="module")
def embedded():
    return reference.load()


@pytest.fixture(scope="module")
def wiki(embedded):
    """The first 15,000 characters of the evaluation text."""
    return tokenize_text("".join(corpora.load("wiki")["text"])[:15_000], embedded.tokenizer, "wiki")


@pytest.mark.embedded
def test_embedded_baseline_equals_a_plain_loop(embedded, wiki):
    found = evaluate(embedded.model, embedded.tokenizer, wiki, limit=2)
    total = 0.0
    for begin in (0, 512):
        ids = wiki.ids[None, begin : begin + 512]
        with torch.no_grad():
            total += embedded.model(ids, labels=ids).loss.double().item() * 511
    assert found.n_tokens == 1022
    assert found.nll_sum == pytest.approx(total, rel=1e-5)
    assert found.ppl == pytest.approx(math.exp(total / 1022), rel=1e-5)


@pytest.mark.embedded
def test_embedded_gptq_protocol_equals_a_plain_loop(embedded, wiki):
    found = evaluate(embedded.model, embedded.tokenizer, wiki, PROTOCOLS["gptq-2048"], limit=1)
    ids = wiki.ids[None, :2048]
    with torch.no_grad():
        logits = embedded.model(ids).logits
    loss = torch.nn.CrossEntropyLoss()(logits[0, :-1].float(), ids[0, 1:])
    assert found.ppl == pytest.approx(math.exp(loss.item()), rel=1e-3)


def test_who_stops_in_the_middle_still_has_gradients(new_model):
    model, ids = new_model("llama"), torch.arange(2, 200)
    pieces = slices(model, [Window(ids, 0, len(ids) - 1)])
    next(pieces)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert model(ids[None]).logits.requires_grad
