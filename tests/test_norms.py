import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_regularize._rows import dense_pieces
from lightning_regularize._sharding import Sharding
from lightning_regularize.histograms import Histogram, histograms
from lightning_regularize.norms import (
    change_sums,
    combine,
    copies,
    count_nonfinite,
    counts_at_most,
    nonfinite_counts,
    norms,
    power_sums,
    spectral_norm,
)
from tests.distributed import run_distributed
from tests.models import MODELS, randn

ORDERS = (1.0, 1.5, 2.0, 3.0, math.inf)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def true_norm(tensor, order):
    return torch.linalg.vector_norm(tensor.detach().double().reshape(-1), ord=order).item()


# -- against float64 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_norms_of_parameters_equal_those_in_float64(model, dtype, order):
    parameters = list(model().to(dtype).parameters())
    found = norms(parameters, order)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([true_norm(p, order) for p in parameters], rel=1e-6, abs=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_norms_over_many_blocks_and_slices_equal_those_in_float64(dtype, order):
    tensor = randn(2**21 + 4096 + 7).to(dtype)
    assert norms([tensor], order).item() == pytest.approx(true_norm(tensor, order), rel=1e-6, abs=0)


@pytest.mark.parametrize("order", [1.0, 2.0])
def test_norms_of_as_many_elements_as_gpt2s_embedding_are_accurate(order):
    tensor = randn(38_597_376)
    # In float64 slices, so that the oracle takes little memory.
    oracle = math.fsum(piece.double().abs().pow(order).sum().item() for piece in tensor.split(2**20)) ** (1 / order)
    assert norms([tensor], order).item() == pytest.approx(oracle, rel=1e-6, abs=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", [1.0, 2.0])
def test_sums_of_a_million_half_precision_elements_do_not_overflow(dtype, order):
    expected = pytest.approx(16 * 1_000_000 ** (1 / order), rel=1e-6, abs=0)
    assert norms([torch.full((1_000_000,), 16.0, dtype=dtype)], order).item() == expected


@pytest.mark.parametrize("order", ORDERS)
def test_layout_in_memory_does_not_matter(order):
    image = randn(4, 3, 5, 6)
    layouts = [
        image,
        image.to(memory_format=torch.channels_last),
        image.transpose(0, 2),
        image[:, ::2],
        image.expand(2, 4, 3, 5, 6),
    ]
    assert norms(layouts, order).tolist() == pytest.approx([true_norm(t, order) for t in layouts], rel=1e-6, abs=0)


@pytest.mark.parametrize("order", ORDERS)
def test_scalars_and_empty_tensors_have_norms(order):
    assert norms([torch.tensor(-3.0), torch.zeros(0), torch.zeros(3, 0)], order).tolist() == pytest.approx(
        [3, 0, 0], rel=1e-6, abs=0
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_norms_of_hundreds_of_small_tensors_of_several_shapes_keep_their_order(dtype, order):
    shapes = [(64,), (), (0,), (8, 8), (4096,), (3, 0), (64, 64), (4097,)]
    layout = [shapes[i % len(shapes)] for i in range(300 * len(shapes))]
    tensors = [randn(math.prod(shape), seed=i).view(shape).to(dtype) for i, shape in enumerate(layout)]
    tensors += [randn(2 * n, seed=n)[::2].to(dtype) for n in range(17)] + [randn(8, 4, seed=9).to(dtype).T] * 20
    tensors[40][5] = math.nan
    expected = [true_norm(t, order) if t.numel() else 0.0 for t in tensors]
    assert norms(tensors, order).tolist() == pytest.approx(expected, rel=1e-6, nan_ok=True, abs=0)


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("order", ORDERS)
def test_norms_of_single_blocks_are_accurate(order, count):
    for start in range(0, 400, count):
        tensors = [randn(4096, seed=start + i) for i in range(count)]
        assert norms(tensors, order).tolist() == pytest.approx([true_norm(t, order) for t in tensors], rel=5e-7, abs=0)


@pytest.mark.parametrize("count", [7, 1000, 4096, 4097, 10_000, 2**20])
@pytest.mark.parametrize("value", [0.98395, 0.1, 2.7e-3])
def test_norms_of_equal_elements_are_accurate(value, count):
    """All roundings of a sum go the same way."""
    tensor = torch.full((count,), value)
    for order in (1.0, 2.0):
        assert norms([tensor], order).item() == pytest.approx(true_norm(tensor, order), rel=1e-6, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e-22, 1e19, 1e30])
@pytest.mark.parametrize("count", [5, 5000, 2**20 + 5])
@pytest.mark.parametrize("order", ORDERS)
def test_elements_whose_squares_leave_the_range_of_float32_have_norms(order, count, scale, dtype):
    tensor = (randn(count) * scale).to(dtype)
    assert norms([tensor, torch.ones(5000)], order).tolist() == pytest.approx(
        [true_norm(tensor, order), 5000 ** (1 / order)], rel=1e-6, abs=0
    )


def test_zeros_have_a_norm_of_zero_and_infinity_one_of_infinity():
    tensors = [torch.zeros(5000), torch.full((5000,), math.inf), torch.zeros(3)]
    assert norms(tensors).tolist() == [0.0, math.inf, 0.0]


def test_small_tensors_of_one_shape_and_two_dtypes_have_norms():
    tensors = [randn(9, seed=i).to(torch.float64 if i % 2 else torch.bfloat16) for i in range(40)]
    assert norms(tensors).tolist() == pytest.approx([true_norm(t, 2.0) for t in tensors], rel=1e-6, abs=0)


def test_no_tensors_have_no_norms():
    assert norms([]).shape == (0,)


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
def test_norms_of_what_is_not_finite_say_so(order):
    found = norms([torch.tensor([1.0, math.nan]), torch.tensor([1.0, -math.inf]), torch.ones(2)], order)
    assert found[0].isnan()
    assert found[1].isposinf()
    assert found[2].isfinite()


def test_infinity_norm_of_a_large_tensor_with_nan_is_nan():
    tensor = torch.ones(2**20 + 1)
    tensor[5] = math.nan
    assert norms([tensor], math.inf).isnan()


@pytest.mark.filterwarnings(
    "ignore:Sparse invariant checks are implicitly disabled:UserWarning"
)  # torch, on making one
@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
def test_sparse_and_complex_tensors_have_norms(order):
    sparse = torch.sparse_coo_tensor([[0, 2, 2]], [3.0, 1.0, 3.0], (5,))
    complex_numbers = torch.tensor([3 + 4j, 0])
    assert norms([sparse, complex_numbers], order).tolist() == pytest.approx(
        [true_norm(torch.tensor([3.0, 4.0]), order), 5.0], rel=1e-6, abs=0
    )


@pytest.mark.parametrize("order", [0.5, 0, -math.inf, math.nan, "2", True])
def test_what_is_no_norm_type_is_refused(order):
    with pytest.raises(ValueError, match="`norm_type` should be at least 1"):
        norms([torch.ones(1)], order)


@pytest.mark.parametrize("order", ORDERS)
def test_combined_norms_equal_the_norm_of_the_whole(order):
    parts = [randn(7), randn(3, seed=1), torch.zeros(0)]
    assert combine(norms(parts, order).tolist(), order) == pytest.approx(
        true_norm(torch.cat(parts), order), rel=1e-6, abs=0
    )


def test_combined_norms_carry_nan_and_neither_overflow_nor_underflow():
    assert all(math.isnan(combine([1.0, math.nan, 2.0], order)) for order in (1.0, 2.0, math.inf))
    assert combine([3e200, 4e200]) == pytest.approx(5e200, rel=1e-6, abs=0)
    assert combine([3e-200, 4e-200]) == pytest.approx(5e-200, rel=1e-6, abs=0)
    assert combine([]) == 0
    assert combine([3e200, 0.0], 3.0) == pytest.approx(3e200, rel=1e-6, abs=0)
    assert combine([0.0, 0.0], 3.0) == 0
    assert combine([1.0, math.inf], 3.0) == math.inf


# -- other sums ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_counts_equal_those_of_numpy(dtype):
    tensor = (randn(2**20 + 999) * 4).round().to(dtype)
    tensor[:5] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0])
    values = tensor.double().numpy()
    pieces = dense_pieces([tensor, torch.zeros(3)])
    finite = values[np.isfinite(values)]
    assert counts_at_most(pieces).tolist() == [(finite == 0).sum(), 3]
    assert counts_at_most(pieces, 2.0).tolist() == [(abs(finite) <= 2).sum(), 3]
    assert nonfinite_counts(pieces).tolist() == [3, 0]


def test_nonfinite_elements_are_counted_and_large_ones_are_not():
    assert count_nonfinite([torch.tensor([1.0, math.nan, math.inf]), torch.full((3,), 3e38)]).tolist() == [2, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_changes_equal_those_in_float64(dtype):
    tensors = [randn(2**20 + 3).to(dtype), randn(3, 4, seed=1).to(dtype), torch.zeros(0, dtype=dtype)]
    before = copies(tensors)
    after = [(t + 0.01 * randn(*t.shape, seed=2)).to(dtype) for t in tensors]
    (sums, squares), radial = change_sums(before, after, [1.0, 2.0])
    for i, (old, new) in enumerate(zip(tensors, after, strict=True)):
        change, is_fast = new.double() - old.double(), i == 0 and dtype == torch.float32
        assert sums[i].item() == pytest.approx(change.abs().sum().item(), rel=1e-7 if is_fast else 1e-12, abs=0)
        assert squares[i].item() == pytest.approx(change.square().sum().item(), rel=1e-7 if is_fast else 1e-12, abs=0)
        product = (change.norm() * old.double().norm()).item()
        expected = pytest.approx(
            (old.double() * change).sum().item(), rel=0, abs=product * (1e-9 if is_fast else 1e-14)
        )
        assert radial[i].item() == expected


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e18, 1e25], ids=str)
def test_changes_whose_squares_or_products_leave_the_range_of_float32(size):
    usual, large = randn(2**17, seed=2), randn(2**17, seed=1) * size ** (0.3 if size > 1 else 1)
    before = [usual, large, torch.zeros(2**16 + 1), torch.zeros(2**17)]
    after = [1.1 * usual, large + size * randn(2**17), torch.full((2**16 + 1,), size), torch.zeros(2**17)]
    (squares,), radial = change_sums(copies(before), after, [2.0])
    changes = [new.double() - old.double() for new, old in zip(after, before, strict=True)]
    assert squares.tolist() == pytest.approx([change.square().sum().item() for change in changes], rel=1e-6, abs=0)
    products = [(old.double() * change).sum().item() for old, change in zip(before, changes, strict=True)]
    assert radial.tolist() == pytest.approx(products, rel=1e-5, abs=0)


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (300, 40), (256, 128), (200, 700)], ids=str)
def test_spectral_norm_equals_the_largest_singular_value(shape):
    matrix = randn(*shape)
    assert spectral_norm(matrix).item() == pytest.approx(
        torch.linalg.svdvals(matrix.double())[0].item(), rel=1e-3, abs=0
    )


@pytest.mark.parametrize("size", [1e38, 1e-30], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (200, 100)], ids=str)
def test_spectral_norm_of_elements_whose_squares_leave_the_range_of_float32(shape, size):
    matrix = randn(*shape).clamp(-3, 3) * size
    assert spectral_norm(matrix).item() == pytest.approx(
        torch.linalg.svdvals(matrix.double())[0].item(), rel=1e-3, abs=0
    )


@pytest.mark.parametrize("shape", [(3, 5), (200, 100), (100, 200)], ids=str)
def test_spectral_norm_of_a_complex_matrix(shape):
    matrix = torch.complex(randn(*shape), randn(*shape, seed=1))
    expected = torch.linalg.svdvals(matrix.to(torch.complex128))[0].item()
    assert spectral_norm(matrix).item() == pytest.approx(expected, rel=1e-3, abs=0)


@pytest.mark.parametrize("count", [4, 5000])
def test_changes_of_complex_weights_are_those_of_their_parts(count):
    before, after = (torch.complex(randn(count, seed=i), randn(count, seed=i + 1)) for i in (0, 2))
    (sums, squares), radial = change_sums(copies([before]), [after], [1.0, 2.0])
    w, v = torch.view_as_real(before).double(), torch.view_as_real(after).double()
    expected = [(after - before).abs().sum().item(), (v - w).square().sum().item(), (w * (v - w)).sum().item()]
    assert [sums.item(), squares.item(), radial.item()] == pytest.approx(expected, rel=1e-5, abs=0)


def test_a_tensor_with_the_negative_bit_is_counted():
    tensor = torch.complex(torch.zeros(4), torch.tensor([0.0, 1.0, 2.0, 0.0])).conj().imag
    assert tensor.is_neg()
    assert counts_at_most(dense_pieces([tensor])).tolist() == [2]


@pytest.mark.parametrize("size", [1e-3, 1.0, 3.0], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 7])
def test_spectral_norm_of_a_matrix_of_low_rank(rank, size):
    """After its rank only rounding is left to find directions by, which differs from processor to processor."""
    for seed in range(5):
        matrix = size * randn(300, rank, seed=seed) @ randn(rank, 200, seed=seed + 5)
        expected = torch.linalg.svdvals(matrix.double())[0].item()
        assert spectral_norm(matrix).item() == pytest.approx(expected, rel=1e-5, abs=0)


def test_spectral_norm_of_zero_empty_and_broken_matrices():
    assert spectral_norm(torch.zeros(200, 100)).item() == 0
    assert spectral_norm(torch.zeros(0, 4)).item() == 0
    assert spectral_norm(torch.full((200, 100), math.nan)).isnan()
    assert spectral_norm(torch.ones(2, 2, dtype=torch.bfloat16)).item() == pytest.approx(2, rel=1e-6, abs=0)


# -- histograms ------------------------------------------------------------------------------------------------------


def assert_same_histogram(found, values):
    counts, edges = np.histogram(values, bins=len(found.counts), range=(found.low, found.high))
    assert sum(found.counts) == counts.sum() == np.isfinite(values).sum()
    # Elements within rounding of an edge may fall to either side.
    assert np.abs(np.cumsum(found.counts) - np.cumsum(counts)).max() <= 2e-4 * len(values) + 2
    assert found.edges == pytest.approx(edges.tolist(), rel=1e-6, abs=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("center", [0.0, 100.0])
def test_histograms_equal_numpys(dtype, center):
    tensor = (randn(2**20 + 99) + center).to(dtype)
    (found,) = histograms([tensor], sharding=Sharding())
    if dtype in (torch.float64, torch.float32):  # the values of half precision lie on edges
        assert_same_histogram(found, tensor.double().numpy())
    assert (found.low, found.high) == (tensor.min().item(), tensor.max().item())
    assert sum(found.counts) == tensor.numel()


@pytest.mark.parametrize("size", [1, 2, 999, 8450, 8451, 2**18 + 1, 2**19 + 4097])
def test_histograms_equal_numpys_at_any_size(size):
    values = randn(size).double()
    (found,) = histograms([values], sharding=Sharding())
    assert sum(found.counts) == size
    if size > 1:
        assert_same_histogram(found, values.numpy())


def test_histograms_of_negative_elements_end_below_zero():
    """A small tensor beside a large one, which comes first where they are arranged."""
    tensors = [-1 - randn(size).abs() for size in (10, 2**18 + 1)]
    for found, tensor in zip(histograms(tensors, sharding=Sharding()), tensors, strict=True):
        assert (found.low, found.high) == (tensor.min().item(), tensor.max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_histograms_reach_to_the_ends_of_the_range(dtype):
    limits = torch.finfo(dtype)
    for scale in (limits.max, limits.smallest_normal / 8):
        tensor = scale * torch.tensor([-1.0, -1.0, 0.5, 1.0, math.nan], dtype=dtype)
        (found,) = histograms([tensor], sharding=Sharding(), bins=4)
        assert found.counts == [2, 0, 0, 2]
        assert found.edges == pytest.approx([scale * share for share in (-1.0, -0.5, 0.0, 0.5, 1.0)], rel=1e-15, abs=0)


@pytest.mark.parametrize("value", [0.0, 3.0, -1e30, 1e-40])
def test_histograms_of_one_number_are_about_it(value):
    (found,) = histograms([torch.full((7,), value)], sharding=Sharding(), bins=2)
    assert sum(found.counts) == 7
    assert found.low < value < found.high


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
def test_histograms_of_sparse_tensors_count_the_zeros_that_are_not_stored():
    sparse = torch.sparse_coo_tensor([[0, 2, 2]], [[3.0, -1.0], [1.0, 0.5], [3.0, 0.0]], (5, 2))
    nothing = torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, 2), (5, 2))
    tensors = [sparse, nothing, torch.ones(5)]
    dense = [t.to_dense() for t in tensors]
    assert histograms(tensors, sharding=Sharding(), bins=7) == histograms(dense, sharding=Sharding(), bins=7)


def test_histograms_leave_out_what_is_not_finite():
    tensor = torch.tensor([0.0, 1.0, 2.0, 4.0, math.nan, math.inf, -math.inf])
    assert histograms([tensor], sharding=Sharding(), bins=4) == [Histogram([1, 1, 1, 1], 0.0, 4.0)]


@pytest.mark.parametrize("tensor", [torch.zeros(0), torch.full((3,), math.nan)], ids=["empty", "nan"])
def test_histograms_of_nothing_are_empty(tensor):
    assert histograms([tensor], sharding=Sharding(), bins=2) == [Histogram([0, 0], 0.0, 1.0)]


def test_histogram_of_equal_elements_has_a_width():
    assert histograms([torch.ones(5)], sharding=Sharding(), bins=2) == [Histogram([0, 5], 0.5, 1.5)]


# -- memory ----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation made; views are none."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_full_size_temporary_is_made(dtype):
    tensor = torch.zeros(5 * 2**20, dtype=dtype)
    with Largest() as largest:
        pieces = dense_pieces([tensor])
        for norm_type in ORDERS:
            power_sums(pieces, norm_type)
        counts_at_most(pieces)
        counts_at_most(pieces, 0.1)
        nonfinite_counts(pieces)
        histograms([tensor], sharding=Sharding())
    assert largest.elements <= 2**20


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_full_size_temporary_is_made_for_the_norms_of_several_tensors(dtype, order):
    tensors = [-torch.ones(3 * 2**20, dtype=dtype), torch.ones(5), *(torch.ones(2**19, dtype=dtype) for _ in range(4))]
    with Largest() as largest:
        found = norms(tensors, order)
    assert largest.elements <= 2**20
    assert found.tolist() == pytest.approx([t.numel() ** (1 / order) for t in tensors], rel=1e-6, abs=0)


def test_copies_of_many_small_tensors_are_no_larger_than_a_slice():
    tensors = [torch.ones(4096) for _ in range(600)]
    with Largest() as largest:
        found = norms(tensors)
    assert largest.elements <= 2**20
    assert found.tolist() == [64.0] * 600


# -- several ranks ---------------------------------------------------------------------------------------------------


def _one_piece_is_broken(rank, world_size):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    wholes = [torch.tensor(values) for values in ([1.0, math.nan], [math.nan, 1.0], [1.0, math.inf], [-3.0, 2.0])]
    return norms([distribute_tensor(whole, mesh, [Shard(0)]) for whole in wholes], math.inf).tolist()


def test_an_infinity_norm_keeps_the_nan_of_any_rank():
    for found in run_distributed(_one_piece_is_broken):
        assert found == pytest.approx([math.nan, math.nan, math.inf, 3.0], nan_ok=True, rel=1e-6, abs=0)


def _sharded(rank, world_size, shapes):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    whole = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    placements = [Shard(0), Shard(1), Replicate()]
    found = {}
    for order in (1.0, 2.0, 3.0, math.inf):
        for placement in placements:
            spread = [distribute_tensor(t, mesh, [placement]) for t in whole]
            found[str(placement), order] = norms(spread, order).tolist()
        mixed = [distribute_tensor(t, mesh, [placements[i % 3]]) if i % 4 else t for i, t in enumerate(whole)]
        found["mixed", order] = norms(mixed, order).tolist()
    spread = [distribute_tensor(t, mesh, [Shard(0)]) for t in whole]
    return found, histograms(spread, sharding=Sharding(), bins=8), count_nonfinite([spread[0] / 0]).tolist()


SHAPES = [(5, 3), (1, 4), (8, 8), (2, 1), (7, 2)]  # on two ranks: uneven, empty, even


def test_norms_of_shards_and_replicas_equal_those_of_the_whole():
    expected = [randn(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    for found, pictures, nonfinite in run_distributed(_sharded, SHAPES):
        for (_, order), values in found.items():
            assert values == pytest.approx([true_norm(t, order) for t in expected], rel=1e-6, abs=0)
        assert pictures == histograms(expected, sharding=Sharding(), bins=8)
        assert nonfinite == [15]


def _fsdp1(rank, world_size):
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel

    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    module = _two_layers()
    wrapped = FullyShardedDataParallel(module, use_orig_params=True, device_id=torch.device("cpu"))
    wrapped(randn(4, 3)).sum().backward()
    sharding, parameters = Sharding(wrapped), list(wrapped.parameters())
    gradients = [p.new_empty(0) if p.grad is None else p.grad for p in parameters]  # a rank may have no piece of it
    local = [p.numel() for p in parameters]
    weights = norms(parameters, sharding=sharding).tolist()
    return local, weights, norms(gradients, sharding=sharding, parameters=parameters).tolist()


def _two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


@pytest.mark.filterwarnings("ignore:.*FSDP.*:FutureWarning")  # torch.distributed.fsdp: FSDP1 is deprecated
@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # torch.distributed.fsdp on CPU
def test_norms_of_fsdp1_pieces_equal_those_of_the_whole():
    module = _two_layers()
    module(randn(4, 3)).sum().backward()
    results = run_distributed(_fsdp1)
    assert any(0 in local for local, *_ in results)  # one rank has no piece of some parameter
    for _, weights, gradients in results:
        assert weights == pytest.approx([true_norm(p, 2.0) for p in module.parameters()], rel=1e-6, abs=0)
        assert gradients == pytest.approx([true_norm(p.grad, 2.0) for p in module.parameters()], rel=1e-6, abs=0)
