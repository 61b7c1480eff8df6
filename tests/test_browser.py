"""Widgets as a reader meets them, in JupyterLab and Chromium: a slider redraws, a measurement is stopped."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import psutil
import pytest
from playwright.sync_api import Locator, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = "02_quantization_basics.ipynb"
SERVER_SECONDS = 60
NOTEBOOK_SECONDS = 400
CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # cells out of view stay in the page
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
# Runs every cell of the open notebook and answers when the last one is done.
RUN_ALL = """async (milliseconds) => {
    const widget = window.jupyterapp.shell.currentWidget;
    await widget.context.ready;
    await widget.sessionContext.ready;
    const late = new Promise((_, fail) => setTimeout(() => fail(new Error("the cells took too long")), milliseconds));
    await Promise.race([window.jupyterapp.commands.execute("notebook:run-all-cells"), late]);
    return widget.content.model.toJSON().cells
        .flatMap((cell) => cell.outputs || [])
        .filter((output) => output.output_type === "error")
        .map((output) => `${output.ename}: ${output.evalue}`);
}"""
PICTURE = """async (image) => {
    const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
    return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}"""


@pytest.fixture
def chromium() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.fail(
            "Chromium is not installed; `apt-get install chromium` installs it on Debian.", pytrace=False
        )
    return found


@contextmanager
def jupyterlab(folder: Path, home: Path, notebook: str = NOTEBOOK) -> Iterator[str]:
    """JupyterLab on a folder, with settings and workspaces of its own; yields a notebook's address with the token.

    The settings that the project ships lie in the environment, where every JupyterLab finds them.
    """
    private = Path(tempfile.mkdtemp(prefix="jupyter-"))  # short: sockets have paths of limited length
    settings = private / "settings"
    for name, values in SETTINGS.items():
        file = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(values))
    places = {f"JUPYTER_{name}_DIR": str(private / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    places |= {
        "JUPYTERLAB_SETTINGS_DIR": str(settings),
        "JUPYTERLAB_WORKSPACES_DIR": str(private / "workspaces"),
        "IPYTHONDIR": str(private / "ipython"),
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    log = private / "log.txt"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1"]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    command += [f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True"]
    with log.open("wb") as said:
        server = subprocess.Popen(
            command,
            cwd=folder,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=os.environ | places | {"EDGELAB_FAST": "1", "EDGELAB_HOME": str(home)},
        )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_for(f"{address}/api/status?token={token}", server, log)
        yield f"{address}/lab/tree/{notebook}?token={token}"
    finally:
        _end(server)
        shutil.rmtree(private, ignore_errors=True)


def _wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + SERVER_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urlopen(address, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.2)
    pytest.fail(
        f"JupyterLab did not answer within {SERVER_SECONDS} s:\n{log.read_text()[-2000:]}", pytrace=False
    )


def _end(server: subprocess.Popen) -> None:
    """End the server, its kernels and what they started; each lives in a session of its own."""
    if server.poll() is not None:
        return
    family = [*psutil.Process(server.pid).children(recursive=True), psutil.Process(server.pid)]
    server.terminate()  # it then ends its kernels
    _, alive = psutil.wait_procs(family, timeout=15)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=5)
    server.wait()


@contextmanager
def opened(chromium: str, address: str) -> Iterator[Page]:
    """A notebook in Chromium with all its cells run, none of which may fail. Leaves a screenshot in results/."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGUMENTS)
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.goto(address)
        page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext", timeout=60_000)
        errors = page.evaluate(RUN_ALL, 1000 * NOTEBOOK_SECONDS)
        try:
            assert errors == []
            yield page
        finally:
            screenshot = ROOT / "results" / "browser.png"
            screenshot.parent.mkdir(exist_ok=True)
            page.screenshot(path=screenshot)
            browser.close()


@pytest.mark.browser
@pytest.mark.embedded
def test_a_moved_slider_changes_the_value_and_the_picture(chromium: str, home: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "notebooks" / NOTEBOOK, tmp_path)
    with jupyterlab(tmp_path, home) as address, opened(chromium, address) as page:
        _move_bits(page)


@pytest.mark.browser
@pytest.mark.embedded
def test_a_measurement_is_stopped_and_begun_again(chromium: str, home: Path, tmp_path: Path) -> None:
    """With widget messages one after the other, as the project sets JupyterLab: a blocked kernel would hear no stop."""
    cells = ["from edgelab.widgets.exploring import explorer", "explorer(windows=31)"]
    _write(tmp_path / "stop.ipynb", cells)
    with jupyterlab(tmp_path, home, "stop.ipynb") as address, opened(chromium, address) as page:
        explorer = page.locator(".widget-vbox", has=page.locator(".widget-dropdown")).first
        measure, stop = (explorer.get_by_role("button", name=name) for name in ("Measure live", "Stop"))
        for _ in range(2):
            expect(stop).to_be_disabled()
            measure.click()
            expect(explorer.get_by_text("Step 1 of 2, none:")).to_be_visible(timeout=60_000)
            expect(explorer.get_by_text("to go.")).to_be_visible()
            expect(measure).to_be_disabled()
            expect(explorer.locator("select").first).to_be_disabled()
            stop.click()
            expect(explorer.get_by_text("Stopped. What had been measured is kept: 0 of 2")).to_be_visible()
            expect(measure).to_be_enabled()
        assert "perplexity" in explorer.locator("img").get_attribute("alt").lower()


@pytest.mark.browser
@pytest.mark.embedded
def test_a_ticked_block_changes_what_the_model_writes(chromium: str, home: Path, tmp_path: Path) -> None:
    cells = [
        "import edgelab as el",
        "from edgelab.widgets.layers import layer_picker",
        "layer_picker(el.load(), tokens=8, windows=31, only='quality')",
    ]
    _write(tmp_path / "layers.ipynb", cells)
    with jupyterlab(tmp_path, home, "layers.ipynb") as address, opened(chromium, address) as page:
        picker = page.locator(".widget-vbox", has=page.locator(".edgelab-layers")).first
        answer = picker.locator(".edgelab-layers")
        expect(answer).to_have_attribute("data-blocks", "30")
        picker.locator(".widget-checkbox input").first.check()
        expect(answer).to_have_attribute("data-blocks", "29", timeout=60_000)
        picker.get_by_role("button", name="Measure live").click()
        expect(picker.get_by_text("to go.")).to_be_visible(timeout=60_000)
        expect(picker.locator(".widget-checkbox input").first).to_be_disabled()
        picker.get_by_role("button", name="Stop").click()
        expect(picker.get_by_text("Stopped. What had been measured is kept")).to_be_visible(timeout=60_000)
        picker.get_by_role("button", name="All blocks back").click()
        expect(answer).to_have_attribute("data-blocks", "30", timeout=60_000)


@pytest.mark.browser
@pytest.mark.embedded
def test_an_adapter_is_trained_live_and_a_hotter_teacher_is_covered_by_more(
    chromium: str, home: Path, tmp_path: Path
) -> None:
    cells = [
        "from edgelab.widgets.distilling import temperature_slider",
        "temperature_slider([4.0 - 0.1 * n for n in range(200)], [f'token {n}' for n in range(200)])",
        "from edgelab.widgets.trials import adapter_trials",
        "adapter_trials(steps=50, windows=2)",
    ]
    _write(tmp_path / "adapters.ipynb", cells)
    with jupyterlab(tmp_path, home, "adapters.ipynb") as address, opened(chromium, address) as page:
        teacher = page.locator(".widget-vbox", has=page.locator(".edgelab-temperature")).first
        covered, handle = teacher.locator(".edgelab-temperature"), teacher.locator(".noUi-handle")
        before = int(covered.get_attribute("data-kl"))
        for _ in range(3):
            handle.press("ArrowRight")
        expect(covered).not_to_have_attribute("data-kl", str(before), timeout=20_000)
        assert int(covered.get_attribute("data-kl")) > before

        trials = page.locator(".widget-vbox", has=page.get_by_role("button", name="Measure live")).first
        trials.get_by_role("button", name="Measure live").click()
        expect(trials.get_by_text("to go.")).to_be_visible(timeout=60_000)
        expect(trials.locator("select").first).to_be_disabled()
        expect(trials.locator("img")).to_be_visible(timeout=180_000)  # the loss, while it trains
        trials.get_by_role("button", name="Stop").click()
        expect(trials.get_by_text("Stopped. What had been measured is kept")).to_be_visible(timeout=60_000)
        expect(trials.get_by_role("button", name="Measure live")).to_be_enabled()


@pytest.mark.browser
@pytest.mark.embedded
def test_a_fleet_is_planned_anew_and_a_device_killed_in_mid_sentence(
    chromium: str, home: Path, tmp_path: Path
) -> None:
    cells = [
        "from edgelab.widgets.fleet import fleet_editor",
        "fleet_editor()",
        "from edgelab.widgets.partition import live_partition",
        "live_partition(tokens=60)",
    ]
    _write(tmp_path / "fleet.ipynb", cells)
    with jupyterlab(tmp_path, home, "fleet.ipynb") as address, opened(chromium, address) as page:
        editor = page.locator(".widget-vbox", has=page.locator(".edgelab-plan")).first
        plan = editor.locator(".edgelab-plan")
        before = float(plan.get_attribute("data-ms"))
        handle = editor.locator(".widget-slider", has_text="Cloud").locator(".noUi-handle")
        handle.focus()
        for _ in range(6):
            handle.press("ArrowRight")
        expect(plan).not_to_have_attribute("data-ms", f"{before:.3f}", timeout=20_000)
        assert float(plan.get_attribute("data-ms")) < before
        assert editor.locator("img").get_attribute("alt")

        running = page.locator(".widget-vbox", has=page.get_by_role("button", name="Write")).first
        write, kill = (running.get_by_role("button", name=name) for name in ("Write", "Kill a device"))
        expect(kill).to_be_disabled()
        write.click()
        expect(kill).to_be_enabled(timeout=240_000)
        kill.click()
        expect(running.get_by_text("was lost: noticed in")).to_be_visible(timeout=60_000)
        expect(running.get_by_text("Done.")).to_be_visible(timeout=60_000)
        expect(write).to_be_enabled()


@pytest.mark.browser
@pytest.mark.embedded
def test_a_threshold_is_moved_and_the_cloud_unplugged(chromium: str, home: Path, tmp_path: Path) -> None:
    each = {
        "sent": "0000",
        "ms": [90.0] * 4,
        "edge_ms": [90.0] * 4,
        "scores": {"margin": [0.1, 0.3, 0.5, 0.7]},
    }
    there = each | {"sent": "1111", "ms": [60.0] * 4, "edge_ms": [0.0] * 4, "scores": {}}
    cells = [
        "import json\nimport edgelab as el\nfrom edgelab.ledger import Row\n"
        "from edgelab.widgets.hybrid import cloud_trip\nfrom edgelab.widgets.live_request import live_request",
        f"edge, cloud = {each}, {there}",
        "known = dict(host='here', threads=1, link='wifi')\n"
        "one = Row('none @ torch', served=json.dumps(edge), requests_right='0101', **known)\n"
        "two = Row('none @ cloud:cloud=(none),link=wifi', runtime='cloud', served=json.dumps(cloud),\n"
        "          requests_right='1111', sent_bytes_per_request=900.0, received_bytes_per_request=400.0, **known)\n"
        "cloud_trip(el.ledger.frame([one, two]))",
        "live_request('none @ cloud:cloud=(none),link=wifi,deadline_s=20', tokens=8)",
    ]
    _write(tmp_path / "hybrid.ipynb", cells)
    with jupyterlab(tmp_path, home, "hybrid.ipynb") as address, opened(chromium, address) as page:
        trip = page.locator(".widget-vbox", has=page.locator(".edgelab-trip")).first
        figures, handle = trip.locator(".edgelab-trip"), trip.locator(".noUi-handle")
        handle.focus()
        handle.press("Home")
        expect(figures).to_have_attribute("data-share", "0.000000", timeout=20_000)
        expect(figures).to_have_attribute("data-right", "0.500000")
        handle.press("End")
        expect(figures).to_have_attribute("data-right", "1.000000", timeout=20_000)
        expect(trip.locator("img")).to_have_attribute(
            "alt", re.compile("^100 % go to the cloud"), timeout=20_000
        )

        live = page.locator(".widget-vbox", has=page.get_by_role("button", name="Ask")).first
        ask, stop = (live.get_by_role("button", name=name) for name in ("Ask", "Stop"))
        answer = live.locator(".edgelab-answer")
        expect(stop).to_be_disabled()
        ask.click()
        expect(answer).to_have_attribute("data-by", "cloud", timeout=240_000)
        live.get_by_role("button", name="Unplug the cloud").click()
        expect(ask).to_be_enabled()
        ask.click()
        expect(answer).to_have_attribute("data-by", "edge", timeout=60_000)
        expect(live.locator("img")).to_have_attribute("alt", re.compile("1: cloud, 2: edge"), timeout=20_000)
        stop.click()
        expect(live.get_by_text("Edge, cloud and link have ended")).to_be_visible(timeout=60_000)
        expect(ask).to_be_enabled()


def _write(file: Path, cells: list[str]) -> None:
    """A notebook of some code cells."""
    kernel = {"name": "python3", "display_name": "Python 3"}  # without one JupyterLab asks for it
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata={"kernelspec": kernel}
    )
    nbformat.write(notebook, file)


def _move_bits(page: Page) -> None:
    """One bit less in the grid explorer: value, picture and the number beside the slider all change."""
    explorer = page.locator(".widget-vbox", has=page.locator(".edgelab-grid"))
    bits = explorer.locator(".widget-slider", has_text="Bits")
    explorer.scroll_into_view_if_needed()
    before = _state(explorer)
    assert before.picture.startswith(b"\x89PNG".hex())
    expect(bits.locator(".widget-readout")).to_have_text("4")

    handle = bits.locator(".noUi-handle")
    handle.focus()
    handle.press("ArrowLeft")
    expect(bits.locator(".widget-readout")).to_have_text("3")
    expect(explorer.locator(".edgelab-grid")).not_to_have_attribute("data-mse", before.mse, timeout=20_000)
    expect(explorer.locator("img")).not_to_have_attribute("src", before.source, timeout=20_000)
    after = _state(explorer)
    assert float(after.mse) > 2 * float(before.mse)  # half the levels
    assert after.picture.startswith(b"\x89PNG".hex()) and after.picture != before.picture


class State(NamedTuple):
    """What the grid explorer shows: the value in the page, and the picture's address and bytes in hexadecimal."""

    mse: str
    source: str
    picture: str


def _state(explorer: Locator) -> State:
    image = explorer.locator("img")
    mse = explorer.locator(".edgelab-grid").get_attribute("data-mse")
    return State(mse, image.get_attribute("src"), image.evaluate(PICTURE))
