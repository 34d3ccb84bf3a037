"""Does what is released say what is true? Version, requirements, imports, the citation, and the Makefile's targets."""

import ast
import importlib
import json
import pkgutil
import re
import subprocess
import sys
from importlib.metadata import metadata, requires, version
from pathlib import Path

import pytest
import yaml

import lightning_regularize

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib  # which pytest brings on Python 3.10

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "pyproject.toml").read_text()
PYPROJECT = tomllib.loads(TEXT)
PROJECT = PYPROJECT["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
PACKAGE = ROOT / "lightning_regularize"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = ["lightning_regularize"] + [
    module.name for module in pkgutil.walk_packages([str(PACKAGE)], "lightning_regularize.")
]

OTHER_NAMES = {"scikit-learn": "sklearn"}  # what a distribution is imported as, where that is not its name
# Nobody chooses to install it for us: it is imported when a parameter is met that DeepSpeed made, and is there then.
BROUGHT_BY_THE_USER = {"deepspeed"}


def distribution(requirement):
    return re.match(r"[\w-]+", requirement)[0]


def imported_as(requirement):
    return OTHER_NAMES.get(distribution(requirement), distribution(requirement).replace("-", "_"))


REQUIRED = {imported_as(requirement) for requirement in PROJECT["dependencies"]}
OPTIONAL = {imported_as(each) for extra in PROJECT["optional-dependencies"].values() for each in extra} - {
    "lightning_regularize"
}


# Version


def test_the_version_is_stated_in_one_place():
    assert PROJECT["dynamic"] == ["version"]
    assert "version" not in PROJECT
    assert "version" not in CITATION
    stated = re.findall(
        r'^__version__ = "(.*)"$', (ROOT / PYPROJECT["tool"]["hatch"]["version"]["path"]).read_text(), re.M
    )
    assert stated == [lightning_regularize.__version__]
    assert version("lightning-regularize") == lightning_regularize.__version__  # else `make test` installs anew
    elsewhere = [path.name for path in SOURCES if "__version__" in path.read_text()]
    assert elsewhere == ["__init__.py"]


# Requirements


def test_what_is_installed_says_what_pyproject_says():
    found = metadata("lightning-regularize")
    assert found["Requires-Python"] == PROJECT["requires-python"]
    assert found["Summary"] == PROJECT["description"]
    assert found["License-Expression"] == PROJECT["license"]
    assert set(found.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    expected = {(normalized(each), "") for each in PROJECT["dependencies"]}
    for extra in PROJECT["optional-dependencies"]:
        expected |= {(normalized(each), extra) for each in requirements_of(extra)}
    assert {as_written(each) for each in requires("lightning-regularize")} == expected


def requirements_of(extra):
    """What an extra asks for, with what is asked for by those of ours that it names."""
    for requirement in PROJECT["optional-dependencies"][extra]:
        name, named, _ = normalized(requirement)
        if name != "lightning-regularize":
            yield requirement
        for other in named if name == "lightning-regularize" else ():
            yield from requirements_of(other)


def as_written(requirement):
    """A requirement of the metadata, and the extra that it belongs to."""
    requirement, _, marker = requirement.partition(";")
    found = re.search(r"extra == ['\"](.*?)['\"]", marker)
    return normalized(requirement), found[1] if found else ""


def normalized(requirement):
    name, extras, rest = re.fullmatch(r"([\w-]+)(\[.*\])?(.*)", requirement.strip()).groups()
    return name, frozenset((extras or "").strip("[]").split(",")), rest


def test_each_lower_bound_has_its_reason_beside_it():
    lines = [
        line for line in TEXT.partition("[project.urls]")[0].splitlines() if re.search(r'"[\w-]+(\[.*\])?>=', line)
    ]
    bounds = [each for each in all_requirements() if ">=" in each]
    assert len([line for line in lines if "hatchling" not in line and "requires-python" not in line]) == len(bounds)
    for bound in bounds:
        (line,) = [line for line in lines if f'"{bound}"' in line]
        oldest = bound.partition(">=")[2]
        assert re.search(rf"# {re.escape(oldest)}: \S", line), f"{bound} has no reason: # {oldest}: ..."


def all_requirements():
    extras = PROJECT["optional-dependencies"].values()
    return [*PROJECT["dependencies"], *(each for extra in extras for each in extra)]


def test_each_requirement_has_a_lower_bound():
    unbounded = {each for each in all_requirements() if ">=" not in each}
    assert all(each.startswith("lightning-regularize[") for each in unbounded)


def test_the_versions_that_are_tested_are_allowed():
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M))
    for requirement in (each for each in all_requirements() if ">=" in each):
        assert as_numbers(pinned[distribution(requirement)]) >= as_numbers(requirement.partition(">=")[2]), requirement


def as_numbers(release):
    return [int(number) for number in release.split(".")]


# Imports


def imports(path):
    """Names of top-level packages that a file imports: when it is imported itself, and later."""
    tree = ast.parse(path.read_text())
    for_types = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    never = {id(inner) for node in for_types for inner in ast.walk(node)}
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    late = {id(inner) for node in functions for inner in ast.walk(node)}
    found = [
        (name.partition(".")[0], id(node) in late)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in never
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])
    ]
    known = {"lightning_regularize", *sys.stdlib_module_names}
    return ({name for name, is_late in found if is_late is late_ones} - known for late_ones in (False, True))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_what_a_file_imports_is_declared(path):
    at_once, later = imports(path)
    assert at_once <= REQUIRED
    assert later <= REQUIRED | OPTIONAL | BROUGHT_BY_THE_USER


def test_each_requirement_is_imported():
    at_once, later = zip(*map(imports, SOURCES), strict=True)
    found = set.union(*at_once, *later)
    assert found >= REQUIRED - {"lightning"}
    assert "lightning" not in found, "_trainer/names.py imports whichever package of Lightning there is"


@pytest.mark.parametrize("name", MODULES)
def test_public_names_exist(name):
    module = importlib.import_module(name)
    public = getattr(module, "__all__", [])
    assert len(set(public)) == len(public)
    assert [each for each in public if not hasattr(module, each)] == []


def test_the_package_has_public_names_and_types():
    assert len(lightning_regularize.__all__) > 15
    assert (PACKAGE / "py.typed").is_file()


STAGES = """
import importlib, json, sys, time
for names in {stages!r}:
    start = time.process_time()  # of the processor: on a busy machine the time that passes says little
    for name in names:
        importlib.import_module(name)
    print(json.dumps([time.process_time() - start, sorted(sys.modules)]))
"""


def import_in_stages(*stages):
    """A process that imports lists of modules one after another: the seconds of each, and what is loaded after it."""
    code = STAGES.format(stages=stages)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, loaded = zip(*map(json.loads, done.stdout.splitlines()), strict=True)
    return seconds, [set(names) for names in loaded]


def foreign(modules):
    """The packages of others among loaded modules."""
    return {name.partition(".")[0] for name in modules} - {"lightning_regularize", *sys.stdlib_module_names}


@pytest.mark.parametrize(
    ("imported", "other"), [("lightning.pytorch", "pytorch_lightning"), ("pytorch_lightning", "lightning")]
)
def test_the_import_is_quick_and_loads_no_package_that_lightning_has_not_loaded(imported, other):
    """Of the two packages of Lightning it loads the one alone that the user has imported."""
    pytest.importorskip(imported)
    shares = []
    while not shares or (min(shares) > 0.05 and len(shares) < 3):  # the first may compile
        (of_lightning, ours, _), (before, after, whole) = import_in_stages(
            [imported], ["lightning_regularize"], [*sorted(REQUIRED - {"lightning"}), *MODULES]
        )
        shares.append(ours / of_lightning)
        assert "lightning_regularize.schedules" in after - before
        assert foreign(after - before) == set()
        assert foreign(whole - before) & (OPTIONAL | BROUGHT_BY_THE_USER) == set()
        assert other not in whole
    assert min(shares) <= 0.05


ALONE = """
import sys, warnings
sys.modules["lightning"] = None  # as where it is not installed
warnings.simplefilter("ignore")  # Lightning's: few workers
import torch
from lightning_regularize import RegularizedModule, WeightDecay  # above Lightning, where formatters put it
from pytorch_lightning import Trainer

class Line(RegularizedModule):
    def __init__(self):
        super().__init__(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch):
        return 0.0 * self.layer(batch).sum()  # weights move by weight decay alone

line = Line()
expected = line.layer.weight.detach() * (1 - 0.1 * 0.5) ** 2  # lr * weight_decay
quiet = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
Trainer(callbacks=WeightDecay(0.5), max_steps=2, **quiet).fit(line, torch.utils.data.DataLoader(torch.ones(2, 4)))
torch.testing.assert_close(line.layer.weight.detach(), expected)
"""


def test_pytorch_lightning_alone_is_enough():
    pytest.importorskip("pytorch_lightning")
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "home"),
    [("Cosine", "schedules"), ("MaxNorm", "projections"), ("Orthogonal", "penalties"), ("plot_norms", "plots")],
)
def test_a_name_of_another_module_is_found_for_the_user(name, home):
    message = f"Write: from lightning_regularize.{home} import {name}$"
    with pytest.raises(ImportError, match=message):
        exec(f"from lightning_regularize import {name}")
    with pytest.raises(AttributeError, match=message):
        getattr(lightning_regularize, name)
    assert not hasattr(lightning_regularize, name)


@pytest.mark.parametrize("name", ["Cosinus", "check_number", "Any", "__path_of_nothing__", "step_sizes_"])
def test_other_names_are_unknown_as_in_any_module(name):
    with pytest.raises(AttributeError, match=f"^module 'lightning_regularize' has no attribute '{name}'$"):
        getattr(lightning_regularize, name)
    with pytest.raises(ImportError, match=f"^cannot import name '{name}' from 'lightning_regularize'"):
        exec(f"from lightning_regularize import {name}")


def test_modules_are_imported_as_ever():
    from lightning_regularize import plots, step_sizes  # which also has a function of its own name

    assert (plots.__name__, step_sizes.__name__) == ("lightning_regularize.plots", "lightning_regularize.step_sizes")


def test_names_are_looked_for_in_every_module_that_the_api_documents():
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    documented = re.findall(r"^::: lightning_regularize\.([a-z_]+)$", pages, re.M)
    assert set(lightning_regularize._MODULES) == set(documented) - set(lightning_regularize.__all__)


# Citation and Makefile


def test_the_citation_has_what_its_format_requires():
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION.keys() >= {"message", "title", "authors"}
    assert all(isinstance(CITATION[key], str) and CITATION[key] for key in ("message", "title", "abstract"))
    assert CITATION["type"] in ("software", "dataset")
    assert CITATION["license"] == PROJECT["license"]
    assert CITATION["authors"]
    assert all(author.keys() <= {"name", "website"} and author["name"] for author in CITATION["authors"])
    assert all(isinstance(keyword, str) for keyword in CITATION["keywords"])
    assert CITATION["title"].startswith(f"{PROJECT['name']}: ")


PAPER = (ROOT / "paper.md").read_text()
PAGES = "".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def test_the_paper_has_the_form_of_joss():
    _, header, text = PAPER.split("---\n", 2)
    fields = yaml.safe_load(header)
    assert fields.keys() >= {"title", "tags", "authors", "affiliations", "date", "bibliography"}
    assert (ROOT / fields["bibliography"]).is_file()
    known = {affiliation["index"] for affiliation in fields["affiliations"]}
    assert all(author["affiliation"] in known for author in fields["authors"])
    headings = re.findall(r"^# (.*)$", text, re.M)
    assert {"Summary", "Statement of need", "State of the field"} <= set(headings)
    assert headings[-1] == "References"
    assert 250 <= len(re.sub(r"^\|.*", "", text, flags=re.M).split()) <= 1000


def test_the_references_of_the_paper_are_those_of_the_documentation():
    entries = re.findall(r"^@\w+\{(\w+),\n(.*?)^\}", (ROOT / "paper.bib").read_text(), re.M | re.S)
    cited = set(re.findall(r"@(\w+)\b", PAPER.split("---\n", 2)[2]))
    assert cited == {key for key, _ in entries}
    for key, fields in entries:
        assert {"title", "author", "year", "url"} <= set(re.findall(r"^  (\w+) = \{", fields, re.M)), key
        (url,) = re.findall(r"url = \{(.*?)\}", fields)
        assert url in PAGES, key


def test_the_numbers_of_the_paper_are_those_of_the_documentation():
    rows = re.findall(r"^\| [^|].*\d.*\|$", PAPER, re.M)
    assert len(rows) == 4
    assert [row for row in rows if row not in PAGES] == []


@pytest.mark.parametrize("name", ["CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_pages_for_contributors_link_to_files_and_headings_that_are_there(name):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", (ROOT / name).read_text()):
        path, _, anchor = target.partition("#")
        linked = ROOT / (path or name)
        assert linked.is_file(), target
        titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.M)
        assert not anchor or anchor in [title.lower().replace(" ", "-") for title in titles], target


def test_each_target_has_a_line_of_help():
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.M)
    targets = re.findall(r"^([a-z-]+):", MAKEFILE, re.M)
    helped = re.findall(r"^([a-z-]+):.* ## \w.*$", MAKEFILE, re.M)
    assert len(targets) > 10
    assert targets == helped
    assert sorted(targets) == sorted(phony.split())
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[0] for line in shown.splitlines()] == targets


def test_the_makefile_is_what_contributors_are_told():
    told = re.findall(r"make ([a-z-]+)", (ROOT / "CONTRIBUTING.md").read_text() + (ROOT / "README.md").read_text())
    assert {"test", "check", "demo", "dist", "test-lowest"} <= set(told)
    assert set(told) <= set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M))
