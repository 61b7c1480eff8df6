"""What shows saved rows does without torch: each case runs in a fresh interpreter, which then looks for it."""

import subprocess
import sys

import pytest

CASES = [
    "edgelab.ledger.frame()",
    "edgelab.rows.comparable(edgelab.ledger.frame())",
    "edgelab.rows.recommend(edgelab.ledger.frame(), 200)",
    "edgelab.plots.tradeoff(edgelab.ledger.frame())._repr_png_()",
    "edgelab.plots.window_delta(edgelab.ledger.frame())",
    "edgelab.devices.fits_and_speed()",
    "edgelab.exercises.check('best_within_200_mb', 1)",
    "edgelab.report.write(edgelab.ledger.frame(), 'report.html')",
    "edgelab.widgets.side_by_side.budget_slider(edgelab.ledger.frame())",
    "edgelab.widgets.exploring.explorer()",
    "edgelab.widgets.memory.memory_calculator()",
    "edgelab.widgets.decoding.decode_calculator(20)",
    "edgelab.widgets.devices.device_picker()",
    "edgelab.widgets.phone.phone_bench(edgelab.devices.saved_bench('xiaomi_14'))",
    "edgelab.devices.file_sizes()",
    "edgelab.widgets.measuring.protocol_picker",
    "edgelab.plots.time_line({'edge only': [('edge', 0.0, 0.2)]})",
    "edgelab.plots.deferral([0, 1, 0, 1], [1, 1, 1, 1], {'margin': [1, 3, 2, 4]})",
    "edgelab.machine()",
]


@pytest.mark.parametrize("case", CASES)
def test_torch_is_not_imported(case, tmp_path):
    name = case.partition("(")[0].rpartition(".")[0]
    heavy = "{'torch', 'transformers', 'datasets'} & sys.modules.keys()"
    code = f"import sys, {name}\n{case}\nfound = {heavy}\nsys.exit(str(found) if found else 0)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
