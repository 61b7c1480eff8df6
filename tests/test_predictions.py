"""Guesses: kept in the reader's home, said in one line, and drawn over what is measured."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import edgelab as el
from edgelab.exercises import PredictionError

NAME = "02 perplexity by bits"
NO_GUESS = "No guess yet: put numbers in place of None, or run on without."


def points(figure):
    """x, y and colour of the face of every marker."""
    return [
        (*map(float, dots.get_offsets()[0]), *dots.get_facecolor()[0][:3])
        for dots in figure.axes[0].collections
    ]


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def title(figure):
    return figure.axes[0].get_title(loc="left")


def kept_files():
    from edgelab import assets

    return [json.loads(file.read_text()) for file in sorted((assets.home() / "predictions").glob("*"))]


# Keeping


def test_none_keeps_nothing():
    assert repr(el.predict(NAME, None)) == repr(el.predict(NAME, {"8": None, "4": None})) == NO_GUESS
    assert repr(el.predict(NAME, {})) == NO_GUESS
    assert kept_files() == []


def test_a_guess_is_kept_and_said():
    assert repr(el.predict(NAME, 24)) == "Kept: you expect 24."
    assert repr(el.predict("00 size", "1234.5", "MB")) == "Kept: you expect 1,234.5 MB."
    assert repr(el.predict(NAME, None)) == "Kept earlier: you expected 24."


def test_numbers_by_name_leave_out_what_is_not_guessed():
    prediction = el.predict(NAME, {"8 bits": 22, "4 bits": None, 3: np.float32(70)}, "ppl")
    assert repr(prediction) == "Kept: you expect 22 ppl for 8 bits, 70 ppl for 3."
    assert el.predict(NAME, {"8 bits": None}).guess == {"8 bits": 22, "3": 70}


def test_a_later_guess_replaces_the_first_which_stays_in_the_file():
    for guess in (24, 30, 28):
        el.predict(NAME, guess)
    assert el.predict(NAME, None).guess == 28
    assert [(file["name"], file["first"], file["guess"]) for file in kept_files()] == [(NAME, 24, 28)]


def test_a_restarted_kernel_knows_the_guess():
    el.predict(NAME, {"4 bits": 24})
    code = f"import edgelab as el; print(el.predict({NAME!r}, None))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "Kept earlier: you expected 24 for 4 bits."


def test_names_that_share_letters_or_are_long_have_files_of_their_own():
    names = ["a b", "a-b", "../a b", "é" * 300, "é" * 301]
    for number, name in enumerate(names):
        el.predict(name, number)
    assert [el.predict(name, None).guess for name in names] == [0, 1, 2, 3, 4]
    assert len(kept_files()) == 5


@pytest.mark.parametrize("content", ["", "[]", '{"guess": 3}', "{", "\x00"])
def test_a_damaged_file_counts_as_no_guess(content, home):
    el.predict(NAME, 24)
    (file,) = (home / "predictions").iterdir()
    file.write_text(content)
    assert repr(el.predict(NAME, None)) == NO_GUESS
    assert repr(el.predict(NAME, 25)) == "Kept: you expect 25."


def test_a_home_that_cannot_be_written_does_not_end_the_notebook(home, caplog):
    home.write_text("a file where the folder should be")
    assert el.predict(NAME, 24).guess == 24
    assert "The guess is not kept" in caplog.text


@pytest.mark.parametrize("guess", ["many", True, float("nan"), [1, 2], {"4 bits": "few"}, 1j, "inf"])
def test_a_guess_that_is_no_number_is_said_in_a_sentence(guess):
    with pytest.raises(PredictionError, match=r"^A guess is a number such as 24, or .*\.$"):
        el.predict(NAME, guess)
    assert kept_files() == []


@pytest.mark.parametrize("name", ["", " ", None, 2])
def test_a_question_needs_a_name(name):
    with pytest.raises(PredictionError, match="needs a name"):
        el.predict(name, 24)


# Drawing


def test_one_guess_is_drawn_next_to_the_measurement():
    figure = el.predict("00 size of 7B", 7, "GB").against(26.95)
    assert [x for x, *_ in points(figure)] == [7, 26.95]
    assert texts(figure) == ["you: 7 GB", "measured: 26.95 GB"]
    assert title(figure) == "You expected 7 GB; measured: 26.95 GB"
    assert figure.axes[0].get_xlabel() == "Size of 7B (GB)"
    assert "You expected 7 GB" in figure.alt and "measured: 26.95 GB" in figure.alt


def test_the_title_names_the_guess_that_is_farthest_off():
    prediction = el.predict(NAME, {"8 bits": 22, "4 bits": 14, "3 bits": 100})
    figure = prediction.against({"8 bits": 22, "4 bits": 28, "3 bits": 70})
    assert title(figure) == "Your guesses are off by up to 2.0 times, most at 4 bits"
    assert title(el.predict(NAME, {"a": 10, "b": 10}).against({"a": 10.2, "b": 9.9})).startswith(
        "All your guesses"
    )
    falling = el.predict(NAME, {"a": -1, "b": 0}, "nats").against({"a": 2, "b": 0.5})
    assert title(falling) == "Your guesses are off by up to 3 nats, most at a"
    assert falling.axes[0].get_xscale() == "linear"


def test_without_a_guess_the_measurement_is_drawn_alone():
    figure = el.predict(NAME, None).against(pd.Series({"8 bits": 22.0, "4 bits": 28.0}))
    assert [x for x, *_ in points(figure)] == [22, 28]
    assert title(figure) == "Perplexity by bits, measured"
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["8 bits", "4 bits"]


@pytest.mark.parametrize("guess, scale", [(22 * 29, "linear"), (22 * 31, "log")])
def test_the_axis_is_logarithmic_from_thirty_times_on(guess, scale):
    assert el.predict(NAME, guess).against(22).axes[0].get_xscale() == scale


def test_guesses_for_something_else_are_named_not_drawn():
    figure = el.predict(NAME, {"8 bits": 22, "5 bits": 23}).against(
        {"8 bits": 21.7, "4 bits": 28, "3 bits": None}
    )
    assert [x for x, *_ in points(figure)] == [22, 21.7, 28]
    assert "Expected, but not measured: 5 bits." in figure.get_supxlabel()
    alone = el.predict(NAME, None).against(28)  # an earlier version of the question had several parts
    assert [x for x, *_ in points(alone)] == [28]


@pytest.mark.parametrize("measured", [None, {}, {"a": None}, "much", {"a": float("inf")}])
def test_a_measurement_that_is_no_number_is_said_in_a_sentence(measured):
    with pytest.raises(PredictionError, match=r"measurement.*\.$"):
        el.predict(NAME, 24).against(measured)


def test_no_label_leaves_the_picture():
    guesses = {f"{bits} bits": 10.0**bits for bits in range(8)}
    figure = el.predict(NAME, guesses, "tokens/s").against(
        {name: 3 * value for name, value in guesses.items()}
    )
    figure.draw_without_rendering()
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text.get_text()


def test_fast_mode_keeps_guesses_and_stamps_the_picture(monkeypatch):
    monkeypatch.setenv("EDGELAB_FAST", "1")
    assert "FAST" in el.predict(NAME, 24).against(28).get_suptitle()
    assert el.predict(NAME, None).guess == 24
