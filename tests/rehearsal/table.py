"""What each callback may cost a step: kernels launched, and waiting for the device."""

from dataclasses import dataclass
from typing import Any

from torch.optim import SGD

from lightning_regularize import (
    AnchorDecay,
    ConstrainedDecay,
    ElasticNetPenalty,
    GroupLassoPenalty,
    Hyperball,
    L1Penalty,
    L2Penalty,
    WeightConstraint,
    WeightDecay,
    WeightNormMonitor,
    WeightPenalty,
)
from lightning_regularize.penalties import L1, NuclearNorm
from lightning_regularize.projections import NM, FrobeniusBall, MaxNorm, Rank, SpectralBall, TopShare
from lightning_regularize.schedules import Cosine, CubicRamp


@dataclass(frozen=True)
class Row:
    """A callback and its bounds.

    Args:
        name: What it is called in the table.
        make: Makes it.
        launches: Kernels that it may launch in a step that is not logged, however many tensors there are.
        logged_launches: Likewise in a step that is logged; None for no bound but that of any number of tensors.
        takes_half: Does it act on weights of half precision?
        transfers: How often the host waits for the device in a step that is logged. In others it never does.
        is_attention: Is it for layers of attention?
        takes_adam: Does it act on what AdamW steps? Else SGD does.
    """

    name: str
    make: Any
    launches: int
    logged_launches: int | None = None
    takes_half: bool = True
    transfers: int = 0
    is_attention: bool = False
    takes_adam: bool = True

    @property
    def options(self):
        attention = {"is_attention": True} if self.is_attention else {}
        return attention if self.takes_adam else {**attention, "optimizer": SGD}


_ALL_BUT_SPECTRA = ("weight", "rms", "gradient", "update", "ratio", "angle", "distance", "sparsity", "effective_decay")

ROWS = (
    # torch's foreach AdamW launches seven kernels for a group without weight decay, so that groups made by hand cost
    # as much.
    Row("WeightDecay by the optimizer", lambda: WeightDecay(Cosine(0.04, 0.4)), 7),
    Row("WeightDecay, decoupled", lambda: WeightDecay(0.1, method="decoupled"), 4),
    Row("WeightDecay, independent", lambda: WeightDecay(0.1, method="independent"), 4),
    Row("WeightDecay, coupled", lambda: WeightDecay(0.1, method="coupled"), 4),
    Row("WeightDecay, cautious", lambda: WeightDecay(0.1, method="cautious"), 12),
    Row("WeightDecay, stable", lambda: WeightDecay(0.1, method="stable"), 30),
    Row("L1, gradient", lambda: L1Penalty(1e-5), 6, transfers=1),
    Row("L1, proximal", lambda: L1Penalty(1e-5, method="proximal"), 20, transfers=1),
    Row("L2, gradient", lambda: L2Penalty(1e-5), 6, transfers=1),
    Row("L2, proximal", lambda: L2Penalty(1e-5, method="proximal"), 20, transfers=1),
    Row("elastic net, gradient", lambda: ElasticNetPenalty(1e-5, 1e-5), 8, transfers=1),
    Row("elastic net, proximal", lambda: ElasticNetPenalty(1e-5, 1e-5, method="proximal"), 20, transfers=1),
    Row("group lasso, gradient", lambda: GroupLassoPenalty(1e-5), 20, transfers=1),
    Row("group lasso, proximal", lambda: GroupLassoPenalty(1e-5, method="proximal"), 120, transfers=1),
    Row(
        "group lasso of blocks, proximal",
        lambda: GroupLassoPenalty(1e-5, group="block", block_size=4, method="proximal"),
        120,
        transfers=1,
    ),
    Row("heads, gradient", lambda: GroupLassoPenalty(1e-5, group="head"), 60, transfers=1, is_attention=True),
    Row(
        "heads, proximal",
        lambda: GroupLassoPenalty(1e-5, group="head", method="proximal"),
        160,
        transfers=1,
        is_attention=True,
    ),
    Row("WeightPenalty of L1", lambda: WeightPenalty(L1(), 1e-5), 6, transfers=1),
    Row("max-norm", lambda: WeightConstraint(MaxNorm(3.0)), 25),
    Row("Frobenius ball", lambda: WeightConstraint(FrobeniusBall(3.0)), 25),
    Row("spectral ball", lambda: WeightConstraint(SpectralBall(3.0)), 60),
    Row("2 of 4", lambda: WeightConstraint(NM(2, 4)), 40),
    Row("the largest tenth", lambda: WeightConstraint(TopShare(0.1)), 40),
    Row("the largest tenth of all", lambda: WeightConstraint(TopShare(CubicRamp(0.2, 0.1, until=1), "all")), 40),
    Row("frozen zeros", lambda: WeightConstraint(TopShare(0.1), freeze_zeros=0), 40),
    Row("rank 2", lambda: WeightConstraint(Rank(2)), 40),
    Row("nuclear norm, gradient", lambda: WeightPenalty(NuclearNorm(), 1e-5), 40),
    Row(
        "nuclear norm, proximal",
        lambda: WeightPenalty(NuclearNorm(), 1e-5, method="proximal"),
        40,
        takes_adam=False,
    ),
    Row("AnchorDecay", lambda: AnchorDecay(0.01), 6),
    Row("AnchorDecay, selective", lambda: AnchorDecay(0.5, method="selective"), 40, takes_half=False),
    Row("ConstrainedDecay", lambda: ConstrainedDecay(), 20),
    Row("Hyperball", lambda: [WeightDecay(0.0), Hyperball()], 45, takes_half=False),
    Row("monitor, weight norms", lambda: WeightNormMonitor(quantities=("weight",)), 0, 20, transfers=1),
    Row(
        "monitor, all but spectra",
        lambda: WeightNormMonitor(detail="parameter", quantities=_ALL_BUT_SPECTRA),
        *(0, 80),
        transfers=1,
    ),
)
