"""RAPL on a folder that looks like the kernel's, and energy estimated where there is none."""

import pytest

from edgelab.devices import PowerError, battery_percent, estimated_j, tokens_per_charge
from edgelab.measure.energy import RAPL_BASIS, Meter, metered, rapl_domains


@pytest.fixture
def powercap(tmp_path):
    for name, kind, energy in [
        ("intel-rapl:0", "package-0", 5_000_000),
        ("intel-rapl:1", "package-1", 900),
        ("intel-rapl:0:0", "core", 77),
        ("intel-rapl:2", "psys", 88),
    ]:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "name").write_text(kind + "\n")
        (folder / "energy_uj").write_text(f"{energy}\n")
        (folder / "max_energy_range_uj").write_text("9000000\n")
    return tmp_path


def test_only_packages_are_counted(powercap):
    assert [domain.name for domain in rapl_domains(powercap)] == ["intel-rapl:0", "intel-rapl:1"]


def test_joules_are_the_difference_of_the_counters_of_all_packages(powercap):
    with metered(powercap) as meter:
        (powercap / "intel-rapl:0" / "energy_uj").write_text("7000000\n")
        (powercap / "intel-rapl:1" / "energy_uj").write_text("500900\n")
        (powercap / "intel-rapl:2" / "energy_uj").write_text("5000000\n")
    assert meter.joules == pytest.approx(2.5) and meter.seconds > 0
    assert meter.per_token(10, power_w=99) == (pytest.approx(0.25), RAPL_BASIS)


def test_a_counter_that_wrapped_around_goes_on_from_its_range(powercap):
    with metered(powercap) as meter:
        (powercap / "intel-rapl:0" / "energy_uj").write_text("1000000\n")  # 5 J -> 9 J = 0 -> 1 J
    assert meter.joules == pytest.approx(5.0)


def test_nothing_readable_gives_none_and_the_estimate_names_its_basis(tmp_path):
    with metered(tmp_path / "none") as meter:
        pass
    assert meter.joules is None and meter.per_token(4) == (None, None)
    assert Meter(seconds=0.0412).per_token(4, power_w=15) == (
        pytest.approx(0.1545),
        "estimated: 15 W x 10.3 ms",
    )


def test_a_counter_that_only_root_may_read_gives_none(powercap):
    (powercap / "intel-rapl:0" / "energy_uj").unlink()  # a file that cannot be read, also for root
    (powercap / "intel-rapl:0" / "energy_uj").mkdir()
    (powercap / "intel-rapl:1" / "energy_uj").unlink()
    with metered(powercap) as meter:
        pass
    assert meter.joules is None


def test_the_meter_is_filled_when_the_work_fails(powercap):
    with pytest.raises(RuntimeError), metered(powercap) as meter:
        raise RuntimeError
    assert meter.joules == 0 and meter.seconds > 0


def test_battery_by_hand():
    assert estimated_j(15, 0.0103) == (pytest.approx(0.1545), "estimated: 15 W x 10.3 ms")
    assert tokens_per_charge(0.5, 10) == 72_000
    assert battery_percent(0.36, 10) == pytest.approx(1.0)
    with pytest.raises(PowerError, match="battery_wh is 0"):
        tokens_per_charge(1, 0)
    with pytest.raises(PowerError, match="power_w is -1"):
        estimated_j(-1, 1)
