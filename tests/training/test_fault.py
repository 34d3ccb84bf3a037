"""What if a process dies in the middle of a step?"""

import datetime
import multiprocessing
import os
import socket
import time

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_regularize import L1Penalty, WeightDecay, WeightNormMonitor
from lightning_regularize.schedules import Cosine
from tests.training.matrix import Column, Kept, Network, Weights, shard
from tests.training.support import QUIET, make_trainer
from tests.training.test_layouts import Save, Steps

pytestmark = QUIET

PATIENCE = 5  # seconds that a process waits for others
DIES_AT, DIED = 8, 17  # a step after the checkpoint, and what the process that dies leaves behind

SPREAD = {
    "ddp": Column("", lambda: {"strategy": DDPStrategy(timeout=datetime.timedelta(seconds=PATIENCE))}, data_parallel=2),
    "fsdp2": Column(
        "",
        lambda: {"strategy": ModelParallelStrategy(2, 1, timeout=datetime.timedelta(seconds=PATIENCE))},
        data_parallel=2,
        spread=shard,
    ),
}


class Die(L.Callback):
    """Ends rank 1 when its gradients are complete: the others are in the middle of the same step, and wait."""

    def on_before_optimizer_step(self, trainer, *_):
        if trainer.global_rank == 1 and trainer.global_step == DIES_AT:
            os._exit(DIED)


def fit(rank, column, *callbacks, resume=None):
    module, weights = Network().build(column), Weights()
    features = [WeightDecay(Cosine(0.1, 0.9)), L1Penalty(0.05), WeightNormMonitor(detail="parameter")]
    trainer = make_trainer(
        *callbacks, *features, weights, logger=Kept(), max_epochs=1, devices=column.processes, **column.options()
    )
    trainer.fit(module, Steps(rank, column.data_parallel, torch.float64), ckpt_path=resume)
    return weights.found


def process(rank, port, column, folder, callbacks, resume):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", NODE_RANK="0")
    os.environ.update(LOCAL_RANK=str(rank), CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    try:
        torch.save(fit(rank, SPREAD[column], *callbacks, resume=resume), folder / f"weights.{rank}")
    except BaseException as error:
        (folder / f"error.{rank}").write_text(repr(error))
        os._exit(1)


def run(column, folder, *callbacks, resume=None):
    """The exit codes of two processes, and the seconds until both have ended."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("fork")
    arguments = port, column, folder, callbacks, resume
    processes = [context.Process(target=process, args=(rank, *arguments)) for rank in range(2)]
    start = time.monotonic()
    for p in processes:
        p.start()
    for p in processes:
        p.join(60)
        if p.is_alive():
            p.kill()
    return [p.exitcode for p in processes], time.monotonic() - start


@pytest.mark.parametrize("column", SPREAD)
@pytest.mark.filterwarnings("ignore")  # of processes that end in the middle, and of torch's checkpoints
def test_a_process_that_dies_ends_the_run_and_the_checkpoint_goes_on(column, tmp_path):
    saved = tmp_path / "saved"
    codes, seconds = run(column, tmp_path, Save(saved), Die())
    assert codes == [1, DIED]  # an error, not a hang that something else had to end
    assert (tmp_path / "error.0").read_text().startswith(("RuntimeError", "DistBackendError"))
    assert seconds < PATIENCE + 20  # starting and training take some

    assert run(column, tmp_path, resume=saved)[0] == [0, 0]
    expected = fit(0, Column("alone"))
    found = torch.load(tmp_path / "weights.0", weights_only=False)
    for name, weight in expected.items():
        assert found[name] == pytest.approx(weight, rel=0, abs=1e-12), name
