"""Mutants of what happens around steps: ``_steps/`` and ``_trainer/``."""

from tests.mutants.mutant import mutants_of

MUTANTS = [
    *mutants_of(
        "_steps/hooks.py",
        "tests/training/test_changes_in_mid_run.py::test_acts_in_the_order_of_callbacks_on_an_optimizer_that_one_of_them_has_brought",
        # Callbacks act in their order, also on an optimizer that was made in mid-run.
        ("self._watches.sort(key=lambda each: each.order)", "pass"),
    ),
    *mutants_of(
        "_steps/hooks.py",
        "tests/steps/test_hooks.py::test_hooks_of_others_see_the_users_groups",
        ("move_to_end(post.id, last=False)", "move_to_end(post.id)"),
        ("move_to_end(pre.id)", "move_to_end(pre.id, last=False)"),
    ),
    *mutants_of(
        "_steps/hooks.py",
        "tests/steps/test_hooks.py::test_a_step_that_was_kept_before",
        ("if self._depth > 1:", "if self._depth > 2:"),
    ),
    *mutants_of(
        "_steps/hooks.py",
        "tests/steps/test_hooks.py::test_a_closure_in_another_place",
        ("callable(value) and not isinstance(value, nn.Module))", "callable(value))"),
    ),
    *mutants_of(
        "_steps/hooks.py",
        "tests/steps/test_hooks.py::test_with_and_without_a_closure",
        ("self._show_parts(optimizer)\n        return loss", "return loss"),
        ("self._show_parts(optimizer)\n            return None", "return None"),
    ),
    *mutants_of(
        "_steps/hooks.py",
        "tests/steps/test_hooks.py::test_a_step_that_a_grad_scaler_skips_neither_counts_nor_acts",
        ("return found_inf is not None and bool(found_inf.item())", "return False"),
        ("is_real=not self._is_skipped)", "is_real=True)"),
    ),
    *mutants_of(
        "_steps/hooks.py",
        "tests/steps/test_hooks.py::test_a_step_at_a_learning_rate_of_zero_counts_where_nothing_is_loaded",
        # The rate of 0 at the start of a warm-up does not mean that a checkpoint is being loaded.
        ("if optimizer.state or any(float(", "if any(float("),
        ("return bool(gradients) and not any(", "return not any("),
    ),
    *mutants_of(
        "_steps/hooks.py",
        "tests/steps/test_hooks.py::test_gradients_are_complete_at_each_evaluation_and_weights_change_once",
        ("for watch in watches if is_first else ():", "for watch in watches:"),
    ),
    *mutants_of(
        "_steps/hooks.py",
        "tests/steps/test_hooks.py::test_the_gradients_of_lbfgs_are_complete_after_each_evaluation_and_not_before",
        ("for watch in watches if gradients else ():", "for watch in watches:"),
    ),
    *mutants_of(
        "_steps/hooks.py",
        "tests/training/test_attach.py::test_the_step_that_dcp_makes_to_learn_what_state_there_is_neither_acts_nor_counts",
        ("for watch in () if self._is_loading else list(self._watches):", "for watch in list(self._watches):"),
    ),
    *mutants_of(
        "_steps/hooks.py",
        "tests/training/test_attach.py::test_nothing_acts_or_counts_in_a_step_that_a_scaler_skips",
        ("if self._is_loading or self._is_skipped:", "if self._is_loading:"),
    ),
    *mutants_of(
        "_steps/hooks.py",
        "tests/training/test_rules.py::test_what_is_appended_in_mid_run_decays_by_its_own_rule_from_then_on",
        ("self._held.thaw()", "pass"),
    ),
    *mutants_of(
        "_steps/hooks.py",
        "tests/steps/test_hooks.py::test_a_step_that_was_kept_before",
        ("if not _is_inside(frame, self._frame):", "if True:"),
    ),
    *mutants_of(
        "_steps/hooks.py",
        "tests/training/test_lifecycle.py::test_a_wrapper_of_step_that_somebody_has_put_there_in_mid_run_stays_and_works",
        (
            'if self._shadow is not None and vars(optimizer).get("step") is self._shadow:',
            "if self._shadow is not None:",
        ),
    ),
    *mutants_of(
        "_steps/hooks.py",
        "tests/steps/test_hooks.py::test_a_step_that_somebody_has_put_there_before_is_there_again_after_it_was_removed",
        ("optimizer.step = self._step_before  #", "pass  #"),
    ),
    *mutants_of(
        "_steps/run.py",
        "tests/steps/test_hooks.py::test_an_optimizer_keeps_what_acts_on_inner_ones_that_are_made_anew",
        ("vars(self._optimizer).setdefault(KEPT, _Kept()).append(watch)", "pass"),
        ("        return _Kept, ()", "        return _Kept, ([*self],)"),
    ),
    *mutants_of(
        "_steps/hooks.py",
        "tests/steps/test_hooks.py::test_one_entry_for_each_group_is_told_what_to_do",
        ("except (LookupError, ValueError, AttributeError) as error:", "except LookupError as error:"),
    ),
    *mutants_of(
        "_steps/hooks.py",
        "tests/steps/test_hooks.py::test_an_error_of_an_optimizer_without_parts_stays_its_own",
        ("if users is None or len(users[0]) == len(optimizer.param_groups):", "if users is None:"),
    ),
    *mutants_of(
        "_steps/hooks.py",
        "tests/steps/test_hooks.py::test_a_step_that_calls_the_step_of_its_base_class",
        ("if self._depth > 0:\n            return", "if False:\n            return"),
    ),
    *mutants_of(
        "_steps/watch.py",
        "tests/training/test_attach.py::test_an_inner_optimizer_that_replaces_another_one_acts_from_its_first_step",
        ("if optimizer is self.optimizer or not self.holds(optimizer):", "if optimizer is self.optimizer:"),
    ),
    *mutants_of(
        "_trainer/run.py",
        "tests/training/test_changes_in_mid_run.py::test_the_optimizers_own_decay_has_the_groups_of_the_new_optimizer",
        ("                return\n        self.refresh()", "                return"),
    ),
    *mutants_of(
        "_steps/parts.py",
        "tests/training/test_optimizers.py::test_factors_equal_hand_made_groups_bit_for_bit",
        ("own = value[schedule] * factor if", "own = value[schedule] if"),
    ),
    *mutants_of(
        "_steps/parts.py",
        "tests/steps/test_parts.py::test_parts_keep_what_they_differ_in",
        ("keys += [k for k in contents if k in target", "keys += [k for k in ()"),
        ("return id(value), value._version", "return id(value)"),
        ("if key not in group or first[key] is not group[key]:", "if key not in group:"),
        ("target[key] = value.clone()", "target[key] = value"),
    ),
    *mutants_of(
        "_steps/parts.py",
        "tests/steps/test_parts.py::test_the_tensors_that_an_optimizer_sees_while_it_steps_are_always_the_same",
        ("known.copy_(value)", "target[key] = value.clone()"),
        ("own = torch.full_like(given, own)", "pass"),
    ),
    *mutants_of(
        "_steps/parts.py",
        "tests/steps/test_parts.py::test_what_an_optimizer_writes_to_its_groups_stands_in_the_users_group",
        ("type(value)(value) if type(value) in (dict, list) else value", "value"),
    ),
    *mutants_of(
        "_steps/parts.py",
        "tests/steps/test_parts.py::test_parameters_that_are_appended_to_a_group",
        ("if i < len(before):", "if False:"),
    ),
    *mutants_of(
        "_steps/parts.py",
        "tests/steps/test_parts.py::test_values_that_a_checkpoint_has_for_as_many_parts_are_used",
        ("if i < len(saved) and len(saved[i]) == len(division.parts):", "if i < len(saved):"),
    ),
    *mutants_of(
        "_steps/parts.py",
        "tests/training/test_groups_stay.py::test_an_optimizer_that_reads_its_groups_before_the_closure_is_refused_in_its_first_step",
        ("return any(not all(were_read) and", "return False and any(not all(were_read) and"),
    ),
    *mutants_of(
        "_steps/parts.py",
        "tests/steps/test_parts.py::test_an_optimizer_that_leaves_parts_unread_is_an_error",
        ("return any(not all(were_read) and (any(were_read) or not to_the_end)", "return any(not any(were_read)"),
        ("(any(were_read) or not to_the_end)", "any(were_read)"),
    ),
    *mutants_of(
        "_steps/parts.py",
        "tests/steps/test_parts.py::test_an_optimizer_that_only_looks_at_its_groups_in_its_first_step_is_asked_in_the_next",
        ("to_the_end and not any(map(any, of_groups))", "False"),
    ),
    *mutants_of(
        "_steps/parts.py",
        "tests/steps/test_parts.py::test_what_an_optimizer_leaves_alone_is_its_own_affair",
        ("(any(were_read) or not to_the_end)", "True"),
        ("        return others + self.copy()", "        return others + []"),
    ),
    *mutants_of(
        "_steps/parts.py",
        "tests/steps/test_parts.py::test_a_list_with_one_rate_for_each_group_goes_with_them",
        ("            setattr(optimizer, name, values)", "            pass"),
    ),
    *mutants_of(
        "_steps/parts.py",
        "tests/training/test_groups_stay.py::test_adabound",
        ('_PER_GROUP = ("base_lrs",)', "_PER_GROUP = ()"),
    ),
    *mutants_of(
        "_steps/parts.py",
        "tests/steps/test_parts.py::test_a_parameter_with_a_name_in_the_group",
        ('[group["param_names"][j] for j in places if j < len(group["param_names"])]', 'group["param_names"]'),
    ),
    *mutants_of(
        "_steps/parts.py",
        "tests/steps/test_parts.py::test_parameters_that_are_appended_to_a_group",
        (' for j in places if j < len(group["param_names"])]', " for j in places]"),
    ),
    *mutants_of(
        "_steps/parts.py",
        "tests/steps/test_parts.py::test_the_users_groups_are_known_while_their_parts_are_shown",
        ("return optimizer.param_groups if users is None else users[0]", "return optimizer.param_groups"),
    ),
    *mutants_of(
        "_steps/parts.py",
        "tests/steps/test_parts.py::test_keys_that_come_and_go_between_steps",
        ("for key in division.in_group.forget_missing(group):", "for key in ():"),
    ),
    *mutants_of(
        "_steps/targets.py",
        "tests/training/test_changes_in_mid_run.py::test_acts_on_parameters_that_are_replaced_in_their_group",
        ("except _DifferentError:\n            return False", "except _DifferentError:\n            return True"),
    ),
    *mutants_of(
        "_steps/targets.py",
        "tests/training/test_changes_in_mid_run.py::test_acts_on_parameters_that_a_group_gets",
        (
            'self._lists = [copy.copy(group["params"]) for group in groups]',
            'self._lists = [group["params"] for group in groups]',
        ),
        ("if known is None or known[0] != version:", "if known is None:"),
    ),
    *mutants_of(
        "_steps/targets.py",
        "tests/training/test_changes_in_mid_run.py::test_acts_on_new_layers_from_the_next_step_on",
        ("if target is not None and self._move is not None:", "if False:"),
        ("if any(self._is_new(p) for params in held for p in params):", "if False:"),
    ),
    *mutants_of(
        "_steps/buckets.py",
        "tests/steps/test_buckets.py::test_memory_for_temporaries_grows",
        ("if buffer is None or buffer.numel() < size:", "if buffer is None:"),
    ),
    *mutants_of(
        "_steps/buckets.py",
        "tests/steps/test_buckets.py::test_memory_of_fake_tensors_is_not_kept",
        ("if type(buffer) is Tensor:", "if True:"),
    ),
    *mutants_of(
        "_steps/buckets.py",
        "tests/test_decay.py::test_a_share_in_a_tensor_is_not_rounded_to_half_precision",
        ("dtype = torch.promote_types(tensors[0].dtype, torch.float32)", "dtype = tensors[0].dtype"),
    ),
    *mutants_of(
        "_steps/buckets.py",
        "tests/test_decay.py::test_a_list_of_all_kinds",
        ("if wide is not tensors:", "if False:"),
    ),
    *mutants_of(
        "_steps/buckets.py",
        "tests/test_penalties.py::test_groups_of_a_list_may_have_a_threshold_each",
        ("torch._foreach_copy_(local_pieces(tensors), values.unbind())", "pass"),
        ("scratch(first, shape, slot=slot)", "scratch(first, shape)"),
    ),
    *mutants_of(
        "_steps/buckets.py",
        "tests/steps/test_buckets.py::test_rows_may_have_to_agree_in_more_and_large_ones_may_have_to_be_whole",
        ("keys.append(alike)", "pass"),
        ("(dims is None or dims[i] is not None)", "True"),
    ),
    *mutants_of(
        "_steps/buckets.py",
        "tests/steps/test_buckets.py::test_a_step_asks_for_no_memory_of_the_size_of_a_large_weight",
        ("if wide and first.is_cpu and first.dtype in HALF:", "if False:"),
    ),
    *mutants_of(
        "_steps/buckets.py",
        "tests/test_projections.py::test_max_norm_is_strict_in_every_precision",
        ("if len(tensors) > 1 or values.dtype != tensors[0].dtype:", "if len(tensors) > 1:"),
    ),
    *mutants_of(
        "_steps/buckets.py",
        "tests/steps/test_buckets.py::test_without_temporaries_large_tensors_stay_whole",
        ("cuts = bounded or not first.is_cpu or first.dtype in HALF", "cuts = True"),
        ("or not first.is_cpu or first.dtype in HALF", "or first.dtype in HALF"),
        ("not first.is_cpu or first.dtype in HALF", "not first.is_cpu"),
    ),
    *mutants_of(
        "_steps/watch.py",
        "tests/training/test_attach.py::test_a_plain_loop_goes_on_from_its_state",
        # The step counter of a run that goes on.
        ("default=self._start)", "default=0)"),
    ),
    *mutants_of(
        "_steps/watch.py",
        "tests/training/test_precision.py::test_a_skipped_step_leaves_the_weights_alone_and_the_schedule_goes_on",
        ("max(self._steps.values(), default=0) + is_skipped", "max(self._steps.values(), default=0)"),
    ),
    *mutants_of(
        "_steps/watch.py",
        "tests/training/test_several_optimizers.py::test_each_counts_its_own_steps",
        ("            self._is_counted = True", "            pass"),
    ),
    *mutants_of(
        "_steps/watch.py",
        "tests/training/test_penalties.py::test_steps_of_torchs_own_optimizer_count",
        ("self._announced.remove(optimizer)", "pass"),
    ),
    *mutants_of(
        "_steps/watch.py",
        "tests/steps/test_hooks.py::test_an_inner_optimizer_that_is_made_anew",
        ("self._steps.get(leaf, steps) for leaf", "self._steps.get(leaf, 0) for leaf"),
    ),
    *mutants_of(
        "_steps/watch.py",
        "tests/steps/test_hooks.py::test_the_optimizer_itself_steps_what_no_inner_one_holds",
        ("any(id(p) not in held for", "all(id(p) not in held for"),
    ),
    *mutants_of(
        "_steps/watch.py",
        "tests/steps/test_hooks.py::test_zero_redundancy_optimizer_that_overlaps_with_ddp_is_refused",
        ('if getattr(optimizer, "_overlap_with_ddp", False):', "if False:"),
    ),
    *mutants_of(
        "_steps/watch.py",
        "tests/steps/test_hooks.py::test_several_optimizers_in_one",
        ("value.values() if isinstance(value, dict) else value", "value"),
    ),
    *mutants_of(
        "_steps/watch.py",
        "tests/training/test_lifecycle.py::test_after_a_fit",
        ("if each() is not None and each() is not follower]", "if each() is not None]"),
    ),
    *mutants_of(
        "_steps/watch.py",
        "tests/steps/test_hooks.py::test_a_loop_that_counts_by_itself",
        ("return self._steps[leaf] if self._position is None else self._position()", "return self._steps[leaf]"),
    ),
    *mutants_of(
        "_steps/run.py",
        "tests/training/test_norm_monitor.py::test_groups_are_labeled_by_name_or_number",
        ("if len(self.watches) > 1 else", "if self.watches else"),
    ),
    *mutants_of(
        "_steps/run.py",
        "tests/training/test_attach.py::test_a_plain_loop_goes_on_from_its_state",
        ("steps=next(iter(saved or ()), 0)", "steps=0"),
    ),
    *mutants_of(
        "_steps/clock.py",
        "tests/steps/test_clock.py::test_a_rate_that_falls_has_the_peak_from_which_it_fell",
        ("peak = max(peak, float(lr), before)", "peak = max(peak, float(lr))"),
    ),
    *mutants_of(
        "_steps/clock.py",
        "tests/steps/test_clock.py::test_what_schedulers_write_into_a_group_counts",
        ('group.get("max_lr", group.get("initial_lr", 0.0))', 'group.get("initial_lr", 0.0)'),
    ),
    *mutants_of(
        "_steps/clock.py",
        "tests/steps/test_clock.py::test_a_checkpoint_tells_of_peaks_if_it_has_as_many_groups",
        ("ref(first), max(peak, self._peak(group))", "ref(first), self._peak(group)"),
        ('if len(peaks) == len(optimizer.param_groups) and group["params"]:', 'if group["params"]:'),
    ),
    *mutants_of(
        "_steps/clock.py",
        "tests/steps/test_clock.py::test_what_follows_a_rate_needs_one_and_other_errors_stay_their_own",
        ("if not math.isnan(at.lr):", "if True:"),
    ),
    *mutants_of(
        "_steps/group_decay.py",
        "tests/training/test_beside_other_callbacks.py::test_what_is_unfrozen_decays_unless_it_is_excluded",
        (
            "1.0 if given is None or not self._largest else given / self._largest",
            "(given or 0.0) / self._largest if self._largest else 1.0",
        ),
    ),
    *mutants_of(
        "_steps/group_decay.py",
        "tests/training/test_beside_other_callbacks.py::test_groups_that_unfreezing_has_added_are_left_as_without_the_callback",
        ("_set(group, given.original or 0.0)", "_set(group, given.value or 0.0)"),
    ),
    *mutants_of(
        "_steps/group_decay.py",
        "tests/training/test_decay_methods.py::test_the_optimizers_own_decay_is_off",
        ("row.shown() if self._shows_value else 0.0", "row.shown()"),
    ),
    *mutants_of(
        "_steps/group_decay.py",
        "tests/training/test_optimizers.py::test_tensors_in_the_groups_are_filled_in_place",
        ("group[_DECAY].fill_(value)", "group[_DECAY] = group[_DECAY].new_tensor(value)"),
    ),
    *mutants_of(
        "_steps/group_decay.py",
        "tests/training/test_optimizers.py::test_the_users_groups_keep_their_ratio",
        ("if factor > largest.get(schedule, 0.0):", "if factor < largest.get(schedule, 9e9):"),
    ),
    *mutants_of(
        "_steps/group_decay.py",
        "tests/steps/test_hooks.py::test_zero_redundancy_optimizer_on_two_processes",
        ("known.get(id(first), factors) for", "factors for"),
    ),
    *mutants_of(
        "_trainer/run.py",
        "tests/training/test_several_optimizers.py::test_resumed_each_goes_on_at_its_own_step",
        # The step counters of a second run with two optimizers.
        ("if saved is not None and len(saved) == count:", "if False:"),
    ),
    *mutants_of(
        "_trainer/run.py",
        "tests/training/test_several_optimizers.py::test_counts_that_a_checkpoint_does_not_hold_are_estimated_and_it_is_said",
        ("[step // max(count, 1)] * count", "[step] * count"),
    ),
    *mutants_of(
        "_trainer/run.py",
        "tests/training/test_decay_methods.py::test_a_grad_scaler_changes_nothing",
        ('or not getattr(optimizer, "_step_supports_amp_scaling", False):', ":"),
    ),
    *mutants_of(
        "_trainer/run.py",
        "tests/training/test_norm_monitor.py::test_keys_stand_on_the_rows_of_train_loss",
        ("(logged_step(trainer) + 1) % every == 0", "logged_step(trainer) % every == 0"),
    ),
    *mutants_of(
        "_trainer/run.py",
        "tests/training/test_dropout.py::test_the_rate_is_of_the_step_and_not_of_the_batch",
        ("math.ceil(batches / trainer.accumulate_grad_batches)", "(batches // trainer.accumulate_grad_batches)"),
    ),
    *mutants_of(
        "_trainer/run.py",
        "tests/training/test_norm_monitor.py::test_groups_are_labeled_by_name_or_number",
        ("enumerate(optimizer.param_groups, start=1)", "enumerate(optimizer.param_groups)"),
    ),
    *mutants_of(
        "_trainer/run.py",
        "tests/training/test_accumulation.py::test_an_unknown_end_is_an_error_before_training",
        ("if batches == math.inf:\n        return math.inf", "if batches == math.inf:\n        return 1"),
    ),
    *mutants_of(
        "_trainer/loggers.py",
        "tests/training/test_changes_in_mid_run.py::test_values_of_a_batch_that_failed_are_not_logged_by_the_next_run",
        ("_ROWS.pop(trainer, None)", "pass"),
    ),
    *mutants_of(
        "_trainer/loggers.py",
        "tests/training/test_norm_monitor.py::test_values_are_of_their_own_step_and_not_repeated",
        ("row = _ROWS.pop(trainer)", "row = _ROWS[trainer]"),
    ),
    *mutants_of(
        "_trainer/loggers.py",
        "tests/training/test_norm_monitor.py::test_histograms_in_tensorboard_count_the_weights",
        ("bucket_limits=edges[1:]", "bucket_limits=edges[:-1]"),
    ),
]
