"""Several optimizers as one: Muon for the matrices, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from operator import is_not
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_regularize._checks import named_errors
from lightning_regularize._factories import check_decisive, check_factories, check_initialized, divide, make_optimizer
from lightning_regularize.groups import rule_name
from lightning_regularize.selection import hidden_matrices, parameter_infos, require_matches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


__all__ = ["ChainedOptimizer", "hidden_matrices"]


class ChainedOptimizer(Optimizer):
    """Several optimizers as one: each steps the parameters that its rule selects.

    It is one torch optimizer for training loops, for automatic optimization in Lightning, LR schedulers, GradScaler and
    checkpoints. Its ``param_groups`` are those of the inner optimizers, the same dictionaries, in the order of the
    rules. ``step`` evaluates the closure once and then steps one optimizer after the other, so the weights are bit for
    bit those of several optimizers stepped by hand. The state dict has torch's layout, numbered over all groups.

    An LR scheduler with one value for each group, such as ``OneCycleLR(optimizer, max_lr=[0.02, 3e-4], ...)``, takes
    them in the order of the groups. A scheduler that cycles momentum, as OneCycleLR does by default, cycles the first
    beta of those that have betas. A GradScaler unscales the gradients itself, also where inner optimizers are fused.

    Args:
        module: Its trainable parameters are optimized, each tensor once. Under FSDP1 the wrapped module.
        optimizers: Rule -> what makes an optimizer of a list of parameters, such as a class or a
            ``functools.partial``. The first rule that matches a parameter decides; ``"*"`` at the end is for the rest.
            Kinds that the module does not have are skipped.

    Raises:
        TypeError: ``module`` or ``optimizers`` is something else, a rule is of no known type, or a value makes no
            optimizer.
        ValueError: A rule matches nothing or nothing that is left, a parameter matches no rule, or an optimizer refuses
            its parameters, as Muon does what is not 2-D; the message names rule and parameters.

    Example:
        >>> from functools import partial
        >>> module = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> muon, adamw = partial(torch.optim.Muon, lr=0.02), partial(torch.optim.AdamW, lr=3e-4)
        >>> optimizer = ChainedOptimizer(module, {hidden_matrices: muon, "*": adamw})
        >>> [(type(inner).__name__, len(inner.param_groups[0]["params"])) for inner in optimizer.optimizers]
        [('Muon', 1), ('AdamW', 4)]
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.02, 0.0003]
    """

    optimizers: list[Optimizer]
    """The inner optimizers, in the order of the rules."""

    rules: list[Any]
    """The rule of each inner optimizer."""

    def __init__(self, module: nn.Module, optimizers: Mapping[Any, Callable[[Any], Optimizer]]) -> None:
        check_factories(optimizers)
        infos = parameter_infos(module)
        with named_errors("ChainedOptimizer"):
            require_matches(optimizers, infos, argument="optimizers")
        trainable = [info for info in infos if info.parameter.requires_grad]
        if not trainable:
            raise ValueError(f"ChainedOptimizer: {type(module).__name__} has no trainable parameters.")
        check_initialized(trainable)
        check_decisive(list(optimizers), infos)
        self.optimizers, self.rules = [], []
        self._places: list[tuple[int, int]] = []  # of each group: its optimizer, and its place among the groups there
        self._shared: list[dict[str, Any]] = []  # what `param_groups` should hold
        self._source: tuple[ref[nn.Module], dict[Any, Callable[[Any], Optimizer]]] | None
        self._source = ref(module), dict(optimizers)
        super().__init__([{"params": [info.parameter for info in trainable]}], {})  # which calls `add_param_group`
        self.state: Any = _States(self.optimizers)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the module, each to the optimizer of its rule, with the other entries as they are.

        They make one new group for each optimizer that gets some, at the end of ``param_groups``.

        Args:
            param_group: As for torch.

        Raises:
            ValueError: A parameter is not of the module, or matches no rule.
            RuntimeError: This is a copy, which does not know the module, or the module is gone.
        """
        module = None if self._source is None else self._source[0]()
        if self._source is None or module is None:
            raise RuntimeError(
                "This ChainedOptimizer does not know its module, since it is a copy or the module is gone: call "
                "`add_param_group` of one of its `optimizers`."
            )
        factories, options = self._source[1], {k: v for k, v in param_group.items() if k != "params"}
        given = param_group["params"]
        given = [given] if isinstance(given, Tensor) else [p[1] if isinstance(p, tuple) else p for p in given]
        for rule, infos in divide(given, parameter_infos(module), factories).items():
            if rule in self.rules:
                parameters = [info.parameter for info in infos]
                self.optimizers[self.rules.index(rule)].add_param_group({**options, "params": parameters})
            else:
                optimizer = make_optimizer(rule, factories[rule], infos)
                for group in optimizer.param_groups:
                    group.update(options)
                self.optimizers.append(optimizer)
                self.rules.append(rule)
        self._refresh()
        self.defaults.clear()
        self.defaults.update(_shared_defaults(self.optimizers))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all inner optimizers, one after the other.

        Args:
            closure: Evaluates the model and returns the loss; called once, before the first of them steps.

        Returns:
            The loss, if there is a closure.

        Raises:
            RuntimeError: Somebody else has changed the list ``param_groups``, or replaced ``state``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refresh()
        if not isinstance(self.state, _States):
            raise RuntimeError(
                "ChainedOptimizer: `state` was replaced, of which the inner optimizers know nothing: empty it in place "
                "by `state.clear()`."
            )
        for optimizer in self.optimizers:
            _pass_on_momentum(optimizer)
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The states of all inner optimizers, in torch's layout: numbers run over the parameters of all groups.

        What an inner optimizer keeps under a key that is no parameter has the key ``(number of the optimizer, key)``.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self._refresh()
        inner = [optimizer.state_dict() for optimizer in self.optimizers]
        numbers: list[dict[Any, int]] = [{} for _ in inner]
        groups: list[dict[str, Any]] = []
        for i, j in self._places:
            group, first = inner[i]["param_groups"][j], sum(map(len, numbers))
            own = list(range(first, first + len(group["params"])))
            numbers[i].update(zip(group["params"], own, strict=True))
            groups.append({**group, "params": own})
        states = (
            (numbers[i].get(k, (i, k)), state) for i, one in enumerate(inner) for k, state in one["state"].items()
        )
        state_dict: dict[str, Any] = {"state": dict(states), "param_groups": groups}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave.

        Args:
            state_dict: Of an optimizer with the same rules over the same parameters.

        Raises:
            ValueError: The groups are others.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._add_restored_groups()
        self._refresh()
        saved = state_dict["param_groups"]
        sizes, saved_sizes = ([len(group["params"]) for group in groups] for groups in (self.param_groups, saved))
        if saved_sizes != sizes:
            raise ValueError(
                f"ChainedOptimizer: the state dict has groups of {saved_sizes} parameters, and this optimizer has "
                f"groups of {sizes}: use the rules with which it was saved."
            )
        inner: list[dict[str, Any]] = [{"state": {}, "param_groups": []} for _ in self.optimizers]
        owner: dict[Any, int] = {}
        for (i, _), group in sorted(zip(self._places, saved, strict=True), key=lambda each: each[0]):
            inner[i]["param_groups"].append(group)
            owner.update(dict.fromkeys(group["params"], i))
        for key, state in state_dict["state"].items():
            i, key_of_inner = (owner[key], key) if key in owner else key
            inner[i]["state"][key_of_inner] = state
        for optimizer, of_optimizer in zip(self.optimizers, inner, strict=True):
            optimizer.load_state_dict(of_optimizer)
        self._refresh()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _add_restored_groups(self) -> None:
        """Add what stands in ``param_groups`` behind the groups here.

        To resume a run, Lightning's BaseFinetuning sets ``param_groups`` to a list with the groups that it had added,
        just before the state is loaded.
        """
        given, known = self.param_groups, self._shared
        keys, known_keys = ([[*map(id, group["params"])] for group in groups] for groups in (given, known))
        if len(given) > len(known) and keys[: len(known)] == known_keys:
            self.param_groups = list(known)
            for group in given[len(known) :]:
                self.add_param_group(group)

    def _refresh(self) -> None:
        """Share the dictionaries that the inner optimizers have now: they may have loaded a state, or got a group.

        Raises:
            RuntimeError: Somebody else has changed the list of these dictionaries.
        """
        if len(self.param_groups) != len(self._shared) or any(map(is_not, self.param_groups, self._shared)):
            raise RuntimeError(
                "ChainedOptimizer: somebody has changed the list `param_groups`, of which the inner optimizers know "
                "nothing: use `add_param_group`. DeepSpeed's ZeRO, which steps flat copies of the weights group by "
                "group, cannot be used: use DDP or FSDP2."
            )
        found = [(i, j) for i, optimizer in enumerate(self.optimizers) for j in range(len(optimizer.param_groups))]
        if len(found) != len(self._places):
            kept = [place for place in self._places if place in found]
            self._places[:] = kept + [place for place in found if place not in kept]
        self.param_groups[:] = self._shared[:] = [self.optimizers[i].param_groups[j] for i, j in self._places]

    def __getstate__(self) -> dict[str, Any]:
        """A copy knows neither the module nor the rules, which may be functions that cannot be pickled."""
        names = ("defaults", "state", "param_groups", "_shared", "optimizers", "_places")
        return {**{name: vars(self)[name] for name in names}, "rules": [*map(rule_name, self.rules)], "_source": None}

    def __repr__(self) -> str:
        inner = (f"{rule_name(rule)}: {each!r}" for rule, each in zip(self.rules, self.optimizers, strict=True))
        return "\n".join([f"{type(self).__name__} (", *inner, ")"])


class _States(MutableMapping[Any, Any]):
    """The states of several optimizers as one mapping, of which each entry lies in the optimizer of the parameter."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers

    def _of(self, key: Any) -> Any:
        for optimizer in self._optimizers:
            if key in optimizer.state or any(key is p for group in optimizer.param_groups for p in group["params"]):
                return optimizer.state
        raise KeyError(key)

    def __getitem__(self, key: Any) -> Any:
        return self._of(key)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._of(key)[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._of(key)[key]

    def __iter__(self) -> Iterator[Any]:
        return (key for optimizer in self._optimizers for key in optimizer.state)

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._optimizers)


def _shared_defaults(optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """The settings that all optimizers have. LR schedulers look here for what they may cycle."""
    first, *others = [optimizer.defaults for optimizer in optimizers]
    shared = {key: value for key, value in first.items() if all(key in each for each in others)}
    if "betas" not in shared and all("momentum" in each or "betas" in each for each in (first, *others)):
        shared.setdefault("momentum", 0.0)
    return shared


def _pass_on_momentum(optimizer: Optimizer) -> None:
    """A scheduler that cycles momentum writes one and the same key to all groups: for Adam, it is the first beta."""
    if "betas" in optimizer.defaults and "momentum" not in optimizer.defaults:
        for group in optimizer.param_groups:
            if "max_momentum" in group and group.get("momentum", group["betas"][0]) != group["betas"][0]:
                group["betas"] = (group["momentum"], *group["betas"][1:])
