"""The notation of recipes: printing and parsing round-trip, identity, and one sentence for every mistake."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgelab.techniques  # noqa: F401 (enters the techniques)
from edgelab import recipes
from edgelab.recipes import Recipe, RecipeError, parse
from edgelab.techniques.quantization.floats import BFloat16, Float16
from edgelab.techniques.quantization.rtn import RoundToNearest

ROUNDING = st.builds(
    RoundToNearest,
    bits=st.integers(2, 8),
    group_size=st.integers(0, 4096),
    symmetric=st.booleans(),
    embedding_bits=st.sampled_from([0, *range(2, 9)]),
)
RECIPES = st.builds(
    Recipe,
    st.lists(ROUNDING | st.builds(BFloat16) | st.builds(Float16), max_size=4).map(tuple),
    st.sampled_from(["torch", "simulated", "llamacpp"]),
)


@dataclass(frozen=True)
class Shrink:
    """A technique with settings of the other types, one of them required."""

    steps: int
    sparsity: float = 0.5
    layout: str = "2:4"

    def apply(self, model, context):
        return model


@pytest.fixture
def shrink(monkeypatch):
    """`prune.shrink`, registered for one test."""
    monkeypatch.setattr(recipes, "TECHNIQUES", dict(recipes.TECHNIQUES))
    return recipes.register("prune.shrink", shown=("steps",))(Shrink)


@given(RECIPES)
def test_printing_and_parsing_round_trip(recipe):
    assert parse(str(recipe)) == recipe
    assert str(parse(str(recipe))) == str(recipe)


@given(ROUNDING, st.randoms(use_true_random=False), st.sampled_from(["", " ", "  "]))
def test_key_order_defaults_and_spaces_do_not_change_identity(technique, random, space):
    settings = [
        f"{key}{space}={space}{str(getattr(technique, key)).lower()}"
        for key in ("bits", "group_size", "symmetric", "embedding_bits")
    ]
    random.shuffle(settings)
    text = f"{space}quantize.rtn{space}:{space}{f'{space},{space}'.join(settings)}{space}@{space}torch{space}"
    assert parse(text) == Recipe((technique,))
    assert str(parse(text)) == str(Recipe((technique,)))


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("none", "none"),
        (" none @ torch", "none"),
        ("none@llamacpp", "none @ llamacpp"),
        ("quantize.rtn", "quantize.rtn:bits=4,group_size=64"),
        (
            "quantize.rtn:group_size=64,bits=4,symmetric=false,embedding_bits=0",
            "quantize.rtn:bits=4,group_size=64",
        ),
        ("quantize.rtn:symmetric=TRUE,bits=3", "quantize.rtn:bits=3,group_size=64,symmetric=true"),
        (
            "quantize.bf16+quantize.rtn:bits=8,group_size=0 @ simulated",
            "quantize.bf16 + quantize.rtn:bits=8,group_size=0 @ simulated",
        ),
    ],
)
def test_canonical_text(text, canonical):
    assert str(parse(text)) == canonical


def test_parts_of_a_recipe():
    recipe = parse("quantize.bf16 + quantize.rtn:bits=3 @ simulated")
    assert recipe.techniques == (BFloat16(), RoundToNearest(bits=3))
    assert recipe.runtime == "simulated"
    assert recipe.weights == "quantize.bf16 + quantize.rtn:bits=3,group_size=64"
    assert recipe.family == "quantize"
    assert (parse("none").family, parse("none").techniques, parse("none").runtime) == (
        "baseline",
        (),
        "torch",
    )


def test_order_of_techniques_is_identity():
    assert parse("quantize.bf16 + quantize.fp16") != parse("quantize.fp16 + quantize.bf16")


def test_settings_of_every_type(shrink):
    assert parse("prune.shrink:sparsity=1e-3,steps=7") == Recipe((shrink(7, 0.001, "2:4"),))
    assert str(parse("prune.shrink:layout=4:8,steps=7,sparsity=0.5")) == "prune.shrink:steps=7,layout=4:8"
    with pytest.raises(RecipeError, match=r"^prune\.shrink needs steps\.$"):
        parse("prune.shrink:sparsity=0.1")
    with pytest.raises(RecipeError, match=r"^prune\.shrink:sparsity is a number, not 'half'\.$"):
        parse("prune.shrink:steps=1,sparsity=half")


@given(st.integers(), st.floats(allow_nan=False), st.sampled_from(["2:4", "4:8", "block"]))
def test_round_trip_of_numbers_and_names(steps, sparsity, layout):
    kept = dict(recipes.TECHNIQUES)
    try:
        shrink = recipes.register("prune.shrink", shown=("steps",))(Shrink)
        recipe = Recipe((shrink(steps, sparsity, layout),))
        assert parse(str(recipe)) == recipe
    finally:
        recipes.TECHNIQUES.clear()
        recipes.TECHNIQUES.update(kept)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("quantise.rtn:bits=4", "Unknown technique 'quantise.rtn'; did you mean .*quantize.rtn"),
        ("quantize.rnt", "Unknown technique 'quantize.rnt'; did you mean .*quantize.rtn"),
        ("nonne", "Unknown technique 'nonne'; did you mean none"),
        ("xyzzy", "Unknown technique 'xyzzy'; .*quantize.rtn"),
        ("quantize.rtn:bit=4", "Unknown key 'bit' for quantize.rtn; did you mean .*bits"),
        ("quantize.rtn:groupsize=4", "Unknown key 'groupsize' for quantize.rtn; did you mean .*group_size"),
        ("quantize.rtn:zzz=4", "Unknown key 'zzz' for quantize.rtn; .*group_size.*symmetric"),
        ("quantize.bf16:bits=4", "Unknown key 'bits' for quantize.bf16; it has no settings"),
        ("none @ troch", "Unknown runtime 'troch'; did you mean torch"),
        ("none @", "names no runtime after '@'"),
        ("none @ torch @ torch", "Unknown runtime"),
        ("", "has an empty part"),
        ("quantize.bf16 + ", "has an empty part"),
        (" @ torch", "has an empty part"),
        ("none + quantize.bf16", "'none' stands alone"),
        ("none + none", "'none' stands alone"),
        ("none:bits=4", "'none' stands alone"),
        ("quantize.rtn:bits", r"'bits' in quantize.rtn should be bits=value"),
        ("quantize.rtn:bits=4,bits=3", r"'bits=3' in quantize.rtn should be bits=value, once"),
        ("quantize.rtn:bits=four", "quantize.rtn:bits is a whole number, not 'four'"),
        ("quantize.rtn:bits=4.0", "quantize.rtn:bits is a whole number, not '4.0'"),
        ("quantize.rtn:bits=", "quantize.rtn:bits is a whole number, not ''"),
        ("quantize.rtn:symmetric=yes", "quantize.rtn:symmetric is true or false, not 'yes'"),
        ("quantize.rtn:bits=1", "bits=1 is outside 2 to 8"),
        ("quantize.rtn:bits=9", "bits=9 is outside 2 to 8"),
        ("quantize.rtn:bits=-4", "bits=-4 is outside 2 to 8"),
        ("quantize.rtn:embedding_bits=1", "embedding_bits=1 is outside 2 to 8"),
        ("quantize.rtn:group_size=-64", "group_size=-64 is negative"),
    ],
)
def test_mistakes_are_answered_with_one_sentence(text, sentence):
    with pytest.raises(RecipeError, match=sentence) as caught:
        parse(text, runtimes=("torch", "simulated"))
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    assert ". " not in str(caught.value)


def test_any_runtime_where_none_are_named():
    assert parse("none @ engine-of-tomorrow").runtime == "engine-of-tomorrow"
