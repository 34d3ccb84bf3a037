"""Does the observer see what launches kernels on the device, and what waits for it?"""

import pytest
import torch

from tests.rehearsal.device import NAME, Seen, is_possible, rehearse

pytestmark = pytest.mark.skipif(not is_possible(), reason="this torch knows no devices written in Python")


def observe(observer, act):
    here, there = torch.zeros(3), torch.zeros(3, device=NAME)
    observer.seen = Seen()
    act(here, there)
    return observer.seen


@pytest.mark.parametrize(
    ("act", "launched"),
    [
        (lambda here, there: there.view(1, 3)[0, 1:].T, 0),
        (lambda here, there: here.mul_(2).sum(), 0),
        (lambda here, there: there.mul_(2).sum(), 2),
        (lambda here, there: torch._foreach_mul_([there, there], 2.0), 1),
        (lambda here, there: torch._foreach_mul_([there, there.double()], 2.0), 1 + 2),
        (lambda here, there: torch._foreach_add_([there.expand(2, 3)] * 2, [there.expand(2, 3).clone()] * 2), 1 + 2),
        (lambda here, there: torch._foreach_copy_([there, there], [there.half(), there.half()]), 2 + 1),
    ],
    ids=["views", "host", "device", "list", "list of two dtypes", "lists of other strides", "list to another dtype"],
)
def test_launches(act, launched):
    assert rehearse(observe, act).launched.total() == launched


@pytest.mark.parametrize(
    ("act", "waited"),
    [
        (lambda here, there: there.sum().item(), 1),
        (lambda here, there: float(there[0]), 1),
        (lambda here, there: bool(there.sum() > 0), 1),
        (lambda here, there: there.tolist(), 1),
        (lambda here, there: there.add_(there, alpha=there[0]), 1),
        (lambda here, there: there.cpu(), 1),
        (lambda here, there: here.copy_(there), 1),
        (lambda here, there: torch._foreach_copy_([there, there], [here, here]), 1),
        (lambda here, there: torch.tensor([1.0], device=NAME), 1),
        (lambda here, there: there.new_tensor([1.0]), 1),
        (lambda here, there: here.to(NAME), 1),
        (lambda here, there: there[[0, 2]], 1),
        (lambda here, there: there[torch.tensor([0, 2])], 1),
        (lambda here, there: torch.linalg.eigvalsh(there.expand(3, 3)), 1),
        (lambda here, there: here.to(NAME, non_blocking=True), 0),
        (lambda here, there: there.copy_(here, non_blocking=True), 0),
        (lambda here, there: there * torch.tensor(2.0), 0),
        (lambda here, there: there[torch.zeros(2, dtype=torch.long, device=NAME)], 0),
        (lambda here, there: here.sum().item(), 0),
    ],
    ids=[
        *("item", "float", "bool", "tolist", "alpha", "cpu", "copy to the host", "list of copies", "tensor"),
        *("new_tensor", "copy to the device", "index of numbers", "index on the host", "eigenvalues"),
        *("queued copy", "queued copy_", "number on the host", "index on the device", "host"),
    ],
)
def test_waits(act, waited):
    assert rehearse(observe, act).waited.total() == waited


@pytest.mark.parametrize(
    "act",
    [
        lambda here, there: here + there,
        lambda here, there: torch._foreach_add_([there], [here]),
        lambda here, there: torch._foreach_mul_([there], torch.tensor(2.0)),
    ],
    ids=["tensors", "lists", "list and a number on the host"],
)
def test_mixed_devices_are_refused(act):
    with pytest.raises(RuntimeError, match="device"):
        rehearse(observe, act)
