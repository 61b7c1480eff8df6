"""The notation of recipes: printing and parsing round-trip, identity, and one sentence for every mistake."""

import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from edgelab import recipes, sources
from edgelab.recipes import Context, Recipe, RecipeError, canonical, catalogue, parse
from edgelab.techniques.quantization.floats import BFloat16
from edgelab.techniques.quantization.rtn import RoundEmbedding, RoundToNearest


@dataclass(frozen=True)
class Everything:
    """A technique with a setting of every type, the first of them required.

    steps: of training. Each sees one window. layout: which weights of a group are zero; "none" is a text, too.
    teacher: what is imitated.
    """

    steps: int
    share: float = 0.5
    slow: bool = False
    folder: str = ""
    label: str = "x"
    layout: Literal["2:4", "4:8", "a+b", "none"] = "2:4"
    width: Literal[2, 4, "auto"] = "auto"
    teacher: Recipe = dataclasses.field(default_factory=Recipe)
    limit: int | None = None
    rate: float | None = 0.1
    strict: bool | None = None
    text: str | None = None
    pattern: Literal["none", "rows"] | None = "rows"
    start: Recipe | None = None
    weight: float = 4

    def apply(self, model, context):
        return [*model, self.steps]


@dataclass(frozen=True)
class Elsewhere:
    """A deployment with settings."""

    cloud: Recipe = dataclasses.field(default_factory=Recipe)
    link: str = "wifi"


@pytest.fixture(autouse=True, scope="module")
def registered():
    """`test.everything` and `elsewhere`, while the tests of this file run."""
    recipes.register("test.everything", version=3, shown=("steps",))(Everything)
    recipes.deployment("elsewhere", version=2)(Elsewhere)
    yield
    del recipes.TECHNIQUES["test.everything"], recipes.DEPLOYMENTS["elsewhere"]


VALUES = {
    "int": st.integers(),
    "float": st.floats(allow_nan=False, allow_infinity=False),
    "bool": st.booleans(),
    "str": st.text() | st.text('ab ,+@:=()"\\'),
}


def recipe_values() -> st.SearchStrategy[Recipe]:
    """Recipes of every technique, in any number, on every deployment, recipes inside recipes."""
    simple = st.just(Recipe()) | st.builds(Recipe, st.just((RoundToNearest(bits=3),)))
    return st.recursive(simple, recipes_over, max_leaves=3)


def recipes_over(inner: st.SearchStrategy[Recipe]) -> st.SearchStrategy[Recipe]:
    techniques = st.sampled_from([*recipes.techniques().values()]).flatmap(
        lambda kind: instances(kind, inner)
    )
    deployments = st.sampled_from([*recipes.deployments().values()]).flatmap(
        lambda kind: instances(kind, inner)
    )
    return st.builds(Recipe, st.lists(techniques, max_size=3).map(tuple), deployments)


def instances(kind: type, inner: st.SearchStrategy[Recipe]) -> st.SearchStrategy:
    """Instances of a registered class, of values that its constructor takes."""

    def values(one: recipes.Setting) -> st.SearchStrategy:
        if one.name == "corpus":  # one that exists
            return st.just(DEFAULT)
        kinds = VALUES | {"recipe": inner, "choice": st.sampled_from(one.options or ("",))}
        # Constructors refuse most numbers: half of the time the default, which they take.
        found = kinds[one.kind] | st.none() if one.optional else kinds[one.kind]
        return found if one.default is None else found | st.just(DEFAULT)

    def make(chosen: dict) -> object:
        try:
            return kind(**{name: value for name, value in chosen.items() if value is not DEFAULT})
        except RecipeError:
            assume(False)

    return st.fixed_dictionaries({one.name: values(one) for one in recipes.describe(kind).settings}).map(make)


DEFAULT = object()


@given(st.data())
def test_printing_and_parsing_round_trip(data):
    recipe = data.draw(recipe_values())
    assert parse(str(recipe)) == recipe
    assert str(parse(str(recipe))) == str(recipe)


@given(st.data())
def test_every_setting_of_every_type_round_trips(data):
    recipe = Recipe((data.draw(instances(Everything, recipe_values())),))
    assert parse(str(recipe)) == recipe


@given(st.data())
def test_a_catalogue_reads_a_recipe_as_its_techniques_do(data):
    recipe = data.draw(recipe_values())
    plain = canonical(str(recipe), catalogue())
    assert (str(plain), plain.weights, plain.runtime, plain.family) == (
        str(recipe),
        recipe.weights,
        recipe.runtime,
        recipe.family,
    )
    assert [one.version for one in plain.techniques] == [one.version for one in recipe.techniques]
    assert plain.deployment.version == recipe.deployment.version


ROUNDING = st.builds(
    RoundToNearest, bits=st.integers(2, 8), group_size=st.integers(0, 4096), symmetric=st.booleans()
)


@given(ROUNDING, st.randoms(use_true_random=False), st.sampled_from(["", " ", "  "]))
def test_key_order_defaults_and_spaces_do_not_change_identity(technique, random, space):
    settings = [
        f"{key}{space}={space}{str(getattr(technique, key)).lower()}"
        for key in ("bits", "group_size", "symmetric")
    ]
    random.shuffle(settings)
    text = f"{space}quantize.rtn{space}:{space}{f'{space},{space}'.join(settings)}{space}@{space}torch{space}"
    assert parse(text) == Recipe((technique,))
    assert str(parse(text)) == str(Recipe((technique,)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", "none"),
        (" none @ torch", "none"),
        ("none@llamacpp", "none @ llamacpp"),
        ("quantize.rtn", "quantize.rtn:bits=4,group_size=64"),
        ("quantize.rtn:group_size=64,bits=4,symmetric=false", "quantize.rtn:bits=4,group_size=64"),
        ("quantize.rtn:symmetric=TRUE,bits=3", "quantize.rtn:bits=3,group_size=64,symmetric=true"),
        (
            "quantize.bf16+quantize.rtn:bits=8,group_size=0 @ simulated",
            "quantize.bf16 + quantize.rtn:bits=8,group_size=0 @ simulated",
        ),
        ("test.everything:share=1e+20,steps=7", "test.everything:steps=7,share=1e20"),
        ("test.everything:share=1,weight=5.0,steps=7", "test.everything:steps=7,share=1.0,weight=5"),
        ("test.everything:weight=4.0,steps=7", "test.everything:steps=7"),
        ("test.everything:layout=4:8,steps=7,share=0.5", "test.everything:steps=7,layout=4:8"),
        ("test.everything:steps=7,layout=a+b", "test.everything:steps=7"),
        ('test.everything:steps=7,layout="a+b"', 'test.everything:steps=7,layout="a+b"'),
        ('test.everything:steps=7,folder="C:\\my models"', "test.everything:steps=7,folder=C:\\my models"),
        ('test.everything:steps=7,folder="a, \\"b\\""', 'test.everything:steps=7,folder="a, \\"b\\""'),
        ('test.everything:steps=7,folder=""', "test.everything:steps=7"),
        ('test.everything:steps=7,text="none",rate=none', 'test.everything:steps=7,rate=none,text="none"'),
        ("test.everything:steps=7,width=4,teacher=( none )", "test.everything:steps=7,width=4"),
        (
            "test.everything:steps=7,teacher=(quantize.rtn+quantize.bf16@elsewhere:cloud=(none@llamacpp),link=lte)",
            "test.everything:steps=7,teacher=(quantize.rtn:bits=4,group_size=64 + quantize.bf16 "
            "@ elsewhere:cloud=(none @ llamacpp),link=lte)",
        ),
    ],
)
def test_canonical_text(text, expected):
    if text.endswith("layout=a+b"):  # a bare plus joins techniques
        with pytest.raises(RecipeError, match=r"layout is one of 2:4, 4:8, a\+b, none, not 'a'"):
            parse(text)
    else:
        assert str(parse(text)) == expected


def test_parts_of_a_recipe():
    recipe = parse("quantize.bf16 + quantize.rtn:bits=3 @ simulated")
    assert recipe.techniques == (BFloat16(), RoundToNearest(bits=3))
    assert recipe.runtime == "simulated"
    assert recipe.weights == "quantize.bf16 + quantize.rtn:bits=3,group_size=64"
    assert recipe.family == "quantize"
    assert recipe.prefix(1) == parse("quantize.bf16")
    assert recipe.on("elsewhere:link=lte") == parse(f"{recipe.weights} @ elsewhere:link=lte")
    assert recipe.on("torch") == parse(recipe.weights) != recipe
    none = parse("none")
    assert (none.family, none.techniques, none.runtime, none) == ("baseline", (), "torch", Recipe())


def test_what_is_added_does_not_make_a_family():
    assert parse("qat:bits=4 + quantize.embedding").family == "qat"
    assert parse("prune.wanda + recover + quantize.embedding").family == "prune"
    assert parse("prune.wanda + quantize.rtn + quantize.embedding").family == "quantize"
    assert parse("quantize.embedding").family == "quantize"
    assert parse("quantize.rtn + qlora + merge").family == "lora"


def test_a_recipe_applies_its_techniques_in_order():
    recipe = parse("test.everything:steps=1 + test.everything:steps=2")
    assert recipe.apply([0], Context()) == [0, 1, 2]
    assert recipe.prefix(1).apply([0], Context()) == [0, 1]


def test_order_of_techniques_is_identity():
    assert parse("quantize.bf16 + quantize.fp16") != parse("quantize.fp16 + quantize.bf16")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("quantize.rtn:bits=3,embedding_bits=0", [RoundToNearest(bits=3)]),
        ("quantize.rtn:embedding_bits=8", [RoundToNearest(), RoundEmbedding(8, symmetric=False)]),
        (
            "quantize.rtn:embedding_bits=6,symmetric=true + quantize.bf16",
            [RoundToNearest(symmetric=True), RoundEmbedding(6, symmetric=True), BFloat16()],
        ),
    ],
)
def test_recipes_of_earlier_versions_are_read(old, new):
    assert parse(old) == Recipe(tuple(new))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("quantise.rtn:bits=4", "Unknown technique 'quantise.rtn'; did you mean .*quantize.rtn"),
        ("quantize.rnt", "Unknown technique 'quantize.rnt'; did you mean .*quantize.rtn"),
        (
            "quantize",
            r"'quantize' is a family of techniques; write one of quantize\.autoround, .*quantize\.rtn",
        ),
        ("nonne", "Unknown technique 'nonne'; did you mean none"),
        ("xyzzy", "Unknown technique 'xyzzy'; .*quantize.rtn"),
        ("quantize.rtn:bit=4", "Unknown key 'bit' for quantize.rtn; did you mean .*bits"),
        ("quantize.rtn:groupsize=4", "Unknown key 'groupsize' for quantize.rtn; did you mean .*group_size"),
        ("quantize.rtn:zzz=4", "Unknown key 'zzz' for quantize.rtn; .*group_size.*symmetric"),
        ("quantize.bf16:bits=4", "Unknown key 'bits' for quantize.bf16; it has no settings"),
        ("none @ troch", "Unknown deployment 'troch'; did you mean torch"),
        ("none @ elsewhere:lnk=lte", "Unknown key 'lnk' for elsewhere; did you mean link"),
        (
            "none @ elsewhere:cloud=none",
            r"elsewhere:cloud is a recipe in parentheses, such as \(none\), not 'none'",
        ),
        ("none @ elsewhere:cloud=(none @ troch)", "Unknown deployment 'troch'; did you mean torch"),
        ("none @ elsewhere:cloud=(none", r"A '\(' in 'none @ elsewhere:cloud=\(none' is never closed"),
        ("none @ elsewhere:link=a)", r"A '\)' in 'none @ elsewhere:link=a\)' closes nothing"),
        ('none @ elsewhere:link="a', "A quote in 'none @ elsewhere:link=\"a' is never closed"),
        (
            'none @ elsewhere:link="a"b',
            'elsewhere:link should have its quotes around the whole value, not "a"b',
        ),
        ("none @", "names no deployment after '@'"),
        ("none @ torch @ torch", "has more than one '@'"),
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
        ("quantize.rtn:range=max", "quantize.rtn:range is one of minmax, percentile, mse, not 'max'"),
        ("quantize.rtn:bits=1", "bits=1 is outside 2 to 8"),
        ("quantize.rtn:bits=9", "bits=9 is outside 2 to 8"),
        ("quantize.rtn:bits=-4", "bits=-4 is outside 2 to 8"),
        ("quantize.rtn:embedding_bits=1", "bits=1 is outside 2 to 8"),
        ("quantize.rtn:group_size=-64", "group_size=-64 is negative"),
        ("test.everything:share=0.1", "test.everything needs steps"),
        ("test.everything:steps=1,share=half", "test.everything:share is a number, not 'half'"),
        ("test.everything:steps=1,share=inf", "test.everything:share is a number, not 'inf'"),
        ("test.everything:steps=1,share=nan", "test.everything:share is a number, not 'nan'"),
    ],
)
def test_mistakes_are_answered_with_one_sentence(text, sentence):
    with pytest.raises(RecipeError, match=sentence) as caught:
        parse(text)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    assert ". " not in str(caught.value)


def test_a_description_of_a_technique():
    method = catalogue().techniques["test.everything"]
    assert (method.version, method.shown, method.kept) == (3, ("steps",), False)
    assert method.what == "A technique with a setting of every type, the first of them required."
    found = {one.name: one for one in method.settings}
    assert (found["steps"].kind, found["steps"].default, found["steps"].meaning) == (
        "int",
        None,
        "of training",
    )
    assert (found["rate"].kind, found["rate"].default, found["rate"].optional) == ("float", "0.1", True)
    assert found["width"].options == (2, 4, "auto")
    assert (found["teacher"].default, found["start"].default) == ("(none)", "none")
    assert found["share"].meaning == ""


def test_every_setting_says_what_it_means():
    described = [method for one in recipes.catalogue() for method in one.values()]
    own = [method for method in described if method.name not in ("test.everything", "elsewhere")]
    unsaid = [f"{method.name}:{one.name}" for method in own for one in method.settings if not one.meaning]
    assert len(own) > 30 and not unsaid


def test_what_calibrates_or_trains_is_kept():
    known = catalogue().techniques
    assert known["quantize.gptq"].kept and known["qat"].kept
    assert not known["quantize.rtn"].kept


def test_a_name_belongs_to_one_class():
    with pytest.raises(
        RecipeError, match=r"^'quantize\.rtn' is registered already, by edgelab\..*rtn; choose"
    ):
        recipes.register("quantize.rtn")(Everything)
    with pytest.raises(RecipeError, match=r"^'torch' is registered already"):
        recipes.deployment("torch")(Elsewhere)


def test_a_setting_hides_nothing_that_its_class_says_of_itself():
    with pytest.raises(
        RecipeError, match=r"^'test\.odd' has a setting called version, which says something else"
    ):
        recipes.register("test.odd")(dataclasses.make_dataclass("Odd", [("version", int, 1)]))


def test_a_type_that_no_text_gives_is_refused():
    odd = dataclasses.make_dataclass("Odd", [("sizes", list[int])], frozen=True)
    with pytest.raises(
        RecipeError, match=r"^Odd\.sizes has the type list\[int\]; a setting is an int, float,"
    ):
        recipes.register("test.odd")(odd)
    assert "test.odd" not in recipes.techniques()


def fresh(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    assert not done.returncode, done.stderr
    return done.stdout.strip()


def test_the_registry_loads_itself_in_a_fresh_interpreter():
    code = "import edgelab; print(edgelab.parse('quantize.rtn:bits=3 @ llamacpp'))"
    assert fresh(code) == "quantize.rtn:bits=3,group_size=64 @ llamacpp"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home of one's own, whose sources all are older than this process."""
    monkeypatch.setenv("EDGELAB_HOME", str(tmp_path))
    monkeypatch.delenv("EDGELAB_PLUGINS", raising=False)
    monkeypatch.setattr(sources, "_LOADED_NS", sys.maxsize)
    return tmp_path


def test_a_saved_catalogue_reads_recipes_without_torch(home):
    assert recipes.saved_catalogue() is None
    recipes.save_catalogue()
    assert recipes.saved_catalogue() == catalogue()
    code = (
        "import sys; from edgelab import recipes; known = recipes.saved_catalogue();"
        "print(recipes.canonical('quantize.rtn:symmetric=TRUE@llamacpp', known), 'torch' in sys.modules)"
    )
    assert fresh(code) == "quantize.rtn:bits=4,group_size=64,symmetric=true @ llamacpp False"


@pytest.mark.parametrize("damage", ["a changed plugin", "a new plugin", "half a file"])
def test_a_stale_catalogue_is_not_read(home, damage):
    (home / "plugins").mkdir()
    (home / "plugins" / "one.py").write_text("one = 1\n")
    recipes.save_catalogue()
    assert recipes.saved_catalogue() is not None
    if damage == "half a file":
        (home / "sources" / "recipes.json").write_text("{")
    else:
        (home / "plugins" / ("one.py" if damage == "a changed plugin" else "two.py")).write_text("one = 12\n")
    assert recipes.saved_catalogue() is None


def test_a_catalogue_older_than_the_sources_is_not_saved(home, monkeypatch):
    monkeypatch.setattr(sources, "_LOADED_NS", 0)
    recipes.save_catalogue()
    assert recipes.saved_catalogue() is None
