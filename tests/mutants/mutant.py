"""What a mutant is, and how one is made."""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent


class Mutant(NamedTuple):
    """A plausible mistake in the package.

    Args:
        path: The file, below ``lightning_regularize``.
        old: What stands in it, exactly once.
        new: What stands there instead.
        test: The test that has to fail then, as pytest names it, with any of its parameters.
    """

    path: str
    old: str
    new: str
    test: str

    def __str__(self):
        return f"{self.path}: {self.old.strip()}  ->  {self.new.strip() or '(nothing)'}"

    def file(self, root=ROOT):
        return root / "lightning_regularize" / self.path

    def source(self):
        """The text of the file with the mistake in it.

        Raises:
            ValueError: The place is not found, or not one alone.
        """
        text = self.file().read_text()
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.path}: {self.old!r} should be there once, and is there {count} times.")
        return text.replace(self.old, self.new)


def mutants_of(path, test, *changes):
    """Mutants of one file that one test has to notice. A change is an old and a new text."""
    return [Mutant(path, old, new, test) for old, new in changes]
