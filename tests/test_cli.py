"""Everything can be built from YAML by LightningCLI, and wrong YAML says what is wrong."""

import sys

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_regularize import RegularizedModule, WeightConstraint, WeightDecay
from lightning_regularize.callbacks._base import Regularizer
from lightning_regularize.factors import WidthPower
from lightning_regularize.projections import Function, TopShare
from lightning_regularize.schedules import Constant, CubicRamp, FollowLR
from tests.models import randn
from tests.test_docs import blocks_of
from tests.test_docs import run as run_blocks
from tests.training.support import zero_mean

pytest.importorskip("jsonargparse")


@pytest.fixture(autouse=True)
def _command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cli"])  # LightningCLI warns where both it and `args` are given
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # lightning 2.6 calls what jsonargparse renames


SCHEDULE = """
class_path: lightning_regularize.schedules.Warmup
init_args:
  schedule: {class_path: lightning_regularize.schedules.Cosine, init_args: {start: 0.1, end: 0.4}}
  steps: 2
  start: 0.05
"""

# One of each, and two of some, as a user would write them.
CALLBACKS = f"""
- class_path: lightning_regularize.WeightDecay
  init_args:
    weight_decay: {yaml.safe_load(SCHEDULE)}
    factors: {{"layers.3.*": 0.5}}
    exclude: [bias, norm, "type:LayerNorm"]
- class_path: lightning_regularize.L1Penalty
  init_args: {{strength: 1.0e-4, include: ["layers.0.*"]}}
- class_path: lightning_regularize.L1Penalty
  init_args: {{strength: 1.0e-5, include: ["layers.3.*"], method: proximal}}
- class_path: lightning_regularize.GroupLassoPenalty
  init_args: {{strength: 1.0e-6, include: ["layers.0.*"], group: block, block_size: 2}}
- class_path: lightning_regularize.WeightConstraint
  init_args:
    projection: {{class_path: lightning_regularize.projections.MaxNorm, init_args: {{max_norm: 0.5}}}}
- class_path: lightning_regularize.WeightConstraint
  init_args:
    projection: {{class_path: lightning_regularize.projections.Box, init_args: {{low: -0.3, high: 0.3}}}}
    include: ["layers.0.*"]
- class_path: lightning_regularize.WeightConstraint
  init_args:
    projection:
      class_path: lightning_regularize.projections.TopShare
      init_args:
        share: {{class_path: lightning_regularize.schedules.CubicRamp, init_args: {{start: 1.0, end: 0.5}}}}
        scope: all
    include: ["layers.3.*"]
    freeze_zeros: 0.8
- class_path: lightning_regularize.WeightConstraint
  init_args: {{projection: tests.training.support.zero_mean, include: ["layers.3.bias"]}}
- class_path: lightning_regularize.DropoutSchedule
  init_args:
    p: {{class_path: lightning_regularize.schedules.Linear, init_args: {{start: 0.5, end: 0.0}}}}
- class_path: lightning_regularize.WeightNormMonitor
  init_args: {{detail: parameter, quantities: [weight, gradient]}}
- class_path: lightning_regularize.RegularizationSummary
"""

# These decay as well, which the others would make them say in a warning.
ALONE = {
    "L2Penalty": {"strength": 1e-4},
    "ElasticNetPenalty": {"l1": 1e-4, "l2": 1e-4},
    "WeightPenalty": {
        "penalty": {"class_path": "lightning_regularize.penalties.Orthogonal", "init_args": {"mode": "columns"}},
        "strength": 0.01,
    },
    "AnchorDecay": {"strength": 0.01},
    "ConstrainedDecay": {"bound": "start", "exclude": ["layers.3.*"]},
    "Hyperball": {"exclude": ["layers.3.*"]},
    "GeneralizationGapMonitor": {"metric": "loss"},
    "ActivationPenalty": {"strength": 0.01, "include": ["layers.0"]},
}


class Net(RegularizedModule):
    def __init__(self, width: int = 4, **kwargs):
        super().__init__(**kwargs)
        self.layers = nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width), nn.Dropout(0.1), nn.Linear(width, 1))

    def training_step(self, batch, batch_idx):
        loss = self.layers(batch).square().mean()
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layers(batch).square().mean())

    def train_dataloader(self):
        return torch.utils.data.DataLoader(randn(8, 4), batch_size=2)

    val_dataloader = train_dataloader


def config(tmp_path, callbacks):
    csv = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path)}}
    return {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 4,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": csv,
            "callbacks": callbacks,
        },
        "model": {
            "width": 6,
            "weight_decay": 0.0 if len(callbacks) == 1 else 0.05,
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 2}},
        },
    }


def run(path, subcommand="fit"):
    arguments = [subcommand, "--config", str(path)]
    return LightningCLI(Net, auto_configure_optimizers=False, save_config_callback=None, args=arguments)


def write(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_every_callback_trains_from_yaml_and_two_of_a_kind_as_well(tmp_path):
    cli = run(write(tmp_path, config(tmp_path, yaml.safe_load(CALLBACKS))))
    names = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert (names.count("L1Penalty"), names.count("WeightConstraint")) == (2, 4)
    assert cli.trainer.global_step == 4
    assert cli.trainer.callback_metrics["weight_decay"] == pytest.approx(0.4, rel=1e-12, abs=0)  # of the last step
    (decay,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, WeightDecay))
    assert decay.grouping.factors == {"layers.3.*": 0.5}
    (group,) = cli.trainer.optimizers[0].param_groups
    assert group["weight_decay"] == 0.05  # the module's, put back
    norms = torch.linalg.vector_norm(cli.model.layers[0].weight, dim=1)
    assert norms.max() <= 0.5


@pytest.mark.parametrize("name", ALONE)
def test_the_others_train_from_yaml(name, tmp_path):
    callbacks = [{"class_path": f"lightning_regularize.{name}", "init_args": ALONE[name]}]
    assert run(write(tmp_path, config(tmp_path, callbacks))).trainer.global_step == 4


def described(callback):
    """A callback by its class and arguments, with lists as tuples, as which YAML has no tuples."""
    return type(callback), {k: tuple(v) if isinstance(v, list) else v for k, v in callback.arguments.items()}


def test_the_recipes_are_the_same_in_yaml_and_in_python():
    config, callbacks, names = {"seed_everything": 0, "trainer": {"callbacks": []}}, [], {}
    for block in blocks_of("guides/recipes.md"):
        if block.language == "python":
            run_blocks([block], names)
        else:
            content = yaml.safe_load(block.content)
            config["trainer"]["callbacks"] += content.get("trainer", {}).get("callbacks", [])
            config |= {"model": content["model"]} if "model" in content else {}
            callbacks += names["callbacks"]
    cli = LightningCLI(Net, run=False, auto_configure_optimizers=False, save_config_callback=None, args=config)
    ours = [callback for callback in cli.trainer.callbacks if isinstance(callback, Regularizer)]
    found = [*ours, *cli.model.configure_callbacks()]  # the module's are those of the last block
    assert [described(callback) for callback in found] == [described(callback) for callback in callbacks]
    assert repr(cli.model.configure_optimizers()) == repr(names["configure_optimizers"](cli.model))


def test_the_yaml_of_several_optimizers_builds_them():
    (block,) = [block for block in blocks_of("guides/several-optimizers.md") if block.language == "yaml"]
    config = {"seed_everything": 0, **yaml.safe_load(block.content)}
    cli = LightningCLI(Hidden, run=False, auto_configure_optimizers=False, save_config_callback=None, args=config)
    muon, adamw = cli.model.configure_optimizers().optimizers
    assert type(muon) is torch.optim.Muon
    assert type(adamw) is torch.optim.AdamW
    for inner, lr in ((muon, 0.02), (adamw, 0.0003)):
        assert {(group["lr"], group["weight_decay"]) for group in inner.param_groups} <= {(lr, 0.1), (lr, 0.0)}
    (decay,) = cli.model.configure_callbacks()
    assert decay.arguments["weight_decay"] == 0.1


def test_what_print_config_prints_builds_the_same(tmp_path, capsys):
    path = write(tmp_path, config(tmp_path, yaml.safe_load(CALLBACKS)))
    with pytest.raises(SystemExit):
        LightningCLI(Net, auto_configure_optimizers=False, args=["fit", "--config", str(path), "--print_config"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    first, second = run(path), run(printed)
    assert [repr(c.schedule) for c in first.trainer.callbacks if hasattr(c, "schedule")] == [
        repr(c.schedule) for c in second.trainer.callbacks if hasattr(c, "schedule")
    ]
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


class Hidden(Net):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.layers.insert(0, nn.Linear(4, 4))


def test_several_optimizers_in_one(tmp_path, capsys):
    content = config(tmp_path, yaml.safe_load(CALLBACKS)[:1])
    muon = {"class_path": "torch.optim.Muon", "init_args": {"lr": 0.02}}
    content["model"]["optimizers"] = {"hidden_matrices": muon, "*": content["model"].pop("optimizer")}
    content["model"]["weight_decay"] = 0.1
    content["trainer"]["callbacks"][0]["init_args"]["factors"] = {"layers.4.*": 0.5}
    path = tmp_path / "several.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    options = {"auto_configure_optimizers": False, "save_config_callback": None}
    with pytest.raises(SystemExit):
        LightningCLI(Hidden, **options, args=["fit", "--config", str(path), "--print_config"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    for each in (path, printed):
        trainer = LightningCLI(Hidden, **options, args=["fit", "--config", str(each)]).trainer
        assert [type(inner).__name__ for inner in trainer.optimizers[0].optimizers] == ["Muon", "AdamW"]
        assert [group["initial_lr"] for group in trainer.optimizers[0].param_groups] == [0.02, 0.01]
        assert len(trainer.optimizers[0].param_groups[0]["params"]) == 2


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("WeightDecay", {"weight_decay": -1.0}, "weight_decay"),
        ("WeightDecay", {"weight_decay": 0.1, "exclude": ["biases"]}, r"Did you mean 'bias'"),
        ("WeightDecay", {"weight_decay": 0.1, "decay_biases": True}, "decay_biases"),
        ("L1Penalty", {"strength": 0.1, "method": "proximity"}, "proximity"),
        ("WeightNormMonitor", {"detail": "layer"}, "layer"),
    ],
    ids=["negative", "unknown word", "unknown argument", "unknown method", "unknown detail"],
)
def test_wrong_yaml_is_told(name, arguments, message, tmp_path, capsys):
    callbacks = [{"class_path": f"lightning_regularize.{name}", "init_args": arguments}]
    with pytest.raises((SystemExit, ValueError)) as caught:
        run(write(tmp_path, config(tmp_path, callbacks)))
    said = capsys.readouterr().err + str(caught.value)
    assert message.strip("r") in said


def test_constraints_are_built_with_their_numbers(tmp_path):
    cli = run(write(tmp_path, config(tmp_path, yaml.safe_load(CALLBACKS))))
    first, second, third, fourth = (c.projection for c in cli.trainer.callbacks if isinstance(c, WeightConstraint))
    assert repr(first) == "MaxNorm(max_norm=0.5, dim=None)"
    assert repr(second) == "Box(low=-0.3, high=0.3)"
    assert third == TopShare(CubicRamp(1.0, 0.5), "all")
    assert fourth == Function(zero_mean)


RULES = """
class_path: lightning_regularize.WeightDecay
init_args:
  weight_decay:
    "layers.3.*": 0.1
    embedding: 0.0
    "*":
      class_path: lightning_regularize.schedules.FollowLR
      init_args: {value: 0.2}
  exclude: [bias, norm, vector, "!layers.1.weight"]
  factors:
    "layers.0.*":
      class_path: lightning_regularize.factors.WidthPower
      init_args: {base: 1, power: 0.5}
"""


def test_a_schedule_for_each_rule_and_a_factor_of_the_width_are_built_from_yaml(tmp_path):
    cli = run(write(tmp_path, config(tmp_path, [yaml.safe_load(RULES)])))
    (decay,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, WeightDecay))
    assert decay.rules.names == ["layers.3.*", "embedding", "*"]
    assert decay.rules.schedules == [Constant(0.1), Constant(0.0), FollowLR(0.2)]
    assert decay.grouping.factors == {"layers.0.*": WidthPower(1)}
    logged = cli.trainer.callback_metrics
    assert logged["weight_decay/pg1/layers.3.*"] == pytest.approx(0.1, rel=1e-6, abs=0)
    assert logged["weight_decay/pg1/*"] == pytest.approx(0.2 * 0.1 * 2, rel=1e-6, abs=0)  # StepLR, and 4 inputs
