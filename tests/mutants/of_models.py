"""Mutants of what is known of a model: weights that layers use, output layers, several optimizers, activations."""

from tests.mutants.mutant import mutants_of

MUTANTS = [
    *mutants_of(
        "_used.py",
        "tests/training/test_used_weights.py::test_fake_quantized_weights_are_measured_as_they_are_used_and_not_constrained",
        ("quantizer.disable_observer()", "pass"),
        ("copy.deepcopy(own, {id(parameter): parameter for parameter in parameters.values()})", "own"),
        (" and not _fake_quantizers(owner, made)", ""),
        (" or _fake_quantizers(info.owner, leaf):", ":"),
    ),
    *mutants_of(
        "_used.py",
        "tests/training/test_used_weights.py::test_weights_in_training_for_integers_are_measured_on_two_processes",
        ("{id(parameter): parameter for parameter in parameters.values()}", "{}"),
    ),
    *mutants_of(
        "_used.py",
        "tests/training/test_used_weights.py::test_the_used_weight_is_logged",
        ("            made_later.discard(made)\n", ""),
    ),
    *mutants_of(
        "_used.py",
        "tests/training/test_unknown_weights.py::test_it_is_left_out_with_one_warning",
        ("if made_later.intersection(read):", "if False:"),
        (' and "bn" in owner._modules:', " and False:"),
        ("if is_named(self.stored.parameter, *_PACKED):", "if False:"),
        ("if any(leaf in _makes(hook)[1] for hook in owner._forward_pre_hooks.values()):", "if False:"),
    ),
    *mutants_of(
        "_steps/targets.py",
        "tests/training/test_unknown_weights.py::test_frozen_weights_are_not_looked_at",
        ("            if info.parameter.requires_grad:\n                raise", "            raise"),
    ),
    *mutants_of(
        "_steps/targets.py",
        "tests/training/test_unknown_weights.py::test_what_is_refused_is_refused_when_it_is_trained",
        ("if any(parameter.requires_grad for parameter in self._not_learned):", "if False:"),
    ),
    *mutants_of(
        "_steps/clock.py",
        "tests/training/test_messages.py::test_a_function_of_the_step_is_told_before_weights_change",
        ("with named_errors(self._owner):", "if True:"),
    ),
    *mutants_of(
        "_used.py",
        "tests/training/test_pruned_weights.py::test_the_used_weight_is_constrained_and_what_is_masked_is_left_alone",
        ("piece.masked_fill_(is_gone, 0.0)", "pass"),
        ("piece.add_(values)", "pass"),
    ),
    *mutants_of(
        "_used.py",
        "tests/training/test_pruned_weights.py::test_a_weight_that_two_layers_share_is_refused",
        ("if not owner._forward_pre_hooks or info.aliases:", "if not owner._forward_pre_hooks:"),
    ),
    *mutants_of(
        "callbacks/constraint.py",
        "tests/training/test_pruned_weights.py::test_what_would_not_leave_the_mask_alone_is_refused",
        (" or not self.projection.keeps_zeros", ""),
    ),
    *mutants_of(
        "callbacks/_penalty_methods.py",
        "tests/training/test_pruned_weights.py::test_the_gradient_is_that_of_the_penalty_of_the_used_weight",
        ("with found.as_used():", "if True:"),
    ),
    *mutants_of(
        "callbacks/_penalty_methods.py",
        "tests/training/test_pruned_weights.py::test_the_proximal_step_is_that_of_the_used_weight",
        ("with stepped.as_used():", "if True:"),
    ),
    *mutants_of(
        "callbacks/penalty.py",
        "tests/training/test_pruned_weights.py::test_the_gradient_is_that_of_the_penalty_of_the_used_weight",
        ("with whole.as_used():", "if True:"),
    ),
    *mutants_of(
        "_used.py",
        "tests/training/test_used_weights.py::test_a_weight_is_trained_if_any_of_its_sources_is",
        ("any(source.requires_grad for", "all(source.requires_grad for"),
    ),
    *mutants_of(
        "_used.py",
        "tests/training/test_used_weights.py::test_metrics_are_of_the_used_weight_and_rules_know_its_name",
        ("if largest is not info.parameter:", "if False:"),
    ),
    *mutants_of(
        "_used.py",
        "tests/training/test_used_weights.py::test_rules_know_a_used_weight_by_its_sources_too",
        ("dict.fromkeys([*recipe.sources, *info.aliases])", "dict.fromkeys(info.aliases)"),
    ),
    *mutants_of(
        "_used.py",
        "tests/training/test_used_weights.py::test_what_a_computation_draws_and_counts_is_put_back",
        ('fork_rng(devices=[device] if device.type == "cuda" else [])', "fork_rng(enabled=False)"),
        ("gathered(buffer).clone()", "gathered(buffer)"),
    ),
    *mutants_of(
        "_used.py",
        "tests/training/test_used_weights.py::test_the_used_weight_is_logged",
        ("module.training = False", "pass"),
    ),
    *mutants_of(
        "_used.py",
        "tests/training/test_used_weights.py::test_a_mask_that_is_removed_from_another_source_is_noticed",
        ("return now is not None and now.makers == self.recipe.makers", "return now is not None"),
        ("_end(_makes(hook)[0], becomes) == made", "_makes(hook)[0] == made"),
    ),
    *mutants_of(
        "_used.py",
        "tests/training/test_used_weights.py::test_to_measure_changes_no_weight_no_buffer_and_no_random_number",
        ("do_power_iteration=False", "do_power_iteration=True"),
    ),
    *mutants_of(
        "_outputs.py",
        "tests/test_optimizers.py::test_hidden_matrices",
        ("(head|classifier)$", "(heads?|classifier)$"),
        ("(^|(?<!^[qkv])_)(head", "^(head"),
        ("(?<!^[qkv])_", "_"),
        ("if not any(map(_ROUTER.search, path))", "if path"),
        ("for _, parameter in weights[-1:]} - inside", "for _, parameter in weights[-1:]}"),
        ("last = set() if named else", "last = set() if named or told else"),
        ("elif isinstance(classifier, (tuple, list))", "elif isinstance(classifier, list)"),
        (' or model.__dict__.get("default_cfg")', ""),
        ('else getattr(config, "classifier", None)', "else None"),
    ),
    *mutants_of(
        "optimizers.py",
        "tests/test_optimizers.py::test_the_closure_is_evaluated_once_and_before_all",
        ("with torch.enable_grad():", "if True:"),
    ),
    *mutants_of(
        "optimizers.py",
        "tests/test_optimizers.py::test_with_learning_rate_schedulers",
        ("_pass_on_momentum(optimizer)\n", "pass\n"),
        ('shared.setdefault("momentum", 0.0)', "pass"),
    ),
    *mutants_of(
        "optimizers.py",
        "tests/test_optimizers.py::test_the_state_dict_has_the_layout_of_torch",
        ("sum(map(len, numbers))", "len(numbers[i])"),
    ),
    *mutants_of(
        "optimizers.py",
        "tests/test_optimizers.py::test_states_that_belong_to_no_parameter_and_overridden_methods",
        ("numbers[i].get(k, (i, k))", "numbers[i].get(k, k)"),
    ),
    *mutants_of(
        "optimizers.py",
        "tests/test_optimizers.py::test_a_list_of_groups_that_was_changed_is_refused_before_any_weight_changes",
        (" or any(map(is_not, self.param_groups, self._shared))", ""),
    ),
    *mutants_of(
        "optimizers.py",
        "tests/test_optimizers.py::test_frozen_parameters_come_in_when_they_are_added",
        ("group.update(options)", "pass"),
        ("kept + [place for place in found if place not in kept]", "found"),
    ),
    *mutants_of(
        "activations.py",
        "tests/training/test_activations.py::test_penalty_and_gradient_are_means_over_samples_or_positions",
        ("max(outputs.shape[0], 1)", "max(outputs.numel(), 1)"),
        ("outputs.numel() // max(outputs.shape[-1], 1)", "outputs.shape[0]"),
        ("lambda x: 2 * x", "lambda x: x"),
        ("(2 * outputs.logsumexp(-1, keepdim=True))", "outputs.logsumexp(-1, keepdim=True)"),
    ),
    *mutants_of(
        "activations.py",
        "tests/training/test_activations.py::test_penalty_and_gradient_are_computed_in_float32",
        ("kind.gradient(outputs.to(at_least_float32(outputs)))", "kind.gradient(outputs)"),
    ),
    *mutants_of(
        "callbacks/activation.py",
        "tests/training/test_activations.py::test_a_module_that_the_loss_does_not_depend_on_is_told",
        ("if name in self._is_trained - self._is_reached]", "if name not in self._is_trained]"),
    ),
    *mutants_of(
        "callbacks/activation.py",
        "tests/training/test_activations.py::test_training_is_that_with_the_penalty_in_the_loss",
        ("self.run.value(self.schedule) / batches", "self.run.value(self.schedule)"),
        ("term = term * self._scale.to(term.device)", "pass"),
    ),
    *mutants_of(
        "callbacks/activation.py",
        "tests/training/test_activations.py::test_a_second_backward_pass_through_one_forward_pass_adds_nothing",
        (" and not ctx.is_added", ""),
    ),
    *mutants_of(
        "callbacks/activation.py",
        "tests/training/test_activations.py::test_gradients_that_the_model_asks_for_are_its_own",
        ("if ctx.owner.is_in_backward and not", "if not"),
    ),
    *mutants_of(
        "callbacks/activation.py",
        "tests/training/test_activations.py::test_what_is_logged_is_what_the_loss_would_have_had",
        ("activations.penalty(outputs, self.norm) * self._share", "activations.penalty(outputs, self.norm)"),
    ),
    *mutants_of(
        "callbacks/activation.py",
        "tests/training/test_activations.py::test_a_layer_that_is_replaced_between_epochs",
        ("if batch_idx == 0:\n            self._find(self.run)", "pass"),
    ),
]
