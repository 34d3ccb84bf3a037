"""A GPU that is not there: what a step does on it is counted, and nothing is computed.

torch can be told of a device whose kernels are written in Python. This one has none: under ``FakeTensorMode`` a tensor
has a shape, a dtype and a device, but no elements. Each operation passes through a dispatch mode, which counts it.

A device stays registered until its process ends, so each rehearsal has a process of its own.
"""

import collections
import dataclasses
import multiprocessing
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "gpu"
_PACKAGE = str(Path(__file__).parents[2] / "lightning_regularize")

# Operations that launch nothing: they look at the same memory in another way, or reserve some.
_LAUNCH_NOTHING = {
    *("_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "device", "diagonal", "empty"),
    *("empty_like", "empty_strided", "expand", "is_pinned", "lift_fresh", "new_empty", "new_empty_strided", "permute"),
    *("select", "slice", "split", "split_with_sizes", "squeeze", "sym_size", "t", "transpose", "unbind", "unfold"),
    *("unsqueeze", "view", "view_as_complex", "view_as_real"),
}
# Operations that need a number on the host, such as whether an iteration has converged. Those whose result has a size
# that depends on numbers, such as `nonzero`, are an error under FakeTensorMode.
_READ = {
    *("_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "_local_scalar_dense", "equal", "is_nonzero"),
    "linalg_eig",
}
_INDEX = {"_unsafe_index", "index", "index_put", "index_put_"}


@dataclasses.dataclass
class Seen:
    """What happened on the device.

    Args:
        launched: Kernels by operation. A list that torch takes in one call counts once, although a GPU needs a launch
            for each hundred tensors or so; a list that torch takes one by one counts as many as there are tensors.
        waited: What makes the host wait for the device, by operation and line: reading a number, copies to the host,
            and copies from the host that are not queued.
    """

    launched: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    waited: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def __sub__(self, other):
        return Seen(_difference(self.launched, other.launched), _difference(self.waited, other.waited))


class Observer(TorchDispatchMode):
    """Counts in ``seen`` whenever that is not None."""

    def __init__(self):
        super().__init__()
        self.seen = None

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, operation.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = [is_there(tensor) for tensor in tensors]
        is_of_lists = name.startswith("_foreach")
        if is_of_lists and name != "_foreach_copy_" and len(set(on_device)) > 1:  # FakeTensorMode checks all but these
            raise RuntimeError(f"{name} at {_place()} has tensors on several devices.")
        if self.seen is not None and (any(on_device) or _makes_there(kwargs)) and name not in _LAUNCH_NOTHING:
            if name != "_local_scalar_dense":
                self.seen.launched[name] += _launches(args, tensors, name) if is_of_lists else 1
            if _waits(name, args, kwargs, tensors):
                self.seen.waited[f"{name} at {_place()}"] += 1
        if name.startswith(("_foreach", "_fused")) and name.endswith("_") and all(on_device):
            return None  # nothing is to be computed; FakeTensorMode would take long for it, or not know how
        if _makes_there(kwargs):  # FakeTensorMode remembers numbers that were given on the host, and would copy them
            args = tree_map_only(torch.Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device=t.device), args)
        try:
            return operation(*args, **kwargs)
        except DataDependentOutputException:
            return 0  # for example: no gradient overflowed


class Calls(TorchFunctionMode):
    """Calls that write numbers of the host to the device, as a copy that the observer can see."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if name in ("tensor", "as_tensor", "asarray") and _makes_there(kwargs):
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        if name == "new_tensor" and is_there(args[0]):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(args[0].device)
        if name in ("__getitem__", "__setitem__") and is_there(args[0]):
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            indices = tuple(torch.tensor(index) if isinstance(index, list) else index for index in indices)
            return function(args[0], indices, *args[2:])
        return function(*args, **kwargs)


def is_there(tensor):
    """Is a tensor on the device?"""
    return tensor.device.type == NAME


def is_possible():
    """Does this version of torch know devices whose kernels are written in Python?"""
    return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


def rehearse(function, *args, timeout=60):
    """What ``function(observer, *args)`` returned in a process that has the device.

    Raises:
        RuntimeError: It failed, for example because devices were mixed, or took longer than ``timeout`` seconds.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, function, args))
    process.start()
    try:
        has_succeeded, found = receiver.recv() if receiver.poll(timeout) else (False, "The rehearsal takes too long.")
    finally:
        process.kill()
        process.join()
    if not has_succeeded:
        raise RuntimeError(found)
    return found


def _run(sender, function, args):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what callbacks warn of is for other tests
    FakeTensor.tolist = _tolist
    try:
        backend_registration._setup_privateuseone_for_python_backend(NAME)
        torch.get_device_module(NAME).get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
        with FakeTensorMode(allow_non_fake_inputs=True), Observer() as observer, Calls():
            sender.send((True, function(observer, *args)))
    except BaseException:
        sender.send((False, traceback.format_exc()))


def _tolist(tensor):
    """A single copy to the host. FakeTensor's own method asks for each number by itself."""
    return np.zeros(tensor.cpu().shape).tolist()


def _makes_there(kwargs):
    """Is a result asked for on the device?"""
    return str(kwargs.get("device", "")).startswith(NAME)


def _launches(args, tensors, name):
    """A list counts once where torch has a kernel for it: one device and dtype, and equal strides in all lists."""
    lists = [each for each in args if isinstance(each, (list, tuple)) and each and isinstance(each[0], torch.Tensor)]
    first = lists[0]
    converts = name == "_foreach_copy_"  # which takes another dtype in the other list
    is_mixed = len({tensor.device for tensor in tensors}) > 1 or any(len({t.dtype for t in each}) > 1 for each in lists)
    is_mixed |= not converts and len({each[0].dtype for each in lists}) > 1
    is_arranged = all(a.stride() == b.stride() for each in lists for a, b in zip(first, each, strict=True))
    return len(first) if is_mixed or not is_arranged else 1


def _waits(name, args, kwargs, tensors):
    if name in _READ:
        return True
    if name in _INDEX:  # an index on the host is copied first
        return any(not is_there(tensor) and tensor.dim() for tensor in tensors)
    if name == "_to_copy":
        source, target, is_queued = args[0].device, kwargs.get("device") or args[0].device, kwargs.get("non_blocking")
    elif name == "copy_":
        target, source, is_queued = args[0].device, args[1].device, kwargs.get("non_blocking") or args[2:] == (True,)
    elif name == "_foreach_copy_":
        target, source, is_queued = args[0][0].device, args[1][0].device, kwargs.get("non_blocking")
    else:
        return False
    return source.type != target.type and not (target.type == NAME and is_queued)


def _place():
    """The last line of the package on the way here."""
    ours = [frame for frame in traceback.extract_stack() if frame.filename.startswith(_PACKAGE)]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "another package"


def _difference(counter, other):
    """Unlike ``counter - other`` also where less than nothing is left."""
    found = collections.Counter(counter)
    found.subtract(other)
    return collections.Counter({key: count for key, count in found.items() if count})
