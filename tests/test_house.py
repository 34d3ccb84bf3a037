"""Is the tree in CONTRIBUTING.md the tree that there is, is plain torch free of Lightning, and can tests fail?"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_regularize"
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")
MAY_IMPORT_LIGHTNING = ("callbacks/", "_trainer/", "module.py", "__init__.py")

FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
PLAIN = [path for path in FILES if not path.startswith(MAY_IMPORT_LIGHTNING)]


def tree():
    """Paths and questions in the table of CONTRIBUTING.md, in order."""
    _, _, section = (ROOT / "CONTRIBUTING.md").read_text().partition("\n## The tree\n")
    return re.findall(r"^\| `([^`]+)` \| (.+) \|$", section, flags=re.MULTILINE)


def folders():
    parents = {parent.as_posix() for path in FILES for parent in Path(path).parents}
    return {f"{parent}/" for parent in parents - {"."}}


def test_the_tree_lists_every_file_and_folder_once():
    listed = [path for path, _ in tree()]
    assert sorted(listed) == sorted({*FILES, *folders()})


def test_every_file_has_its_own_question():
    questions = [question for path, question in tree() if not path.endswith("/__init__.py")]
    assert len(set(questions)) == len(questions)


@pytest.mark.parametrize("path", FILES)
def test_every_file_begins_with_a_docstring(path):
    assert ast.get_docstring(ast.parse((PACKAGE / path).read_text()))


# Imports


def imported(source, package="lightning_regularize"):
    """All modules, functions and classes that ``source`` imports, at any depth, and also for types only."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - max(node.level - 1, 0)] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def foreign(names):
    """Which of ``names`` are of Lightning, or of the rooms where it belongs."""
    rooms = tuple(f"lightning_regularize.{room.removesuffix('.py').rstrip('/')}" for room in MAY_IMPORT_LIGHTNING[:-1])
    return {name for name in names if any(name == each or name.startswith(f"{each}.") for each in (*LIGHTNING, *rooms))}


@pytest.mark.parametrize("path", PLAIN)
def test_plain_torch_does_not_import_lightning(path):
    package = ".".join(["lightning_regularize", *Path(path).parts[:-1]])
    assert not foreign(imported((PACKAGE / path).read_text(), package))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import lightning.pytorch as pl", {"lightning.pytorch"}),
        ("if TYPE_CHECKING:\n    import pytorch_lightning", {"pytorch_lightning"}),
        ("def f():\n    from lightning.fabric import Fabric", {"lightning.fabric", "lightning.fabric.Fabric"}),
        ("from lightning_regularize import module", {"lightning_regularize.module"}),
        ("from .._trainer import names", {"lightning_regularize._trainer", "lightning_regularize._trainer.names"}),
        ("import lightning_utilities, lightning_regularize.norms", set()),
        ("from lightning_regularize.callbacks_like import x", set()),
    ],
)
def test_imports_of_lightning_are_found(source, found):
    assert foreign(imported(source, "lightning_regularize._steps")) == found


def test_only_the_rooms_of_lightning_are_exempt():
    """Otherwise the check above would look at nothing."""
    assert {"schedules.py", "decay.py", "_steps/hooks.py", "_sharding.py", "plots.py"} <= set(PLAIN)
    assert not {"module.py", "callbacks/weight_decay.py", "_trainer/run.py"} & set(PLAIN)


# Tests that can fail


def loose(source):
    """The lines with a ``pytest.approx`` that does not give both tolerances."""
    nodes = list(ast.walk(ast.parse(source)))
    strict = set()
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        if {"rel", "abs"} <= {keyword.arg for keyword in call.keywords}:
            strict.update(map(id, (call.func, *call.args)))  # of ``functools.partial`` it is an argument
    approx = [node for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.approx"]
    imported = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "pytest"]
    return [node.lineno for node in (*approx, *imported) if id(node) not in strict]


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_approx_has_both_tolerances(path):
    """With one alone, the other is not always 0: ``approx(0.0024e-12, rel=1e-6)`` equals 1e-12."""
    assert not loose(path.read_text())


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("x == pytest.approx(1)", [1]),
        ("x == pytest.approx(1, rel=1e-6)", [1]),
        ("\nx == pytest.approx(1, abs=1e-6)", [2]),
        ("approx = functools.partial(pytest.approx, rel=1e-6)", [1]),
        ("approx = pytest.approx", [1]),
        ("from pytest import approx", [1]),
        ("x == pytest.approx(1, rel=1e-6, abs=0)", []),
        ("approx = functools.partial(pytest.approx, rel=1e-6, abs=0)", []),
    ],
)
def test_loose_tolerances_are_found(source, lines):
    assert loose(source) == lines
