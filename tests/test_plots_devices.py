"""The pictures of predictions: every row is drawn and named, and tables without rows are refused."""

import io

import pytest

from edgelab import plots
from edgelab.devices import PRECISIONS, Engine, catalogue, fits_and_speed, models, published_check, step
from edgelab.plots.style import NothingToDraw


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_every_published_rate_is_a_point_with_its_error():
    check = published_check()
    figure = plots.published_rates(check)
    assert len(figure.axes[0].collections) == len(check) + 1  # and the band
    assert len(texts(figure)) == len(check)
    row = check[check["device"] == "Raspberry Pi 4"].iloc[0]
    assert any(text.startswith("Pi 4") and f"{row['error']:+.0%}" in text for text in texts(figure))
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"
    figure.savefig(io.BytesIO(), format="png")


def test_bars_show_each_precision_and_say_what_does_not_fit():
    table = fits_and_speed(["Phi-2"], ("float16", "Q4_0"))
    figure = plots.device_rates(table)
    # 5.56 GB and a cache of 0.67: a phone of 6 GB leaves 3.6 to a model, an iPhone 15 Pro 6
    assert texts(figure).count("does not fit") == 2
    assert len(figure.axes[0].patches) == table["decode_tok_s"].notna().sum()
    with pytest.raises(NothingToDraw, match="one model"):
        plots.device_rates(fits_and_speed(["Phi-2", "Gemma-2B"]))
    with pytest.raises(NothingToDraw, match="no device"):
        plots.device_rates(table.assign(decode_tok_s=None))


def test_operations_are_bars_by_time_and_the_title_has_their_sum():
    device = next(device for device in catalogue() if device.name == "GeForce RTX 4090")
    work = step(device, models()["SmolLM2-135M"], PRECISIONS["Q4_1"], 512, engine=Engine(overhead_s=1e-3))
    figure = plots.step_operations(work)
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == sorted(work["ms"]) and len(texts(figure)) == len(work)
    assert f"{work['ms'].sum():.3g} ms" in figure.axes[0].get_title(loc="left")
    for empty in (plots.step_operations, plots.published_rates):
        with pytest.raises(NothingToDraw):
            empty(work.iloc[:0])
