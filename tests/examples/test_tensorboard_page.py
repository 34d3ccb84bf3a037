"""Does TensorBoard, opened in a browser on a run of the demo, show its scalars and histograms?"""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from matplotlib.image import imread

from tests.examples.support import run

CHROMIUM = shutil.which("chromium")
QUIET = (  # nothing but the page is fetched, from this machine
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-sync", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The address of TensorBoard on two short runs."""
    folder = tmp_path_factory.mktemp("demo")
    assert run("label_noise", "--fast", "--runs", "none", "l1", "--output", folder).returncode == 0
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder / "tensorboard", "--host", "localhost"]
    server = subprocess.Popen([*command, "--port", str(port), "--load_fast", "false"], stderr=subprocess.DEVNULL)
    address = f"http://localhost:{port}"
    try:
        deadline = time.monotonic() + 120
        while set(tags(address, "histograms")) != {"none", "l1"}:
            assert time.monotonic() < deadline, "TensorBoard did not load the runs"
            time.sleep(0.5)
        yield address
    finally:
        server.kill()
        server.wait()


def tags(address, plugin):
    """What TensorBoard's server says that there is, by run; nothing while it starts."""
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/data/plugin/{plugin}/tags") as answer:
        return {name: set(found) for name, found in json.load(answer).items()}
    return {}


def colored(address, tab, kind, runs, folder):
    """How many pixels of the first chart are neither black, white nor gray: the tag of this kind, for these runs."""
    picture = folder / f"{tab}-{runs}.png"
    url = f"{address}/#{tab}&tagFilter={kind}&regexInput={runs}"
    command = [CHROMIUM, *QUIET, f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=30000"]
    subprocess.run(
        [*command, "--window-size=1400,1000", f"--screenshot={picture}", url],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=120,
        check=True,
    )
    chart = imread(picture)[215:395, 430:705, :3]
    return int((chart.max(axis=2) - chart.min(axis=2) > 0.2).sum())


@pytest.mark.parametrize(("tab", "tag"), [("scalars", "weight_norm/total"), ("histograms", "weight_histogram/net.0")])
def test_the_page_shows_them_in_color(page, tab, tag, tmp_path):
    assert all(any(name.startswith(tag) for name in found) for found in tags(page, tab).values())
    kind = tag.partition("/")[0]
    assert colored(page, tab, kind, "none|l1", tmp_path) > 500 > 20 > colored(page, tab, kind, "nothing", tmp_path)
