"""What do strategies do to a module and to optimizers? DeepSpeed, FSDP1 and others that need special care."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from lightning_regularize._checks import is_named
from lightning_regularize._sharding import Sharding, has_flat_parameters
from lightning_regularize._trainer.names import MisconfigurationException

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torch import Tensor, nn


def model_root(trainer: pl.Trainer | None, module: nn.Module) -> nn.Module:
    """The module as the strategy has wrapped it: under FSDP1 only the wrapper knows the shapes of parameters.

    Raises:
        MisconfigurationException: FSDP1 shows no parameter of the module's own.
    """
    root = getattr(trainer.strategy, "model", None) or module if trainer is not None else module
    if has_flat_parameters(root):
        raise MisconfigurationException(
            "FSDP with `use_orig_params=False` has one flat parameter per unit, in which single parameters cannot be "
            "told apart: use FSDPStrategy(use_orig_params=True), which is Lightning's default."
        )
    return root


def has_optimizer(trainer: pl.Trainer) -> bool:
    """Is there an optimizer? Lightning puts a mock where ``configure_optimizers`` returns None."""
    return any(type(optimizer).__name__ != "_MockOptimizer" for optimizer in trainer.optimizers)


def torch_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer that the user made; Lightning and DeepSpeed wrap it, with the same groups."""
    while not isinstance(optimizer, Optimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer  # type: ignore[no-any-return]  # or what only acts as one


def held_parameters(optimizer: Any) -> list[list[nn.Parameter]]:
    """The module's parameters in each group of an optimizer, in place of which ZeRO holds flat pieces."""
    if hasattr(optimizer, "sub_group_to_group_id"):  # stage 3
        held: list[list[nn.Parameter]] = [[] for _ in optimizer.param_groups]
        for i, parameters in enumerate(optimizer.fp16_groups):
            held[optimizer.sub_group_to_group_id[i]].extend(parameters)
        return held
    if hasattr(optimizer, "bit16_groups"):  # stages 1 and 2
        return [list(parameters) for parameters in optimizer.bit16_groups]
    return [group["params"] for group in optimizer.param_groups]


# DeepSpeed


def deepspeed_keeper(trainer: pl.Trainer) -> str:
    """What of DeepSpeed keeps its own weights and gradients, and copies them to the module; empty if nothing does."""
    config = _deepspeed_config(trainer)
    if stage := int(config.get("zero_optimization", {}).get("stage", 0)):
        return f"ZeRO stage {stage}"
    return "half precision" if any(config.get(key, {}).get("enabled") for key in ("fp16", "bf16")) else ""


def hides_gradients(trainer: pl.Trainer) -> bool:
    """Are gradients scaled by a factor that only DeepSpeed knows?"""
    return bool(_deepspeed_config(trainer).get("fp16", {}).get("enabled"))


def _deepspeed_config(trainer: pl.Trainer) -> dict[str, Any]:
    if not is_named(trainer.strategy, "DeepSpeedStrategy"):
        return {}
    return getattr(trainer.strategy, "config", None) or {}


def check_weights_are_the_optimizers(trainer: pl.Trainer | None, owner: str) -> None:
    """Refuse DeepSpeed's ZeRO, whose optimizer holds its own weights and overwrites the module's.

    Raises:
        MisconfigurationException: The strategy is DeepSpeed with a stage above 0, or in half precision.
    """
    _refuse_keeper(
        trainer, f"{owner} changes the module's weights, and", "overwrites them with its own at the next step"
    )


def check_gradients_are_the_modules(trainer: pl.Trainer | None, owner: str) -> None:
    """Refuse DeepSpeed's ZeRO, whose gradients are not in ``parameter.grad``.

    Raises:
        MisconfigurationException: The strategy is DeepSpeed with a stage above 0, or in half precision.
    """
    _refuse_keeper(trainer, f"{owner} adds to gradients, which", "keeps to itself")


def _refuse_keeper(trainer: pl.Trainer | None, before: str, after: str) -> None:
    if trainer is not None and (keeper := deepspeed_keeper(trainer)):
        raise MisconfigurationException(
            f"{before} DeepSpeed's {keeper} {after}: use DDP, FSDP2 (ModelParallelStrategy), or ZeRO stage 0 in "
            "float32."
        )


# Activations


def check_activations_are_whole(trainer: pl.Trainer, owner: str) -> None:
    """Refuse strategies under which a penalty on activations would be another one than that in the loss.

    Raises:
        MisconfigurationException: Tensor parallelism cuts activations, or DeepSpeed multiplies the loss by itself.
    """
    if getattr(trainer.strategy, "_tensor_parallel_size", 1) != 1:
        raise MisconfigurationException(
            f"{owner} needs whole activations, and tensor parallelism cuts some of them: use FSDP2 alone, "
            "ModelParallelStrategy(tensor_parallel_size=1)."
        )
    if is_named(trainer.strategy, "DeepSpeedStrategy"):
        raise MisconfigurationException(
            f"{owner} has to know what the loss is multiplied by, and DeepSpeed multiplies it by itself: use another "
            "strategy."
        )


# FSDP1


def check_not_flat(sharding: Sharding, parameters: list[nn.Parameter], owner: str) -> None:
    """Refuse FSDP1 and ZeRO-3, which show 1-D pieces that are cut anywhere.

    Raises:
        MisconfigurationException: Some parameter is such a piece.
    """
    if any(sharding.is_flat(parameter) for parameter in parameters):
        raise MisconfigurationException(
            f"{owner} needs whole weights, and FSDP1 and ZeRO-3 cut them anywhere: use ModelParallelStrategy with "
            "fully_shard (FSDP2)."
        )


def check_view(name: str, parameter: Tensor, view: tuple[int, ...], owner: str) -> None:
    """Refuse a grouped ConvTranspose that has no view by groups: cut by a rank boundary, or not contiguous.

    Raises:
        MisconfigurationException: ``parameter`` cannot be viewed so.
    """
    try:
        parameter.detach().view(view)
    except RuntimeError as error:
        raise MisconfigurationException(
            f"{owner}: {name!r} of shape {tuple(parameter.shape)} cannot be viewed by groups, as {view}: ranks cut "
            "through them, or it is not contiguous. Leave it out by `exclude`, or do not shard it."
        ) from error
