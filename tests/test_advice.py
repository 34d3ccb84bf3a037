import pytest
import torch

from lightning_regularize.advice import DecayingGroup, advise

WELL = {"label": "decay", "rule": "AdamW", "lr": 1e-3, "weight_decay": 0.1}  # acts over 10,000 steps


def group(**changes):
    return DecayingGroup(**{**WELL, **changes})


def test_nothing_is_said_of_settings_that_work():
    assert advise([group()], total_steps=50_000, steps_per_epoch=500) == []


def test_nothing_is_said_without_decay():
    assert advise([], total_steps=100) == []


def test_nothing_is_said_of_a_run_of_unknown_length():
    assert advise([group()]) == []


@pytest.mark.parametrize(("steps", "is_told"), [(999, True), (1001, False)])
def test_decay_that_acts_over_ten_runs_is_told(steps, is_told):
    found = advise([group()], total_steps=steps)
    assert bool(found) == is_told
    if is_told:
        (sentence,) = found
        assert sentence.startswith("'decay': weight decay 0.1 at lr 0.001 acts over 10,000 steps; this run has 999:")


def test_decay_that_takes_more_than_all_is_told():
    (found,) = advise([group(weight_decay=3.0, lr=0.5)], total_steps=1000)
    assert "removes 150% of a weight in one step, so that it changes its sign" in found


def test_decay_that_takes_exactly_all_changes_no_sign():
    assert advise([group(weight_decay=2.0, lr=0.5)]) == []


def test_momentum_shortens_what_passes_through_it():
    sgd = group(rule="SGD", lr=0.1, weight_decay=1e-4, momentum=0.9, is_decoupled=False)
    assert advise([sgd], total_steps=2000) == []  # 10,000 steps; without momentum 100,000
    assert "acts over 10,000 steps" in advise([sgd], total_steps=500)[0]


def test_decay_that_forgets_within_an_epoch_is_told():
    (found,) = advise([group(weight_decay=10.0)], total_steps=10_000, steps_per_epoch=1000)
    assert "acts over 100 steps, less than half an epoch of 1,000" in found


def test_a_run_shorter_than_an_epoch_need_not_remember_an_epoch():
    assert advise([group(weight_decay=5.0)], total_steps=100, steps_per_epoch=1000) == []  # acts over 200 steps


@pytest.mark.parametrize("rule", ["Adam", "NAdam", "RMSprop"])
def test_decay_that_passes_through_a_normalization_is_told(rule):
    (found,) = advise([group(rule=rule, is_decoupled=False)])
    assert found.startswith(f"{rule} adds weight decay to the gradient")
    assert advise([group(rule=rule, is_decoupled=True)]) == []


def test_sgd_is_coupled_and_well():
    assert advise([group(rule="SGD", is_decoupled=False)]) == []


@pytest.mark.parametrize(
    ("dtype", "changes", "is_told"),
    [
        (torch.bfloat16, {}, True),  # 1e-4 is below 2^-9
        (torch.float16, {}, True),  # and below 2^-12
        (torch.float32, {}, False),
        (torch.bfloat16, {"weight_decay": 4.0}, False),
        (torch.bfloat16, {"is_fused": True}, False),
        (torch.bfloat16, {"is_decoupled": False, "rule": "SGD"}, False),
    ],
    ids=["bfloat16", "float16", "float32", "strong", "fused", "coupled"],
)
def test_decay_that_rounds_to_nothing_is_told(dtype, changes, is_told):
    found = advise([group(dtypes=frozenset({dtype}), **changes)])
    assert any("lost to rounding" in sentence for sentence in found) == is_told


def test_decay_by_two_is_told():
    (found,) = advise([group()], other_decays=["L2Penalty"])
    assert found == "Weights decay twice: by the optimizer ('decay': weight decay 0.1 at lr 0.001) and by L2Penalty."
    assert advise([], other_decays=["L2Penalty"]) == []
    assert advise([], other_decays=["L2Penalty", "ConstrainedDecay"]) == [
        "Weights decay twice: by L2Penalty and ConstrainedDecay."
    ]


def test_many_groups_are_told_once():
    found = advise([group(label=f"layer {i}") for i in range(12)], total_steps=10)
    assert len(found) == 1
    assert found[0].endswith("The same holds for 11 other groups.")


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.layers.0.q_proj.lora_A.default.weight",
        "layers.0.q_proj.lora_B.weight",
        "layers.0.attn.lora_a.weight",
        "embed.lora_embedding_A.default",
        "lora_b.weight",
        "up.processor.to_q_lora.lora_up.weight",
    ],
)
def test_decay_of_lora_adapters_pulls_towards_the_base_model(name):
    (found,) = advise([], decaying=["head.weight", name, name])
    assert f"LoRA adapters (2, such as {name!r}) pulls towards the base model" in found


@pytest.mark.parametrize("name", ["layers.0.q_proj.weight", "flora_a.weight", "lora_alpha", "explora_b.weight"])
def test_other_names_are_no_adapters(name):
    assert advise([], decaying=[name]) == []
