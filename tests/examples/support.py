"""Examples as a user runs them: in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
NOT_EXAMPLES = {"__main__", "claims", "pictures"}
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in NOT_EXAMPLES)


def run(name, *arguments, cwd=None, **environment):
    """The finished process of ``python examples/<name>.py``."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)],
        env=inherited | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"} | environment,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def agents_command(sweep, parameters):
    """What an agent of Weights & Biases makes of the YAML of a sweep, with these values for its parameters."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    values = {"args": {name: {"value": value} for name, value in parameters.items()}}
    macros = {"${env}": [], "${interpreter}": ["python"], "${program}": [sweep["program"]]}
    macros["${args}"] = create_sweep_command_args(values)["args"]
    command = create_sweep_command(list(sweep["command"]))
    return [word for chunk in command for word in macros.get(chunk, [chunk])]
