"""Mutants of what shrinks weights, and by how much: decay, penalties, projections, schedules and theory."""

from tests.mutants.mutant import mutants_of

MUTANTS = [
    *mutants_of(
        "decay.py",
        "tests/test_decay.py::test_lists_decay_as_torch_multiplies_one_tensor",
        ("torch._foreach_mul_(alike, operand(factor, alike))", "torch._foreach_mul_(alike, factor)"),
    ),
    *mutants_of(
        "decay.py",
        "tests/test_decay.py::test_nothing_and_all_are_shares",
        ("not 0 <= share <= 1:", "not 0 <= share < 1:"),
    ),
    *mutants_of(
        "decay.py",
        "tests/training/test_decay_methods.py::test_only_what_is_not_excluded_decays_and_by_its_factor",
        ("moved[0].ge_(0)", "moved[0].gt_(0)"),
    ),
    *mutants_of(
        "decay.py",
        "tests/training/test_closed_forms.py::test_cautious_decay_does_not_move_the_minimum",
        ('moved = new("sub", start, after)', 'moved = new("sub", after, start)'),
        (
            "torch._foreach_addcmul_(after, start, moved, value=strength)",
            "torch._foreach_addcmul_(after, after, moved, value=strength)",
        ),
    ),
    *mutants_of(
        "decay.py",
        "tests/test_decay.py::test_a_list_of_all_kinds",
        ("torch._foreach_clamp_max_(moved, 0.0)", "pass"),
        # Two temporaries may not share their memory.
        (
            'wide, gaps = widened(some), copies(those, slot="gaps")',
            'wide, gaps = widened(some), copies(those, slot="wide")',
        ),
    ),
    *mutants_of(
        "decay.py",
        "tests/test_decay.py::test_cautious_decay_sees_signs_whose_product_float16_cannot_hold",
        ("if moved[0].dtype == torch.float16:", "if False:"),
    ),
    *mutants_of(
        "decay.py",
        "tests/training/test_decay_methods.py::test_a_warm_start_that_a_grad_scaler_skips_is_made_up_for",
        ("(square_norm - bound) / numel).clamp_min(0)", "(square_norm - bound) / numel)"),
    ),
    *mutants_of(
        "callbacks/_copied_steps.py",
        "tests/training/test_lost_strength.py::test_a_gradient_less_a_small_term_is_right_in_the_mean_of_elements_and_of_steps",
        ("round_with(noise.view_as(gradient)", "round_with(0 * noise.view_as(gradient)"),
        ("torch.arange(step, step + gradient.numel()", "torch.arange(0, gradient.numel()"),
    ),
    *mutants_of(
        "decay.py",
        "tests/training/test_decay_methods.py::test_rounded_at_random_a_thousand_small_steps_are_right_in_the_mean",
        ("torch.float16: 13}", "torch.float16: 12}"),
    ),
    *mutants_of(
        "decay.py",
        "tests/test_decay.py::test_float16_below_its_normal_range_is_right_in_the_mean",
        ("if dtype == torch.float16:  # below", "if False:  # below"),
    ),
    *mutants_of(
        "decay.py",
        "tests/test_decay.py::test_what_is_not_finite_stays_visible",
        ("torch.where(value.isfinite(), rounded, value)", "rounded"),
    ),
    *mutants_of(
        "decay.py",
        "tests/training/test_decay_methods.py::test_seeds_make_other_noise",
        ("torch.Generator(weight.device).manual_seed(seed)", "torch.Generator(weight.device).manual_seed(0)"),
    ),
    *mutants_of(
        "decay.py",
        "tests/test_decay.py::test_one_step_is_right_in_the_mean",
        ("value.abs() < 2.0**-14", "value < 2.0**-14"),
    ),
    *mutants_of(
        "decay.py",
        "tests/training/test_closed_forms.py::test_coupled_decay_pulls_to_zero_while_an_optimizer_climbs",
        (
            "torch._foreach_add_(into, alike, alpha=weight_decay)",
            "torch._foreach_add_(into, alike, alpha=-weight_decay)",
        ),
    ),
    *mutants_of(
        "decay.py",
        "tests/training/test_decay_methods.py::test_decay_that_rounds_to_nothing_is_warned_of_once",
        ("strength = -1.0 if isinstance(share, Tensor) else -share", "strength = -1.0"),
    ),
    *mutants_of(
        "decay_methods.py",
        "tests/test_decay_methods.py::test_coupled_decay_adds_the_gradient_of_a_penalty",
        ('-self.weight_decay if self.group.get("maximize") else ', ""),
    ),
    *mutants_of(
        "decay_methods.py",
        "tests/training/test_decay_methods.py::test_a_grad_scaler_changes_nothing",
        ("alike.pull if scale is None else scale * alike.pull", "alike.pull"),
    ),
    *mutants_of(
        "step_sizes.py",
        "tests/training/test_decay_methods.py::test_a_grad_scaler_changes_nothing",
        ("rows[:, 0] /= scale.to(rows) ** 2", "rows[:, 0] /= scale.to(rows)"),
    ),
    *mutants_of(
        "decay.py",
        "tests/test_decay_methods.py::test_the_noise_is_another_for_each_parameter_and_each_step",
        ('f"{seed}/{step}/{name}"', 'f"{seed}/{step}"'),
        ('f"{seed}/{step}/{name}"', 'f"{seed}/{name}"'),
    ),
    *mutants_of(
        "decay_methods.py",
        "tests/test_decay_methods.py::test_no_weight_changes_if_the_share_of_another_is_too_large",
        ("_check_shares(share for share, _ in shares)", "pass"),
    ),
    *mutants_of(
        "step_sizes.py",
        "tests/test_decay_methods.py::test_stable_adam_equals_the_formula",
        ("1 - beta ** (steps / numel.clamp_min(1) + 1)", "1 - beta ** (steps / numel.clamp_min(1))"),
        ("((1 - beta) * square + beta * seen)", "(beta * square + (1 - beta) * seen)"),
    ),
    *mutants_of(
        "step_sizes.py",
        "tests/test_decay_methods.py::test_where_no_gradient_says_anything_nothing_decays",
        (".nan_to_num(nan=0.0, posinf=0.0)", ""),
    ),
    *mutants_of(
        "decay_methods.py",
        "tests/training/test_decay_methods.py::test_frozen_weights_and_those_without_a_gradient_rest",
        ("return [parameter.grad is not None for parameter in parameters]", "return [True for _ in parameters]"),
    ),
    *mutants_of(
        "callbacks/_rounding.py",
        "tests/training/test_lost_strength.py::"
        "test_what_is_below_the_spacing_of_numbers_is_warned_of_and_what_is_above_is_there",
        # The step of the optimizer is measured, and not only what is added to gradients.
        ("if not (weights and self.is_followed) or id(optimizer) in self.cannot_follow:", "if True:"),
    ),
    *mutants_of(
        "callbacks/_rounding.py",
        "tests/training/test_lost_strength.py::test_what_is_lost_late_or_in_part_is_warned_of_after_500_steps",
        # A step that is measured stands for those before it.
        (
            "self._stands_for = seen - max([k for k in (*_STEPS, seen - self._every) if 0 <= k < seen], default=-1)",
            "pass",
        ),
    ),
    *mutants_of(
        "callbacks/_copied_steps.py",
        "tests/training/test_lost_strength.py::test_an_optimizer_that_keeps_more_than_its_state_is_stepped_once",
        ("        all(isinstance(value, _NUMBERS) for value in own)\n", "        True\n"),
    ),
    *mutants_of(
        "callbacks/_copied_steps.py",
        "tests/training/test_lost_strength.py::test_a_step_that_talks_to_other_ranks_is_made_once",
        ('if func.namespace in ("c10d", "_c10d_functional"):', "if False:"),
    ),
    *mutants_of(
        "callbacks/_rounding.py",
        "tests/training/test_lost_strength.py::test_decay_that_acts_in_a_few_steps_only_is_measured_in_them",
        ("1 if corrects_itself else _EVERY", "_EVERY"),
    ),
    *mutants_of(
        "callbacks/_rounding.py",
        "tests/training/test_lost_strength.py::test_squares_that_half_precision_makes_zero_are_warned_of",
        (
            "places == [changed] or not (self._adds_to_gradients or in_square in places)",
            "places == [changed] or not self._adds_to_gradients",
        ),
    ),
    *mutants_of(
        "callbacks/_rounding.py",
        "tests/training/test_lost_strength.py::test_the_warning_says_what_is_lost_under_noise",
        ("_WHILE = 20", "_WHILE = 1"),
    ),
    *mutants_of(
        "callbacks/_rounding.py",
        "tests/training/test_lost_strength.py::test_updates_that_round_to_nothing_agree_with_every_weight",
        ("self._exact = expected", "pass"),
    ),
    *mutants_of(
        "callbacks/_copied_steps.py",
        "tests/training/test_lost_strength.py::test_constrained_decay_answers_steps_that_are_lost",
        ("elif self._answers:", "elif False:"),
    ),
    *mutants_of(
        "callbacks/_copied_steps.py",
        "tests/training/test_lost_strength.py::test_averages_of_squares_that_stand_still_are_warned_of",
        ("_kept_share(self._group) ** self._steps", "0.0"),
    ),
    *mutants_of(
        "callbacks/_rounding.py",
        "tests/training/test_lost_strength.py::test_decay_that_does_not_depend_on_averages_of_squares_is_not_warned_of",
        (" and not (without is not None and is_decoupled)", ""),
    ),
    *mutants_of(
        "decay_methods.py",
        "tests/training/test_decay_methods.py::test_stable_decay_refuses_what_it_is_not_defined_for_before_training",
        ('if any(group.get("amsgrad") for', "if any(False for"),
    ),
    *mutants_of(
        "_steps/buckets.py",
        "tests/test_decay_methods.py::test_cautious_decay_follows_weights_that_are_replaced",
        ("if tensors and list(map(form_of, tensors)) == list(map(form_of, kept)):", "if tensors and kept:"),
    ),
    *mutants_of(
        "decay_methods.py",
        "tests/test_decay_methods.py::test_cautious_sgd_with_momentum_equals_the_formula",
        (
            "self._copies[optimizer] = refreshed(self._copies.get(optimizer, []), weights)",
            "self._copies[optimizer] = weights",
        ),
    ),
    *mutants_of(
        "penalties.py",
        "tests/test_penalties.py::test_the_gradient_is_added_and_is_that_of_the_formula",
        ("strength * self.l1_ratio)\n            _add_", "strength)\n            _add_"),
    ),
    *mutants_of(
        "penalties.py",
        "tests/test_penalties.py::test_the_value_is_that_of_the_formula_in_float64",
        ("* (0.5 * strength)", "* strength"),
        ("math.sqrt(math.prod(weight.shape[d] for d in dims))", "1.0"),
    ),
    *mutants_of(
        "penalties.py",
        "tests/test_penalties.py::test_the_proximal_map_minimizes_its_objective",
        ("_divide_(weights, thresholds, 1 - self.l1_ratio)", "_divide_(weights, thresholds, 1.0)"),
    ),
    *mutants_of(
        "penalties.py",
        "tests/test_penalties.py::test_groups_become_zero_as_a_whole",
        ("torch.where(found > removed, 1 - removed / found, 0.0)", "torch.where(found > 0, 1 - removed / found, 0.0)"),
    ),
    *mutants_of(
        "penalties.py",
        "tests/test_penalties.py::test_nothing_pulls_where_all_is_zero",
        (".nan_to_num_(0.0, 0.0)", ".nan_to_num_(0.0)"),
    ),
    *mutants_of(
        "penalties.py",
        "tests/test_penalties.py::test_zeros_are_exact_and_signs_never_flip",
        ("write_back_(narrow, wide)", "pass"),
    ),
    *mutants_of(
        "_penalty.py",
        "tests/test_penalties.py::test_a_sparse_gradient_is_refused",
        ("if each.layout is not torch.strided:", "if False:"),
    ),
    *mutants_of(
        "penalties.py",
        "tests/test_penalties.py::test_a_weight_spread_over_ranks_is_penalized_as_a_whole",
        ("others = [d for d in range(number) if d not in dims]", "others = list(range(number))"),
    ),
    *mutants_of(
        "_penalty.py",
        "tests/test_penalties.py::test_strengths_and_thresholds_are_non_negative_and_finite",
        ("if not 0 <= value < math.inf:  #", "if not 0 <= value:  #"),
    ),
    *mutants_of(
        "penalties.py",
        "tests/test_penalties.py::test_the_proximal_step_of_a_list_is_that_of_each",
        ("torch._foreach_minimum_(bounded, thresholds)", "pass"),
    ),
    *mutants_of(
        "_projection.py",
        "tests/test_projections.py::test_max_norm_is_strict_in_every_precision",
        ("bound * (1 - margin(dtype))", "bound"),
    ),
    *mutants_of(
        "_projection.py",
        "tests/test_projections.py::test_weights_that_are_not_finite_stay_as_they_are_and_show",
        ("return (found > bound) & (found < math.inf)", "return (found > bound)"),
    ),
    *mutants_of(
        "projections.py",
        "tests/test_projections.py::test_bounds_hold_and_weights_between_them_keep_their_bits",
        ("(~inside).tolist()", "inside.tolist()"),
    ),
    *mutants_of(
        "projections.py",
        "tests/test_projections.py::test_rows_without_direction_stay_zero",
        ("return off & (found > 0) & (found < math.inf)", "return off & (found < math.inf)"),
    ),
    *mutants_of(
        "projections.py",
        "tests/training/test_units.py::test_a_graph_convolution_is_constrained_per_output",
        ("off = (found - radius).abs() >", "off = (found - radius) >"),
    ),
    *mutants_of(
        "_projection.py",
        "tests/test_projections.py::test_a_relative_radius_is_a_multiple_of_the_norm_at_the_start",
        ("radius=projection.radius * norm, relative=False", "radius=norm, relative=False"),
    ),
    *mutants_of(
        "_projection.py",
        "tests/test_projections.py::test_a_list_is_projected_as_each_of_its_weights",
        ("put_back_(weights, units)", "pass"),
        ("return found.any()", "return found.all()"),
    ),
    *mutants_of(
        "spectral_projections.py",
        "tests/test_projections.py::test_a_vector_kept_from_step_to_step_follows_the_largest_singular_value",
        ("torch._foreach_copy_(kept, direction.unbind())", "pass"),
    ),
    *mutants_of(
        "projections.py",
        "tests/test_projections.py::test_a_parameter_is_projected_in_place_without_autograd",
        ("((smallest < low) | (largest > high)).any()", "(largest > high).any()"),
    ),
    *mutants_of(
        "spectral_projections.py",
        "tests/test_projections.py::test_singular_values_of_units_in_the_last_dims_are_clipped",
        ("*[1 + order.index(d) for d in range(weight.dim())]", "*[1 + d for d in order]"),
    ),
    *mutants_of(
        "projections.py",
        "tests/test_projections.py::test_bad_input_is_refused",
        ("if not self.low < self.high:", "if self.low > self.high:"),
    ),
    *mutants_of(
        "_projection.py",
        "tests/test_projections.py::test_max_norm_is_strict_where_all_roundings_agree",
        ("return eps / 2 if dtype in HALF else 32 * eps", "return eps / 2"),
    ),
    *mutants_of(
        "step_sizes.py",
        "tests/test_step_sizes.py::test_a_steady_gradient_moves_weights_by_the_step_size",
        ('bias = 1 - group["betas"][1] **', 'bias = 1 - group["betas"][0] **'),
        ("local_piece(square), 1 / bias,", "local_piece(square), bias,"),
        ('_number(group["lr"]) / (1 - group["momentum"])', '_number(group["lr"])'),
        ("[size.eps / root for", "[size.eps for"),
        ('(_number(state["step"]) - 1) * group["lr_decay"]', '_number(state["step"]) * group["lr_decay"]'),
        ("/ (1 - momentum) if momentum else lr)", "/ (1 - momentum))"),
        ("for k in (step, step + 1))", "for k in (step - 1, step))"),
    ),
    *mutants_of(
        "step_sizes.py",
        "tests/test_step_sizes.py::test_amsgrad_goes_as_far_as_its_largest_average_says",
        ('state.get("max_exp_avg_sq") if group.get("amsgrad") else ', ""),
    ),
    *mutants_of(
        "step_sizes.py",
        "tests/training/test_closed_forms.py::test_proximal_steps_end_at_scikit_learns_coefficients_and_zeros",
        ("means, means, value=-1)", "means, means, value=1)"),
    ),
    *mutants_of(
        "schedules.py",
        "tests/test_schedules.py::test_steps",
        ("round(boundary * total_steps)", "int(boundary * total_steps)"),
    ),
    *mutants_of(
        "schedules.py",
        "tests/test_schedules.py::test_join_gives_each_schedule_its_own_run",
        ("piece = bisect_right(boundaries, step)", "piece = bisect_right(boundaries, step - 1)"),
        ("step=step - begin, total_steps=end - begin", "step=step, total_steps=end - begin"),
    ),
    *mutants_of(
        "schedules.py",
        "tests/test_schedules.py::test_warmup_of_cosine_is_dinos_warmup_and_cosine_over_the_remaining_steps",
        ("max(at.total_steps - length, 1)", "at.total_steps"),
    ),
    *mutants_of(
        "schedules.py",
        "tests/test_schedules.py::test_past_the_end_the_stairs_hold_although_a_boundary_lies_there",
        ("return at.step if at.step < at.total_steps else", "return at.step if True else"),
    ),
    *mutants_of(
        "schedules.py",
        "tests/training/test_resume.py::test_one_callback_serves_the_first_run_and_the_resumed_one",
        ("if replay is None or step < replay.steps:", "if replay is None:"),
    ),
    *mutants_of(
        "schedules.py",
        "tests/test_schedules.py::test_mixed_boundaries_that_do_not_increase_in_this_run_are_an_error_at_the_call",
        ("if steps != sorted(steps):", "if False:"),
    ),
    *mutants_of(
        "schedules.py",
        "tests/test_schedules.py::test_follow_lr_is_the_value_at_the_peak_and_proportional_below",
        ("self.value * (at.lr / at.peak_lr) if at.peak_lr else 0.0", "self.value * at.lr"),
    ),
    *mutants_of(
        "schedules.py",
        "tests/test_schedules.py::test_rounding_leads_no_value_out_of_what_lies_between_the_ends",
        ("return low if value < low else high if value > high else value", "return value"),
    ),
    *mutants_of(
        "schedules.py",
        "tests/test_schedules.py::test_a_weight_without_gradient_shrinks_to_one_over_e_in_a_timescale",
        ("(self.fraction, at.total_steps))", "(self.fraction, at.steps_per_epoch))"),
    ),
    *mutants_of(
        "schedules.py",
        "tests/test_schedules.py::test_a_bad_argument_is_refused_with_what_was_expected_and_found",
        ("if comparable != sorted(set(comparable)):", "if comparable != sorted(comparable):"),
    ),
    *mutants_of(
        "schedules.py",
        "tests/test_schedules.py::test_early_and_late_dropout_refuse_what_is_no_rate",
        ("if rate >= 1:", "if rate > 1:"),
    ),
    *mutants_of(
        "theory.py",
        "tests/test_theory.py::test_sgd_settles_at_the_expected_norm_and_angle",
        ("_divide(lr, 2 * weight_decay * (1 - momentum))", "_divide(lr, 2 * weight_decay)"),
    ),
    *mutants_of(
        "theory.py",
        "tests/test_theory.py::test_update_rms_of_adam_is_angle_times_rms",
        ("weight_decay * (1 - beta1) / (1 + beta1)", "weight_decay * (1 + beta1) / (1 - beta1)"),
    ),
    *mutants_of(
        "theory.py",
        "tests/test_theory.py::test_the_angle_of_lion_by_hand",
        ("beta1**2 * (1 - beta2) / (1 + beta2)", "beta1 * (1 - beta2) / (1 + beta2)"),
    ),
    *mutants_of(
        "theory.py",
        "tests/test_theory.py::test_timescale_in_epochs_is_that_in_steps_over_the_steps_of_an_epoch",
        ("return _divide(1 - momentum, lr * weight_decay)", "return _divide(1.0, lr * weight_decay)"),
    ),
    *mutants_of(
        "theory.py",
        "tests/test_theory.py::test_decay_at_the_rounding_threshold_moves_no_weight",
        ("torch.finfo(dtype).eps / 4", "torch.finfo(dtype).eps / 2"),
    ),
    *mutants_of(
        "theory.py",
        "tests/test_theory.py::test_mean_square_is_the_second_moment_of_unit_steps",
        ("(1 - lr * weight_decay) ** 2 * mean_square", "(1 - lr * weight_decay) * mean_square"),
    ),
    *mutants_of(
        "theory.py",
        "tests/test_theory.py::test_normalized_weight_decay_of_the_paper",
        ("math.sqrt(batch_size / (samples * epochs))", "(batch_size / (samples * epochs))"),
    ),
    *mutants_of(
        "advice.py",
        "tests/test_advice.py::test_decay_that_takes_exactly_all_changes_no_sign",
        ("group.lr * group.weight_decay > 1:", "group.lr * group.weight_decay >= 1:"),
    ),
    *mutants_of(
        "advice.py",
        "tests/test_advice.py::test_decay_that_rounds_to_nothing_is_told",
        ("if not group.is_decoupled or group.is_fused:", "if not group.is_decoupled:"),
    ),
    *mutants_of(
        "advice.py",
        "tests/test_advice.py::test_a_run_shorter_than_an_epoch_need_not_remember_an_epoch",
        ("steps < min(steps_per_epoch, total_steps) / 2:", "steps < steps_per_epoch / 2:"),
    ),
]
