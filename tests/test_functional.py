import pytest
import torch
from torch import nn

import sbp
from sbp.functional import Streams, join, kept_gradient, split

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
