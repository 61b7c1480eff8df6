"""How answers are judged: numbers and whole numbers, and functions that the reader writes."""

import math
import re

import numpy as np
import pytest
import torch

from edgelab.exercises import EXERCISES, CodeExercise, Exercise, check, exercise

NOTHING_YET = "Your function returned nothing yet: replace the lines marked with ... ."


@pytest.fixture(autouse=True)
def own_exercises(monkeypatch):
    monkeypatch.setattr("edgelab.exercises.checking.EXERCISES", dict(EXERCISES))


def ask(**changes):
    """An exercise called "asked" with an answer of 20.0 unless the test says another."""

    @exercise
    def asked():
        return Exercise(**{"answer": 20.0, "why": "So it is.", "hint": "Count again."} | changes)


def said(answer):
    return repr(check("asked", answer))


# Numbers


def test_before_a_try_there_is_no_hint():
    ask()
    assert said(None) == said(...) == "Replace None by your answer."


def test_a_wrong_number_gets_the_hint_that_fits_it():
    ask(mistakes=[(10.0, "that is half.")])
    assert said(10) == "Not yet: that is half."
    assert said(30) == "Not yet, 30 is too large. Count again."
    assert said(5) == "Not yet, 5 is too small. Count again."


@pytest.mark.parametrize("answer", [20, 20.3, "19.7", torch.tensor(20.0), np.float32(20)])
def test_a_number_is_right_within_the_tolerance(answer):
    ask()
    verdict = check("asked", answer)
    assert verdict.right and str(verdict) == "Right: 20. So it is."


@pytest.mark.parametrize("answer", [20, 20.0, "20", "20.0", np.int64(20), torch.tensor(20)])
def test_a_whole_number_is_right_as_that_number(answer):
    ask(answer=20)
    assert check("asked", answer).right


@pytest.mark.parametrize("answer", [20.3, 19.99, "20.001", 21])
def test_a_whole_number_is_right_as_no_other(answer):
    ask(answer=20)
    assert not check("asked", answer).right
    assert ("no whole number" in said(answer)) == (float(answer) != 21)


def test_a_hundred_thousand_is_not_a_hundred_thousand_and_one():
    ask(answer=100_000)
    assert check("asked", 100_000).right and not check("asked", 100_001).right
    assert said(100_000) == "Right: 100,000. So it is."


def test_a_mistake_next_to_a_whole_number_is_told_from_it():
    ask(answer=20, mistakes=[(21, "one too many."), (20.25, "not divided.")])
    assert said(21) == "Not yet: one too many." and said(20.25) == "Not yet: not divided."


def test_of_two_near_numbers_the_nearest_counts():
    """Both are within 2 % of 20.2."""
    ask(mistakes=[(20.3, "that model is larger.")])
    assert said(20.28) == "Not yet: that model is larger."
    assert check("asked", 20.1).right


@pytest.mark.parametrize(
    "answer, shown",
    [
        ("many", "'many'"),
        (math.nan, "nan"),
        ("inf", "'inf'"),
        (True, "True"),
        ([20], "a list"),
        (torch.zeros(3), "a Tensor"),
        (np.zeros(3), "a ndarray"),
        (len, "a builtin_function_or_method"),
        (10**400, "a int"),
        (20j, "a complex"),
    ],
)
def test_what_is_no_number_is_said(answer, shown):
    ask()
    assert said(answer) == f"A number is needed, not {shown}."


def test_the_sentence_is_what_a_notebook_shows():
    ask(why="a < b & c")
    assert check("asked", 20)._repr_html_() == "<p>Right: 20. a &lt; b &amp; c</p>"


# Functions

WEIGHT = torch.tensor([[0.5, -1.5, 3.0], [1.0, 2.0, -2.0]])


def rounded(weight, bits=3):
    """Integers and scale of each row: of 3 bits -3 to 3."""
    scale = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.round(weight / scale), scale


def floored(weight):
    scale = rounded(weight)[1]
    return torch.floor(weight / scale), scale


def ask_code(**changes):
    @exercise
    def asked():
        settings = {"inputs": WEIGHT, "solution": rounded, "why": "So it is.", "hint": "Look at the scale."}
        return CodeExercise(**settings | {"mistakes": [(floored, "floor is not round.")]} | changes)


def marked(verdict):
    """Texts of the cells that are marked as different."""
    return re.findall(r"<b>(.*?) ≠</b>", verdict.drawing)


def test_the_own_solution_is_right_and_drawn_twice():
    ask_code(returns=("integers", "scale"))
    verdict = check("asked", rounded)
    assert verdict.right and verdict.text == "Right. So it is."
    assert verdict.drawing.count("<table") == 4 and marked(verdict) == []
    assert "Yours, integers, shape (2, 3)" in verdict._repr_html_()
    assert "≠" not in verdict._repr_html_()


def test_the_first_difference_is_named_and_marked():
    ask_code(returns=("integers", "scale"))

    def reader(weight):
        integers, scale = rounded(weight)
        integers[1, 1] = 1
        integers[1, 2] = 0
        return integers, scale

    verdict = check("asked", reader)
    assert verdict.text == (
        "Not yet: integers at [1, 1] is 1 where 3 is expected (2 of 6 numbers differ). Look at the scale."
    )
    assert marked(verdict) == ["1", "0", "3", "-3"]  # yours, then the expected ones


def test_a_recognised_mistake_gets_its_hint():
    ask_code()
    assert said(floored) == "Not yet: floor is not round."
    assert (
        len(marked(check("asked", floored))) == 2
    )  # of 2 × 6 cells, one number differs: 0.5 is floored to 0


def unfilled_line(weight):
    scale = ...
    return torch.round(weight / scale), scale


def unfilled_call(weight):
    return torch.round(...), 1


def unfilled_numpy(weight):
    return np.round(weight.numpy() / ...), 1


@pytest.mark.parametrize(
    "reader",
    [
        lambda weight: None,
        lambda weight: ...,
        lambda weight: (rounded(weight)[0], ...),
        lambda weight: [None, None],
        unfilled_line,
        unfilled_call,
        unfilled_numpy,
    ],
)
def test_a_function_with_gaps_is_not_run_into_a_traceback(reader):
    ask_code()
    assert said(reader) == NOTHING_YET and check("asked", reader).drawing == ""


def raising(weight):
    return weight.reshape(7, 7)


@pytest.mark.parametrize(
    "reader, sentence",
    [
        (raising, "Your function stopped in the line `return weight.reshape(7, 7)` with RuntimeError: shape '[7, 7]'"),
        (lambda: 1, "Your function stopped with TypeError: "),
        (5, "A function is needed: write its name without parentheses and arguments."),
        (WEIGHT, "A function is needed: write its name without parentheses and arguments."),
        (None, "Replace None by your answer."),
        (lambda weight: ("a", "b"), "Not yet: numbers or a tensor are expected, and your function returns a str."),
        (lambda weight: ({}, 1), "Not yet: numbers or a tensor are expected, and your function returns a dict."),
        (lambda weight: (1j, 1), "Not yet: numbers or a tensor are expected, and your function returns a complex."),
        (lambda weight: ([[1, 2], [3]], 1), "Not yet: numbers or a tensor are expected, and your function returns a l"),
        (lambda weight: weight, "Not yet: 2 results are expected, and your function returns 1."),
        (lambda weight: (1, 2, 3), "Not yet: 2 results are expected, and your function returns 3."),
        (lambda weight: (rounded(weight)[0].T, 1), "Not yet: result 1 has the shape (3, 2), and (2, 3) is expected."),
        (lambda weight: (rounded(weight)[0] - float("inf"), 1), "Not yet: result 1 at [0, 0] is -inf where 0 is exp"),
    ],
)  # fmt: skip
def test_whatever_comes_back_gets_one_sentence(reader, sentence):
    ask_code()
    verdict = check("asked", reader)
    assert not verdict.right and verdict.text.startswith(sentence)
    assert "\n" not in verdict.text


def as_lists(weight):
    return [part.tolist() for part in rounded(weight)]


def in_numpy(weight):
    weight = weight.numpy()
    scale = np.abs(weight).max(1, keepdims=True) / 3
    return np.round(weight / scale).astype(np.int8), scale


def with_gradients(weight):
    integers, scale = rounded(weight.requires_grad_())
    return [list(row) for row in integers], scale.double()


def changes_its_input(weight):
    scale = weight.abs().amax(1, keepdim=True) / 3
    return weight.div_(scale).round_(), scale


@pytest.mark.parametrize("reader", [as_lists, in_numpy, with_gradients, changes_its_input])
def test_other_forms_of_the_right_numbers_are_right(reader):
    ask_code()
    assert check("asked", reader).right
    assert check("asked", rounded).right


def test_integers_differ_without_wrapping_around():
    ask_code(inputs=(torch.tensor([0, 255], dtype=torch.uint8),), solution=lambda byte: byte, mistakes=[])
    assert "at [1] is 254 where 255" in said(lambda byte: byte - torch.tensor([0, 1], dtype=torch.uint8))
    assert "at [0] is -1 where 0" in said(lambda byte: byte.int() - 1)
    assert check("asked", lambda byte: byte.bfloat16()).right


def test_large_whole_numbers_are_exact_and_computed_ones_are_not():
    ask_code(inputs=1_000_000_000, solution=lambda word: word, mistakes=[])
    assert "is 1000000001 where 1000000000 is expected" in said(lambda word: word + 1)
    assert check("asked", lambda word: word - 0.3).right  # rounding


def test_several_arguments_and_one_number():
    ask_code(inputs=(25.0, 1000.0), solution=lambda bandwidth, peak: peak / bandwidth, mistakes=[])
    verdict = check("asked", lambda bandwidth, peak: bandwidth / peak)
    assert verdict.text == "Not yet: the result is 0.025 where 40 is expected. Look at the scale."
    assert marked(verdict) == ["0.025", "40"]
    for result in (40, 40.0, np.float32(40), torch.tensor([40.0])):
        assert check("asked", lambda bandwidth, peak, result=result: result).right


def test_two_numbers_may_come_as_a_tensor():
    ask_code(
        inputs=(WEIGHT,), solution=lambda weight: (weight.min(), weight.max()), mistakes=[], returns="ab"
    )
    assert check("asked", lambda weight: torch.tensor([-2.0, 3.0])).right
    assert "Not yet: b is 4 where 3 is expected." in said(lambda weight: (-2.0, 4.0))


def test_numbers_that_look_alike_are_written_until_they_differ():
    ask_code(inputs=1.0, solution=lambda x: x / 3, mistakes=[], tolerance=1e-6)
    assert "the result is 0.33334 where 0.3333333 is expected." in said(lambda x: 0.33334)


def test_what_is_drawn_is_escaped_and_cut():
    ask_code(inputs=torch.zeros(40, 40), solution=lambda x: x, mistakes=[], returns=("<b>",))
    drawing = check("asked", lambda x: x + 1).drawing
    assert "&lt;b&gt;" in drawing and drawing.count("<tr>") == 2 * 16 and drawing.count("<td") == 2 * 16 * 16


def test_a_tensor_of_three_dimensions_and_an_empty_one_are_drawn():
    ask_code(inputs=torch.arange(12.0).reshape(2, 2, 3), solution=lambda x: x, mistakes=[])
    verdict = check("asked", lambda x: x.flip(0))
    assert "at [0, 0, 0] is 6 where 0 is expected" in verdict.text and verdict.drawing.count("<tr>") == 8
    assert "has the shape (0, 3)" in said(lambda x: torch.zeros(0, 3))
