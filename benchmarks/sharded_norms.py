"""What do the norms of 160 sharded parameters cost, beside the least that they can?

Two processes on the CPU, each with half of every parameter (FSDP2). All ways are measured in turn, in one run, and
each figure is a median of rounds, so that a busy machine slows all of them down alike.

    python benchmarks/sharded_norms.py [--rounds 50]
"""

import argparse
import os
import socket
import statistics
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_regularize._rows import dense_pieces
from lightning_regularize.norms import norms, power_sums

LAYERS, WIDTH = 80, 128  # a weight and a bias each


def local_sums(parameters):
    """What no way can do without: each process reduces its pieces, with this package's accurate sums."""
    return power_sums(dense_pieces(parameters), 2.0)


def least(parameters):
    """Right here, where every parameter is spread alike; nothing is looked up."""
    sums = local_sums(parameters)
    dist.all_reduce(sums)
    return sums.sqrt()


def plain_torch(parameters):
    """The same without accurate sums: a few float32 lanes add up everything."""
    sums = torch.stack(torch._foreach_norm([parameter.detach().to_local() for parameter in parameters])).square()
    dist.all_reduce(sums)
    return sums.sqrt()


def one_by_one(parameters):
    return [torch.linalg.vector_norm(parameter.detach()).full_tensor().item() for parameter in parameters]


WAYS = {
    "local sums alone": local_sums,
    "local sums + one all_reduce": least,
    "_foreach_norm + one all_reduce": plain_torch,
    "lightning_regularize.norms": norms,
    ".full_tensor().item() each": one_by_one,
}


def measure(rank, port, rounds, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    expected = torch.stack([torch.linalg.vector_norm(p.detach().double()) for p in model.parameters()])
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (2,)))
    parameters = list(model.parameters())
    torch.testing.assert_close(norms(parameters), expected, rtol=1e-6, atol=0)
    times = {name: [] for name in WAYS}
    for i in range(rounds + 3):
        for name, way in WAYS.items():
            dist.barrier()
            start = time.perf_counter()
            way(parameters)
            if i >= 3:
                times[name].append(time.perf_counter() - start)
    if rank == 0:
        results.put({name: statistics.median(values) for name, values in times.items()})
    dist.barrier()  # or one would leave while the other still talks to it
    del model, parameters
    dist.destroy_process_group()


def run(rounds):
    """Seconds by way."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(measure, (port, rounds, results), nprocs=2)
    return results.get()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    seconds = run(parser.parse_args().rounds)
    for name, value in seconds.items():
        print(f"{name:30s} {1e3 * value:8.2f} ms")
    ours = seconds["lightning_regularize.norms"]
    print(f"norms / (local sums + one all_reduce): {ours / seconds['local sums + one all_reduce']:.2f}   (at most 1.3)")
    print(f"norms / (_foreach_norm + all_reduce):  {ours / seconds['_foreach_norm + one all_reduce']:.2f}")
    print(f"one by one / norms:                    {seconds['.full_tensor().item() each'] / ours:.1f}   (at least 10)")
