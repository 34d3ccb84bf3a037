"""Is the place of each mutant of `make mutants` still there, and the test that has to fail for it?"""

import ast
import functools

import pytest

from tests.mutants.lists import MUTANTS
from tests.mutants.mutant import ROOT, mutants_of


@functools.cache
def functions(path):
    """The tests in a file."""
    return {node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("path", dict.fromkeys(mutant.path for mutant in MUTANTS))
def test_mutants_have_their_place_and_their_test(path):
    for mutant in (each for each in MUTANTS if each.path == path):
        assert mutant.source() != mutant.file().read_text()
        compile(mutant.source(), path, "exec")
        file, _, function = mutant.test.partition("::")
        assert function in functions(file)


def test_no_mutant_stands_there_twice():
    assert len({mutant[:3] for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize(("old", "count"), [("no such text", 0), ("import", 4)])
def test_a_place_that_is_not_found_or_not_one_alone_is_told(old, count):
    (mutant,) = mutants_of("_steps/clock.py", "tests/test_mutants.py", (old, ""))
    with pytest.raises(ValueError, match=rf"_steps/clock.py: '{old}' should be there once, and is there \d+ times"):
        mutant.source()
