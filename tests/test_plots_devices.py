"""The pictures of predictions: every row is drawn and named, and tables without rows are refused."""

import io

import pytest

from edgelab import plots
from edgelab.devices import PRECISIONS, Engine, catalogue, fits_and_speed, models, published_check, step
from edgelab.plots.devices import BAND, seconds
from edgelab.plots.style import NothingToDraw


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize(
    "value_s, text", [(0.214, "0.21 s"), (3.44, "3.4 s"), (9.96, "10 s"), (99.6, "100 s"), (1112, "1,112 s")]
)
def test_seconds_are_written_without_a_power_of_ten(value_s, text):
    assert seconds(value_s) == text


def test_every_published_rate_is_a_point_and_those_outside_the_band_have_their_error():
    check = published_check()
    figure = plots.published_rates(check)
    assert len(figure.axes[0].collections) == len(check) + 1  # and the band
    outside = check[check["error"].abs() > BAND]
    assert 0 < len(outside) < 12 and len(texts(figure)) == len(outside)
    row = check[check["device"] == "Raspberry Pi 4"].iloc[0]
    assert any(text.startswith("Pi 4") and f"{row['error']:+.0%}" in text for text in texts(figure))
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"
    figure.savefig(io.BytesIO(), format="png")


def test_the_rates_of_a_device_are_named_and_never_more_than_a_dozen():
    check = published_check()
    phone = "Phone, Snapdragon 778G"
    named = texts(plots.published_rates(check, [phone]))
    assert sum("778G" in text for text in named) == (check["device"] == phone).sum() == 2
    assert len(texts(plots.published_rates(check, check["device"]))) == 12


def test_points_show_each_precision_and_say_what_does_not_fit():
    table = fits_and_speed(["Phi-2"], ("float16", "Q4_0"))
    figure = plots.device_rates(table)
    # 5.56 GB and a cache of 0.67: a phone of 6 GB leaves 3.6 to a model, an iPhone 15 Pro 6
    assert texts(figure).count("does not fit") == 2
    assert len(figure.axes[0].collections) == table["decode_tok_s"].notna().sum()
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
