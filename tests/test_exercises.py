"""The checks of the exercises: right answers, hints for usual mistakes, and input that is no number."""

import pytest

from edgelab.exercises import EXERCISES, UnknownExercise, check


@pytest.mark.parametrize("name", ["cache_of_70b", "bits_for_13b"])
def test_the_right_answer_is_right_and_nothing_else_is(name):
    asked = EXERCISES[name]()
    assert check(name, asked.answer).startswith("Right")
    for wrong, hint in asked.mistakes:
        assert check(name, wrong) == f"Not yet: {hint}"
    assert check(name, asked.answer * 3.3).startswith("Not yet")
    assert check(name, None).startswith("Replace None")
    assert check(name, "many").startswith("A number is needed")


def test_the_answers_worked_by_hand():
    assert EXERCISES["cache_of_70b"]().answer == 2 * 80 * 8 * 128 * 4096 * 8 * 2 / 1e9
    assert EXERCISES["bits_for_13b"]().answer == 2


def test_an_unknown_exercise_is_answered_with_the_known_ones():
    with pytest.raises(UnknownExercise, match=r"'cache'; there are .*cache_of_70b"):
        check("cache", 1)
