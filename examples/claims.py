"""What does an example claim, and does it hold? With the options and the quiet Lightning that all examples share."""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Claim(NamedTuple):
    """What an example says, what it measured, and whether the one bears out the other."""

    text: str
    measured: str
    holds: bool


def conclude(claims: Sequence[Claim], *, is_fast: bool) -> None:
    """Print a line for each claim, and end with exit code 1 if one does not hold.

    A fast run is too short to be judged: it shows that all works, not what the example is about.
    """
    for claim in claims:
        verdict = "not judged" if is_fast else "holds" if claim.holds else "FAILS"
        print(f"{verdict}: {claim.text}; measured {claim.measured}")
    if not is_fast and not all(claim.holds for claim in claims):
        raise SystemExit(1)


def parser_of(doc: str | None, name: str) -> argparse.ArgumentParser:
    """A command line with ``--seed``, ``--output`` and ``--fast``, described by the first line of a docstring."""
    parser = argparse.ArgumentParser(prog=f"{name}.py", description=(doc or "").partition("\n")[0])
    parser.add_argument("--seed", type=integer(0, 2**32 - 1), default=0, help="of all that is random, by default 0")
    parser.add_argument(
        "--output", type=folder, default=Path("runs") / name, metavar="DIR", help="for figures and logs, %(default)s"
    )
    parser.add_argument("--fast", action="store_true", help="a few steps, to see whether all works")
    return parser


def integer(minimum: int, maximum: int) -> Callable[[str], int]:
    """What argparse converts and checks an integer with."""

    def convert(text: str) -> int:
        value = int(text)
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"should be from {minimum} to {maximum}, got {value}")
        return value

    convert.__name__ = "integer"  # as argparse calls it in "invalid integer value"
    return convert


def number(minimum: float, maximum: float) -> Callable[[str], float]:
    """What argparse converts and checks a number with."""

    def convert(text: str) -> float:
        value = float(text)
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"should be from {minimum:g} to {maximum:g}, got {text}")
        return value

    convert.__name__ = "number"
    return convert


def folder(text: str) -> Path:
    """What argparse converts and checks a folder with, which need not be there yet."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"should be a folder, and {text} is none")
    return path


def be_quiet() -> None:
    """Lightning's notes on devices and logging, and what it warns of in runs as short as these, are no news here."""
    torch.set_num_threads(1)  # models so small wait for a second thread longer than they gain from it
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*GPU available but not used",
        ".*LeafSpec",  # lightning 2.6 calls what torch 2.13 has deprecated
        ".*does not have many workers",
        ".*smaller than the logging interval",
        ".*no `val_dataloader`",
    ):
        warnings.filterwarnings("ignore", message=message)
