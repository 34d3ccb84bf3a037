"""FSDP1 and DeepSpeed on CPU processes, which Lightning and torch refuse only at the front door.

DeepSpeed needs ``DS_ACCELERATOR=cpu`` and g++: it compiles one op on first use, which takes about a minute.
"""

import argparse

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy


class CPUFSDPStrategy(FSDPStrategy):
    """With a device to be told, torch finds its way on CPU; Lightning tells it None there."""

    def _setup_model(self, model):
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(
            model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )


class CPUDeepSpeedStrategy(DeepSpeedStrategy):
    """Make it by ``CPUDeepSpeedStrategy(stage=2, logging_batch_size_per_gpu=2)``; stages 0 to 3 train."""

    def __init__(self, **options):
        super().__init__(process_group_backend="gloo", **options)

    def setup_environment(self):
        DDPStrategy.setup_environment(self)

    def setup_distributed(self):
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model, optimizer, lr_scheduler=None):
        import deepspeed

        engine, optimizer, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.local_rank),
            config=self.config,
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, optimizer
