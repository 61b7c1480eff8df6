"""The table of prices: what it gives, and what is no price, named by line and column."""

import pytest

from edgelab.devices import prices as table
from edgelab.devices.prices import PriceError, Prices, prices

TEXT = """name,usd,per,source
cloud_input,0.5,million tokens,a
cloud_output,2,million tokens,a
electricity,0.36,kWh,a
data:lte,4,GB,a
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A table of prices, which is read in place of the project's."""
    made = tmp_path / "prices.csv"
    made.write_text(TEXT)
    monkeypatch.setattr(table, "data_dir", lambda: tmp_path)
    return made


def test_prices_by_hand(file):
    assert prices() == Prices(0.5, 2.0, 0.36, {"lte": 4.0})
    usd = prices().of(read=1000, written=100, n_bytes=10**6, link="lte", joules=1e4)
    assert usd == pytest.approx(0.0005 + 0.0002 + 0.004 + 0.001)
    assert prices().of(n_bytes=10**6, link="wifi") == 0  # not metered


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        (
            "0.5,million",
            "0.0005,thousand",
            "prices.csv, line 2, column per: 'thousand tokens' should be million",
        ),
        ("4,GB", "0.004,MB", "line 5, column per: 'MB' should be GB"),
        ("kWh", "", "line 4, column per: '' should be kWh"),
        ("0.5,", "nan,", "line 2, column usd: 'nan' is no number"),
        ("0.5,", "inf,", "line 2, column usd: 'inf' is no number"),
        ("0.5,", "$0.5,", "line 2, column usd: '$0.5' is no number"),
        (
            "0.5,",
            '"0,5",',
            "line 2, column usd: '0,5' is no number; write one such as 8 or 25.6, with a full stop, not",
        ),
        ("0.5,", ",", "line 2, column usd: '' is no number"),
        ("0.5,", "-5,", "line 2, column usd: -5 should be at least 0"),
        (
            "data:lte",
            "data:LTE",
            "line 5, column name: nothing with a price is called 'data:LTE'; there are",
        ),
        ("data:lte", "electricity", "line 5, column name: 'electricity' is there twice"),
        ("electricity,0.36,kWh,a\n", "", "the line electricity is missing; give it in USD per kWh"),
        ("usd,per", "eur,per", "line 1: no column is called 'eur'"),
        ("kWh,a", "kWh,a,b", "line 4: there are 5 cells for 4 columns"),
        (
            ",",
            ";",
            "line 1: no column is called 'name;usd;per;source'; there are name, usd, per, source, with commas",
        ),
    ],
)
def test_a_line_that_says_no_price_is_refused_by_line_and_column(file, was, now, said):
    assert was in TEXT
    file.write_text(TEXT.replace(was, now))
    with pytest.raises(PriceError) as caught:
        prices()
    assert said in str(caught.value)


def test_a_table_that_a_spreadsheet_saved_is_read(file):
    known = prices()
    file.write_bytes(b"\xef\xbb\xbf" + TEXT.encode().replace(b"\n", b"\r\n"))
    assert prices() == known
    file.write_text(TEXT.replace("\n", ",,\n"))
    assert prices() == known
