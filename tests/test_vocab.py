"""A smaller vocabulary: merges and counts by hand, any text there and back, the same logits, and the road to a row."""

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from edgelab import corpora, lab, recipes, runtimes
from edgelab.measure.divergence import kl_divergence
from edgelab.measure.perplexity import PerplexitySum, Window, retokenized, slices, windows
from edgelab.measure.protocols import PROTOCOLS
from edgelab.recipes import Context, RecipeError, Record, parse, register
from edgelab.reference import load, load_model, load_tokenizer, resolve
from edgelab.storage import sizes, variants
from edgelab.storage.stages import address
from edgelab.techniques.pruning.vocab import made_on_the_way, times_made

SEEN = "the light of the lighthouse is the light of the night. It is a light, not a lighter.\n" * 4
OTHER = "On Monday the keeper saw three ships; on Tuesday none, «où vont-ils ?», and 21 € in a box.\n"
MERGES = [("g", "h"), ("i", "gh"), ("igh", "t"), ("l", "ight"), ("t", "h"), ("n", "ight")]
RANKS = {pair: rank for rank, pair in enumerate(MERGES)}


def test_what_is_made_on_the_way_by_hand():
    assert made_on_the_way("light", RANKS) == [*"light", "gh", "igh", "ight", "light"]
    assert made_on_the_way("lights", RANKS)[-1] == "light"  # and an s: nothing makes the whole
    assert made_on_the_way("x", RANKS) == ["x"]
    both = {("a", "b"): 0, ("b", "c"): 1, ("ab", "c"): 2, ("a", "bc"): 3}
    assert made_on_the_way("abc", both) == [*"abc", "ab", "abc"]


def test_how_often_each_is_made_by_hand():
    tokens = [*"ghinlt", "th", "night", "light", "ight", "igh", "gh", "nowhere"]
    vocab = {token: number for number, token in enumerate(tokens)}
    used = Counter({vocab["light"]: 3, vocab["ight"]: 1, vocab["night"]: 2, vocab["t"]: 5})
    made = times_made(vocab, RANKS, used)
    assert [made[one] for one in ("gh", "igh", "ight", "light", "night", "th", "t", "l", "n")] == [
        *(6, 6, 6, 3, 2, 0, 11, 3, 2)
    ]
    assert made["nowhere"] == -1
    order = list(made)
    assert order[0] == "t" and order[-2:] == ["th", "nowhere"]
    assert order.index("gh") < order.index("igh") < order.index("ight") < order.index("light")


# Tokenizers


def trained(template=False):
    """Byte-level BPE trained on a few sentences; `template` puts a BOS token before every text, as Llama's does."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([SEEN, OTHER * 2], trainer)
    backend.add_tokens(["<|user|>"])
    if template:
        backend.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing("<s> $0", special_tokens=[("<s>", 0)]),
            ]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template="{{ messages }}", **names)


def fallback():
    """What Gemma has: a BPE of characters and ▁ for a space, which spells what it does not know in 256 bytes."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=140, special_tokens=["<unk>", "<s>"], show_progress=False)
    backend.train_from_iterator([SEEN, OTHER], trainer)
    described = json.loads(backend.to_str())
    model = described["model"] | {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    model["vocab"] |= {f"<0x{byte:02X}>": len(model["vocab"]) + byte for byte in range(256)}
    backend = Tokenizer.from_str(json.dumps(described | {"model": model}))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")


TOKENIZERS = {"bytes": trained(), "template": trained(template=True), "fallback": fallback()}


@pytest.fixture
def seen(tmp_path):
    """A text file that uses a part of the tokens."""
    file = tmp_path / "seen.txt"
    file.write_text(SEEN)
    return file


def pruned(tokenizer, model, file, keep=0, reference=None):
    context = Context(tokenizer=tokenizer, record=Record(), reference=reference)
    changed = parse(f'prune.vocab:keep={keep},text="{file}"').apply(model, context)
    return changed, context


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def original_numbers(mine, theirs):
    vocab, numbers = theirs.get_vocab(), mine.get_vocab()
    return [vocab[token] for token in sorted(numbers, key=numbers.get)]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_text_that_was_seen_is_split_as_before(kind, new_model, seen):
    tokenizer = TOKENIZERS[kind]
    size = len(tokenizer)
    _, context = pruned(tokenizer, new_model("llama", vocab_size=size), seen)
    made = context.tokenizer
    assert made.tokenize(SEEN) == tokenizer.tokenize(SEEN)
    assert len(made.tokenize(OTHER)) > len(tokenizer.tokenize(OTHER))  # which is spelled
    described = json.loads(made.backend_tokenizer.to_str())["model"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(described["merges"])}
    stay = set(tokenizer.all_special_tokens) | {token for token in made.get_vocab() if token.startswith("<")}
    assert all(made_on_the_way(token, ranks)[-1] == token for token in made.get_vocab().keys() - stay)
    assert (
        len(made) < size
        and f"{len(made):,} of {size:,} rows of the embedding stay" in context.record.notes[0]
    )


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_any_text_comes_back(kind, new_model, tmp_path_factory):
    tokenizer = TOKENIZERS[kind]
    file = tmp_path_factory.mktemp("text") / "seen.txt"
    file.write_text(SEEN)
    model = new_model("llama", vocab_size=len(tokenizer))
    made = [pruned(tokenizer, model, file, keep)[1].tokenizer for keep in (0, 320, len(tokenizer) - 1)]

    @given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
    def there_and_back(text):
        for one in made:
            assert one.decode(ids_of(one, text)) == tokenizer.decode(ids_of(tokenizer, text)) == text

    there_and_back()


def test_bytes_and_special_tokens_stay_and_all_are_numbered_anew(new_model, seen, tmp_path):
    tokenizer = TOKENIZERS["template"]
    model = new_model(
        "llama", vocab_size=448, eos_token_id=[1, 340], pad_token_id=2
    )  # rows that no token has
    changed, context = pruned(tokenizer, model, seen, keep=300)
    made = context.tokenizer
    assert len(made) == changed.config.vocab_size == len(changed.model.embed_tokens.weight) == 300
    assert set(made.get_vocab()) >= {
        *pre_tokenizers.ByteLevel.alphabet(),
        *("<s>", "</s>", "<pad>", "<|user|>"),
    }
    assert sorted(made.get_vocab().values()) == list(range(300))
    last = made.convert_tokens_to_ids("<|user|>")
    assert (last, tokenizer.convert_tokens_to_ids("<|user|>")) == (299, 340)
    for config in (changed.config, changed.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, [1, last], 2)
    assert changed.model.embed_tokens.padding_idx == 2
    assert (model.config.vocab_size, model.config.eos_token_id) == (448, [1, 340])  # the model is as it was
    made.save_pretrained(tmp_path / "made")
    for one in (made, PreTrainedTokenizerFast.from_pretrained(tmp_path / "made")):
        assert one("light")["input_ids"][0] == one.bos_token_id == 0
        assert one.decode(one("<|user|> light</s>")["input_ids"]) == "<s><|user|> light</s>"
        assert (one.chat_template, one.pad_token) == ("{{ messages }}", "<pad>")


def test_the_rarest_go_first(new_model, seen):
    model = new_model("llama", vocab_size=421)
    tokenizer = TOKENIZERS["bytes"]
    fewer, more = (pruned(tokenizer, model, seen, keep)[1].tokenizer for keep in (270, 290))
    assert fewer.get_vocab().keys() < more.get_vocab().keys()
    assert {"Ġlight", "Ġthe"} <= fewer.get_vocab().keys() and "Ġlighter" not in fewer.get_vocab()
    lengths = [len(ids_of(one, SEEN)) for one in (tokenizer, more, fewer)]
    assert lengths == sorted(lengths) and lengths[0] < lengths[2]


# Models


@pytest.mark.parametrize("layout", ["llama", "qwen3", "gemma", "phi", "stablelm", "gpt2", "gpt_neox", "opt"])
def test_logits_of_the_tokens_that_stay(layout, new_model, seen):
    tokenizer = TOKENIZERS["bytes"]
    model = new_model(layout, vocab_size=421)
    changed, context = pruned(tokenizer, model, seen)
    made = context.tokenizer
    numbers = original_numbers(made, tokenizer)
    ids = torch.tensor([ids_of(tokenizer, SEEN)[:60]])
    mine = torch.tensor([ids_of(made, SEEN)[:60]])
    with torch.inference_mode():
        expected, found = model(input_ids=ids).logits[..., numbers], changed(input_ids=mine).logits
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    per_token = embedding.shape[1] * (1 if head.weight is embedding else 2) + (head.bias is not None)
    gone = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in changed.parameters())
    assert gone == (421 - len(made)) * per_token > 0


def test_the_reference_of_later_techniques_has_the_same_tokens(new_model, seen):
    model = new_model("llama", vocab_size=421)
    changed, context = pruned(TOKENIZERS["bytes"], model, seen, keep=300, reference=model)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(context.reference(ids).logits, changed(ids).logits)
    again = parse(f'prune.vocab:keep=280,text="{seen}"').apply(changed, context)
    assert len(context.tokenizer) == again.config.vocab_size == context.reference.config.vocab_size == 280


def test_a_second_embedding_is_refused(new_model, seen):
    model = new_model("llama", vocab_size=421)
    extra = torch.nn.Embedding(421, 64)

    class Second(type(model)):
        def forward(self, input_ids, **others):
            return super().forward(
                inputs_embeds=self.model.embed_tokens(input_ids) + extra(input_ids), **others
            )

    model.__class__ = Second
    with pytest.raises(RecipeError, match="Second keeps more for a token than a row of its embedding"):
        pruned(TOKENIZERS["bytes"], model, seen)


# What is refused


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("prune.vocab:keep=-1", "keep=-1 is a number of tokens from 1 on"),
        ("prune.vocab:keep=260,text=SEEN", "above the 260 bytes and special tokens .* at most 341"),
        ("prune.vocab:keep=342,text=SEEN", "at most 341, which is all there are"),
        ("prune.vocab:text=nowhere.txt", "text=nowhere.txt is neither a text file nor corpora"),
        ("prune.vocab:text=wiki/nowhere", "text=wiki/nowhere is neither"),
        (
            "quantize.rtn:bits=8,embedding_bits=8 + prune.vocab:text=SEEN",
            "take prune.vocab before what quantizes",
        ),
    ],
)
def test_what_cannot_be(recipe, sentence, new_model, seen):
    context = Context(tokenizer=TOKENIZERS["bytes"])
    with pytest.raises(RecipeError, match=sentence):
        parse(recipe.replace("SEEN", f'"{seen}"')).apply(new_model("llama", vocab_size=421), context)


def other_tokenizer(kind):
    vocab = {"<unk>": 0, "a": 1, "▁a": 2, "b": 3, "▁b": 4, "▁": 5}
    if kind == "Unigram":
        backend = Tokenizer(models.Unigram([(token, -1.0) for token in vocab], 0))
    elif kind == "WordPiece":
        backend = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    else:
        backend = Tokenizer(models.BPE(vocab, [("▁", "a"), ("▁", "b")], byte_fallback=kind == "space"))
    if kind == "space":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("Unigram", "this tokenizer is Unigram"),
        ("WordPiece", "this tokenizer is WordPiece"),
        ("BPE", "this tokenizer is a BPE without bytes"),
        ("space", "puts a space before each"),
    ],
)
def test_other_tokenizers_are_refused(kind, sentence, new_model, seen):
    with pytest.raises(RecipeError, match=sentence):
        pruned(other_tokenizer(kind), new_model("llama"), seen)


# Windows


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", ["bytes", "template"])
def test_windows_score_the_same_characters(protocol, kind, new_model, seen):
    tokenizer = TOKENIZERS[kind]
    made = pruned(tokenizer, new_model("llama", vocab_size=421), seen, keep=270)[1].tokenizer
    text = corpora.tokenize_text((SEEN + OTHER + "漢字🙂 ") * 45, tokenizer)
    cut = windows(text, PROTOCOLS[protocol], tokenizer, 3)
    other, same = retokenized(text, cut, made)
    assert len(same) == len(cut) >= 1 and other.text == text.text
    for mine, theirs in zip(same, cut, strict=True):
        assert other.characters(mine.first, mine.first + mine.scored) == text.characters(
            theirs.first, theirs.first + theirs.scored
        )
        assert mine.scored > theirs.scored
        assert mine.ids[-mine.scored :].equal(other.ids[mine.first : mine.first + mine.scored])
        read = [made.decode(mine.ids), tokenizer.decode(theirs.ids)]
        assert read[0] == read[1]  # what is read before, too, and BOS where it was


@pytest.mark.parametrize(("protocol", "per_token"), [("edgelab-512", True), ("lm-eval-word", False)])
def test_what_is_per_token_is_left_out(protocol, per_token, new_model, seen):
    tokenizer, rules = TOKENIZERS["bytes"], PROTOCOLS[protocol]
    made = pruned(tokenizer, new_model("llama", vocab_size=421), seen, keep=270)[1].tokenizer
    text = corpora.tokenize_text((SEEN + OTHER) * 45, tokenizer)
    cut = windows(text, rules, tokenizer, 2)
    other, same = retokenized(text, cut, made)
    total = PerplexitySum(other, rules, same, [2.0, 3.0], cut)
    total.nll = [1000.0, 1100.0]
    found, whole = total.values(), total.result()
    assert found["bits_per_byte"] == whole.bits_per_byte == pytest.approx(2100 / math.log(2) / whole.n_bytes)
    baseline = (2 * cut[0].scored + 3 * cut[1].scored) / math.log(2) / whole.n_bytes
    assert found["delta_bits_per_byte"] == pytest.approx(found["bits_per_byte"] - baseline)
    assert found["window_nll"] is None and "delta_nll" not in found
    assert found["ppl"] == (None if per_token else whole.ppl)  # a word is a word in any tokens


def test_a_window_that_begins_within_a_character_has_a_token_to_begin_with():
    tokenizer = TOKENIZERS["bytes"]
    text = corpora.tokenize_text("a🙂b", tokenizer)  # a, four bytes, b
    other, (window,) = retokenized(text, [Window(text.ids[2:6], 3, 3)], tokenizer)
    assert window.scored == 1 and len(window.ids) == 2
    assert other.characters(window.first, window.first + 1) == text.characters(3, 6) == "b"


# The road


@pytest.fixture
def home_model(new_model, tmp_path):
    """The folder of a tiny Llama of 421 tokens, and a text to score."""
    folder = tmp_path / "model"
    new_model("llama", vocab_size=421).save_pretrained(folder)
    TOKENIZERS["bytes"].save_pretrained(folder)
    (tmp_path / "text.txt").write_text((OTHER + SEEN) * 20)
    return folder


def test_a_row_in_bits_per_byte(home_model, seen, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGELAB_FAST", "1")
    corpus = str(tmp_path / "text.txt")
    settings = {"model": str(home_model), "corpus": corpus, "windows": 2, "only": "quality,speed"}
    recipe = f'prune.vocab:keep=280,text="{seen}"'
    none, few, packed = (
        row
        for _, row in lab.compare(
            ["none", recipe, f"{recipe} + quantize.rtn:group_size=32"], **settings
        ).iterrows()
    )
    assert [few.status, packed.status] == ["ok", "ok"], (few.error, packed.error)
    for row in (few, packed):
        for name in ("ppl", "delta_nll", "kld_mean", "top1_agreement"):
            assert math.isnan(row[name])
        assert row.window_nll is None and "280 of 421 rows of the embedding stay" in row.notes
        assert row.n_tokens > none.n_tokens == 2 * 511 and row.decode_tok_s > 0
        assert row.delta_bits_per_byte_low < row.delta_bits_per_byte < row.delta_bits_per_byte_high
        assert row.delta_bits_per_byte == pytest.approx(row.bits_per_byte - none.bits_per_byte)
        assert row.last_word_items == none.last_word_items > 0 and row.delta_last_word is not None
    assert none.parameters - few.parameters == (421 - 280) * 64
    assert none.weights_mb - few.weights_mb == pytest.approx((421 - 280) * 64 * 4 / 1e6)

    reference = load(str(home_model))
    model, context = pruned(reference.tokenizer, reference.model, seen, keep=280)
    text = corpora.tokenize(corpus, reference.tokenizer)
    rules = PROTOCOLS["edgelab-512"]
    text, cut = retokenized(text, windows(text, rules, reference.tokenizer, 2), context.tokenizer)
    total = PerplexitySum(text, rules, cut)
    for piece in slices(model, cut):
        total.add(piece)
    assert few.bits_per_byte == pytest.approx(total.result().bits_per_byte, rel=1e-5)
    assert few.n_tokens == total.result().n_tokens
    written = lab.sample(recipe, "the light", tokens=4, model=str(home_model))
    with torch.inference_mode():
        ids = torch.tensor([ids_of(context.tokenizer, "the light")])
        told = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=1, pad_token_id=2)
    assert written == context.tokenizer.decode(told[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture
def watching():
    """A technique whose stage is kept, and the contexts that it was given."""
    contexts = []

    @register("test.watching", kept=True)
    @dataclass(frozen=True)
    class Watching:
        """Changes nothing."""

        place: int = 0

        def apply(self, model, context):
            contexts.append((len(context.tokenizer), len(context.reference.get_input_embeddings().weight)))
            return model

    yield contexts
    recipes.TECHNIQUES.pop("test.watching")


def test_what_comes_behind_it_has_its_tokens(home_model, seen, watching):
    source = resolve(str(home_model))
    start = f'prune.vocab:keep=280,text="{seen}"'
    recipe = parse(f"test.watching + {start} + test.watching:place=1 + test.watching:place=2")
    folder = variants.build(recipe, source, 0, lambda done, total: None)  # the last one from what is on disk
    assert watching == [(341, 421), (280, 280), (280, 280)]
    own = variants.load_own_tokenizer(folder)
    assert len(own) == variants.load(folder).config.vocab_size == 280
    made = pruned(load_tokenizer(source), load_model(source), seen, 280)[1].tokenizer
    assert own.get_vocab() == made.get_vocab() and own.tokenize(OTHER) == made.tokenize(OTHER)
    plain = variants.build(parse("none"), source, 0, lambda done, total: None)
    assert variants.load_own_tokenizer(plain) is None


@pytest.mark.parametrize("layout", ["llama", "qwen2", "gemma"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_its_tokenizer_is_loaded_as_it_was_saved(layout, kind, new_model, seen, tmp_path):
    tokenizer = TOKENIZERS[kind]
    changed, context = pruned(tokenizer, new_model(layout, vocab_size=421), seen, keep=320)
    variants.save(changed, tmp_path / "variant", {"own_tokenizer": True}, context.tokenizer)
    loaded, text = variants.load_own_tokenizer(tmp_path / "variant"), f"<s> {OTHER}"
    assert loaded.get_vocab() == context.tokenizer.get_vocab()
    assert loaded(text)["input_ids"] == context.tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])


def test_it_is_an_ordinary_model_on_disk(home_model, seen):
    recipe = parse(f'prune.vocab:keep=280,text="{seen}"')
    folder = variants.build(recipe, resolve(str(home_model)), 0, lambda done, total: None)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)(OTHER, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, variants.load(folder)(ids).logits)


@pytest.mark.embedded
def test_on_the_embedded_model():
    reference = load()
    model, tokenizer = reference.model, reference.tokenizer
    context = Context(tokenizer=tokenizer, record=Record())
    changed = parse("prune.vocab:keep=16384").apply(model, context)
    made = context.tokenizer
    tensors, matrices = variants.stored_tensors(changed)
    size = sizes.measure_size(changed, tensors, matrices)
    assert size.embedding_bytes == 16_384 * 576 * 4 and size.parameters == 134_515_008 - 32_768 * 576
    numbers, vocab = original_numbers(made, tokenizer), tokenizer.get_vocab()
    wiki = corpora.read("wiki")[:1000]
    ids = torch.tensor([ids_of(made, wiki)])
    theirs = torch.tensor([[vocab[token] for token in made.tokenize(wiki)]])
    with torch.inference_mode():
        expected, found = model(theirs).logits[..., numbers], changed(ids).logits
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-5)
    text = corpora.read("multilingual")[:20_000]
    assert made.decode(ids_of(made, text)) == tokenizer.decode(ids_of(tokenizer, text))
    conversation = [{"role": "user", "content": "Hello"}]
    said = made.apply_chat_template(conversation, tokenize=False)
    assert said == tokenizer.apply_chat_template(conversation, tokenize=False)
    assert (
        made(said)["input_ids"][0]
        == made.convert_tokens_to_ids("<|im_start|>")
        == changed.config.bos_token_id
    )


def test_another_text_is_another_variant_and_another_question(home_model, seen, tmp_path):
    source, text = resolve(str(home_model)), f'prune.vocab:text="{seen}"'
    settings = {
        "model": str(home_model),
        "corpus": str(tmp_path / "text.txt"),
        "windows": 1,
        "only": "quality",
    }
    first, row = address(parse(text), source, 0), lab.measure(text, **settings)
    assert address(parse(text), source, 0) == first and lab.measure(text, **settings).row_id == row.row_id
    look = (
        "import sys; from edgelab import lab; (row,) = lab.stream([sys.argv[1]], interleave=False, model=sys.argv[2], "
        "corpus=sys.argv[3], windows=1, only='quality'); print(row.row_id)"
    )
    command = [sys.executable, "-c", look, text, str(home_model), str(tmp_path / "text.txt")]
    assert subprocess.run(command, capture_output=True, text=True).stdout.split() == [row.row_id]
    seen.write_text(SEEN + OTHER)
    assert address(parse(text), source, 0) != first
    other = subprocess.run(command, capture_output=True, text=True).stdout.split()
    assert len(other) == 1 and other != [row.row_id]


def test_llama_cpp_has_the_tokens_of_the_variant(home_model, seen):
    pytest.importorskip("xllamacpp")
    source = resolve(str(home_model))
    folder = variants.build(parse(f'prune.vocab:keep=280,text="{seen}"'), source, 0, lambda done, total: None)
    own = variants.load_own_tokenizer(folder)
    ids = ids_of(own, OTHER)[:40]
    expected = runtimes.load("torch", folder).logits(ids)
    engine = runtimes.load("llamacpp", folder)
    assert kl_divergence(expected, engine.logits(ids)).mean() < 1e-5
    engine.close()
    file = next(runtimes.exported("llamacpp", folder).folder.glob("*.gguf"))
    fields = GGUFReader(file).fields
    assert fields["tokenizer.ggml.tokens"].contents() == own.convert_ids_to_tokens(list(range(280)))
    merges = json.loads(own.backend_tokenizer.to_str())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"].contents() == [" ".join(pair) for pair in merges]
