"""Mutants of callbacks."""

from tests.mutants.mutant import mutants_of

MUTANTS = [
    *mutants_of(
        "callbacks/_base.py",
        "tests/training/test_penalties.py::test_lbfgs_logs_the_weights_of_its_first_evaluation",
        ("self._logged[step.watch.index] = step.watch.steps", "pass"),
    ),
    *mutants_of(
        "callbacks/_base.py",
        "tests/training/test_accumulation.py::test_a_run_that_stops_early_keeps_to_the_planned_length",
        ("elif 0 < most < horizon and not trainer.should_stop:", "elif 0 < most < horizon:"),
    ),
    *mutants_of(
        "callbacks/_base.py",
        "tests/training/test_lifecycle.py::test_a_callback_that_is_kept_lets_go_of_the_module_the_optimizer_and_the_trainer",
        ("delattr(self, name)", "pass"),
        ('self.__dict__.pop("log", None)', "pass"),
    ),
    *mutants_of(
        "callbacks/_base.py",
        "tests/training/test_resume.py::test_the_constructor_wins_over_the_checkpoint_and_says_so",
        (" and then[name] != now[name]", ""),
    ),
    *mutants_of(
        "callbacks/_base.py",
        "tests/training/test_precision.py::test_bfloat16_autocast_decays_float32_weights_exactly",
        ("if most > self._most_steps:", "if most >= self._most_steps:"),
    ),
    *mutants_of(
        "callbacks/_base.py",
        "tests/training/test_attach.py::test_a_state_that_comes_too_late_is_an_error",
        ("if self.run is not None and self.run.trainer is None and not self.run.is_over:", "if False:"),
    ),
    *mutants_of(
        "callbacks/_base.py",
        "tests/training/test_attach.py::test_what_is_no_optimizer_is_told_what_to_write_instead",
        ("elif isinstance(optimizer, (list, tuple, dict)) and len(optimizer):", "elif False:"),
    ),
    *mutants_of(
        "callbacks/_selective.py",
        "tests/training/test_idle.py::test_frozen_parameters_are_warned_of",
        ("if any(info.parameter.requires_grad and", "if any("),
    ),
    *mutants_of(
        "callbacks/_selective.py",
        "tests/training/test_constraints.py::test_what_does_not_last_under_lookahead_is_told",
        ('if is_named(optimizer, "Lookahead", "TRAC") and not is_followed:', "if False:"),
    ),
    *mutants_of(
        "callbacks/_selective.py",
        "tests/training/test_constraints.py::test_an_optimizer_that_has_other_weights_for_evaluation_is_told",
        ("for each in (optimizer, *stepping_optimizers(optimizer)):", "for each in (optimizer,):"),
    ),
    *mutants_of(
        "callbacks/_selective.py",
        "tests/training/test_constraints.py::test_the_optimizer_of_accelerate_has_no_other_weights",
        ('if has_both and not is_named(each, "AcceleratedOptimizer"):', "if has_both:"),
    ),
    *mutants_of(
        "callbacks/penalty.py",
        "tests/training/test_changes_in_mid_run.py::test_the_gradient_of_a_penalty_is_refused_by_an_optimizer_that_climbs",
        ("if step.optimizer not in self._checked:", "if False:"),
    ),
    *mutants_of(
        "callbacks/penalty.py",
        "tests/training/test_penalties.py::test_frozen_weights_are_not_in_the_logged_value",
        ("alike.where([p.requires_grad for p in alike.parameters])", "alike"),
    ),
    *mutants_of(
        "callbacks/penalty.py",
        "tests/training/test_penalties.py::test_a_step_that_overflows_moves_nothing",
        ("if is_real and self.is_due(step):", "if self.is_due(step):"),
    ),
    *mutants_of(
        "callbacks/penalty.py",
        "tests/training/test_penalties.py::test_each_penalty_adds_its_gradient",
        ("return ElasticNet(self.l1 / (self.l1 + self.l2))", "return ElasticNet(self.l2 / (self.l1 + self.l2))"),
    ),
    *mutants_of(
        "callbacks/_penalty_methods.py",
        "tests/training/test_penalties.py::test_a_grad_scaler_changes_nothing",
        ("scaled = strength if step.scale is None else step.scale * strength", "scaled = strength"),
    ),
    *mutants_of(
        "callbacks/_penalty_methods.py",
        "tests/training/test_penalties.py::test_a_parameter_without_a_gradient_gets_none_and_stays",
        ("self.where([parameter.grad is not None for parameter in self.parameters])", "self"),
    ),
    *mutants_of(
        "callbacks/_rounding.py",
        "tests/training/test_lost_strength.py::test_in_between_it_is_as_in_float32_or_warned_of",
        ("TOLERANCE = 0.05", "TOLERANCE = 0.5"),
    ),
    *mutants_of(
        "callbacks/_penalty_methods.py",
        "tests/training/test_penalties.py::test_exact_zeros_of_what_is_divided_by_its_norm_are_refused",
        ("if is_normalized(info) and", "if False and"),
    ),
    *mutants_of(
        "callbacks/_penalty_methods.py",
        "tests/training/test_penalties.py::test_an_unknown_metric_is_an_error_before_training_that_names_the_known",
        ("if penalized and not knows(optimizer):", "if False:"),
    ),
    *mutants_of(
        "callbacks/_penalty_methods.py",
        "tests/training/test_penalties.py::test_what_cannot_work_is_an_error_before_training",
        ('if any(group.get("maximize") and penalized', "if any(False and penalized"),
    ),
    *mutants_of(
        "callbacks/constraint.py",
        "tests/training/test_constraints.py::test_the_constraint_holds_after_an_optimizer_has_moved_what_another_one_in_it_stepped",
        ("if watch.may_move_weights_later else ()", "if False else ()"),
    ),
    *mutants_of(
        "callbacks/constraint.py",
        "tests/training/test_constraints.py::test_a_constraint_that_binds_says_nothing",
        ("changed if self._bound is None else self._bound | changed.to(self._bound.device)", "changed"),
        ("if bound == 0:", "if True:"),
        ("-1.0 if self._bound is None", "0.0 if self._bound is None"),
    ),
    *mutants_of(
        "callbacks/constraint.py",
        "tests/training/test_distributed.py::test_a_constraint_of_one_weight_under_zero_redundancy_optimizer",
        ("if self.run is None or self._is_checked", "if self._bound is None or self._is_checked"),
    ),
    *mutants_of(
        "callbacks/constraint.py",
        "tests/training/test_lifecycle.py::test_what_is_added_in_mid_run_does_nothing_before_the_next_fit",
        ("if self.run is None or self._is_checked", "if self._is_checked"),
    ),
    *mutants_of(
        "callbacks/constraint.py",
        "tests/training/test_constraints.py::test_a_resumed_power_iteration_goes_on_where_it_was",
        ("target.vector = start if saved is None else saved.to(start)", "target.vector = start"),
    ),
    *mutants_of(
        "callbacks/constraint.py",
        "tests/training/test_constraints.py::test_a_step_that_overflows_moves_nothing",
        ("        self._due.pop(optimizer, None)\n", ""),
    ),
    *mutants_of(
        "callbacks/constraint.py",
        "tests/training/test_target_share.py::test_from_a_step_on_zeros_stay_and_the_rest_trains_on",
        ("stacked(those).masked_fill_(mask, 0)", "stacked(those)"),
        ("self._freeze = Constant(0.0) if freeze_zeros is None", "self._freeze = Constant(0.0) if freeze_zeros"),
    ),
    *mutants_of(
        "callbacks/constraint.py",
        "tests/training/test_target_share.py::test_projections_at_every_nth_step",
        ("(step.number + 1) % self.every_n_steps == 0", "step.number % self.every_n_steps == 0"),
    ),
    *mutants_of(
        "callbacks/constraint.py",
        "tests/training/test_constraints.py::test_frozen_weights_are_left_alone",
        ("[t for t in targets if t.info.parameter.requires_grad]", "list(targets)"),
    ),
    *mutants_of(
        "callbacks/constraint.py",
        "tests/training/test_constraints.py::test_a_relative_radius_is_of_the_weights_at_the_start_when_resumed_too",
        ("alike.setdefault((id(projection), target.dim),", "alike.setdefault(target.dim,"),
    ),
    *mutants_of(
        "callbacks/constraint.py",
        "tests/training/test_constraints.py::test_a_parametrized_weight_is_refused_before_training",
        ("if (why := why_not_held(info)) and", "if (why := '') and"),
    ),
    *mutants_of(
        "callbacks/_selective.py",
        "tests/training/test_units.py::test_where_the_units_are_a_guess_it_is_told_once_a_class",
        ("if not units_are_known(info.owner, info.shape):", "if False:"),
    ),
    *mutants_of(
        "_heads.py",
        "tests/training/test_weight_groups.py::test_groups_are_penalized_as_a_whole",
        ("number = keys // width", "number = heads"),
        ("if width and size % width == 0:", "if False:"),
        ("if self._is_head_by_head():", "if False:"),
        ('stated.get("head_first") is True', "False"),
    ),
    *mutants_of(
        "callbacks/_penalty_methods.py",
        "tests/training/test_weight_penalty.py::test_every_third_step_has_three_times_the_strength",
        ("return owner.every_n_steps * owner", "return owner"),
    ),
    *mutants_of(
        "_joint.py",
        "tests/training/test_weight_groups.py::test_groups_are_penalized_as_a_whole",
        ("start + self.first * width, ", "self.first * width, "),
    ),
    *mutants_of(
        "_joint.py",
        "tests/training/test_weight_groups.py::test_a_large_layer_is_taken_some_heads_at_a_time",
        ("range(0, heads, step)", "range(0, 1, step)"),
    ),
    *mutants_of(
        "_joint.py",
        "tests/training/test_weight_groups.py::test_two_processes_end_where_one_does",
        ("[whole_tensor(tensor, like) for tensor in tensors_of(numbers)]", "tensors_of(numbers)"),
    ),
    *mutants_of(
        "callbacks/_weight_groups.py",
        "tests/training/test_weight_groups.py::test_a_layer_in_two_parameter_groups_is_refused",
        ("if place.setdefault(part.layer, i) != i:", "if False:"),
    ),
    *mutants_of(
        "callbacks/anchor_decay.py",
        "tests/training/test_changes_in_mid_run.py::test_leaves_frozen_parameters_alone_and_acts_again_when_they_are_trained",
        ("moving = columns if all(flags) else", "moving = columns if flags else"),
    ),
    *mutants_of(
        "callbacks/anchor_decay.py",
        "tests/training/test_decay_methods.py::test_weights_are_pulled_to_where_they_began",
        ("_Target(info, local_tensor(info.parameter).clone(),", "_Target(info, local_tensor(info.parameter),"),
    ),
    *mutants_of(
        "callbacks/constrained_decay.py",
        "tests/training/test_decay_methods.py::test_the_bound_is_taken_where_growth_slows_down",
        ('(growth < state["growth"]) & state["bound"].isinf()', '(growth < state["growth"])'),
        ('state["smoothed"], state["growth"] = smoothed, growth', 'state["growth"] = growth'),
    ),
    *mutants_of(
        "callbacks/dropout.py",
        "tests/training/test_dropout.py::test_a_number_of_the_settings_is_told_and_scheduled_if_asked",
        ("{*code.co_names, *keywords}", "code.co_names"),
    ),
    *mutants_of(
        "callbacks/dropout.py",
        "tests/training/test_dropout.py::test_a_compiled_model_is_compiled_for_few_rates_only",
        ("i / (_COMPILED_LEVELS - 1)", "i / _COMPILED_LEVELS"),
    ),
    *mutants_of(
        "callbacks/norm_monitor.py",
        "tests/training/test_norm_monitor.py::test_lbfgs_is_logged_once_a_step",
        ("and watch.index not in self._readings:", ":"),
    ),
    *mutants_of(
        "callbacks/_monitored.py",
        "tests/training/test_norm_monitor.py::test_frozen_parameters_do_not_count",
        ("if weight.is_trainable and weight not in", "if weight not in"),
    ),
    *mutants_of(
        "callbacks/_logged.py",
        "tests/training/test_norm_monitor.py::test_keys_beyond_the_cap_are_left_out_with_a_warning",
        ("if len(details) > self._monitor.max_keys:", "if False:"),
    ),
    *mutants_of(
        "callbacks/_logged.py",
        "tests/training/test_norm_monitor.py::test_histograms_end_at_the_cap",
        ("self._histogram_bytes += len(drawn) * _BYTES", "pass"),
    ),
    *mutants_of(
        "callbacks/_rounding.py",
        "tests/training/test_decay_methods.py::test_decay_that_is_small_only_while_the_rate_warms_up_is_not",
        # The peak tells whether decay is lost, not the first rate of a warm-up.
        ("at.lr < 0.5 * at.peak_lr", "at.lr < 0.0 * at.peak_lr"),
    ),
    *mutants_of(
        "_trainer/loggers.py",
        "tests/training/test_hyperparameters.py::test_only_the_first_rank_logs",
        ("for logger in trainer.loggers if trainer.is_global_zero else ():", "for logger in trainer.loggers:"),
    ),
    *mutants_of(
        "_trainer/loggers.py",
        "tests/training/test_hyperparameters.py::test_loggers_write_them_beside_those_of_the_module",
        # TensorBoard shows what is written first, and nothing of what Lightning writes afterwards.
        ("{**of_the_modules, **values}", "dict(values)"),
        ('if name != "_class_path"}', "}"),
    ),
    *mutants_of(
        "callbacks/summary.py",
        "tests/training/test_hyperparameters.py::test_nothing_is_logged_while_a_model_is_only_validated",
        ('if self.log_hyperparams and stage == "fit":', "if self.log_hyperparams:"),
    ),
    *mutants_of(
        "callbacks/summary.py",
        "tests/training/test_summary.py::test_without_an_optimizer_rates_are_not_known_and_nothing_is_noted_about_them",
        ("rows = [row._replace(lr=None, advice=None) for row in rows]", "pass"),
    ),
    *mutants_of(
        "callbacks/summary.py",
        "tests/training/test_summary.py::test_a_summary_of_an_optimizer_alone_and_of_a_callback_in_use",
        ("decay = copy.copy(decays[0])", "decay = decays[0]"),
    ),
]
