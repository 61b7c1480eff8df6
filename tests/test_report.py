"""The HTML report: complete, self-contained, escaped, and written whole or not at all."""

from html.parser import HTMLParser

import pytest

from edgelab import report, tasks
from edgelab.assets import AssetError
from edgelab.ledger import Field, Row, declare


def make_row(recipe="none", **fields):
    return dict(
        recipe=recipe, family="quantize", model="tiny", badge="packed", kernel="int4", status="ok",
        source="reader", protocol="edgelab-512", corpus="wiki", n_tokens=2044,
        ppl=21.7, delta_nll=0.01, delta_nll_low=-0.02, delta_nll_high=0.04, kld_mean=0.003,
        top1_agreement=0.987, weights_mb=1234.56, bits_per_weight=4.5, peak_rss_mb=800.0,
        ttft_ms_p50=120.0, tpot_ms_p50=40.0, decode_tok_s=25.0, decode_ratio=1.5,
        host="laptop", cpu="A CPU", cores=4, threads=2, ram_gb=16.0, os="Linux", python="3.11",
        versions='{"torch": "2.13.0"}', started_at="2026-11-23T10:00:00",
    ) | fields  # fmt: skip


class Page(HTMLParser):
    """Text, tags and attributes of a page; refuses tags that are not closed in order."""

    def __init__(self, html):
        super().__init__()
        self.text, self.tags, self.open = "", [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br", "wbr", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


def read(path):
    return Page(path.read_text(encoding="utf-8"))


def test_the_report_holds_numbers_machine_and_explanations(tmp_path):
    path = tmp_path / "results" / "report.html"
    assert report.write([make_row()], path, notes="Weights of a 4-bit file.") == path
    page = read(path)
    for text in (
        *("1,234.6", "21.70", "+0.0100", "[-0.0200, +0.0400]", "98.7%", "int4", "1.50"),
        *("laptop (1 row)", "A CPU, 4 cores, 2 threads, 16 GB memory", "Linux, Python 3.11", "torch 2.13.0"),
        *("Weights of a 4-bit file.", "2026-11-23", "edgelab-512"),
        *(
            "NLL above the baseline (nats per token)",
            "Negative log-likelihood minus the baseline's",
            "Lower is better.",
            "[95 % interval]",
        ),
        *("Weights (MB)", "Stored weights with scales and embedding", "really packed weights"),
    ):
        assert text in page.text, text
    assert "FAST" not in page.text


def test_the_report_asks_the_network_for_nothing(tmp_path):
    page = read(report.write([make_row()], tmp_path / "report.html"))
    names = [tag for tag, _ in page.tags]
    assert not {"script", "link", "iframe", "object"} & set(names)
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 3  # one row has no difference to a baseline
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")
    assert "Nothing to draw: no row has per-window NLL" in page.text


def test_a_failed_row_shows_its_sentence(tmp_path):
    failed = {
        "recipe": "quantize.rtn:bits=2",
        "badge": "packed",
        "status": "oom",
        "error": "Out of memory at 24 GB.",
    }
    page = read(report.write([make_row(), failed], tmp_path / "report.html"))
    assert "oom: Out of memory at 24 GB." in page.text
    assert "2 rows, 1 failed" in page.text


def test_everything_failed_is_still_a_report(tmp_path):
    page = read(
        report.write([{"recipe": "none", "status": "error", "error": "no"}], tmp_path / "report.html")
    )
    assert page.text.count("Nothing to draw") == 4
    assert "error: no" in page.text


def test_missing_values_are_dashes_not_zeros(tmp_path):
    rows = [make_row(), make_row(ppl=None, decode_ratio=None)]
    page = read(report.write(rows, tmp_path / "report.html"))
    assert page.text.count("–") == 2


def test_quality_and_cost_are_tables_of_their_own(tmp_path):
    timed = make_row("quantize.timed", ppl=None, delta_nll=None, kld_mean=None, top1_agreement=None)
    page = read(report.write([make_row(), timed], tmp_path / "report.html"))
    quality, costs = page.text.split("Size and speed")[0], page.text.split("Size and speed")[1]
    assert "Perplexity" in quality and "Decoding" not in quality and "quantize.timed" not in quality
    assert "Decoding" in costs and "quantize.timed" in costs
    assert "wbr" not in page.text  # it is a tag, not text


def test_tasks_and_what_the_model_writes_are_shown_where_rows_have_them(tmp_path):
    tasked = make_row(last_word=0.421, sample=["a cat < dog\nand more"])
    page = read(report.write([make_row(), tasked], tmp_path / "report.html"))
    for text in (
        "Last words predicted",
        "42.1%",
        "What the model writes",
        tasks.PROMPTS[0],
        "a cat < dog\nand",
    ):
        assert text in page.text, text
    page = read(report.write([make_row()], tmp_path / "report.html"))
    assert "Last words" not in page.text and "What the model writes" not in page.text


def test_a_stranger_s_field_with_a_form_is_a_column(tmp_path, monkeypatch):
    monkeypatch.setattr("edgelab.ledger.row.OTHERS", {})
    declare({"warmth_c": Field("Warmth", unit="°C", form=".1f", meaning="Felt by hand.")})
    page = read(report.write([Row("none", extra={"warmth_c": 41.25})], tmp_path / "report.html"))
    assert "Warmth (°C)" in page.text and "41.2" in page.text and "Felt by hand." in page.text


def test_text_from_rows_is_escaped(tmp_path):
    evil = "<script>alert('1')</script>\"&"
    fields = ["recipe", "badge", "kernel", "host", "cpu", "os", "versions", "model", "protocol", "corpus"]
    rows = [
        make_row(**dict.fromkeys(fields, evil), parity="failed", parity_detail=evil),
        make_row(evil, status="error", error=evil),
    ]
    page = read(report.write(rows, tmp_path / "report.html", notes=evil))
    assert "script" not in [tag for tag, _ in page.tags]
    assert page.text.count(evil) >= len(fields)


def test_fast_failed_parity_and_several_machines_are_said(tmp_path):
    rows = [make_row(fast=True), make_row(host="server", parity="failed", parity_detail="3 % apart")]
    page = read(report.write(rows, tmp_path / "report.html"))
    assert "FAST" in page.text
    assert "parity gate failed: 3 % apart" in page.text
    assert "must not be ranked together" in page.text
    assert "server (1 row)" in page.text


def test_no_rows_is_a_sentence(tmp_path):
    with pytest.raises(report.ReportError, match="no rows to report"):
        report.write([], tmp_path / "report.html")


def test_a_report_that_fails_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        report.write([make_row()], path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AssetError, match="choose a place that can be written"):
        report.write([make_row()], tmp_path / "file" / "report.html")
    with pytest.raises(report.ReportError, match="is a folder; name a file"):
        report.write([make_row()], tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
