"""Mutants of what is measured, and of the rows, units and ranks that it is measured over."""

from tests.mutants.mutant import mutants_of

MUTANTS = [
    *mutants_of(
        "_orthogonal_walk.py",
        "tests/test_theory.py::test_muon_settles_at_the_expected_rms_and_angle",
        ("kept * momentum**degree", "kept * momentum"),
        ("squares: Tensor = n * ", "squares: Tensor = m * "),
    ),
    *mutants_of(
        "norms.py",
        "tests/test_norms.py::test_elements_whose_squares_leave_the_range_of_float32_have_norms",
        # Squares leave the range of float32 long before the elements.
        ("smallest = 1e-26 if norm_type == 2 else 0.0", "smallest = 0.0"),
        ("if value < smallest or value == math.inf]", "if value < smallest]"),
    ),
    *mutants_of(
        "norms.py",
        "tests/test_norms.py::test_an_infinity_norm_keeps_the_nan_of_any_rank",
        ('"max" if math.isinf(norm_type) else "sum"', '"sum"'),
    ),
    *mutants_of(
        "norms.py",
        "tests/test_norms.py::test_norms_of_parameters_equal_those_in_float64",
        ("torch.maximum(values.amax(dim=1), values.amin(dim=1).neg_())", "values.amax(dim=1)"),
    ),
    *mutants_of(
        "norms.py",
        "tests/test_norms.py::test_no_full_size_temporary_is_made_for_the_norms_of_several_tensors",
        ("torch.maximum(largest, -smallest)", "largest"),
    ),
    *mutants_of(
        "norms.py",
        "tests/test_norms.py::test_combined_norms_carry_nan_and_neither_overflow_nor_underflow",
        ("if largest in (0.0, math.inf):", "if largest == 0.0:"),
        # NaN is not lost in a maximum.
        ("if any(math.isnan(v) for v in values):", "if False:"),
    ),
    *mutants_of(
        "norms.py",
        "tests/test_norms.py::test_counts_equal_those_of_numpy",
        ("rows_of(pieces, fill=math.nan)", "rows_of(pieces)"),
        ("le_(threshold)", "lt_(threshold)"),
        ("torch.abs(rows.values, out=flags)", "flags.copy_(rows.values)"),
    ),
    *mutants_of(
        "norms.py",
        "tests/test_norms.py::test_spectral_norm_equals_the_largest_singular_value",
        ("vector = vector - rows.T @ (rows.conj() @ vector)", "pass"),
    ),
    *mutants_of(
        "norms.py",
        "tests/training/test_norm_monitor.py::test_each_quantity_equals_its_definition",
        ("change.mul_(old).sum(dim=1)", "change.square().sum(dim=1)"),
    ),
    *mutants_of(
        "norms.py",
        "tests/test_norms.py::test_scalars_and_empty_tensors_have_norms",
        ("exponent=2 if norm_type == 2 else 1)\n    return _with", "exponent=1)\n    return _with"),
    ),
    *mutants_of(
        "_rows.py",
        "tests/test_norms.py::test_scalars_and_empty_tensors_have_norms",
        ("values = values.pow_(exponent)", "pass"),
    ),
    *mutants_of(
        "_rows.py",
        "tests/test_norms.py::test_histograms_of_negative_elements_end_below_zero",
        ("values.new_full((len(like),), initial)", "values.new_zeros(len(like))"),
    ),
    *mutants_of(
        "_rows.py",
        "tests/test_norms.py::test_sparse_and_complex_tensors_have_norms",
        ("piece = piece.coalesce().values()", "piece = piece._values()"),
        ("piece.abs() if piece.is_complex() else piece.float()", "piece.real"),
    ),
    *mutants_of(
        "_rows.py",
        "tests/test_penalties.py::test_the_value_is_that_of_the_formula_in_float64",
        ("for values in others:", "for values in ():"),
    ),
    *mutants_of(
        "units.py",
        "tests/test_projections.py::test_a_unit_is_the_weights_that_an_output_depends_on",
        ("return shape, (0, *range(2, len(shape)))", "return shape, tuple(range(1, len(shape)))"),
    ),
    *mutants_of(
        "units.py",
        "tests/test_projections.py::test_the_matrix_of_a_transposed_convolution_has_a_row_an_output_channel",
        ("(1, *range(3, len(shape) + 1))", "(1, *range(2, len(shape) + 1))"),
    ),
    *mutants_of(
        "units.py",
        "tests/test_projections.py::test_where_a_layer_tells_nothing_dim_0_is_a_guess",
        (" or incoming == outgoing:", ":"),
    ),
    *mutants_of(
        "norms.py",
        "tests/test_norms.py::test_changes_whose_squares_or_products_leave_the_range_of_float32",
        ("for i in sorted(fast) if is_extreme[i]]", "for i in sorted(fast) if False]"),
        ("if rows.indices[0] in suspects]", "]"),
    ),
    *mutants_of(
        "units.py",
        "tests/training/test_units.py::test_the_outputs_of_gpt2_are_constrained",
        ('is_named(owner, "Conv1D") and len(shape) == 2', "False"),
    ),
    *mutants_of(
        "units.py",
        "tests/test_projections.py::test_a_weight_spread_over_ranks_is_projected_as_a_whole",
        ("[Partial() if cut else Replicate() for cut in", "[Partial() for cut in"),
    ),
    *mutants_of(
        "units.py",
        "tests/steps/test_buckets.py::test_a_step_asks_for_no_memory_of_the_size_of_a_large_weight",
        ('torch.square(found, out=scratch(found, slot="squares of units"))', "found.square()"),
    ),
    *mutants_of(
        "units.py",
        "tests/test_projections.py::test_norms_over_many_elements_are_accurate",
        ("_row_norms(rows.narrow(-1, size - rest, rest))) if rest else found", "0 * found) if rest else found"),
    ),
    *mutants_of(
        "units.py",
        "tests/test_projections.py::test_a_dim_that_is_asked_for_precedes_the_layer",
        ("if -number <= d < number", "if 0 <= d < number"),
    ),
    *mutants_of(
        "units.py",
        "tests/test_projections.py::test_bad_input_is_refused",
        ("return tuple(dims) if len(dims) == len(given) else ()", "return tuple(dims)"),
    ),
    *mutants_of(
        "units.py",
        "tests/test_projections.py::test_input_channels_on_different_ranks_are_normed_together",
        (".sqrt() if _is_cut(weight, dims) else found", ".sqrt() if False else found"),
    ),
    *mutants_of(
        "units.py",
        "tests/test_projections.py::test_the_sizes_that_a_layer_tells_decide_what_its_units_are",
        ("return (1,)\n", "return (2,)\n"),
    ),
    *mutants_of(
        "_sharding.py",
        "tests/test_norms.py::test_an_infinity_norm_keeps_the_nan_of_any_rank",
        ("torch.where(values[1] > 0, math.nan, values[0])", "values[0]"),
    ),
    *mutants_of(
        "quantities.py",
        "tests/training/test_norm_monitor.py::test_each_quantity_equals_its_definition",
        ("across = update_square - along.square()", "across = update_square"),
        (
            "turned = torch.atan2(across.clamp_min(0.0).sqrt(), norm + along)",
            "turned = torch.atan2(across.clamp_min(0.0).sqrt(), norm)",
        ),
        ("across.clamp_min(0.0).sqrt()", "across.sqrt()"),
    ),
    *mutants_of(
        "quantities.py",
        "tests/training/test_norm_monitor.py::test_theory_stands_beside_what_is_measured",
        ('& (sums["known"] > 0)', ""),
    ),
    *mutants_of(
        "quantities.py",
        "tests/training/test_norm_monitor.py::test_effective_decay_and_timescale_are_of_what_decays",
        ('torch.where(s["decaying"] > 0, s["decaying"], 1.0)', 's["decaying"]'),
    ),
    *mutants_of(
        "quantities.py",
        "tests/training/test_norm_monitor.py::test_stable_rank_is_of_matrices_as_blocks_of_one",
        ('s["matrix_square"] / s["spectral_square"]', 's["weight_square"] / s["spectral_square"]'),
    ),
    *mutants_of(
        "histograms.py",
        "tests/test_norms.py::test_histograms_equal_numpys_at_any_size",
        ("table[:, bins - 1] += table[:, bins]", "pass"),
    ),
    *mutants_of(
        "histograms.py",
        "tests/test_norms.py::test_histograms_of_one_number_are_about_it",
        ("(2**-20 * low.abs()).clamp_min(0.5)", "torch.full_like(low, 0.5)"),
    ),
    *mutants_of(
        "histograms.py",
        "tests/test_norms.py::test_histograms_leave_out_what_is_not_finite",
        ("posinf=-math.inf, neginf=-math.inf)", "posinf=math.inf, neginf=-math.inf)"),
    ),
    *mutants_of(
        "group_settings.py",
        "tests/training/test_theory_in_training.py::test_a_random_walk_comes_within_3_percent",
        ("square, square * turn**2)", "square, square * turn)"),
    ),
    *mutants_of(
        "metrics.py",
        "tests/test_metrics.py::test_ranks_are_not_added_up",
        ("sum(piece.shape.numel() for piece in pieces)", "sum(piece.tensor.numel() for piece in pieces)"),
    ),
    *mutants_of(
        "metrics.py",
        "tests/test_metrics.py::test_sparsity_equals_its_definition",
        ("return values[-1]", "return values[0]"),
    ),
    *mutants_of(
        "metrics.py",
        "tests/test_metrics.py::test_the_gap_is_training_minus_validation",
        (
            "self.train_metric.compute() - self.val_metric.compute()",
            "self.val_metric.compute() - self.train_metric.compute()",
        ),
        ("self.val_metric.reset()", "pass"),
    ),
]
