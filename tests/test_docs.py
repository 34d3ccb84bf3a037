"""Every block of the documentation runs, every link leads somewhere, and every public name has an entry.

Oracles of the migration page: formulas of the other libraries written out by hand in float64, and timm where it is.
"""

import ast
import builtins
import contextlib
import importlib
import importlib.util
import inspect
import io
import re
import shlex
import subprocess
import sys
import textwrap
from importlib.metadata import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import lightning_regularize
from lightning_regularize.projections import MaxNorm
from lightning_regularize.schedules import Position
from tests.models import randn

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
TITLED_NOT_RUN = re.compile(r'title="[^"]*\bnot run\b[^"]*"')
DOCUMENTED_WHOLE = (
    "decay", "groups", "metrics", "norms", "optimizers", "penalties", "plots", "projections", "schedules", "selection",
    "step_sizes", "theory",
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*[Ll]ogger.*:UserWarning",  # lightning: a Trainer without tensorboard
    "ignore:.*`shuffle=True`.*:UserWarning",
)


class Block(NamedTuple):
    language: str
    options: str
    content: str


def text_of(page):
    return (DOCS / page).read_text()


def blocks_of(page):
    fences = re.findall(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```$", text_of(page), flags=re.DOTALL | re.MULTILINE)
    return [
        Block(language, options, re.sub(f"^{indent}", "", content, flags=re.MULTILINE))
        for indent, language, options, content in fences
    ]


def prose_of(page):
    """A page without its blocks and code spans, in which links are links."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", text_of(page), flags=re.DOTALL)


def run(blocks, names):
    """Run the Python blocks in order, and compare what they print with the output blocks behind them."""
    printed = ""
    for block in blocks:
        if block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as stdout:
                exec(block.content, names)
            printed = stripped(stdout.getvalue())
        elif block.language == "text":
            assert stripped(block.content) in printed
    return names


def stripped(text):
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def names_of_the_quick_start():
    """The guides use its first block, as they say."""
    return run(blocks_of("quick-start.md")[:1], {"__name__": "docs"})


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language == "python" for b in blocks_of(page))])
def test_the_python_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")  # what the output blocks were printed with
    torch.manual_seed(0)
    run(blocks_of(page), names_of_the_quick_start())


def borrowed_by(page):
    """The names that the blocks of a page use and do not define."""
    tree = ast.parse("\n".join(block.content for block in blocks_of(page) if block.language == "python"))
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    defined = {name.id for name in names if not isinstance(name.ctx, ast.Load)} | {*dir(builtins), "__name__"}
    for node in ast.walk(tree):
        if isinstance(node, ast.alias):
            defined.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)):
            defined.add(node.name)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
    return {name.id for name in names} - defined


@pytest.mark.parametrize("page", [page for page in PAGES if borrowed_by(page)])
def test_a_page_that_borrows_from_the_quick_start_begins_with_a_link_to_it(page):
    assert borrowed_by(page) <= {"Classifier", "loader"}
    assert re.search(r"\]\((\.\./)?quick-start\.md#a-module\)", text_of(page).partition("```")[0])


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_of_a_language_that_is_run_or_say_that_they_are_not(page):
    for language, options, _ in blocks_of(page):
        assert language in {"python", "py", "yaml", "bash", "text"}
        assert (language == "py") == bool(TITLED_NOT_RUN.search(options))
        assert language != "text" or options.strip() == 'title="Output"'


CLI_PAGE = "guides/lightning-cli.md"


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """The program of the CLI page beside its configuration: a function of the command line's arguments."""
    package = pytest.importorskip("lightning.pytorch.cli")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # lightning 2.6 calls what jsonargparse renames
    module = run(blocks_of(CLI_PAGE), {"__name__": "docs"})["Classifier"]
    (config, _) = (block.content for block in blocks_of(CLI_PAGE) if 'title="config.yaml' in block.options)
    Path("config.yaml").write_text(config)
    options = {"auto_configure_optimizers": False, "save_config_callback": None}
    return lambda *arguments: package.LightningCLI(module, **options, args=list(arguments))


@pytest.mark.parametrize("decays_by", ["callback", "module"])
def test_the_configurations_of_the_cli_page_train(decays_by, cli):
    config, of_the_model = (yaml.safe_load(b.content) for b in blocks_of(CLI_PAGE) if 'title="config.yaml' in b.options)
    if decays_by == "module":
        config["model"] |= of_the_model["model"]
        callbacks = config["trainer"]["callbacks"]
        config["trainer"]["callbacks"] = [c for c in callbacks if not c["class_path"].endswith("WeightDecay")]
        Path("config.yaml").write_text(yaml.safe_dump(config))
    trained = cli("fit", "--config", "config.yaml")
    (decay,) = (c for c in trained.trainer.callbacks if isinstance(c, lightning_regularize.WeightDecay))
    assert decay.grouping.factors == {"net.4.*": 0.1}
    expected = {"callback": 0.4, "module": 0.05}[decays_by]  # in the last step
    assert decay.schedule(Position(15, 16, 1, 1e-3, 1e-3)) == pytest.approx(expected, rel=1e-12, abs=0)


def commands_of(text):
    """The lines of the bash blocks of a text, in words and without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


def test_the_commands_of_the_cli_page_run(cli, capsys):
    trained, changed, printed = [words[2:] for words in commands_of(text_of(CLI_PAGE)) if words[0] == "python"]
    assert cli(*trained).trainer.global_step == 16
    other = cli(*changed)
    assert other.trainer.global_step == 5 * 8
    assert other.model.configure_optimizers()["optimizer"].defaults["lr"] == 0.01
    with pytest.raises(SystemExit) as ended:
        cli(*printed)
    assert ended.value.code == 0
    assert "class_path: lightning_regularize.WeightDecay" in capsys.readouterr().out


COMMANDS = [
    pytest.param(words, id=" ".join([page, *words[:3]]))
    for page in ("../README.md", "../CONTRIBUTING.md", *PAGES)
    for words in commands_of(text_of(page))
]


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_name_what_there_is(words):
    """Those of train.py run in the tests of their pages."""
    if words[0] == "make":
        assert re.search(f"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    elif words[0] == "python":
        assert words[1] == "train.py" or (ROOT / words[1]).exists()
    else:
        extras = metadata("lightning-regularize").get_all("Provides-Extra")
        known = {"lightning-regularize", ".", "dist/*.whl", "hydra-core>=1.3"}
        known |= {f"lightning-regularize[{extra}]" for extra in extras}
        assert words[:2] == ["pip", "install"]
        assert set(words[2:]) <= known


def test_each_line_of_the_table_of_recipes_makes_callbacks_or_an_optimizer():
    names = run(blocks_of("guides/which-recipe.md"), {"self": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))})
    rows = [row.split(" | ") for row in text_of("guides/which-recipe.md").splitlines() if row.startswith("| ")][1:]
    lines = {situation: [eval(code, names) for code in re.findall("`([^`]+)`", line)] for situation, line, _ in rows}
    assert len(lines) == 9
    for situation, made in lines.items():
        assert made, situation
        assert all(isinstance(each, (Callback, torch.optim.Optimizer)) for each in made), situation


@pytest.mark.filterwarnings("ignore")  # transformers and accelerate, on import and on use
def test_the_block_for_transformers_trains(tmp_path, monkeypatch):
    for package in ("transformers", "accelerate"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in blocks_of("guides/any-training-loop.md") if block.language == "py"]
    names, shown = {"x": randn(64, 16)}, []
    handle = register_optimizer_step_post_hook(lambda o, *_: shown.append(o.param_groups[0]["weight_decay"]))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(block.content, names)
    finally:
        handle.remove()
    assert (shown[0], shown[-1]) == (0.04, 0.4)
    decays = {len(group["params"]): group["weight_decay"] for group in names["trainer"].optimizer.param_groups}
    assert decays == {2: 0.1, 4: 0.0}  # their own again


# Links, navigation, names


def anchors_of(page):
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.replace("`", "")).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_images_inside_the_documentation_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (DOCS / page).parent / path if path else DOCS / page
        assert linked.is_file(), target
        assert not anchor or anchor in anchors_of(linked.resolve().relative_to(DOCS)), target


def navigation():
    def pages_in(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for child in (entry.values() if isinstance(entry, dict) else entry) for page in pages_in(child)]

    return pages_in(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])


def test_the_navigation_lists_every_page_once():
    assert sorted(navigation()) == PAGES


def test_the_site_loads_nothing_from_elsewhere():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert config["theme"]["font"] is False
    loaded = [*config.get("extra_css", ()), *config.get("extra_javascript", ()), *config["extra"]["polyfills"]]
    assert all("//" not in path and (DOCS / path).is_file() for path in loaded)


def documented():
    """What stands after ``:::`` on the API pages."""
    return {name for page in PAGES for name in re.findall(r"^::: (\S+)$", text_of(page), flags=re.MULTILINE)}


def test_what_the_api_pages_name_exists():
    for path in documented():
        package, _, name = path.rpartition(".")
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(path)
            continue
        assert hasattr(importlib.import_module(package), name), path


@pytest.mark.parametrize("name", lightning_regularize.__all__)
def test_every_name_of_the_package_has_an_entry_in_the_api(name):
    pages = {f"lightning_regularize.{module}" for module in ("groups", "optimizers", "selection")}
    home = getattr(getattr(lightning_regularize, name), "__module__", None)
    assert f"lightning_regularize.{name}" in documented() or home in pages & documented() or name == "DEFAULT_EXCLUDE"
    assert f"[`{name}`][lightning_regularize.{name}]" in text_of("api/index.md")


@pytest.mark.parametrize("name", DOCUMENTED_WHOLE)
def test_modules_are_documented_whole_and_each_public_name_has_a_docstring(name):
    assert f"lightning_regularize.{name}" in documented()
    module = importlib.import_module(f"lightning_regularize.{name}")
    for each, value in vars(module).items():
        if not each.startswith("_") and getattr(value, "__module__", None) == module.__name__ and callable(value):
            assert inspect.getdoc(value), each


def test_every_example_is_in_the_gallery():
    examples = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"__main__", "claims", "pictures"}
    assert examples <= anchors_of("examples.md")


# Migration: the numbers are right


class Still(LightningModule):
    """Nothing moves its weights but what callbacks do."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return sum(0.0 * parameter.sum() for parameter in self.parameters())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def taken_off(net, callbacks):
    """What one step of SGD with rate 1 takes off each parameter: the gradient that the callbacks make."""
    module = Still(net).double()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_steps": 1}
    Trainer(callbacks=callbacks, precision="64-true", **settings).fit(module, torch.utils.data.DataLoader([0.0]))
    after = dict(module.named_parameters())
    return {name: before[name] - after[name].detach() for name in before}, before


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-14, msg=name)


@pytest.fixture
def page(tmp_path, monkeypatch):
    """All names of the migration page."""
    monkeypatch.chdir(tmp_path)
    return run(blocks_of("migration.md"), {"__name__": "docs"})


@pytest.fixture
def net():
    layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.PReLU(), nn.Linear(4, 2))
    for parameter in layers.parameters():
        parameter.data = randn(*parameter.shape)
    return layers.double()


def decays_of(groups):
    return {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}


def test_migration_from_groups_by_hand(page):
    ours = decays_of(lightning_regularize.param_groups(page["model"], 0.05))
    assert ours == decays_of(page["groups"])
    assert set(ours.values()) == {0.05, 0.0}


def test_migration_from_a_penalty_in_the_loss(page, net):
    found, before = taken_off(net, page["callbacks"])
    twin = Still(net).double()
    for name, parameter in twin.named_parameters():
        parameter.data, parameter.grad = before[name], None
    page["loss_with_penalty"](twin, 0.0).backward()
    assert_close(found, {name: parameter.grad for name, parameter in twin.named_parameters()})


def test_migration_from_keras_regularizers(page, net):
    found, before = taken_off(net, page["keras_regularizers"])
    expected = {name: torch.zeros_like(value) for name, value in before.items()}
    expected["net.0.weight"] = 0.01 * 2 * before["net.0.weight"]  # of 0.01 * sum(w ** 2)
    expected["net.0.bias"] = 0.001 * before["net.0.bias"].sign()  # of 0.001 * sum(|w|)
    assert_close(found, expected)


@pytest.mark.parametrize(
    ("to_torch", "shape", "axis", "ours"),
    [
        pytest.param((1, 0), (5, 6), [0], {}, id="Dense"),
        pytest.param((3, 2, 0, 1), (3, 3, 4, 5), [0, 1, 2], {}, id="Conv2D"),
        pytest.param((3, 2, 0, 1), (3, 3, 4, 5), [0], {"dim": 2}, id="Conv2D, default axis"),
        pytest.param((0, 1), (7, 4), [1], {}, id="Embedding"),
        pytest.param((0, 1), (7, 4), [0], {"dim": 0}, id="Embedding, default axis"),
    ],
)
def test_migration_from_keras_max_norm(to_torch, shape, axis, ours):
    kernel = randn(*shape).double()
    norms = kernel.square().sum(axis, keepdim=True).sqrt()
    in_keras = kernel * norms.clamp(0, 1.0) / (1e-7 + norms)  # keras.constraints.MaxNorm(1.0, axis)
    assert (norms > 1).any()
    found = MaxNorm(1.0, **ours).project(kernel.permute(to_torch).contiguous())
    torch.testing.assert_close(found, in_keras.permute(to_torch), rtol=0, atol=1e-6)


def test_migration_from_chainer_hooks(page, net):
    found, before = taken_off(net, page["chainer_hooks"][:2])  # Lightning has added its own since
    assert_close(found, {name: 5e-4 * value + 1e-5 * value.sign() for name, value in before.items()})


def test_migration_from_chainers_decay_of_all_but_biases(page, net):
    found, before = taken_off(net, [page["decay"]])
    biases = {"net.0.bias", "net.3.bias"}  # called `b` in Chainer, where `beta` of the normalization decays
    assert_close(found, {name: 0.0 * value if name in biases else 5e-4 * value for name, value in before.items()})


def test_migration_from_fastai(page, net):
    decays = decays_of(lightning_regularize.param_groups(net, 0.01, exclude=("bias", "norm")))
    names = {name for name, parameter in net.named_parameters() if decays[id(parameter)]}
    # fastai's `norm_bias_params`: all of its norms, and whatever is called `bias`
    assert names == {"0.weight", "2.weight", "3.weight"}


def test_migration_from_timm(page):
    timm = pytest.importorskip("timm.optim")
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "norm": nn.LayerNorm(4), "conv": nn.Conv1d(4, 4, 3)})
    model["embed"].no_weight_decay = lambda: {"weight"}
    theirs = timm.param_groups_weight_decay(model, 0.05, no_weight_decay_list=["embed.weight"])
    assert decays_of(lightning_regularize.param_groups(model, 0.05)) == decays_of(theirs)


# The site


def test_docstrings_become_markdown():
    pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("docstrings", DOCS / "_hooks" / "docstrings.py")
    docstrings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docstrings)
    given = """\
        See :func:`~lightning_regularize.theory.timescale`\\ s, :meth:`Penalty.value` and :math:`w_0`.
        Not :func:`~lightning_regularize._sharding.reshard`, which has no page.

        .. math:: a
            + b

        ``bias``
            Named so.

        * one
          and more

        ====  =====
        A     B
        ====  =====
        a     b
              c
        ====  =====

        Example:
            >>> 1

        References:
            Someone, 2024.
        """
    expected = """\
        See [`timescale`][lightning_regularize.theory.timescale]s, [`Penalty.value`][here.Penalty.value] and $w_0$.
        Not `reshard`, which has no page.

        $$
        a + b
        $$

        `bias`
        :   Named so.

        *   one
            and more

        | A | B |
        | --- | --- |
        | a | b c |

        Examples:
            >>> 1

        *References:* Someone, 2024.
        """
    found = docstrings.to_markdown(textwrap.dedent(given), lambda name: f"here.{name}")
    assert re.sub(r"\n{2,}", "\n\n", found) == textwrap.dedent(expected)


def test_the_site_builds_without_a_warning(tmp_path):
    for package in ("material", "math_core", "mkdocs", "mkdocstrings_handlers.python"):
        pytest.importorskip(package)
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {page: (tmp_path / "site" / page).with_suffix(".html").read_text() for page in PAGES}
    assert "<math" in pages["mathematics.md"]
    assert "<math" in pages["api/theory.md"]
    assert (tmp_path / "site" / "search" / "search_index.js").is_file()  # with which search works in a folder
    assert all(
        'src="javascripts/iframe-worker.js"' in re.sub(r'src="(\.\./)+', 'src="', html) for html in pages.values()
    )
    left_over = re.compile(r':(func|class|meth|mod|data|math):|\.\. math|class="arithmatex"|<script src="http')
    assert not {page: found for page, html in pages.items() if (found := left_over.search(html))}
