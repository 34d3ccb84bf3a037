"""Mutants of the clock, and of the schedule and the factor that each parameter has."""

from tests.mutants.mutant import mutants_of

MUTANTS = [
    *mutants_of(
        "_steps/clock.py",
        "tests/steps/test_clock.py::test_values_that_are_known_ahead_are_those_of_each_step",
        ("and 0 <= step - ahead.first < len(ahead.values):", "and step - ahead.first < len(ahead.values):"),
        ("step - ahead.first < len(ahead.values):", "step < len(ahead.values):"),
        (" and ahead.total_steps == self.total_steps", ""),
    ),
    *mutants_of(
        "_steps/clock.py",
        "tests/steps/test_clock.py::test_a_schedule_is_not_taken_for_one_that_is_gone",
        ("= _Ahead(schedule, ", "= _Ahead(None, "),
    ),
    *mutants_of(
        "_steps/clock.py",
        "tests/training/test_peak.py::test_a_rate_that_rises_above_the_peak_is_told_once",
        ("self.warn_of_peak = _say_nothing\n            return", "return"),
    ),
    *mutants_of(
        "_steps/clock.py",
        "tests/training/test_peak.py::test_a_rate_below_the_peak_is_no_cause",
        ('_peaks.get(id(group["params"][0]))', "_peaks.get(None)"),
    ),
    *mutants_of(
        "_steps/clock.py",
        "tests/training/test_peak.py::test_what_does_not_follow_the_rate_says_nothing",
        (" and value_at(schedule, replace(at, peak_lr=before)) != value", ""),
    ),
    *mutants_of(
        "schedules.py",
        "tests/test_schedules.py::test_what_depends_on_the_step_alone",
        ("all(map(depends_on_step_alone, schedule.schedules))", "any(map(depends_on_step_alone, schedule.schedules))"),
        ("return depends_on_step_alone(schedule.schedule)", "return True"),
        ("Exponential, Polynomial, Steps)\n", "Exponential, Polynomial, Steps, Timescale)\n"),
    ),
    *mutants_of(
        "decay_rules.py",
        "tests/training/test_rules.py::test_ratios_of_groups_and_factors_multiply",
        ("Setting(schedule, factor), f", "Setting(schedule, 1.0), f"),
    ),
    *mutants_of(
        "decay_rules.py",
        "tests/training/test_rules.py::test_a_rule_that_does_nothing_raises_before_training",
        (" and first[id(info)] is rule for info", " for info"),
        ("if not any(self.decide(info).setting.factor for info in infos):", "if False:"),
    ),
    *mutants_of(
        "decay_rules.py",
        "tests/training/test_rules.py::test_a_rule_for_what_a_group_gave_0_raises",
        ("if ratios and not any(ratios):", "if not ratios:"),
    ),
    *mutants_of(
        "decay_rules.py",
        "tests/training/test_rules.py::test_two_lambdas_have_names_of_their_own",
        ("names[:i].count(name) + 1", "names.count(name)"),
    ),
    *mutants_of(
        "decay_rules.py",
        "tests/training/test_rules.py::test_wrong_rules_raise_in_the_constructor",
        (' and "_target_" not in weight_decay', ""),
    ),
    *mutants_of(
        "factors.py",
        "tests/test_factors.py::test_the_width_is_what_a_unit_takes_in",
        ("math.prod(view[dim] for dim in dims)", "view[dims[0]]"),
        ("** self.power", "** 0.5"),
    ),
    *mutants_of(
        "factors.py",
        "tests/test_factors.py::test_what_is_out_of_range_raises",
        ("if not math.isfinite(self.power):", "if False:"),
    ),
    *mutants_of(
        "factors.py",
        "tests/test_factors.py::test_a_width_that_is_not_known_raises",
        ("except ValueError as error:", "except TypeError as error:"),
    ),
]
