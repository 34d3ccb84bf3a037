"""Examples as a user runs them: in a process of their own."""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
NOT_EXAMPLES = {"__main__", "claims", "pictures"}
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in NOT_EXAMPLES)


def run(name, *arguments, cwd=None, **environment):
    """The finished process of ``python examples/<name>.py``."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    variables = inherited | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"} | environment
    command = [str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    with tempfile.NamedTemporaryFile() as output, tempfile.NamedTemporaryFile() as errors:
        request = {"script": command[0], "arguments": command[1:], "environment": variables}
        request |= {"folder": str(cwd or Path.cwd()), "output": output.name, "errors": errors.name}
        starter = _starter()
        try:
            starter.stdin.write(json.dumps(request) + "\n")
            starter.stdin.flush()
            status = int(starter.stdout.readline())
        except BaseException:
            _end(starter)
            _starter.cache_clear()
            raise
        return subprocess.CompletedProcess(command, status, output.read().decode(), errors.read().decode())


@functools.cache
def _starter():
    started = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("starter.py")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(_end, started)
    return started


def _end(started):
    started.kill()
    started.communicate()


def agents_command(sweep, parameters):
    """What an agent of Weights & Biases makes of the YAML of a sweep, with these values for its parameters."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    values = {"args": {name: {"value": value} for name, value in parameters.items()}}
    macros = {"${env}": [], "${interpreter}": ["python"], "${program}": [sweep["program"]]}
    macros["${args}"] = create_sweep_command_args(values)["args"]
    command = create_sweep_command(list(sweep["command"]))
    return [word for chunk in command for word in macros.get(chunk, [chunk])]
