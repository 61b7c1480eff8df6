"""Pictures of adapters: shares of a spectrum by hand, lines over ranks, stacks of training memory."""

import numpy as np
import pandas as pd
import pytest

from edgelab import plots
from edgelab.plots import NothingToDraw


def test_what_a_rank_holds_by_hand():
    """Singular values 2 and 1: the first holds four fifths of the squares."""
    np.testing.assert_allclose(plots.held_by_rank(np.array([2.0, 1.0])), [0.8, 1.0])


def test_lines_name_what_the_marked_rank_holds():
    spectra = {"the change": np.array([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0]]), "the weights": np.ones((2, 3))}
    axes = plots.rank_lines(spectra, marked=1).axes[0]
    assert axes.get_title(loc="left") == "Rank 1 holds 90 % of the change, 33 % of the weights"
    with pytest.raises(NothingToDraw, match="no singular values"):
        plots.rank_lines({})


def test_bars_of_training_memory_add_up_and_carry_the_measurement():
    columns = ["weights_gb", "optimizer_gb", "working_gb", "measured_gb"]
    rows = {"all weights": (0.5, 1.0, 2.0, 3.6), "LoRA": (0.5, 0.02, 1.2, np.nan)}
    axes = plots.training_bars(pd.DataFrame.from_dict(rows, orient="index", columns=columns)).axes[0]
    ends = [patch.get_x() + patch.get_width() for patch in axes.patches]
    assert max(ends) == pytest.approx(3.5) and ends[-1] == pytest.approx(1.72)
    texts = [text.get_text() for text in axes.texts]
    assert "measured" in texts[0] and "measured" not in texts[1]


def test_a_sweep_of_ranks_names_the_best_and_its_bytes():
    points = pd.DataFrame({"rank": [8, 1, 64], "ppl": [8.0, 8.6, 8.2], "adapter_mb": [9.77, 1.22, 78.2]})
    axes = plots.rank_sweep(points, {"no adapter": 9.1, "all weights": 7.9}).axes[0]
    assert axes.get_title(loc="left") == "Rank 8 is best here, in 9.8 MB"
    np.testing.assert_allclose(axes.lines[0].get_xdata(), [1, 8, 64])
    texts = [text.get_text().strip() for text in axes.texts]
    assert texts == ["1.2 MB", "9.8 MB", "78.2 MB", "no adapter: 9.10", "all weights: 7.90"]
    with pytest.raises(NothingToDraw, match="no adapter has been measured"):
        plots.rank_sweep(points[:0], {})


def test_each_way_to_train_has_its_best_rate():
    points = pd.DataFrame(
        {"way": ["all"] * 2 + ["LoRA"] * 2, "learning_rate": [1e-4, 1e-3, 1e-3, 3e-3], "ppl": [8, 12, 9, 8.1]}
    )
    axes = plots.rate_lines(points, 9.1).axes[0]
    assert axes.get_title(loc="left") == "Best learning rate: 0.0001 for all, 0.003 for LoRA"
    with pytest.raises(NothingToDraw, match="no run"):
        plots.rate_lines(points[:0], 9.1)
