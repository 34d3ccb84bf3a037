"""Do loggers get the callbacks' arguments, beside the module's hyper-parameters, and are they read back?"""

import math

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_regularize import (
    AnchorDecay,
    L1Penalty,
    RegularizationSummary,
    WeightConstraint,
    WeightDecay,
    WeightNormMonitor,
    regularize,
)
from lightning_regularize.projections import MaxNorm
from lightning_regularize.schedules import Constant, Cosine
from tests.distributed import run_distributed
from tests.reading import read_wandb_config
from tests.training.support import QUIET, Batches, Regression, make_trainer

pytestmark = QUIET

EXPECTED = {
    "regularization/WeightDecay/weight_decay": "Cosine(start=0.1, end=1.0)",
    "regularization/WeightDecay/exclude": "['bias', 'norm']",
    "regularization/WeightDecay/factors": "{'output.*': 0.5}",
    "regularization/WeightDecay/total_steps": None,
    "regularization/WeightDecay/method": "optimizer",
    "regularization/WeightDecay/rounding": "nearest",
    "regularization/WeightDecay/seed": 0,
    "regularization/L1Penalty 1/strength": 0.01,
    "regularization/L1Penalty 2/strength": 0.02,
    "regularization/L1Penalty 2/include": "['output.*']",
    "regularization/WeightConstraint/projection": "MaxNorm(max_norm=0.5, dim=None)",
    "regularization/WeightNormMonitor/norm_type": math.inf,
    "regularization/WeightNormMonitor/histograms": False,
}


def callbacks(**options):
    return [
        WeightDecay(Cosine(0.1, 1.0), exclude=("bias", "norm"), factors={"output.*": 0.5}),
        L1Penalty(Constant(0.01), include=("hidden.*",)),
        L1Penalty(0.02, include=("output.*",)),
        WeightConstraint(MaxNorm(0.5)),
        WeightNormMonitor(quantities=("weight",), norm_type=math.inf),
        RegularizationSummary(**options),
    ]


class Saved(Regression):
    """A module with hyper-parameters of its own, and that of LightningCLI, which Lightning keeps from loggers."""

    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"width": 3, "_class_path": "tests.Saved"})


def fit(*loggers, module=None, **options):
    trainer = make_trainer(*callbacks(**options), logger=list(loggers), max_epochs=1, limit_train_batches=2)
    trainer.fit(Saved() if module is None else module, Batches())
    return trainer


def in_yaml(logger):
    with open(f"{logger.log_dir}/hparams.yaml") as file:
        return yaml.safe_load(file)


def in_tensorboard(logger):
    """What the page of hyper-parameters shows: of each run it looks only at the first record."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data

    events = EventAccumulator(logger.log_dir)
    events.Reload()
    content = events.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    values = parse_session_start_info_plugin_data(content).hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()}


def test_loggers_write_them_beside_those_of_the_module(tmp_path, monkeypatch):
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    csv, board = CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "board")
    wandb = WandbLogger(save_dir=tmp_path)
    fit(csv, board, wandb)
    wandb.experiment.finish()
    of_wandb = read_wandb_config(tmp_path)
    for key, value in EXPECTED.items():
        assert in_yaml(csv)[key] == value, key
        assert in_yaml(board)[key] == value, key
        assert in_tensorboard(board)[key] == ("None" if value is None else value), key
        assert of_wandb[key] == value, key
    for found in (in_yaml(csv), in_yaml(board), in_tensorboard(board), of_wandb):
        assert found["width"] == 3
        assert not [key for key in found if "RegularizationSummary" in key or key == "_class_path"]


@pytest.mark.filterwarnings("ignore")  # mlflow, on import and on use
def test_mlflow_has_them_among_its_parameters(tmp_path, monkeypatch):
    """Not installed with the others: `pip install mlflow` for it. Seen with 3.18.0."""
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = MLFlowLogger(tracking_uri=f"file:{tmp_path}")
    fit(mlflow)
    run = mlflow.experiment.get_run(mlflow.run_id)
    assert {key: run.data.params[key] for key in EXPECTED} == {key: str(value) for key, value in EXPECTED.items()}
    assert run.data.metrics["weight_norm/total"] > 0
    assert run.data.params["width"] == "3"


def test_they_can_be_left_out(tmp_path):
    csv = CSVLogger(tmp_path)
    fit(csv, log_hyperparams=False)
    assert in_yaml(csv) == {"width": 3}


def test_what_a_module_brings_is_among_them_and_tensors_are_not(tmp_path):
    csv = CSVLogger(tmp_path)
    anchor = AnchorDecay(0.1, anchor={"hidden.weight": torch.zeros(4, 3)}, exclude=("output.*", "norm", "*.bias"))
    trainer = make_trainer(anchor, RegularizationSummary(), logger=csv, max_epochs=1, limit_train_batches=1)
    trainer.fit(regularize(Regression(), 0.3, exclude=("bias", "hidden.*", "norm")), Batches())
    found = in_yaml(csv)
    assert found["regularization/WeightDecay/weight_decay"] == 0.3
    assert found["regularization/AnchorDecay/strength"] == 0.1
    assert "regularization/AnchorDecay/anchor" not in found


class Recording(DummyLogger):
    def __init__(self):
        super().__init__()
        self.logged = {}

    def log_hyperparams(self, params, *args, **kwargs):
        self.logged |= params


def test_nothing_is_logged_while_a_model_is_only_validated():
    module, logger = Regression(), Recording()
    module.validation_step = module.training_step
    make_trainer(*callbacks(), logger=logger).validate(module, Batches(), verbose=False)
    assert logger.logged == {}
    fit(logger)
    assert logger.logged["regularization/WeightDecay/method"] == "optimizer"


class Counting(CSVLogger):
    """Without Lightning's `rank_zero_only`, as loggers of others may be."""

    calls = 0

    def log_hyperparams(self, params=None):
        Counting.calls += 1


def _on_two(rank, world_size, folder):
    trainer = make_trainer(
        WeightDecay(0.1),
        RegularizationSummary(),
        logger=Counting(folder),
        max_epochs=1,
        limit_train_batches=1,
        strategy="ddp",
        devices=world_size,
    )
    trainer.fit(Regression(), Batches())
    return Counting.calls


def test_only_the_first_rank_logs(tmp_path):
    assert run_distributed(_on_two, tmp_path) == [1, 0]


@pytest.mark.parametrize("flag", [1, None, "no"], ids=repr)
def test_the_switch_is_a_boolean(flag):
    with pytest.raises(TypeError, match=r"^RegularizationSummary: `log_hyperparams` should be True or False, got"):
        RegularizationSummary(log_hyperparams=flag)
