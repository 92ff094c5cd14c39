import pytest
import torch

from distrec.methods import losses
from distrec.methods.losses import bpr, gram_distance, info_nce
from distrec.parallel.partition import share
from distrec.parallel.world import World
from tests.methods import plain


def unit(rows: int, width: int, seed: int) -> torch.Tensor:
    draw = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(draw, dim=1)


@pytest.mark.parametrize("temperature", [0.03, 0.2, 1.0, 5.0])
@pytest.mark.parametrize(("distinct", "width", "size"), [(1, 4, 1), (9, 3, 2), (40, 16, 3), (3, 8, 5)])
def test_info_nce_equals_plain_autograd_over_repeated_rows(
    temperature: float, distinct: int, width: int, size: int, monkeypatch: pytest.MonkeyPatch
):
    """The shares of `size` ranks, computed block by block, add up to the whole in value and both gradients."""
    for seed, block in ((0, 1 << 20), (1, 2 * distinct)):
        monkeypatch.setattr(losses, "_BLOCK_ELEMENTS", block)
        counts = torch.randint(1, 4, (distinct,), generator=torch.Generator().manual_seed(seed))
        anchors, candidates = unit(distinct, width, seed), unit(distinct, width, seed + 50)

        a, b = (x.double().requires_grad_() for x in (anchors, candidates))
        repeat = torch.arange(distinct).repeat_interleave(counts)
        similarity = a[repeat] @ b[repeat].t() / temperature
        wanted = (similarity.logsumexp(1) - similarity.diagonal()).sum()
        wanted.backward()

        mine = [x.clone().requires_grad_() for x in (anchors, candidates)]
        parts = []
        for rank in range(size):
            first, stop = share(distinct, rank, size)
            parts.append(info_nce(mine[0][first:stop], mine[1], counts.float(), first, temperature))
        (sum(parts) * 0.5).backward()  # type: ignore[union-attr]
        assert float(sum(parts).detach()) == pytest.approx(float(wanted), rel=2e-6, abs=1e-5)
        for found, exact in zip(mine, (a, b), strict=True):
            torch.testing.assert_close(
                found.grad.double() * 2, exact.grad, rtol=1e-4, atol=2e-6 * distinct / temperature
            )


def test_info_nce_through_normalisation_is_the_formula_of_the_specification():
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(12, 5, generator=generator) for _ in range(2))
    found = info_nce(
        torch.nn.functional.normalize(a, dim=1),
        torch.nn.functional.normalize(b, dim=1),
        torch.ones(12),
        0,
        0.2,
    )
    assert float(found) / 12 == pytest.approx(float(plain.info_nce(a.double(), b.double(), 0.2)), rel=1e-6)


def test_a_temperature_that_would_underflow_is_refused():
    rows = unit(2, 2, 0)
    with pytest.raises(ValueError, match=r"temperature 0.01 is below 0.03"):
        info_nce(rows, rows, torch.ones(2), 0, 0.01)


@pytest.mark.parametrize(("rows", "width", "targets"), [(1, 3, 2), (7, 4, 9), (30, 8, 5), (33, 2, 40)])
def test_gram_distance_equals_plain_autograd_for_any_number_of_ranks(
    rows: int, width: int, targets: int, monkeypatch: pytest.MonkeyPatch
):
    for block in (256, 4):
        monkeypatch.setattr(losses, "_GRAM_ROWS", block)
        generator = torch.Generator().manual_seed(rows)
        v, t = torch.randn(rows, width, generator=generator), torch.randn(rows, targets, generator=generator)
        exact = v.double().requires_grad_()
        wanted = (exact @ exact.t() - t.double() @ t.double().t()).square().sum()
        wanted.backward()
        for size in (1, 2, 3, 8):
            mine = v.clone().requires_grad_()
            total = sum(gram_distance(mine, t, World(rank, size)) for rank in range(size))
            (total * 3).backward()  # type: ignore[union-attr]
            assert float(total.detach()) == pytest.approx(float(wanted), rel=1e-5)
            scale = float(exact.grad.abs().max())
            torch.testing.assert_close(mine.grad.double() / 3, exact.grad, rtol=1e-4, atol=1e-5 * scale)


def test_equal_grams_have_no_distance():
    v = unit(20, 6, 1)
    assert float(gram_distance(v, v.clone(), World(0, 1))) < 1e-10


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_bpr_equals_its_formula_and_does_not_overflow(scale: float):
    generator = torch.Generator().manual_seed(0)
    u, p, n = (scale * torch.randn(50, 6, generator=generator) for _ in range(3))
    exact = torch.nn.functional.softplus(-((u * p).double().sum(1) - (u * n).double().sum(1)))
    torch.testing.assert_close(bpr(u, p, n).double(), exact, rtol=1e-4, atol=1e-5)
    if scale <= 1:
        assert float(bpr(u, p, n).mean()) == pytest.approx(
            float(plain.bpr(u.double(), p.double(), n.double())), rel=1e-5
        )
    huge = torch.full((1, 1), 1e4)
    assert float(bpr(huge, -huge, huge)) == pytest.approx(2e8)
    assert float(bpr(huge, huge, -huge)) == 0
