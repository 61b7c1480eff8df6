"""Rows go into the ledger and come back, also with several writers and a killed one."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pandas as pd
import pytest

from edgelab import ledger
from edgelab.errors import EdgeLabError
from edgelab.ledger import LedgerError, Row

ROW = Row(
    "none", ppl=21.7, windows=2, n_tokens=1022, fast=True, window_nll=[3.0, 3.1], started_at="2026-01-01"
)


def test_a_row_comes_back_as_it_was():
    ledger.add(ROW)
    (found,) = ledger.own()
    assert found == ROW and found.fast is True and found.delta_nll is None


def test_find_gives_the_newest_row_with_these_values():
    for day, ppl in enumerate((1.0, 2.0, 3.0)):
        ledger.add(Row("none", ppl=ppl, seed=day // 2, started_at=f"2026-01-0{day + 1}"))
    assert ledger.find(recipe="none", seed=0).ppl == 2.0
    assert ledger.find(recipe="none", seed=7) is None


def test_a_ledger_of_an_earlier_version_gains_the_new_columns():
    ledger.path().parent.mkdir(parents=True)
    with sqlite3.connect(ledger.path()) as old:
        old.execute("CREATE TABLE rows (recipe TEXT, started_at TEXT, row_id TEXT PRIMARY KEY)")
        old.execute("INSERT INTO rows VALUES ('none', '2025-01-01', 'old')")
    old.close()
    ledger.add(ROW)
    assert [row.row_id for row in ledger.own()] == ["old", ROW.row_id]


def test_the_newest_whole_answer_counts():
    """A later row that lacks what is asked for does not hide an earlier one that has it."""
    first = Row("none", ppl=21.7, peak_rss_mb=500.0, made_by='{"perplexity": 1}', started_at="2026-01-01")
    later = Row("none", ppl=21.8, made_by='{"perplexity": 2}', started_at="2026-01-02")
    for row in (first, later):
        ledger.add(row)
    questions = [
        ({"recipe": "none"}, []),
        ({"recipe": "none"}, ["peak_rss_mb"]),
        ({"recipe": "none", "made_by.perplexity": 1}, []),
        ({"recipe": "none", "made_by.latency": 1}, []),
    ]
    assert ledger.newest(questions) == [later, first, first, None]


def test_a_verdict_of_the_gate_belongs_to_every_row_of_variant_and_export():
    same = {"variant": "abc", "runtime": "llamacpp", "made_by": '{"export": 1, "gate": 2}'}
    before = Row("r @ llamacpp", **same, started_at="2026-01-01")
    other = Row("r @ llamacpp", **same | {"made_by": '{"export": 2, "gate": 2}'}, started_at="2026-01-02")
    earlier = Row("r @ llamacpp", **same | {"made_by": '{"export": 1, "gate": 1}'}, started_at="2026-01-02")
    gated = Row("r @ llamacpp", **same, parity="passed", parity_detail="+0.1%", started_at="2026-01-03")
    for row in (before, other, earlier, gated):
        ledger.add(row)
    assert [row.parity for row in ledger.own()] == ["passed", None, None, "passed"]
    assert ledger.verdict(before) == ("passed", "+0.1%")
    assert ledger.verdict(other) == ledger.verdict(earlier) == (None, None)


def test_a_column_of_numbers_is_numeric_also_where_nothing_was_measured():
    table = ledger.frame([ROW])
    assert all(pd.api.types.is_numeric_dtype(table[name]) for name in ("ppl", "decode_ratio", "iterations"))
    assert table.fast.dtype == bool and table.recipe[0] == "none"


def test_exports_hold_the_same_values_in_every_form(tmp_path):
    for suffix in ("csv", "parquet", "jsonl"):
        ledger.export([ROW], tmp_path / f"rows.{suffix}")
    assert ledger.read(tmp_path / "rows.jsonl") == [ROW]
    for table in (pd.read_csv(tmp_path / "rows.csv"), pd.read_parquet(tmp_path / "rows.parquet")):
        assert table.loc[0, "ppl"] == 21.7 and pd.isna(table.loc[0, "delta_nll"])
    assert not list(tmp_path.glob(".*"))


def test_an_unknown_form_or_place_is_one_sentence(tmp_path):
    with pytest.raises(LedgerError, match=r"not to '.xls'"):
        ledger.export([ROW], tmp_path / "rows.xls")
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgeLabError, match="choose a place"):
        ledger.export([ROW], tmp_path / "file" / "rows.csv")


def test_a_ledger_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGELAB_HOME", str(tmp_path / "file"))
    with pytest.raises(LedgerError, match="set EDGELAB_HOME"):
        ledger.add(ROW)


WRITER = """
import sys
from edgelab.ledger import Row, add
for n in range(int(sys.argv[2])):
    add(Row("none", seed=n, host=sys.argv[1]))
    print(n, flush=True)
"""


def test_several_writers_lose_nothing():
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, name, "20"], stdout=subprocess.DEVNULL)
        for name in "abc"
    ]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    assert sorted((row.host, row.seed) for row in ledger.own()) == [
        (name, n) for name in "abc" for n in range(20)
    ]


def test_a_killed_writer_leaves_whole_rows():
    writer = subprocess.Popen([sys.executable, "-c", WRITER, "a", "100000"], stdout=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while writer.stdout.readline() != b"5\n":
        assert time.monotonic() < deadline
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate()
    rows = ledger.own()
    assert len(rows) >= 6 and [row.seed for row in rows] == list(range(len(rows)))
    ledger.add(ROW)


def test_committed_reference_rows_are_whole_and_say_what_they_are():
    for row in ledger.reference():
        assert row.status == "ok" and row.badge in ("packed", "simulated", "runtime", "analytic"), row.recipe
        assert not row.fast and row.git_sha and json.loads(row.versions)["torch"], row.recipe
