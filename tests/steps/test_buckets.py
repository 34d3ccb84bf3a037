"""Are tensors arranged in lists that one call can work on, with every element in exactly one of them?"""

import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_regularize._steps.buckets import Bucket, buckets, copies, new, scratch
from lightning_regularize.penalties import GroupLasso
from lightning_regularize.projections import FrobeniusSphere, UnitNorm
from tests.models import randn

MIB = 2**20
LAYOUTS = {
    "contiguous": lambda: (randn(1500, 1600), randn(1500, 1600, seed=1)),
    "transposed alike": lambda: (randn(1500, 1600).T, randn(1500, 1600, seed=1).T),
    "channels_last": lambda: tuple(randn(200, 300, 5, 5, seed=s).to(memory_format=torch.channels_last) for s in (0, 1)),
    "one transposed": lambda: (randn(1600, 1500), randn(1500, 1600, seed=1).T),
    "strided": lambda: (randn(1500, 3200)[:, ::2], randn(1500, 1600, seed=1)),
    "expanded": lambda: (randn(1500, 1600), torch.tensor(2.0).expand(1500, 1600)),
    "one row": lambda: (randn(1, 3_000_003), randn(1, 3_000_003, seed=1)),
    "vector": lambda: (randn(3_000_003), randn(3_000_003, seed=1)),
    "number": lambda: (torch.tensor(2.0), torch.tensor(3.0)),
    "nothing": lambda: (torch.empty(0), torch.empty(0)),
    "rows of nothing": lambda: (torch.empty(4, 0), torch.empty(4, 0)),
}

each_layout = pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)


@each_layout
def test_every_element_is_in_one_bucket_beside_its_own_partner(make):
    weight, other = make()
    expected = weight + 2 * other
    weight = weight.clone()  # keeps strides
    for bucket in buckets([weight], [other]):
        torch._foreach_add_(bucket.columns[0], bucket.columns[1], alpha=2)
    torch.testing.assert_close(weight, expected)


@each_layout
def test_pieces_of_large_tensors_are_bounded(make):
    for bucket in buckets(*[[tensor] for tensor in make()]):
        assert all(sum(t.nbytes for t in column) <= 4 * MIB + 8 * 1600 for column in bucket.columns)


@pytest.mark.parametrize("dim", [0, 1])
def test_where_units_matter_large_tensors_are_cut_between_them(dim):
    weight = randn(1500, 1600)
    found = [piece for bucket in buckets([weight], alike=[0], dims=[dim]) for piece in bucket.columns[0]]
    assert len(found) == 3
    assert all(piece.shape[1 - dim] == weight.shape[1 - dim] for piece in found)
    assert torch.equal(torch.cat(found, dim), weight)


@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 1), (torch.bfloat16, 2)], ids=str)
def test_without_temporaries_large_tensors_stay_whole(dtype, count):
    weight = torch.zeros(1500, 2400, dtype=dtype)
    assert len(list(buckets([weight], bounded=False))) == count
    assert len(list(buckets([torch.zeros(20, 1500, 2400, device="meta")], bounded=False))) > 1


def test_rows_of_a_bucket_agree_in_device_and_dtypes():
    weights = [torch.ones(2), torch.ones(2, dtype=torch.bfloat16), torch.ones(3), torch.ones(2, device="meta")]
    states = [torch.ones(2), torch.ones(2), torch.ones(3, dtype=torch.float64), torch.ones(2, device="meta")]
    assert [b.indices for b in buckets(weights)] == [[0, 2], [1], [3]]
    assert [b.indices for b in buckets(weights, states)] == [[0], [1], [2], [3]]


def test_rows_may_have_to_agree_in_more_and_large_ones_may_have_to_be_whole():
    weights = [torch.ones(2, 3), torch.ones(3, 2), torch.ones(2, 3), torch.ones(1500, 1600)]
    found = list(buckets(weights, alike=[w.shape for w in weights], dims=[None] * 4))
    assert [bucket.indices for bucket in found] == [[0, 2], [1], [3]]
    assert found[-1] == Bucket([3], ([weights[3]],))


def test_many_small_tensors_make_few_buckets_each_of_them_bounded():
    weights = [torch.ones(100, 100) for _ in range(300)]
    found = list(buckets(weights))
    assert [i for bucket in found for i in bucket.indices] == list(range(300))
    assert len(found) == 3  # 300 times 40,000 bytes
    assert all(sum(t.nbytes for t in bucket.columns[0]) <= 4 * MIB for bucket in found)


def test_on_another_device_tensors_of_any_size_come_together():
    weights = [torch.empty(1000, 1000, device="meta") for _ in range(20)]
    assert [len(bucket.indices) for bucket in buckets(weights)] == [16, 4]


def test_a_temporary_of_a_large_tensor_lies_where_the_one_before_lay():
    weight = randn(400, 500)
    first = new("sign", [weight])[0]
    assert torch.equal(first, weight.sign())
    assert new("sqrt", [weight.abs()])[0].data_ptr() == first.data_ptr()
    assert scratch(weight, slot="other").data_ptr() != first.data_ptr()
    assert scratch(weight, dtype=torch.float64).data_ptr() != first.data_ptr()


STEPS = {
    "gradient": lambda weight, gradient: GroupLasso().add_gradient_(gradient, weight, 0.1),
    "proximal step": lambda weight, gradient: GroupLasso().proximal_(weight, 1e-4),
    "projection of rows": lambda weight, gradient: UnitNorm().project_(weight.mul_(2)),
    "projection of columns": lambda weight, gradient: UnitNorm(dim=0).project_(weight.mul_(2)),
    "projection of a matrix": lambda weight, gradient: FrobeniusSphere(1.0).project_(weight.mul_(2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_step_asks_for_no_memory_of_the_size_of_a_large_weight(step, dtype):
    weight, gradient = randn(500, 512).to(dtype), randn(500, 512, seed=1).to(dtype)
    step(weight, gradient)  # from here on there is memory for temporaries
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        step(weight, gradient)
    assert max(event.cpu_memory_usage for event in found.events()) < weight.nbytes / 8


def test_temporaries_of_small_tensors_are_apart():
    weights = [randn(3, 2), randn(2), torch.empty(0)]
    for found, weight in zip(new("sign", weights), weights, strict=True):
        assert torch.equal(found, weight.sign())


def test_results_with_other_arguments_are_those_of_torch():
    large, small = [randn(400, 500)], [randn(3), randn(4)]
    for tensors in (large, small):
        others = [randn(*t.shape, seed=1) for t in tensors]
        for found, a, b in zip(new("minimum", tensors, others), tensors, others, strict=True):
            assert torch.equal(found, torch.minimum(a, b))
        for found, a in zip(new("mul", tensors, 0.5), tensors, strict=True):
            assert torch.equal(found, 0.5 * a)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_copies_are_of_their_own_and_half_precision_is_float32(dtype):
    for tensors in ([randn(400, 500).T.to(dtype)], [randn(3).to(dtype), randn(4).to(dtype)]):
        for found, tensor in zip(copies(tensors), tensors, strict=True):
            assert found.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
            assert torch.equal(found, tensor.to(found.dtype))
            assert found.data_ptr() != tensor.data_ptr()


def test_what_is_too_large_is_not_kept():
    weight = torch.empty(4 * MIB)
    assert scratch(weight).shape == weight.shape
    assert scratch(weight, slot="large").data_ptr() != scratch(torch.empty(8), slot="large").data_ptr()


def test_memory_from_inference_mode_can_be_used_outside_of_it():
    with torch.inference_mode():
        scratch(torch.empty(8), slot="inference")
    scratch(torch.empty(8), slot="inference").zero_()


def test_threads_do_not_share_memory():
    mine, theirs = scratch(torch.empty(8)), []
    thread = threading.Thread(target=lambda: theirs.append(scratch(torch.empty(8))))
    thread.start()
    thread.join()
    assert theirs[0].data_ptr() != mine.data_ptr()


def test_memory_for_temporaries_grows():
    for size in (2, 5, 3):
        assert scratch(torch.empty(size), slot="grows").shape == (size,)


def test_memory_of_fake_tensors_is_not_kept():
    with FakeTensorMode():
        scratch(torch.empty(8), slot="fake")
    assert type(scratch(torch.empty(8), slot="fake")) is torch.Tensor
