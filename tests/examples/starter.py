"""Starts examples in processes that have imported torch and Lightning already: to import them takes longer than to run.

Each line of the input is a request in JSON; the answer to it is a line with the exit status.
"""

import gc
import json
import os
import runpy
import sys
from pathlib import Path

import lightning.pytorch  # noqa: F401  (before the package, as in the examples)
import matplotlib as mpl
import sklearn.model_selection  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

import lightning_regularize  # noqa: F401

mpl.use("agg")
gc.collect()
gc.freeze()  # or each process would look through all that is imported before it ends, which takes two seconds


def become(script, arguments, environment, folder, output, errors):
    """Let this process be as if it had been started for the script."""
    for number, (path, flags) in enumerate([(os.devnull, os.O_RDONLY), (output, os.O_WRONLY), (errors, os.O_WRONLY)]):
        os.dup2(os.open(path, flags), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).parent)


def request():
    """The next request, in a process that is made for it; this one waits for it to end, and for more."""
    while line := sys.stdin.readline():
        if (child := os.fork()) == 0:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


if __name__ == "__main__":
    asked = request()
    become(**asked)
    runpy.run_path(asked["script"], run_name="__main__")
