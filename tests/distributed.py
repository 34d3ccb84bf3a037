"""Several processes that form one gloo group, so that a Lightning Trainer inside joins it and starts none itself."""

import os
import socket
import time
import traceback

import torch
import torch.multiprocessing as mp


def run_distributed(function, *args, world_size=2, timeout=60):
    """What ``function(rank, world_size, *args)`` returned on each rank; an error on any rank, or a hang, raises.

    Forked processes see everything the test module defines, and start within 0.1 s. Results travel by pickle.
    """
    context = mp.get_context("fork")
    results, port = context.SimpleQueue(), _free_port()
    processes = [
        context.Process(target=_run, args=(rank, world_size, port, function, args, results))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        return _collect(processes, results, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.join(0.1)
            if process.is_alive():
                process.kill()


def _run(rank, world_size, port, function, args, results):
    # LightningEnvironment takes the processes as made from outside once LOCAL_RANK is set.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world_size))
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    try:
        results.put((rank, True, function(rank, world_size, *args)))
    except BaseException:  # a failed assertion, or pytest.fail, is a result as well
        results.put((rank, False, traceback.format_exc()))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _collect(processes, results, deadline):
    found = {}
    while len(found) < len(processes):
        if results.empty():
            if time.monotonic() > deadline:
                raise AssertionError(f"only ranks {sorted(found)} answered in time: a hang, most likely a collective")
            if not any(p.is_alive() for p in processes) and results.empty():
                raise AssertionError(f"only ranks {sorted(found)} answered, the others died")
            time.sleep(0.01)
            continue
        rank, succeeded, value = results.get()
        if not succeeded:
            raise AssertionError(f"rank {rank}:\n{value}")
        found[rank] = value
    return [found[rank] for rank in range(len(processes))]


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
