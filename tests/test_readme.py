"""The README's Python blocks run, one after another, as a reader would type them."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.filterwarnings("ignore:.*[Ll]ogger.*:UserWarning")  # lightning: a Trainer without tensorboard
def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    names = {}
    for block in blocks:
        exec(block, names)
    assert type(names["callbacks"][0]).__name__ == "WeightDecay"


def test_it_is_short_and_what_it_links_to_is_there():
    text = README.read_text()
    assert len(text.split()) < 900
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert len(links) >= 5
    assert all((README.parent / link).exists() for link in links)
