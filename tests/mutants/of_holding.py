"""Mutants of what holds weights near anchors, on spheres and at zero."""

from tests.mutants.mutant import mutants_of

MUTANTS = [
    *mutants_of(
        "spheres.py",
        "tests/training/test_hyperball.py::test_a_step_that_is_not_finite_stays_visible",
        ("has_moved = step != 0", "has_moved = step > 0"),
    ),
    *mutants_of(
        "spheres.py",
        "tests/training/test_hyperball.py::test_a_step_turns_by_the_learning_rate_whatever_its_length",
        ("lengths * radii / step", "lengths / step"),
    ),
    *mutants_of(
        "spheres.py",
        "tests/training/test_hyperball.py::test_what_does_not_move_stays_to_the_last_bit",
        ("torch.where(has_moved & (length != 0), radii / length, 1.0)", "radii / length"),
    ),
    *mutants_of(
        "spheres.py",
        "tests/training/test_hyperball.py::test_pieces_are_turned_as_the_whole",
        ("length = norms(weights, sharding=sharding)", "length = norms(pieces)"),
        ("step = norms(weights, sharding=sharding)", "step = norms(pieces)"),
    ),
    *mutants_of(
        "callbacks/hyperball.py",
        "tests/training/test_hyperball.py::test_a_matrix_that_is_moved_to_another_layer_keeps_its_norm",
        ("moved.radius = target.radius", "pass"),
    ),
    *mutants_of(
        "callbacks/hyperball.py",
        "tests/training/test_hyperball.py::test_the_norm_of_the_checkpoint_counts_and_one_that_is_damaged_is_refused",
        ("if name in saved:", "if False:"),
        ('= {"radii": {"*": POSITIVE}}', "= {}"),
    ),
    *mutants_of(
        "callbacks/hyperball.py",
        "tests/training/test_hyperball.py::test_a_weight_without_a_norm_is_named",
        (" | ~radii.isfinite()", ""),
    ),
    *mutants_of(
        "callbacks/hyperball.py",
        "tests/training/test_hyperball.py::test_decay_of_the_same_weights_is_refused_before_any_weight_changes",
        ("_DECAYS = (AnchorDecay, ConstrainedDecay)", "_DECAYS = (AnchorDecay,)"),
        ("(value or (factor and callback.rules.set_decay))", "value"),
    ),
    *mutants_of(
        "callbacks/hyperball.py",
        "tests/training/test_hyperball.py::test_weight_decay_of_other_weights_goes_on",
        ("if parts is None or parts.setting_of(t.info.parameter)[1]]", "]"),
    ),
    *mutants_of(
        "callbacks/hyperball.py",
        "tests/training/test_hyperball.py::test_with_muon_and_a_rate_for_each_group",
        ("rate_of(step.optimizer, group)", "rate_of(step.optimizer, moving[0][0])"),
    ),
    *mutants_of(
        "callbacks/_saved.py",
        "tests/training/test_resume.py::test_a_damaged_state_is_refused_before_training",
        ("type(value) is int and value >= 0", "type(value) is int"),
        ("is_number(value) and 0 <= value <= _LARGEST", "is_number(value) and 0 <= value"),
        ("is_number(value) and 0 < value <= _LARGEST", "is_number(value) and 0 <= value <= _LARGEST"),
        (" and bool(value.isfinite().all())", ""),
        ('layout.get("*", layout.get(key))', "layout.get(key)"),
    ),
    *mutants_of(
        "decay.py",
        "tests/training/test_anchor_decay.py::test_selective_decay_equals_a_loop_by_hand",
        ("squares.sqrt(), dots > 0", "squares.sqrt(), dots >= 0"),
        ("neginf=0.0).clamp_min(0)", "neginf=0.0)"),
    ),
    *mutants_of(
        "decay.py",
        "tests/test_decay.py::test_nothing_is_pulled_past_its_anchor",
        ("(strengths * ratios).clamp_max(1)", "strengths * ratios"),
        (".nan_to_num(nan=0.0, neginf=0.0)", ""),
    ),
    *mutants_of(
        "decay.py",
        "tests/test_decay.py::test_importance_is_a_factor_of_each_element",
        ("torch._foreach_mul_(gaps, factors)", "pass"),
        (
            "            torch._foreach_mul_(gaps, _like(share, gaps))\n"
            "            torch._foreach_add_(wide, gaps)\n        else:",
            "            torch._foreach_add_(wide, gaps)\n        else:",
        ),
        # Two temporaries may not share their memory.
        ('        gaps = copies(those, slot="gaps")', '        gaps = copies(those, slot="wide")'),
    ),
    *mutants_of(
        "sparse_projections.py",
        "tests/test_sparse_projections.py::test_the_result_is_the_nearest_of_all",
        ("groups.abs().argsort(", "groups.argsort("),
    ),
    *mutants_of(
        "sparse_projections.py",
        "tests/test_sparse_projections.py::test_a_list_is_as_one_after_the_other_and_a_second_time_changes_nothing",
        ("(groups.gather(-1, smallest) != 0).any()", "(groups != 0).any()"),
    ),
    *mutants_of(
        "sparse_projections.py",
        "tests/test_sparse_projections.py::test_bad_input",
        ("if self.n >= self.m:", "if self.n > self.m:"),
    ),
    *mutants_of(
        "sparse_projections.py",
        "tests/test_sparse_projections.py::test_the_layer_says_which_dim_is_the_input",
        ("input_dim = along[indices[0]][0] + 1", "input_dim = 2"),
    ),
    *mutants_of(
        "sparse_projections.py",
        "tests/test_sparse_projections.py::test_m_that_does_not_divide_is_told_before_training",
        ("along = min(dim) if dim else 1\n", "along = 0\n"),
    ),
    *mutants_of(
        "sparse_projections.py",
        "tests/test_sparse_projections.py::test_the_largest_share_is_kept",
        ("(bits < here) | (equal & (ordinal <= rest))", "(bits <= here)"),
        ("(below | (equal & (_ordinal(equal) <= left)))", "(below | equal)"),
        ("            left = left - ordinal[-1]", "            left - ordinal[-1]"),
        ("left = left - totals.gather(0, digit.view(1))[0]", "left = left - totals[0]"),
    ),
    *mutants_of(
        "sparse_projections.py",
        "tests/test_sparse_projections.py::test_pieces_are_projected_as_the_whole",
        ("for each in filter(is_dtensor, weights):", "for each in ():"),
        ("    if is_dtensor(weights[0]):\n", "    if False:\n"),
    ),
    *mutants_of(
        "spectral_projections.py",
        "tests/test_low_rank.py::test_the_nearest_matrix_of_a_rank",
        ("sigma.device) < rank", "sigma.device) <= rank"),
        ("found if tall is whole else found.mT", "found"),
    ),
    *mutants_of(
        "spectral_projections.py",
        "tests/test_low_rank.py::test_a_large_matrix_is_projected_nearly_as_well",
        ("_RANGE_ITERATIONS = 10, 4", "_RANGE_ITERATIONS = 10, 0"),
    ),
    *mutants_of(
        "nuclear_norm.py",
        "tests/test_low_rank.py::test_the_proximal_map_of_the_nuclear_norm",
        ("1 - threshold / sigma, 0.0)", "1 - threshold / sigma, 1.0)"),
    ),
    *mutants_of(
        "nuclear_norm.py",
        "tests/test_low_rank.py::test_the_gradient_is_that_of_autograd",
        ("1 / sigma, 0.0)", "sigma, 0.0)"),
    ),
    *mutants_of(
        "nuclear_norm.py",
        "tests/test_low_rank.py::test_zero_singular_values_have_no_gradient",
        ("sigma > relative * sigma[:, :1]", "sigma > 0"),
    ),
]
