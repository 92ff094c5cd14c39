"""The parts of TorchRec that `torchrec_internals` relies on exist and work as assumed, for both kinds of tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distrec.parallel.world import World
from distrec.runtime import quiet
from tests.distributed import run_workers
from tests.tables.small_tables import ITEMS, WIDTH, tables

EPS = 1e-3


def look(kind: str) -> dict[str, Any]:
    from torchrec import KeyedJaggedTensor

    from distrec.tables.torchrec_internals import local_sums_of_squares, local_weights, set_fused_lr

    made = tables(World.current(), {"tables": kind, "lr": 0.5, "eps": EPS})
    collection = made._collections["item"]

    def read() -> torch.Tensor:
        """Rows 1 and 0, looked up through the kernel."""
        ids = KeyedJaggedTensor(keys=["item"], values=torch.tensor([1, 0]), lengths=torch.tensor([2]))
        return collection(ids)["item"].values()

    rows = local_weights(collection, "item")
    rows[:2] = torch.arange(2.0 * WIDTH).view(2, WIDTH)
    out: dict[str, Any] = {"shape": rows.shape, "leaf": rows.is_leaf and not rows.requires_grad}
    out["written"] = local_weights(collection, "item").clone(), rows.clone()
    if kind == "sparse":  # exact tables use only the kernel's storage, not its look-up
        out["read"] = read().detach().clone(), rows[[1, 0]].clone()
        sums, before = local_sums_of_squares(collection, "item"), rows.clone()
        out["sums"] = sums.clone(), torch.zeros(len(rows))
        set_fused_lr(collection, 0.25)
        out["rate alone"] = rows.clone(), before
        grad = torch.arange(2.0 * WIDTH).view(2, WIDTH) + 1
        read().backward(grad)
        squares = grad.square().mean(1)
        wanted = before.clone()
        wanted[[1, 0]] -= 0.25 * grad / (squares.sqrt() + EPS)[:, None]
        out["stepped"] = rows.clone(), wanted
        out["summed"] = local_sums_of_squares(collection, "item")[[1, 0]].clone(), squares
        sums[:] = 7
        out["live"] = local_sums_of_squares(collection, "item").clone(), torch.full((len(rows),), 7.0)
    return out


def both() -> dict[str, Any]:
    quiet()
    return {kind: look(kind) for kind in ITEMS}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return dict(run_workers(both, 1)[0])


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", ITEMS)
def test_rows_sums_and_rate_are_those_of_the_kernel(found: dict[str, Any], kind: str):
    seen = dict(found[kind])
    assert seen.pop("shape") == (ITEMS[kind], WIDTH)
    assert seen.pop("leaf")
    assert len(seen) == (7 if kind == "sparse" else 1)
    for name, (value, wanted) in seen.items():
        torch.testing.assert_close(value, wanted, msg=lambda text, name=name: f"{name}: {text}")
