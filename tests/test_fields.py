"""A field is declared once, and everything that shows rows reads that declaration."""

import pytest

from edgelab import ledger
from edgelab.lab.question import Settings, ask
from edgelab.ledger import FIELDS, Field, Row, UndeclaredField
from edgelab.ledger.row import OTHERS, value_types
from edgelab.measure import MEASUREMENTS, UnknownMeasurement, chosen, measurement, measurements


@pytest.fixture
def entropy():
    """A measurement from elsewhere, with a field of its own."""
    field = Field("Entropy", unit="nats", better="higher", heading="H", meaning="Of the next token.")

    @measurement("entropy", part="entropy", needs="session", fields={"entropy": field})
    def run(subject):
        return {"entropy": 1.5}

    yield run
    del MEASUREMENTS["entropy"], OTHERS["entropy"]


def test_every_field_of_a_row_is_declared_and_says_its_type():
    assert set(FIELDS) == set(vars(Row("none"))) == set(value_types())
    assert all(about.label for about in FIELDS.values())
    assert FIELDS["weights_mb"].with_unit == "Weights (MB)" and FIELDS["weights_mb"].better == "lower"
    for name, about in FIELDS.items():
        assert set(about.ends or ()) <= set(FIELDS), name


def test_a_misspelt_name_is_an_error_and_no_lost_number():
    row = Row("none")
    with pytest.raises(UndeclaredField, match="No field is called 'pppl'"):
        row.fill({"pppl": 21.7})
    row.fill({"ppl": 21.7})
    assert row.ppl == row["ppl"] == 21.7
    with pytest.raises(UndeclaredField, match="does not declare"):
        measurement("wrong", part="quality", needs="variant", fields=("pppl",))


def test_every_measurement_fills_declared_fields_and_no_two_the_same():
    known = measurements()
    filled = [name for one in known.values() for name in one.fields]
    assert len(filled) == len(set(filled)) and set(filled) <= set(FIELDS)
    assert {one.part for one in known.values()} == {
        *("variant", "quality", "speed", "memory", "tasks", "extraction", "requests", "privacy"),
    }


def test_a_field_from_elsewhere_is_kept_and_shown(entropy):
    row = Row("none", started_at="2026-01-01")
    row.fill({"entropy": 1.5})
    ledger.add(row)
    (found,) = ledger.own()
    assert found["entropy"] == 1.5 and found.flat()["entropy"] == 1.5 and found == row
    assert ledger.frame([found, Row("none")])["entropy"].tolist()[0] == 1.5
    assert ledger.every_field()["entropy"].with_unit == "Entropy (nats)"
    with pytest.raises(UndeclaredField, match="a field of every row already"):
        measurement("again", part="again", needs="variant", fields={"ppl": Field("Mine")})


def test_only_names_parts(entropy):
    assert {one.part for one in chosen("entropy, quality")} == {"entropy", "quality", "variant"}
    assert "tasks" not in {one.part for one in chosen(None)}
    with pytest.raises(
        UnknownMeasurement,
        match=r"size is none of entropy, extraction, memory, privacy, quality, requests, speed, tasks\.",
    ):
        chosen("size")


def test_another_text_is_another_question_for_whatever_reads_it(tiny, tmp_path):
    """Whatever part of a row a measurement calls its own."""
    field = Field("Surprise", better="lower")
    try:
        measurement("surprise", part="surprise", needs="logits", fields={"surprise": field})(
            lambda subject: None
        )
        measurement("pause", part="pause", needs="process", fields={"pause": field})(lambda subject: None)
        few, many = (
            ask(["none"], Settings(model=str(tiny), windows=windows, only="surprise"), False)[0]
            for windows in (8, 32)
        )
        assert not few.covers(many) and few.wanted[0]["windows"] == 8 and not few.timed
        (timed,) = ask(["none"], Settings(model=str(tiny), only="pause"), False)
        assert timed.timed and timed.wanted[0]["threads"] == 2 and "windows" not in timed.wanted[0]
    finally:
        for name in ("surprise", "pause"):
            MEASUREMENTS.pop(name, None)
            OTHERS.pop(name, None)
