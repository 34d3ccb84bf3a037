"""Everything can be built from YAML by Hydra, as the guide says: each block of it trains."""

import inspect
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import lightning_regularize
from lightning_regularize import WeightDecay, schedules
from lightning_regularize.callbacks._base import Regularizer
from tests.test_docs import blocks_of
from tests.training.support import QUIET, SaveAfter, make_trainer, weights

hydra = pytest.importorskip("hydra")
from hydra.utils import instantiate  # noqa: E402  where hydra is installed
from omegaconf import OmegaConf  # noqa: E402

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.*`shuffle=True`.*:UserWarning")]

PAGE = "guides/hydra.md"
YAML = {block.options.split('"')[1]: block.content for block in blocks_of(PAGE) if block.language == "yaml"}
ALL = OmegaConf.create(YAML["conf/callbacks.yaml"])
QUIETLY = [f"+trainer.enable_{what}=false" for what in ("progress_bar", "model_summary", "checkpointing")]


@pytest.fixture
def program(tmp_path, monkeypatch):
    """The modules of the page in a folder, beside its configuration: the function ``main`` with overrides."""
    for block in blocks_of(PAGE):
        name = block.options.split('"')[1].split(":")[0].split(" ")[0] if block.options else ""
        if name.endswith((".py", "config.yaml")):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(block.content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def main(*overrides):
        import train

        with hydra.initialize_config_dir(str(tmp_path / "conf"), version_base="1.3"):
            return train.main(hydra.compose("config", [*QUIETLY, "+trainer.accelerator=cpu", *overrides]))

    yield main
    for name in ("train", "schedule_of_mine"):
        sys.modules.pop(name, None)


def classifier():
    import train

    torch.manual_seed(0)
    return train.Classifier(weight_decay=0.0)


def find(trainer, kind):
    (found,) = (callback for callback in trainer.callbacks if isinstance(callback, kind))
    return found


def test_the_program_trains_and_interpolations_reach_the_schedule(program):
    trainer = program("weight_decay=0.2", "callbacks.l1=null")
    decay = find(trainer, WeightDecay)
    assert decay.schedule == schedules.Cosine(0.2, 0.4)
    assert decay.grouping.factors == {"net.4.*": 0.1}
    assert not [c for c in trainer.callbacks if isinstance(c, lightning_regularize.L1Penalty)]
    assert trainer.global_step == 16
    assert trainer.callback_metrics["weight_decay"] == pytest.approx(0.4, rel=1e-12, abs=0)
    assert isinstance(trainer.optimizers[0], torch.optim.AdamW)  # of a function that `_partial_` made


def test_the_commands_of_the_page_change_values_take_out_a_callback_and_train_several_times(program, monkeypatch):
    (block,) = [b.content for b in blocks_of(PAGE) if b.language == "bash" and "--multirun" in b.content]
    changed, without, thrice = ([*shlex.split(line)[2:]] for line in block.splitlines())
    assert find(program(*changed), WeightDecay).schedule == schedules.Cosine(0.05, 0.2)
    assert not [c for c in program(*without).callbacks if isinstance(c, lightning_regularize.L1Penalty)]
    monkeypatch.setattr(sys, "argv", ["train.py", *thrice, *QUIETLY, "+trainer.accelerator=cpu"])
    runpy.run_path("train.py", run_name="__main__")
    assert sorted(path.parent.name for path in Path("multirun").glob("*/*/*/.hydra")) == ["0", "1", "2"]


@pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning")  # lightning: of each resumed run
def test_the_command_of_the_page_resumes_what_the_program_has_saved(program):
    (command,) = [b.content for b in blocks_of(PAGE) if b.language == "bash" and "ckpt_path" in b.content]
    _, _, *overrides = shlex.split(command)
    saves = "trainer.enable_checkpointing=true"
    program(saves)
    trainer = program(saves, *overrides)
    assert trainer.ckpt_path.endswith("epoch=1-step=16.ckpt")
    assert trainer.global_step == 10 * 8


def test_every_callback_is_on_the_page():
    public = vars(lightning_regularize)
    callbacks = {name for name, each in public.items() if inspect.isclass(each) and issubclass(each, Regularizer)}
    assert {each._target_.rpartition(".")[2] for each in ALL.values()} == callbacks


@pytest.mark.parametrize("name", list(ALL))
def test_each_callback_trains_with_the_lists_and_mappings_of_hydra(name, program):
    trainer = make_trainer(instantiate(ALL[name]), max_epochs=2, logger=CSVLogger("logs"))
    trainer.fit(classifier())
    assert trainer.global_step == 16


@pytest.mark.parametrize("convert", ["none", "partial", "object", "all"])
def test_what_hydra_makes_is_the_same_whatever_it_converts(convert):
    for config in ALL.values():
        made, plainly = instantiate(config, _convert_=convert), instantiate(config, _convert_="all")
        assert repr(made) == repr(plainly)
        assert made.argument_texts() == plainly.argument_texts()
        assert made.identity() == plainly.identity()


def test_a_list_of_schedules_needs_convert():
    config = OmegaConf.create(YAML["conf/pieces.yaml"])
    expected = schedules.Join([schedules.Linear(0.0, 0.1), schedules.Cosine(0.1, 0.4)], [0.5])
    assert instantiate(config).schedule == expected
    del config.weight_decay["_convert_"]
    with pytest.raises(Exception, match=r"`schedules` .* write `_convert_: all` beside the `_target_` that has the"):
        instantiate(config)


def test_functions_train(program):
    config = OmegaConf.create(YAML["conf/functions.yaml"])
    stairs, own = instantiate(config.stairs), instantiate(config.own)
    assert schedules.simulate(stairs.schedule, total_steps=6) == pytest.approx([0.2] * 4 + [0.02] * 2, rel=1e-12, abs=0)
    trainer = make_trainer(stairs, own, max_epochs=1)
    trainer.fit(classifier())
    assert trainer.global_step == 8


def settings(**changes):
    config = OmegaConf.create({"rate": 0.4, "callbacks": [ALL.weight_decay, ALL.l1_penalty, ALL.weight_norm_monitor]})
    config.callbacks[0].weight_decay.schedule.start = "${rate}"
    return OmegaConf.merge(config, changes)


def trained(config, *others, ckpt_path=None):
    module = classifier()
    module.net[3].p = 0.0  # a resumed run draws other random numbers
    callbacks = [instantiate(each) for each in config.callbacks]
    make_trainer(*callbacks, *others, max_epochs=2, logger=CSVLogger("logs")).fit(module, ckpt_path=ckpt_path)
    return weights(module)


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(program, tmp_path):
    whole = trained(settings(), SaveAfter(tmp_path, 8))
    torch.load(tmp_path / "8.ckpt", weights_only=True)  # nothing of hydra is in it
    resumed = trained(settings(), ckpt_path=tmp_path / "8.ckpt")  # without a warning
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def test_a_mapping_that_differs_from_the_checkpoint_is_named(program, tmp_path):
    trained(settings(), SaveAfter(tmp_path, 8))
    changed = settings()
    changed.callbacks[0].factors["net.0.*"] = 0.7
    with pytest.warns(UserWarning, match=r"factors: {'net\.0\.\*': 0\.5, .*} then, {'net\.0\.\*': 0\.7, .*} now"):
        trained(changed, ckpt_path=tmp_path / "8.ckpt")
