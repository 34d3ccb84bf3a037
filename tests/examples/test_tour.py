"""Does the notebook show what is saved in it? `jupyter execute --inplace examples/tour.ipynb` saves it anew."""

import os
import re

import pytest

from tests.examples.support import EXAMPLES

nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
import nbformat  # noqa: E402  which nbclient brings

NOTEBOOK = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",  # jupyter_client and zmq, on event loops
    "ignore:.*[Pp]roactor.*:RuntimeWarning",
)


def shown(notebook):
    """What each cell shows, by type; of figures only that there is one."""
    found = []
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        for output in cell.outputs:
            if output.output_type == "stream":
                found.append((output.name, output.text))
            else:
                data = dict(output.data)
                if "image/png" in data:
                    found.append(("image/png", data["image/png"] != ""))
                else:
                    found += sorted(data.items())
    return found


def test_its_links_lead_to_pages():
    text = "".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) >= 3
    assert all((EXAMPLES / link).is_file() for link in links)


def test_it_shows_what_is_saved_in_it(tmp_path, monkeypatch):
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))  # nothing is left in a home
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]))
    again = nbclient.execute(nbformat.from_dict(NOTEBOOK), cwd=str(tmp_path), timeout=100)
    found = shown(again)
    assert found == shown(NOTEBOOK)
    kinds = [kind for kind, _ in found]
    assert "stderr" not in kinds
    assert kinds.count("image/png") == 2
    assert sum("<table>" in text for kind, text in found if kind == "text/html") == 3
    assert list(tmp_path.glob("*.csv")) == []
