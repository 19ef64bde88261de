import pytest
import torch
from torch import nn

import sbp
from sbp.functional import Streams, join, kept_gradient, rescale_gradient, split

KEEP = torch.tensor([0, 2, 3, 6])
DROP = torch.tensor([1, 4, 5])


def position_wise():
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5)).double()


def run(f, x, keep, drop, dim=1):
    x = x.clone().requires_grad_()
    out = sbp.keep_gradient(f, x, keep, drop, dim)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out.detach(), torch.autograd.grad((out * weight).sum(), [x, *f.parameters()])


def test_kept_and_dropped_gradients_sum_to_the_full_one():
    f, x = position_wise(), torch.randn(2, 7, 6, dtype=torch.float64)
    everything, nothing = torch.arange(7), torch.arange(0)
    _, full = run(f, x, everything, nothing)
    out, kept = run(f, x, KEEP, DROP)
    _, dropped = run(f, x, DROP, KEEP)
    torch.testing.assert_close(out, f(x))
    for a, b, c in zip(kept, dropped, full, strict=True):
        torch.testing.assert_close(a + b, c, rtol=1e-12, atol=1e-12)
    assert not kept[0][:, DROP].any() and kept[0][:, KEEP].any()


def test_any_dimension():
    f = nn.Conv1d(3, 4, 1).double()
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    out, (dx, *_) = run(f, x, KEEP, DROP, dim=2)
    torch.testing.assert_close(out, f(x))
    assert not dx[..., DROP].any()


@pytest.mark.parametrize("wrong", [KEEP, torch.arange(0), torch.arange(5)])
def test_positions_must_add_up(wrong):
    with pytest.raises(ValueError, match="must together be the 7 positions of dimension 1"):
        sbp.keep_gradient(nn.Identity(), torch.zeros(1, 7, 2), KEEP, wrong)


def test_split_and_join_are_inverse_in_both_directions():
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)

    def there_and_back(x):
        kept, dropped = split(x, KEEP, DROP)
        return join(Streams(kept * 2, dropped.sin()), KEEP, DROP)

    assert torch.autograd.gradcheck(there_and_back, x)
    assert torch.equal(join(split(x, KEEP, DROP), KEEP, DROP), x)
    assert torch.autograd.gradcheck(lambda x: split(x, KEEP, DROP).kept, x)
    assert torch.autograd.gradcheck(lambda x: split(x, KEEP, DROP).dropped, x)
    assert not join(Streams(x[:, KEEP], None), KEEP, DROP)[:, DROP].any()


EACH_KEEP = torch.tensor([[0, 2, 3, 6], [1, 2, 4, 5]])
EACH_DROP = torch.tensor([[1, 4, 5], [0, 3, 6]])


def test_positions_of_each_image():
    f, x = position_wise(), torch.randn(2, 7, 6, dtype=torch.float64)
    out, found = run(f, x, EACH_KEEP, EACH_DROP)
    torch.testing.assert_close(out, f(x))
    x = x.requires_grad_()
    alone = torch.cat([sbp.keep_gradient(f, x[i : i + 1], EACH_KEEP[i], EACH_DROP[i]) for i in range(2)])
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    expected = torch.autograd.grad((alone * weight).sum(), [x, *f.parameters()])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_positions_of_each_image_split_and_join_as_those_of_all_do():
    x = torch.randn(3, 2, 7, dtype=torch.float64).transpose(0, 1).transpose(1, 2).requires_grad_()  # (2, 7, 3)

    def there_and_back(x):
        kept, dropped = split(x, EACH_KEEP, EACH_DROP)
        return join(Streams(kept * 2, dropped.sin()), EACH_KEEP, EACH_DROP)

    assert torch.autograd.gradcheck(there_and_back, x)
    assert torch.equal(join(split(x, EACH_KEEP, EACH_DROP), EACH_KEEP, EACH_DROP), x)
    assert torch.autograd.gradcheck(lambda x: split(x, EACH_KEEP, EACH_DROP).kept, x)
    same = [index.expand(2, -1) for index in (KEEP, DROP)]
    for a, b in zip(split(x, *same), split(x, KEEP, DROP), strict=True):
        assert torch.equal(a, b)
    alone = Streams(x[:, KEEP], None)
    assert torch.equal(join(alone, *same), join(alone, KEEP, DROP))


@pytest.mark.parametrize(("images", "dim"), [(1, 1), (3, 1), (2, 2)])
def test_positions_are_for_as_many_images(images, dim):
    with pytest.raises(ValueError, match=rf"positions of 2 images along dimension 1 cannot split {images} along {dim}"):
        split(torch.zeros(images, 7, 7), EACH_KEEP, EACH_DROP, dim)


@pytest.mark.parametrize("prefix", [0, 2])
def test_a_rescaled_gradient(prefix):
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    out = rescale_gradient(x, 2.5, prefix)
    assert torch.equal(out, x) and rescale_gradient(x, 1.0, prefix) is x
    weight = torch.randn_like(out)
    (found,) = torch.autograd.grad((out * weight).sum(), x)
    expected = weight.clone()
    expected[:, prefix:] *= 2.5
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert sbp.saved_bytes(lambda: rescale_gradient(x, 2.5, prefix)) == 0


@pytest.mark.parametrize("without_gradient_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_loses_no_gradient(without_gradient_first, dtype):
    """Autocast caches the lower-precision copy of a weight: one made without gradient must not be used with it."""
    f = position_wise().float()
    x = torch.randn(2, 7, 6)
    with torch.autocast("cpu", dtype):
        if without_gradient_first:
            with torch.no_grad():
                f(x)
        out = sbp.keep_gradient(f, x, KEEP, DROP)
        assert out.dtype == dtype
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in f.parameters())


def test_a_dropped_stream_of_another_dtype_joins():
    streams = Streams(torch.ones(1, 4, 2, dtype=torch.bfloat16), torch.ones(1, 3, 2))
    assert join(streams, KEEP, DROP).dtype == torch.bfloat16


def test_a_stream_that_nothing_reads_is_not_computed():
    assert kept_gradient(torch.sin, Streams(torch.ones(1), None)).dropped is None
