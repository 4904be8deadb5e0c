"""The Triton kernels against their references and against float64: norm, finite check, perturbation, restore."""

import math

import pytest
import torch
from error_bounds import assert_as_exact
from exact_formulas import perturbed, scaled_norm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, DTYPES, LISTS, SIZES, assert_same_bits, copies, kernels, reference, tensors

from fastsam.kernels import philox, reference_common
from fastsam.kernels.philox import Draw
from fastsam.kernels.tensor_list import Backup, as_words, in_memory_order

if kernels is None:
    pytest.skip("triton is not installed", allow_module_level=True)
from fastsam.kernels import chunk_access, launch, perturb

pytestmark = pytest.mark.usefixtures("poisoned")
WORDS = pytest.mark.parametrize("draw", [None, (True, None), (True, 0.6), (False, 0.6)], ids=str)


@pytest.fixture
def poisoned(monkeypatch):
    """New memory holds NaN, so that whatever a kernel leaves out shows."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)
        filled = lambda *args, original=original, **kwargs: (  # noqa: E731
            t.fill_(math.nan) if (t := original(*args, **kwargs)).is_floating_point() else t
        )
        monkeypatch.setattr(torch, name, filled)


@pytest.fixture
def no_scalars(monkeypatch):
    """The reference computes its scale on the device, as the kernel does."""
    monkeypatch.setattr(reference_common, "READ_SCALARS", False)


@pytest.fixture
def small_chunks(monkeypatch):
    """Many chunks for each tensor, also where the interpreter would take one."""
    monkeypatch.setattr(launch, "_INTERPRETED_BLOCK_SIZE", 64)


def etas_of(grads, adaptive):
    return [[None, 0.0, 0.5][i % 3] for i in range(len(grads))] if adaptive else None


def draw_of(draw, n, step=2**31 + 7, seed=2**63 + 5):
    rounding, keep = draw or (False, None)
    return draw and Draw(
        seed, step, tuple(range(3, n + 3)), rounding, keep and tuple([keep, 1.0, 0.0][i % 3] for i in range(n))
    )


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtypes", LISTS, ids=str)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_norm(dtypes, adaptive, scale):
    if scale != 1:
        dtypes = [d for d in dtypes if d != torch.float16] or [torch.float32]
    grads, weights = tensors(dtypes, scale=scale), tensors(dtypes, seed=1, scale=scale)
    etas = etas_of(grads, adaptive)
    norm = kernels.norm(grads, weights, etas)
    assert (norm.shape, norm.dtype) == ((), torch.float64)
    assert_as_exact([norm], [scaled_norm(grads, weights, etas)])
    again = kernels.norm(copies(grads), copies(weights), etas)
    assert_same_bits([again], [norm])


@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_norm_of_a_mask(keep):
    grads, weights = tensors(DTYPES, sizes=(63, 4096)), tensors(DTYPES, seed=1, sizes=(63, 4096))
    draw = Draw(5, 6, tuple(range(len(grads))), keep_probability=(keep,) * len(grads))
    for adaptive in (False, True):
        etas = etas_of(grads, adaptive)
        kept = [torch.where(reference_common.mask_of(draw, i, g), g, 0) for i, g in enumerate(grads)]
        expected = scaled_norm(kept, weights, etas)
        assert_as_exact(
            [launcher.norm(grads, weights, etas, draw) for launcher in (kernels, reference)], [expected] * 2
        )
        assert (expected.value == 0) == (keep == 0)


@pytest.mark.usefixtures("no_scalars")
@pytest.mark.parametrize("rounding", [True, False])
def test_one_draw_for_each_tensor(rounding):
    n = len(tensors(DTYPES))
    draw = Draw(5, 6, tuple(range(n)), rounding, keep_probability=(0.5,) * n, whole=True)
    first = philox.first_words(n, 6, 5)
    kept = [word < philox.threshold(0.5) for word in first]
    assert any(kept)
    assert not all(kept)
    grads = tensors(DTYPES)
    chosen = [g for g, is_kept in zip(grads, kept, strict=True) if is_kept]
    for g, is_kept in zip(grads, kept, strict=True):
        if not is_kept:
            g.fill_(torch.nan)  # counts in nothing
    norm = kernels.norm(grads, draw=draw)
    assert_as_exact([norm, reference.norm(grads, draw=draw)], [scaled_norm(chosen)] * 2)
    found = []
    for launcher in (kernels, reference):
        weights = tensors(DTYPES, seed=1)
        for w in weights:
            w[w < 0] = -0.0  # which adding 0 would change
        before = copies(weights)
        launcher.perturb_(weights, grads, Backup(weights), norm, [0.3] * n, None, draw)
        moved = [not torch.equal(a, b) for a, b in zip(weights, before, strict=True) if a.numel() > 10]
        assert moved == [is_kept for is_kept, w in zip(kept, weights, strict=True) if w.numel() > 10]
        assert_same_bits(*[[t for t, k in zip(some, kept, strict=True) if not k] for some in (weights, before)])
        found.append(weights)
    assert_same_bits(*found)


@pytest.mark.usefixtures("no_scalars")
@pytest.mark.parametrize("whole", [False, True])
def test_a_launch_whose_step_moves_on_draws_what_a_later_step_does(whole):
    grads, n = tensors(DTYPES, sizes=(63, 4096)), len(tensors(DTYPES, sizes=(63, 4096)))
    norm = torch.ones((), dtype=torch.float64, device=DEVICE)
    advance = torch.tensor(2**31 + 3, device=DEVICE)
    later = Draw(5, 2**31 + 9, tuple(range(n)), keep_probability=(0.5,) * n, whole=whole)
    moved_on = later._replace(step=6, advance=advance)
    for launcher in (kernels, reference):
        found = []
        for draw in (later, moved_on):
            weights = tensors(DTYPES, seed=1, sizes=(63, 4096))
            launcher.perturb_(weights, grads, Backup(weights), norm, [0.3] * n, None, draw)
            found.append([*weights, launcher.norm(grads, draw=draw)])
        assert_same_bits(*found)


@pytest.mark.usefixtures("small_chunks")
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 5), st.sampled_from(DTYPES)), min_size=1, max_size=4))
def test_any_list_of_lengths_and_offsets(cases):
    generator = torch.Generator().manual_seed(0)

    def made():
        return [torch.randn(n + skip, generator=generator).to(DEVICE, dtype)[skip:] for n, skip, dtype in cases]

    weights, grads = made(), made()
    norm = kernels.norm(grads)
    assert_as_exact([norm], [scaled_norm(grads)])
    assert kernels.found_nonfinite(grads).item() == 0
    before, expected = copies(weights), copies(weights)
    draw = Draw(1, 2, tuple(range(len(cases))))
    backup = Backup(weights)
    kernels.perturb_(weights, grads, backup, norm, [0.3] * len(cases), None, draw)
    assert_same_bits(backup.tensors, before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_common, "READ_SCALARS", False)
        reference.perturb_(expected, grads, Backup(expected), norm, [0.3] * len(cases), None, draw)
    assert_same_bits(weights, expected)
    kernels.restore_(backup)
    assert_same_bits(weights, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_entries_are_found_wherever_they_are(dtype, bad, monkeypatch):
    monkeypatch.setattr(launch, "_INTERPRETED_BLOCK_SIZE", 1024)
    grads = [t.to(DEVICE, dtype) for t in (torch.ones(2100), torch.ones(71)[1:], torch.ones(8, 6)[:, ::2])]
    for tensor, position in ((0, 0), (0, 1023), (0, 2099), (1, 35), (2, 0)):
        flat = grads[tensor].view(-1) if tensor < 2 else grads[tensor][:, 0]
        assert kernels.found_nonfinite(grads).item() == 0.0
        flat[position] = bad
        found = kernels.found_nonfinite(grads)
        assert (found.item(), found.shape, found.dtype) == (1.0, (), torch.float32)
        assert not torch.isfinite(kernels.norm(grads))
        flat[position] = torch.finfo(dtype).max


@pytest.mark.usefixtures("no_scalars")
@WORDS
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtypes", LISTS, ids=str)
def test_perturb_and_restore(dtypes, adaptive, draw):
    sizes = SIZES if len(dtypes) == 1 else SIZES[:-1]
    weights, grads = tensors(dtypes, sizes=sizes), tensors(dtypes, seed=1, sizes=sizes)
    etas, rho = etas_of(grads, adaptive), [[0.5, -0.25, 0.0, 30.0][i % 4] for i in range(len(grads))]
    draw = draw_of(draw, len(weights))
    before, expected, addresses = copies(weights), copies(weights), [w.data_ptr() for w in weights]
    norm = kernels.norm(grads, weights, etas, draw)
    backup = Backup(weights)
    versions = [w._version for w in weights]
    kernels.perturb_(weights, grads, backup, norm, rho, etas, draw)
    assert all(w._version > version for w, version in zip(weights, versions, strict=True))
    assert_same_bits(backup.tensors, before)
    reference.perturb_(expected, grads, Backup(expected), norm, rho, etas, draw)
    assert_same_bits(weights, expected)  # the same operations, in the same order, rounded alike
    if draw is None:
        rows = zip(before, grads, rho, etas or [None] * len(rho), strict=True)
        assert_as_exact(weights, [perturbed(*row, norm) for row in rows])
    kernels.restore_(backup)
    assert_same_bits(weights, before)
    for w in weights:
        w.fill_(3)
    kernels.restore_(backup)  # a second time does nothing
    assert all((w == 3).all() for w in weights)
    assert addresses == [w.data_ptr() for w in weights]


@pytest.mark.usefixtures("no_scalars")
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_another_dtype(dtype, grad_dtype):
    weights, grads = tensors([dtype], sizes=(63, 4096)), tensors([grad_dtype], seed=1, sizes=(63, 4096))
    expected, etas = copies(weights), etas_of(grads, True)
    norm = kernels.norm(grads, weights, etas)
    assert_as_exact([norm], [scaled_norm(grads, weights, etas)])
    kernels.perturb_(
        weights, grads, Backup(weights), norm, [0.3] * len(weights), etas, draw_of((True, None), len(weights))
    )
    reference.perturb_(
        expected, grads, Backup(expected), norm, [0.3] * len(weights), etas, draw_of((True, None), len(weights))
    )
    assert_same_bits(weights, expected)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("adaptive", [None, 0.0])
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_useless_norm_leaves_weights_alone(value, adaptive, stochastic):
    weights, grads = tensors(DTYPES, sizes=(63, 4096)), tensors(DTYPES, seed=1, sizes=(63, 4096))
    for w, g in zip(weights, grads, strict=True):
        g.fill_(value)
        w.flatten()[:1].fill_(-0.0)
        in_memory_order(w)[:1].fill_(-0.0)
    before = copies(weights)
    etas = [adaptive] * len(weights)
    norm = kernels.norm(grads, weights, etas)
    assert norm.item() == 0 if value == 0 else not torch.isfinite(norm)
    dense = [i for i, w in enumerate(weights) if w.stride() != (6, 2)]  # the reference turns -0 into 0
    weights, grads, before, etas = ([part[i] for i in dense] for part in (weights, grads, before, etas))
    draw = draw_of((True, None), len(weights)) if stochastic else None
    kernels.perturb_(weights, grads, Backup(weights), norm, [0.5] * len(weights), etas, draw)
    assert_same_bits(weights, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_survives(dtype):
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    patterns = torch.arange(-(2**15), 2**15, device=DEVICE).to(integers) << 8 * (dtype.itemsize - 2)
    weights = [patterns.view(dtype).clone(), patterns[1:].clone().view(dtype)[1:]]
    before, backup = copies(weights), Backup(weights)
    grads = [torch.ones_like(w) for w in weights]
    kernels.perturb_(weights, grads, backup, torch.ones((), device=DEVICE), [1.0, 1.0])
    assert not torch.equal(weights[0], before[0])
    kernels.restore_(backup)
    assert_same_bits(weights, before)


ANY = [*DTYPES, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.complex64]


@pytest.mark.parametrize("implementation", [kernels, reference], ids=["triton", "torch"])
def test_words_of_any_dtype_are_copied_bit_for_bit(implementation):
    sources = [(t * 100).to(dtype) for dtype in ANY for t in tensors([torch.float32], sizes=(0, 1, 7, 5000))]
    words = [as_words(t) for t in sources]
    targets = [torch.empty_like(w) for w in words]
    versions, addresses = [t._version for t in targets], [t.data_ptr() for t in targets]
    implementation.copy_(targets, words)
    assert_same_bits(targets, words)
    assert addresses == [t.data_ptr() for t in targets]
    assert all(t._version > before for t, before in zip(targets, versions, strict=True) if t.numel())
    before = [t.clone() for t in sources]
    for t in sources:
        t.zero_()
    implementation.copy_(words, targets)
    assert_same_bits(sources, before)
    implementation.copy_([], [])


def test_words_are_of_four_bytes_wherever_the_memory_allows_it():
    assert as_words(torch.zeros(4, dtype=torch.uint8)).dtype == torch.float32
    assert as_words(torch.zeros(5, dtype=torch.uint8)).dtype == torch.uint8
    assert as_words(torch.zeros(6, dtype=torch.uint8)[1:5]).dtype == torch.uint8
    assert as_words(torch.zeros((), dtype=torch.int64)).shape == (2,)
    gappy = torch.zeros(4, 4)[:, ::2]
    assert as_words(gappy) is gappy


@WORDS
def test_draws_do_not_depend_on_the_size_of_chunks(draw, monkeypatch):
    found = []
    for size in (128, 16384):
        monkeypatch.setattr(launch, "_INTERPRETED_BLOCK_SIZE", size)
        weights, grads = tensors(DTYPES, sizes=(63, 2048)), tensors(DTYPES, seed=1, sizes=(63, 2048))
        norm = torch.ones((), dtype=torch.float64, device=DEVICE)
        kernels.perturb_(weights, grads, Backup(weights), norm, [0.3] * len(weights), None, draw_of(draw, len(weights)))
        found.append(weights)
    assert_same_bits(*found)


@pytest.mark.parametrize("index", [0, 2**32 - 1])
@pytest.mark.parametrize("step", [0, 2**31, 2**32 - 1])
@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1, -3])
def test_words_are_those_of_the_contract(seed, step, index):
    """A mask's threshold finds each word: here the words themselves decide what moves."""
    # aligned lanes and others; parts of a tensor, of which the last crosses a multiple of 2^32 counters
    for skip, start in ((0, 0), (1, 0), (0, 4), (0, 7), (1, 2**34 - 42), (0, 2**34 - 40)):
        words = philox.words(1000, index, step, seed, start=start)
        weights = [torch.zeros(1000 + skip, device=DEVICE)[skip:]]
        grads = [torch.ones(1000 + skip, device=DEVICE)[skip:]]
        keep = words.sort().values[500].item() / 2**32
        draw = Draw(seed, step, (index,), keep_probability=(keep,), starts=(start,))
        kernels.perturb_(weights, grads, Backup(weights), torch.ones((), device=DEVICE), [1.0], None, draw)
        assert torch.equal(weights[0].cpu() != 0, words < philox.threshold(keep))


@pytest.mark.parametrize("cuts", [(64, 400, 1004), (1, 66, 67, 1003)], ids=str)
@pytest.mark.parametrize("launcher", [kernels, reference], ids=["triton", "torch"])
def test_parts_draw_what_the_whole_does(launcher, cuts):
    generator = torch.Generator().manual_seed(0)
    norm = torch.ones((), dtype=torch.float64, device=DEVICE)
    for dtype in DTYPES:
        weights, grads = (torch.randn(1100, generator=generator).to(DEVICE, dtype) for _ in range(2))

        def parts(tensor):
            return [part.clone() for part in tensor.tensor_split(cuts)]

        n = len(cuts) + 1
        draw = Draw(5, 6, (7,) * n, keep_probability=(0.5,) * n, starts=(0, *cuts))
        cut = parts(weights)
        launcher.perturb_(cut, parts(grads), Backup(cut), norm, [0.3] * n, None, draw)
        masked = launcher.norm(parts(grads), draw=draw)
        whole, before = draw.take([0]), weights.clone()
        kept = torch.where(reference_common.mask_of(whole, 0, grads), grads, 0)
        assert_as_exact([masked, launcher.norm([grads], draw=whole)], [scaled_norm([kept])] * 2)
        launcher.perturb_([weights], [grads], Backup([weights]), norm, [0.3], None, whole)
        assert_same_bits([torch.cat(cut)], [weights])
        assert 0.4 < (weights != before).double().mean() < 0.6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_stochastic_rounding_is_that_of_the_reference_for_every_magnitude(dtype):
    values = torch.tensor([s * 2.0**e * (1 + f / 97) for e in range(-30, 18) for f in range(97) for s in (1, -1)])
    weights = [values.to(DEVICE, dtype)]
    grads, expected = [torch.full_like(weights[0], 2.0**-12) * weights[0].float().abs()], copies(weights)
    norm, draw = torch.ones((), dtype=torch.float64, device=DEVICE), Draw(7, 8, (9,))
    kernels.perturb_(weights, grads, Backup(weights), norm, [1.0], None, draw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_common, "READ_SCALARS", False)
        reference.perturb_(expected, grads, Backup(expected), norm, [1.0], None, draw)
    assert_same_bits(weights, expected)
    assert not torch.equal(weights[0], values.to(DEVICE, dtype))


@pytest.fixture
def stretches(monkeypatch, small_chunks):
    """Of each chunk that the perturbation takes its length, its addresses, and how much goes in wide accesses."""
    if not launch.INTERPRETED:
        pytest.skip("a GPU's programs do not tell")
    seen = []

    def spy(length, addresses, original=chunk_access.aligned_length):
        result = original(length, addresses)
        seen.append((int(length.handle.data.item()), int(addresses.handle.data.item()), int(result.handle.data.item())))
        return result

    monkeypatch.setattr(perturb, "aligned_length", spy)
    return seen


def test_only_aligned_tensors_are_taken_in_wide_accesses(stretches):
    """The interpreter forgives a wrong hint of alignment; a GPU faults."""
    for skips in ((0, 0), (1, 0), (0, 1), (2, 2), (4, 4), (4, 0)):
        weights, grads = [torch.ones(200)[skips[0] :]], [torch.ones(210)[skips[1] : 200 - skips[0] + skips[1]]]
        assert weights[0].numel() == grads[0].numel()
        backup = Backup(weights)
        stretches.clear()
        kernels.perturb_(weights, grads, backup, torch.ones(()), [1.0])
        pointers = [t.data_ptr() for t in (weights[0], grads[0], backup.tensors[0])]
        is_aligned = all(pointer % 16 == 0 for pointer in pointers)
        assert is_aligned == (skips in ((0, 0), (4, 4), (4, 0)))
        assert all(addresses == pointers[0] | pointers[1] | pointers[2] for _, addresses, _ in stretches)
        assert all(wide == (length // 16 * 16 if is_aligned else 0) for length, _, wide in stretches)
        assert sum(length for length, _, _ in stretches) == weights[0].numel()


def test_parts_are_taken_in_wide_accesses_where_they_start_with_a_counter(stretches):
    for start, draws, is_wide in ((0, True, True), (8, True, True), (6, True, False), (6, False, True)):
        weights = [torch.ones(208)]
        draw = Draw(1, 2, (3,), keep_probability=(0.5,) if draws else None, starts=(start,))
        stretches.clear()
        kernels.perturb_(weights, [torch.ones(208)], Backup(weights), torch.ones(()), [1.0], None, draw)
        assert {wide == length for length, _, wide in stretches} == {is_wide}
