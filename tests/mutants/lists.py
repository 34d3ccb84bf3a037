"""All mutants."""

from tests.mutants import of_callbacks, of_decay, of_norms, of_rules, of_steps

LISTS = (of_steps, of_norms, of_decay, of_rules, of_callbacks)
MUTANTS = [mutant for each in LISTS for mutant in each.MUTANTS]
