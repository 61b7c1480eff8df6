"""Controls of a widget, found by what is written on them, and a wait for what a thread behind them does."""

import time

SECONDS = 180  # more than anything takes that is waited for, on a busy machine


def walk(box):
    yield box
    for child in getattr(box, "children", ()):
        yield from walk(child)


def control(box, description):
    (found,) = [one for one in walk(box) if getattr(one, "description", "") == description]
    return found


def until(true):
    deadline = time.monotonic() + SECONDS
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert true()
