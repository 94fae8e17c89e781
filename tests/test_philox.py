"""The dropout mask: known answers of Philox, and the mask's own properties."""

import numpy as np
import pytest
import torch

from lora_kernels import philox

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    "rounds, value, wanted",
    [  # Random123's kat_vectors for philox4x32
        (7, 0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (10, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (10, ONES, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_known_answers(rounds, value, wanted):
    counter = [torch.full((1,), value)] * 4
    assert tuple(int(word) for word in philox.philox_4x32(counter, (value, value), rounds)) == wanted


def test_pi_counter():
    counter = [torch.tensor([v]) for v in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)]
    words = philox.philox_4x32(counter, (0xA4093822, 0x299F31D0), 10)
    assert tuple(int(w) for w in words) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_mask_is_the_words_lanes_in_order():
    seed = torch.tensor(0x0123_4567_89AB_CDEF)
    mask = philox.keep_mask(seed, 3, 21, 0.4)
    for m in range(3):
        for j in range(21):
            counter = [torch.tensor([v]) for v in (m, 0, j // 8, 0)]
            word = int(philox.philox_4x32(counter, (0x89AB_CDEF, 0x0123_4567))[(j % 8) // 2])
            assert bool(mask[m, j]) == ((word >> (16 * (j % 2))) & 0xFFFF >= philox.threshold_of(0.4))


def test_mask_does_not_depend_on_the_shape_around_it():
    seed = torch.tensor(5)
    large = philox.keep_mask(seed, 9000, 40, 0.25)  # more rows than one chunk computes
    for tokens, features in ((1, 1), (9, 40), (9000, 33)):
        assert torch.equal(philox.keep_mask(seed, tokens, features, 0.25), large[:tokens, :features])


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9, 0.9999])
def test_keep_rate_and_mean(p):
    keep = philox.keep_mask(torch.tensor(3), 1000, 1000, p)
    rate, wanted = keep.double().mean().item(), 1 / philox.inv_keep(p)
    assert abs(wanted - (1 - p)) <= 2**-17 + 1e-12, "p is rounded to a multiple of 2^-16"
    assert abs(rate - wanted) < 5 * (wanted * (1 - wanted) / 1e6) ** 0.5, "five standard deviations"
    for other in (keep.roll(1, 0), keep.roll(1, 1), keep.roll(8, 1), philox.keep_mask(torch.tensor(4), 1000, 1000, p)):
        both = (keep & other).double().mean().item()
        assert abs(both - wanted**2) < 5 * (wanted**2 / 1e6) ** 0.5 + 1e-4, "neighbours and seeds are independent"


@pytest.mark.parametrize("features", [1, 8, 21])
def test_packed_bits_are_numpys(features):
    """As numpy.packbits has them, of whole groups: what is behind the last feature is the mask of further ones."""
    seed, groups = torch.tensor(7), -(-features // 8)
    packed = philox.packed_mask(seed, 9000, features, 0.3)
    assert packed.dtype == torch.uint8 and packed.shape == (9000, groups)
    assert (packed.numpy() == np.packbits(philox.keep_mask(seed, 9000, 8 * groups, 0.3).numpy(), axis=1)).all()
    for dtype in (torch.int16, torch.int32, torch.int64):
        bits = philox.unpacked(packed, features, dtype)
        assert bits.dtype == dtype and torch.equal(bits, -philox.keep_mask(seed, 9000, features, 0.3).to(dtype))


def test_edges():
    assert philox.threshold_of(0.0) == 0 and philox.inv_keep(0.0) == 1.0
    assert philox.threshold_of(1 - 1e-9) == 65535 and philox.inv_keep(1 - 1e-9) == 65536.0
    assert philox.keep_mask(torch.tensor(1), 50, 50, 0.0).all()
    assert philox.keep_mask(torch.tensor(-1), 0, 50, 0.5).shape == (0, 50)


def test_seed_follows_torchs_generator():
    torch.manual_seed(11)
    first = [philox.draw_seed(torch.device("cpu")) for _ in range(3)]
    torch.manual_seed(11)
    assert [int(s) for s in first] == [int(philox.draw_seed(torch.device("cpu"))) for _ in range(3)]
    assert len({int(s) for s in first}) == 3
