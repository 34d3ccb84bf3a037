"""Mutants of rules, groups, layers, arguments and modules."""

from tests.mutants.mutant import mutants_of

MUTANTS = [
    *mutants_of(
        "selection.py",
        "tests/test_selection.py::test_every_parameter_of_a_known_model_has_the_expected_kind",
        (
            "min((_kind(use, shape) for use in uses), key=KINDS.index)",
            "max((_kind(use, shape) for use in uses), key=KINDS.index)",
        ),
        ("|.*_bias(_[a-z])?", ""),
    ),
    *mutants_of(
        "selection.py",
        "tests/test_selection.py::test_a_class_of_the_user_is_judged_by_its_name_and_the_shape",
        ("|[GF]RN([123]d)?$", ""),
    ),
    *mutants_of(
        "selection.py",
        "tests/test_selection.py::test_a_tied_tensor_is_found_by_any_name_and_any_owner",
        ("owners = (info.owner, *info.alias_owners)\n", "owners = (info.owner,)\n"),
        (
            "fnmatchcase(name, rule) for name in (info.name, *info.aliases)",
            "fnmatchcase(name, rule) for name in (info.name,)",
        ),
    ),
    *mutants_of(
        "selection.py",
        "tests/test_selection.py::test_the_hooks_of_old_are_understood",
        ('name.removesuffix("_orig")', "name"),
    ),
    *mutants_of(
        "selection.py",
        "tests/test_selection.py::test_only_weight_normalization_has_a_magnitude",
        ('name == "original0" and isinstance(holder[0], _WeightNorm)', 'name == "original0"'),
    ),
    *mutants_of(
        "selection.py",
        "tests/test_selection.py::test_frozen_parameters_are_known_but_not_selected",
        ("return [info for info in chosen if info.parameter.requires_grad]", "return chosen"),
    ),
    *mutants_of(
        "selection.py",
        "tests/test_selection.py::test_an_idle_rule_raises_and_names_what_is_near",
        ('require_matches(exclude, infos, argument="exclude")', "pass"),
    ),
    *mutants_of(
        "selection.py",
        "tests/test_selection.py::test_names_that_a_model_computes_may_contain_wrappers",
        ("path if wraps(module, name) else _join(path, name)", "_join(path, name)"),
    ),
    *mutants_of(
        "selection.py",
        "tests/test_selection.py::test_torch_layers_have_the_expected_kinds",
        ("if shape is not None and len(shape) < 2:", "if shape is not None and len(shape) < 1:"),
    ),
    *mutants_of(
        "selection.py",
        "tests/test_selection.py::test_no_weight_decay_may_name_a_submodule",
        ('return f"{name}.".startswith(f"{listed}.")', "return name.startswith(listed)"),
    ),
    *mutants_of(
        "selection.py",
        "tests/test_selection.py::test_the_owner_of_a_parametrized_weight_is_the_parametrized_module",
        (
            "isinstance(holder, ParametrizationList) and len(modules) > 2",
            "isinstance(holder, ParametrizationList) and len(modules) > 3",
        ),
    ),
    *mutants_of(
        "selection.py",
        "tests/steps/test_parts.py::test_parameters_that_stand_in_no_module_decay_by_their_shape",
        ('kind: Kind = "vector" if parameter.dim() <= 1 else "weight"', 'kind: Kind = "weight"'),
    ),
    *mutants_of(
        "selection.py",
        "tests/test_selection.py::test_a_setting_that_is_called_no_weight_decay_declares_nothing",
        ("if not callable(declare):", "if False:"),
    ),
    *mutants_of(
        "groups.py",
        "tests/test_groups.py::test_the_first_matching_factor_wins",
        ("groups.setdefault((layer, -factor), group)", "groups.setdefault((layer, factor), group)"),
    ),
    *mutants_of(
        "groups.py",
        "tests/test_groups.py::test_layers_of_a_sequential_are_its_repeated_modules",
        ('group["lr"] = lr * scale', 'group["lr"] = lr'),
    ),
    *mutants_of(
        "groups.py",
        "tests/test_groups.py::test_decay_that_would_apply_to_nothing_is_refused",
        ("    if weight_decay > 0:", "    if weight_decay >= 0:"),
    ),
    *mutants_of(
        "groups.py",
        "tests/test_module.py::test_frozen_parameters_are_in_no_group",
        ("if not any(info.parameter.requires_grad for info in decaying):", "if False:"),
    ),
    *mutants_of(
        "groups.py",
        "tests/test_module.py::test_what_does_not_fit_the_module_is_refused_before_it_trains",
        ("for info in infos if not self._exclusion(info)}", "for info in infos}"),
    ),
    *mutants_of(
        "groups.py",
        "tests/test_groups.py::test_frozen_weights_leave_no_empty_group",
        ("trainable = [info for info in infos if info.parameter.requires_grad]", "trainable = list(infos)"),
    ),
    *mutants_of(
        "groups.py",
        "tests/test_groups.py::test_lambdas_are_told_apart_by_what_they_compute",
        ("repr((code.co_code, constants, code.co_names))", "repr((code.co_code, code.co_names))"),
    ),
    *mutants_of(
        "groups.py",
        "tests/test_groups.py::test_description_tells_the_rule_that_decided",
        ("return 0.0, reason", "return 0.0, ''"),
    ),
    *mutants_of(
        "_layers.py",
        "tests/test_groups.py::test_numbers_of_layers_have_no_gap_where_blocks_share_their_weight",
        # Numbers of layers have no gap.
        ("    return _dense(layers)", "    return layers"),
    ),
    *mutants_of(
        "_layers.py",
        "tests/test_groups.py::test_a_timm_model_inside_a_wrapper_keeps_its_layers_and_what_is_outside_learns_at_the_full_rate",
        ("layer += layer < 0 or place[-1] != 99999", "layer += 1"),
        ("layers.get(id(info.parameter), layer)", "layers.get(id(info.parameter), 0)"),
    ),
    *mutants_of(
        "_layers.py",
        "tests/test_groups.py::test_layer_decay_keeps_decay_apart_and_names_the_layers",
        ("layer if i < last_in_block else len(blocks) + 1", "layer"),
    ),
    *mutants_of(
        "_layers.py",
        "tests/test_groups.py::test_layers_are_the_same_under_wrappers",
        ("inner = next((child for name, child in block.named_children() if wraps(block, name)), None)", "inner = None"),
    ),
    *mutants_of(
        "_checks.py",
        "tests/test_groups.py::test_what_is_no_number_is_refused",
        ("and not isinstance(value, bool))", ")"),
    ),
    *mutants_of(
        "_checks.py",
        "tests/test_groups.py::test_layer_groups_out_of_place_are_refused",
        ("if not 0 < check_number(layer_decay", "if not 0 <= check_number(layer_decay"),
    ),
    *mutants_of(
        "callbacks/_arguments.py",
        "tests/training/test_penalties.py::test_state_keys_tell_two_in_one_trainer_apart",
        ("return 1 + sum(c._number < self._number and", "return 1 + sum("),
    ),
    *mutants_of(
        "_checks.py",
        "tests/training/test_messages.py::test_a_bad_argument_is_told_with_what_to_write",
        ("if str(error).startswith(name):", "if False:"),
    ),
    *mutants_of(
        "callbacks/_arguments.py",
        "tests/training/test_resume.py::test_functions_that_are_defined_again_are_no_difference",
        ('return re.sub(r" at 0x[0-9a-f]+", "", repr(value))', "return repr(value)"),
    ),
    *mutants_of(
        "module.py",
        "tests/test_module.py::test_schedulers_start_from_the_scaled_rates",
        ('group["lr"] = group["lr"] * optimizer.defaults["lr"]', "pass"),
    ),
    *mutants_of(
        "module.py",
        "tests/test_module.py::test_a_regularized_module_trains_bit_for_bit_as_with_groups_made_by_hand",
        ('group["weight_decay"] = self._weight_decay', "pass"),
    ),
    *mutants_of(
        "module.py",
        "tests/test_module.py::test_a_plateau_is_watched_each_epoch",
        (', "interval": "epoch"}', "}"),
    ),
    *mutants_of(
        "module.py",
        "tests/test_module.py::test_callbacks_of_the_module_stay",
        ("found if isinstance(found, Sequence) else [found]", "list(found)"),
    ),
]
