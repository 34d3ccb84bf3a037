"""All mutants."""

from tests.mutants import (
    of_callbacks,
    of_decay,
    of_holding,
    of_models,
    of_norms,
    of_positions,
    of_rules,
    of_steps,
)

LISTS = (of_steps, of_positions, of_norms, of_decay, of_holding, of_rules, of_models, of_callbacks)
MUTANTS = [mutant for each in LISTS for mutant in each.MUTANTS]
