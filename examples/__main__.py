"""Run all examples, one after the other, and print what each claims, what it measured, and whether that holds.

python examples [--fast] [NAME ...]
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
NOT_EXAMPLES = {"__main__", "claims", "pictures"}
NAMES = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in NOT_EXAMPLES)
VERDICTS = ("holds: ", "FAILS: ", "not judged: ")


def main() -> None:
    """Run the examples that are named, and end with exit code 1 if one of them fails."""
    parser = argparse.ArgumentParser(prog="python examples", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--fast", action="store_true", help="a few steps of each, to see whether all works")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="keep the first figure of each there, as NAME.png")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; by default all")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(NAMES)):
        parser.error(f"no example is called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    failed = [name for name in options.names or NAMES if not run(name, ["--fast"] * options.fast, options.figures)]
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}")


def run(name: str, arguments: list[str], figures: Path | None) -> bool:
    """Run one example, print its lines, and tell whether all is well."""
    start = time.monotonic()
    process = subprocess.run(
        [sys.executable, HERE / f"{name}.py", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    lines = [line for line in process.stdout.splitlines() if line.startswith(VERDICTS)]
    print(f"{name} ({time.monotonic() - start:.0f} s)", *lines or ["no claim"], sep="\n  ", flush=True)
    if figures is not None and (first := re.search(r"^Figure: (.+)$", process.stdout, flags=re.MULTILINE)):
        figures.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(first[1], figures / f"{name}.png")
    if process.returncode and not any(line.startswith("FAILS") for line in lines):
        print(process.stderr, file=sys.stderr)  # it did not get as far as to judge
    return process.returncode == 0 and bool(lines)


if __name__ == "__main__":
    main()
