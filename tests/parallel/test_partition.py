import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distrec.parallel.partition import Partition, share


@given(rows=st.integers(1, 500), size=st.integers(1, 40))
def test_blocks_are_those_of_torch_chunk(rows: int, size: int):
    """TorchRec and DTensor with `Shard(0)` cut rows into shards in the same way as `torch.chunk` cuts tensors."""
    partition = Partition(rows, size)
    chunks = [chunk.tolist() for chunk in torch.arange(rows).chunk(size)]
    chunks += [[] for _ in range(size - len(chunks))]
    blocks = [list(range(partition.start(rank), partition.stop(rank))) for rank in range(size)]
    assert blocks == chunks
    assert [partition.count(rank) for rank in range(size)] == [len(chunk) for chunk in chunks]
    owners = partition.owner(torch.arange(rows)).tolist()
    assert owners == [rank for rank, chunk in enumerate(chunks) for _ in chunk]


@pytest.mark.parametrize("size", [1, 3])
def test_an_array_without_rows_has_empty_blocks(size: int):
    partition = Partition(0, size)
    assert [partition.count(rank) for rank in range(size)] == [0] * size


@given(count=st.integers(0, 500), size=st.integers(1, 40))
def test_shares_cover_the_range_and_differ_by_one_at_most(count: int, size: int):
    shares = [share(count, rank, size) for rank in range(size)]
    assert [n for low, high in shares for n in range(low, high)] == list(range(count))
    lengths = [high - low for low, high in shares]
    assert max(lengths) - min(lengths) <= 1
