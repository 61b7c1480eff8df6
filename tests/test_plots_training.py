"""The course of training: every batch is drawn, the line is the mean, and nothing is drawn from nothing."""

import io

import numpy as np
import pytest

from edgelab import plots
from edgelab.plots.style import NothingToDraw


def curve(*losses: float) -> list[dict[str, float]]:
    """Batches of 100 tokens, half a minute each."""
    return [
        {"step": n, "tokens": 100 * n, "seconds": 30.0 * n, "loss": loss} for n, loss in enumerate(losses, 1)
    ]


RUNS = {"short": curve(4.0, 2.0), "long": curve(4.0, 2.0, 3.0, 1.0)}


def test_every_batch_is_a_dot_and_the_line_is_the_mean_around_it():
    axes = plots.training_curve(RUNS, mean_of=3).axes[0]
    short, long = (collection.get_offsets() for collection in axes.collections)
    assert short.tolist() == [[100, 4], [200, 2]]
    assert long.tolist() == [[100, 4], [200, 2], [300, 3], [400, 1]]
    means = [line.get_ydata().tolist() for line in axes.lines]
    assert means == [[3, 3], [3, 3, 2, 2]]
    assert axes.get_xlim()[0] == 0


def test_labels_say_run_steps_and_minutes():
    figure = plots.training_curve(RUNS, "Cross-entropy")
    axes = figure.axes[0]
    assert {text.get_text() for text in axes.texts} == {"short: 2 steps, 1.0 min", "long: 4 steps, 2.0 min"}
    assert axes.get_ylabel() == "Cross-entropy (nats per token)"
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    assert picture.getvalue().startswith(b"\x89PNG")


@pytest.mark.parametrize(("last", "scale"), [(2.0, "linear"), (0.1, "log")])
def test_the_axis_is_logarithmic_where_the_loss_falls_far(last, scale):
    assert plots.training_curve({"run": curve(4.0, last)}).axes[0].get_yscale() == scale


def test_the_legend_names_the_mean_only_where_there_is_one():
    def words(mean_of: int) -> list[str]:
        legend = plots.training_curve(RUNS, mean_of=mean_of).axes[0].get_legend()
        return [text.get_text() for text in legend.get_texts()]

    assert words(2) == ["a batch", "mean of 2 batches"]
    assert words(1) == ["a batch"]


@pytest.mark.parametrize(("setting", "stamped"), [("1", True), ("", False)])
def test_fast_mode_is_stamped(monkeypatch, setting, stamped):
    monkeypatch.setenv("EDGELAB_FAST", setting)
    assert ("FAST" in plots.training_curve(RUNS).get_suptitle()) is stamped


def test_more_runs_than_colours_are_drawn():
    figure = plots.training_curve({str(n): curve(3.0, 2.0 + n / 10) for n in range(9)})
    assert len(figure.axes[0].collections) == 9
    assert np.ptp([line.get_ydata()[-1] for line in figure.axes[0].lines]) > 0


@pytest.mark.parametrize("curves", [{}, {"untrained": []}])
def test_nothing_to_draw(curves):
    with pytest.raises(NothingToDraw, match="measure a recipe that trains, such as qat:bits=3"):
        plots.training_curve(curves)


def test_a_mean_of_no_batches_is_refused():
    with pytest.raises(NothingToDraw, match="mean_of=0 batches have no mean; use 1 or more"):
        plots.training_curve(RUNS, mean_of=0)


def test_looks_at_held_out_text_are_squares():
    run = curve(4.0, 2.0, 3.0, 1.0)
    run[1]["validation_loss"], run[3]["validation_loss"] = 5.0, 2.5
    axes = plots.training_curve({"run": run, "blind": curve(3.0)}, mean_of=1).axes[0]
    squares = [line for line in axes.lines if line.get_marker() == "s"]
    assert [line.get_xydata().tolist() for line in squares] == [[[200, 5], [400, 2.5]]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a batch", "held-out text"]
