"""Devices of the reader's own: a file in EDGELAB_HOME, read beside the project's, and refused by line and column."""

import pytest

from edgelab import assets
from edgelab.devices import (
    DeviceFileError,
    ShapeError,
    catalogue,
    class_engine,
    class_range,
    fits_and_range,
    keep_device,
    models,
    own_device,
    own_devices,
    own_file,
    tables,
)
from edgelab.devices.device import project_devices
from edgelab.listing import listing

HEAD = "name,memory_gb,memory_bandwidth_gb_s"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGELAB_HOME", str(tmp_path))
    return tmp_path


def test_without_a_file_there_are_the_devices_of_the_project():
    assert own_devices() == [] and own_file() == assets.home() / "devices.csv"
    assert {one.name for one in catalogue()} == {one.name for one in project_devices()}


def test_a_file_in_the_home_is_read_beside_the_catalogue(home):
    (home / "devices.csv").write_text(
        "name, memory_gb, memory_bandwidth_gb_s, float32_gflop_s, runs_on, usable_gb\n"
        "My phone, 8, 51.2, , , \n"
        '"Old laptop, blue",16,25.6,120,CPU,14\n'
    )
    found = {one.name: one for one in catalogue()}
    phone, laptop = found["My phone"], found["Old laptop, blue"]
    assert (phone.memory_gb, phone.memory_bandwidth_gb_s, phone.float32_gflop_s) == (8, 51.2, None)
    assert phone.runs_on == "phone" and phone.room_gb == pytest.approx(4.8)  # no phone leaves less than 60 %
    assert laptop.room_gb == 14 and laptop.compute_gflop_s("int8") == 120
    assert [one.memory_gb for one in catalogue()] == sorted(one.memory_gb for one in catalogue())
    assert "My phone" in {row["name"] for row in listing("devices")}
    assert class_engine("phone").bandwidth_share == class_engine("phone", without="My phone").bandwidth_share


def test_a_device_from_figures_is_kept_for_the_next_session(home):
    phone = own_device("My phone", 51.2, 8)
    keep_device(phone)
    keep_device(
        own_device("Board", memory_bandwidth_gb_s=17.1, memory_gb=4, gflop_s=30, usable_gb=3.5, runs_on="CPU")
    )
    assert own_devices() == [
        phone,
        own_device("Board", 17.1, 4, 30, 3.5, "CPU"),
    ]
    keep_device(own_device("My phone", 60, 12))
    assert [(one.name, one.memory_gb) for one in own_devices()] == [("My phone", 12), ("Board", 4)]
    assert (home / "devices.csv").read_text().splitlines()[0].startswith(HEAD)
    elsewhere = home / "mine.csv"
    keep_device(phone, elsewhere)
    assert own_devices(elsewhere) == [phone]


def test_what_a_kept_device_knows_beyond_the_form_stays(home):
    (home / "devices.csv").write_text(f"{HEAD},battery_wh,battery_source\nA,8,51.2,18.5,printed on it\n")
    keep_device(own_device("B", 17.1, 4))
    assert [(one.name, one.battery_wh, one.battery_source) for one in own_devices()] == [
        ("A", 18.5, "printed on it"),
        ("B", None, ""),
    ]


@pytest.mark.parametrize(
    "text, sentence",
    [
        (f"{HEAD}\nA,six,51.2\n", "devices.csv, line 2, column memory_gb: 'six' is no number"),
        (
            f"{HEAD}\nA,8,51.2\nB,8,51.2 GB/s\n",
            "line 3, column memory_bandwidth_gb_s: '51.2 GB/s' is no number",
        ),
        (f"{HEAD}\nA,8,\n", "line 2, column memory_bandwidth_gb_s: '' is no number"),
        (f"{HEAD}\nA,-8,51.2\n", "line 2, column memory_gb: -8 is not positive"),
        (f"{HEAD}\nA,nan,51.2\n", "line 2, column memory_gb: 'nan' is no number"),
        (f"{HEAD}\n,8,51.2\n", "line 2, column name: it is empty"),
        (f"{HEAD}\nA,8,51.2\nA,4,17\n", "line 3, column name: 'A' is there twice"),
        (f"{HEAD}\nRaspberry Pi 5,8,51.2\n", "'Raspberry Pi 5' is a device of the catalogue"),
        (f"{HEAD},usable_gb\nA,8,51.2,9\n", "column usable_gb: 9 GB are more than the 8 GB there are"),
        (f"{HEAD},runs_on\nA,8,51.2,NPU\n", "column runs_on: 'NPU' is none of CPU, phone, GPU"),
        (f"{HEAD}\nA,8,51.2,3\n", "line 2: there are 4 cells for 3 columns"),
        ("name,ram\nA,8\n", "line 1: no column is called 'ram'; there are name"),
        (f"{HEAD}\nA,inf,51.2\n", "line 2, column memory_gb: 'inf' is no number"),
        (f"{HEAD},name\nA,8,51.2,B\n", "line 1: the column name is there twice"),
        (f'{HEAD},memory_source\nA,8,51.2,"of it\nB,8,51.2,\n', "line 2: unexpected end of data"),
        ("name,memory_gb\nA,8\n", "line 1: the column memory_bandwidth_gb_s is missing"),
    ],
)
def test_a_bad_line_is_refused_by_line_and_column(home, text, sentence):
    (home / "devices.csv").write_text(text)
    with pytest.raises(DeviceFileError) as caught:
        catalogue()
    assert sentence in str(caught.value) and str(home) not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "was", "now", "sentence"),
    [
        (
            "devices.csv",
            "CPU,8,7.5,12.8",
            "CPU,8,7.5,fast",
            "line 2, column memory_bandwidth_gb_s: 'fast' is no",
        ),
        (
            "devices.csv",
            "CPU,8,7.5,12.8",
            "CPU,8,75,12.8",
            "line 2, column usable_gb: 75 GB are more than the 8",
        ),
        ("devices.csv", "CPU,8,7.5,12.8", "NPU,8,7.5,12.8", "line 2, column runs_on: 'NPU' is none of CPU"),
        (
            "devices.csv",
            "Raspberry Pi 5,",
            "Raspberry Pi 4,",
            "line 3, column name: 'Raspberry Pi 4' is there twice",
        ),
        ("devices.csv", ",", ";", "line 1: no column is called 'name;class;"),
        (
            "models.csv",
            "llama,32,4096",
            "llama,many,4096",
            "line 2, column layers: 'many' should be a whole number",
        ),
        (
            "models.csv",
            "32000,false",
            "32000,no",
            "line 2, column tied_embeddings: 'no' should be true or false",
        ),
        ("models.csv", "name,", "nam,", "line 1: no column is called 'nam'"),
    ],
)
def test_a_bad_line_of_the_project_is_refused_by_line_and_column(
    tmp_path, monkeypatch, file, was, now, sentence
):
    text = (tables.data_dir() / file).read_text(encoding="utf-8")
    assert was in text
    (tmp_path / file).write_text(text.replace(was, now), encoding="utf-8")
    monkeypatch.setattr(tables, "data_dir", lambda: tmp_path)
    with pytest.raises((DeviceFileError, ShapeError)) as caught:
        project_devices() if file == "devices.csv" else models()
    assert f"{file}, {sentence}" in str(caught.value)


def test_figures_that_cannot_be_are_refused():
    with pytest.raises(DeviceFileError, match="The device, column memory_gb: 0 is not positive"):
        own_device("A", 51.2, 0)
    with pytest.raises(DeviceFileError, match="column name: it is empty"):
        own_device(" ", 51.2, 8)


def test_a_file_that_is_no_text_is_refused(home):
    (home / "devices.csv").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(DeviceFileError, match="cannot be read"):
        own_devices()


def test_the_range_of_phones_is_that_of_rates_on_phones_and_cpus():
    (slow, fast), gpu = class_range("phone"), class_range("GPU")
    assert (slow.bandwidth_share, fast.bandwidth_share) == tuple(
        one.bandwidth_share for one in class_range("CPU")
    )
    assert slow.bandwidth_share < 0.3 < 0.7 < fast.bandwidth_share < 1  # Raspberry Pi 4 and Intel N150
    assert "11 published rates on phone and CPU devices" in slow.basis
    assert gpu[0].bandwidth_share < class_engine("GPU").bandwidth_share < gpu[1].bandwidth_share
    with pytest.raises(ShapeError, match="there are CPU, phone and GPU"):
        class_range("NPU")


def test_the_range_of_a_phone_holds_its_middle():
    phone = next(one for one in catalogue() if "778G" in one.name)
    table = fits_and_range(phone, ["Gemma-2B", "Phi-2", "StableLM-3B"])
    assert len(table) == 9 and set(table["badge"]) == {"analytic"}
    fits = table[table["fits"]]
    assert (fits["slow_tok_s"] < fits["decode_tok_s"]).all() and (
        fits["decode_tok_s"] < fits["fast_tok_s"]
    ).all()
    assert table.loc[~table["fits"], ["decode_tok_s", "slow_tok_s", "fast_tok_s"]].isna().all(axis=None)
    large = {row["model"] for _, row in table.iterrows() if row["precision"] == "float16" and row["fits"]}
    assert not large  # 16 bits of 2.5 billion weights are 5 GB, and the phone leaves 3.6
    assert set(fits.loc[fits["precision"] == "Q4_0", "model"]) == {"Gemma-2B", "Phi-2", "StableLM-3B"}
    assert fits_and_range(phone, [models()["Gemma-2B"]]).equals(fits_and_range(phone, ["Gemma-2B"]))
