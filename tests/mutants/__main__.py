"""Does the test that should notice it fail for each mutant? ``python -m tests.mutants [WORD ...]``

With words, only for mutants of files whose path has one of them.

Two copies of the repository are made, one for each worker. Each mutant is tested in a process of its own, which is
forked when torch and Lightning are imported already, because to import them takes longer than most of the tests. A test
that hangs is ended by pytest-timeout, and fails.
"""

import contextlib
import importlib
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # one of them warns of modules that are imported already

import pytest

from tests.mutants.lists import MUTANTS
from tests.mutants.mutant import ROOT

WORKERS = 2
ALIVE = "ALIVE"
IMPORTED = ("torch.distributed.fsdp", "lightning.pytorch", "pytorch_lightning", "torchmetrics", "numpy", "scipy")
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "runs", "shared", "site")


class FirstFailure:
    """A plugin of pytest's that remembers the first test that fails."""

    name = ""

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.name:
            self.name = report.nodeid


def run_tests(copy, tests):
    """In a process of its own: the exit status of pytest, and the first test that failed, to ``<copy>.result``."""
    with Path(f"{copy}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    sys.path[:] = [str(copy), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
    sys.dont_write_bytecode = True  # a file is changed within a second, and its size may stay
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    first = FirstFailure()
    status = pytest.main(["-x", "--quiet", "-p", "pytest_timeout", "-p", "no:cacheprovider", *tests], plugins=[first])
    Path(f"{copy}.result").write_text(f"{int(status)} {first.name}")


def outcome(copy, status):
    """What came of a process: is a mutant killed, and by what?"""
    result = Path(f"{copy}.result")
    if os.WIFSIGNALED(status):
        return True, f"killed by a crash, signal {os.WTERMSIG(status)}"
    found, _, test = result.read_text().partition(" ") if result.exists() else ("", "", "")
    if found == "1":
        return True, f"killed by {test}"
    return False, ALIVE if found == "0" else f"ALIVE, or pytest did not run: {Path(f'{copy}.log').read_text()[-2000:]}"


def run_all(jobs, copies):
    """Run ``jobs``, pairs of a mutant or None and tests, and yield each with its outcome as it ends."""
    waiting, free, running = list(reversed(jobs)), list(copies), {}
    while waiting or running:
        while waiting and free:
            (mutant, tests), copy = waiting.pop(), free.pop()
            Path(f"{copy}.result").unlink(missing_ok=True)
            if mutant is not None:
                mutant.file(copy).write_text(mutant.source())
            pid = os.fork()
            if not pid:
                try:
                    run_tests(copy, tests)
                except BaseException:
                    traceback.print_exc(file=sys.__stderr__)
                finally:
                    os._exit(0)
            running[pid] = mutant, copy, time.monotonic()
        pid, status = os.wait()
        mutant, copy, start = running.pop(pid)
        yield mutant, *outcome(copy, status), time.monotonic() - start
        if mutant is not None:
            shutil.copy(mutant.file(), mutant.file(copy))
        free.append(copy)


def main(words):
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.path for word in words)]
    tests = sorted({mutant.test for mutant in chosen})
    alive, start = [], time.monotonic()
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        copies = [Path(folder) / str(i) for i in range(WORKERS)]
        for copy in copies:
            shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        # A test that fails without a mutant would kill all.
        for _, _, by, _ in run_all([(None, some) for i in range(WORKERS) if (some := tests[i::WORKERS])], copies):
            if by != ALIVE:
                sys.exit(f"Without any mutant: {by}")
        for mutant, killed, by, seconds in run_all([(mutant, [mutant.test]) for mutant in chosen], copies):
            print(f"{mutant}\n    {by} ({seconds:.0f} s)", flush=True)
            alive += [] if killed else [mutant]
    print(f"\n{len(chosen)} mutants, {len(alive)} alive, {(time.monotonic() - start) / 60:.0f} minutes")
    print(*(f"alive: {mutant}" for mutant in alive), sep="\n")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main(sys.argv[1:])
