"""`distrec synth graph`: generate a prepared dataset of any size, for benchmarks.

Users' numbers of interactions are lognormal, and items' popularity follows a shifted power law. Each item belongs to a
cluster, which its vectors reveal, and each user prefers a few clusters, so item content helps to predict choices. In
time order, the last tenth of a user's interactions is test and the tenth before it valid, at least one each.

Users are generated block by block and items part by part. Every draw is keyed by its position, so the bytes do not
depend on the block size. Memory holds a few numbers per user and item, and one block of interactions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distrec.config.bounds import MOST_INTERACTIONS, MOST_ROWS, MOST_WIDTH, check_option
from distrec.data import keyed, parts
from distrec.data.dataset import Dataset, vector_table, write_part
from distrec.data.manifest import FORMAT, SPLITS, FeatureEntry, FileEntry, Manifest, write_manifest
from distrec.data.storage import Folder, open_folder
from distrec.errors import InputError
from distrec.runtime import check_fits

FEWEST = 3  # interactions of a user: one in each split

_BYTES_PER_ROW = 8  # memory per user and item, at the very least: its activity or its rank
_BLOCK = 1 << 20  # interactions generated at a time
_SPREAD = 0.9  # standard deviation of the logarithm of a user's activity
_EXPONENT, _SHIFT = 0.8, 10.0  # the item of rank r has weight (r + shift) ** -exponent
_CLUSTER_ITEMS, _CLUSTERS = 50, 1000  # minimum items per cluster, maximum number of clusters
_TASTES = (0.4, 0.6, 0.7)  # cumulative probabilities of a choice from the user's first, second and third cluster
_ATTEMPTS, _TASTEFUL = 16, 6  # maximum draws until an item is new to its user; how many of them follow tastes
_NOISE = {"text": 0.8, "image": 1.6}  # standard deviation of an entry; that of the cluster's vector is 1
_START, _SPAN = 1_704_067_200, 366 * 86_400  # 2024 UTC


@dataclass(frozen=True)
class GraphSize:
    """Sizes of the dataset to generate.

    Attributes:
        users: number of users.
        items: number of items.
        edges: number of interactions.
        dim: width of feature set `text`.
        image_dim: width of feature set `image`.
        seed: determines all draws.

    Raises:
        InputError: a size is out of range, or the sizes do not fit together.
    """

    users: int
    items: int
    edges: int
    dim: int
    image_dim: int
    seed: int = 7

    def __post_init__(self) -> None:
        for name, most in (
            ("users", MOST_ROWS),
            ("items", MOST_ROWS),
            ("edges", MOST_INTERACTIONS),
            ("dim", MOST_WIDTH),
            ("image_dim", MOST_WIDTH),
        ):
            check_option(name.replace("_", "-"), getattr(self, name), 1, most)
        check_fits(_BYTES_PER_ROW * (self.users + self.items), "options '--users' and '--items'", "lower them")
        if self.items < 4 * FEWEST:
            raise InputError(
                f"option '--items' is {self.items}, which must be at least {4 * FEWEST}, since each user has at least "
                f"{FEWEST} interactions and on average at most a quarter of the items; raise it."
            )
        most = self.users * self.items // 4
        if self.edges > most:
            raise InputError(
                f"option '--edges' is {self.edges}, more than a quarter of the {self.users} x {self.items} pairs; "
                f"lower it to at most {most}, or raise '--users' or '--items'."
            )
        if self.edges < FEWEST * self.users:
            raise InputError(
                f"option '--edges' is {self.edges}, too few for {FEWEST} interactions of each of {self.users} users; "
                f"raise it to at least {FEWEST * self.users}, or lower '--users'."
            )

    @property
    def clusters(self) -> int:
        """Number of item clusters; the item of popularity rank r is in cluster `r % clusters`."""
        return max(2, min(self.items // _CLUSTER_ITEMS, _CLUSTERS))

    def ranked(self) -> np.ndarray:
        """The item of each popularity rank, `[items]` int32."""
        return keyed.permutation(("synth-rank", self.seed), self.items).astype(np.int32)


def write_graph(out: str, size: GraphSize, block: int = _BLOCK) -> Dataset:
    """Write a prepared dataset of `size` to a new folder and print a summary.

    Args:
        out: a folder or `s3://` prefix that does not exist yet.
        block: approximate number of interactions generated at a time; the result does not depend on it.

    Raises:
        InputError: `out` already exists or cannot be written.
    """
    folder = open_folder(out)
    if folder.exists():
        raise InputError(f"option '--out' is '{out}', which exists already; remove it or give another folder.")
    try:
        folder.make()
    except OSError as error:
        raise InputError(
            f"option '--out' is '{out}', which cannot be written ({error}); check the path and its permissions."
        ) from None
    files = write_ids(folder, size.users, size.items)
    ranked = size.ranked()
    counts = _write_interactions(folder, files, size, ranked, block)
    cluster = np.empty(size.items, np.int32)
    cluster[ranked] = np.arange(size.items) % size.clusters
    widths = {"text": size.dim, "image": size.image_dim}
    features = {name: _write_feature(folder, files, size, name, width, cluster) for name, width in widths.items()}
    manifest = Manifest(
        format=FORMAT,
        name=f"synth-{size.users}-{size.items}-{size.edges}",
        users=size.users,
        items=size.items,
        interactions=counts,
        split="synth",
        id_order="given",
        features=features,
        content={},
        config={"synth": {"kind": "graph", **asdict(size)}},
        files=dict(sorted(files.items())),
    )
    write_manifest(folder, manifest)
    shown = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    print(
        f"{manifest.name}: {size.users:,} users, {size.items:,} items, {size.edges:,} interactions ({shown}) in {out}"
    )
    return Dataset.open(out, checked=True)


def write_ids(folder: Folder, users: int, items: int) -> dict[str, FileEntry]:
    """Write `users.parquet` and `items.parquet` with made-up ids and no titles; returns their manifest entries."""
    files = {}
    for side, count in (("users", users), ("items", items)):
        index = pa.array(np.arange(count, dtype=np.int32))
        table = {"index": index, "original": pc.binary_join_element_wise(side[0], index.cast(pa.string()), "")}
        if side == "items":
            table["title"] = pa.nulls(count, pa.string())
        files[f"{side}.parquet"] = write_part(folder, f"{side}.parquet", pa.table(table))
    return files


def degrees(size: GraphSize) -> np.ndarray:
    """Number of interactions of each user, `[users]` int64, with sum `edges`.

    The part above `FEWEST` is lognormal; no user has more than half the items.
    """
    share = np.empty(size.users)
    for start in range(0, size.users, _BLOCK):
        stop = min(start + _BLOCK, size.users)
        share[start:stop] = np.exp(_SPREAD * keyed.normal(("synth-activity", size.seed), start, stop - start))
    room = size.items // 2 - FEWEST

    def above(scale: float) -> np.ndarray:
        return np.minimum(share * scale, room).astype(np.int64)

    spare = size.edges - FEWEST * size.users
    low, high = 0.0, 1.0
    while above(high).sum() < spare:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle).sum() <= spare else (low, middle)
    count = above(low)
    while left := spare - int(count.sum()):  # equal shares, or what rounding left over
        count[np.flatnonzero(count < room)[:left]] += 1
    return count + FEWEST


def _write_interactions(
    folder: Folder, files: dict[str, FileEntry], size: GraphSize, ranked: np.ndarray, block: int
) -> dict[str, int]:
    """Write the parts of all splits; return the number of rows of each split."""
    degree = degrees(size)
    splits = [parts.Parts(folder, f"interactions/{name}", parts.ROWS_PER_PART) for name in SPLITS]
    total = np.zeros(len(SPLITS), np.int64)
    for first, offset, count in _blocks(degree, block):
        item = _chosen(size, ranked, first, offset, count)
        user = np.repeat(np.arange(first, first + len(count), dtype=np.int32), count)
        seconds = (keyed.uniform(("synth-time", size.seed), offset, len(user)) * _SPAN).astype(np.int64)
        seconds += (user - first).astype(np.int64) * _SPAN
        seconds.sort()  # sorts within each user
        time = _START + seconds % _SPAN
        held = np.maximum(count // 10, 1)
        sizes = np.stack([count - 2 * held, held, held], 1)
        label = np.repeat(np.tile(np.arange(3, dtype=np.int8), len(count)), sizes.reshape(-1))
        for number, rows in enumerate(splits):
            here = label == number
            rows.add(pa.table({"user": user[here], "item": item[here], "timestamp": time[here]}))
        total += sizes.sum(0)
    for rows in splits:
        files |= rows.close()
    return dict(zip(SPLITS, total.tolist(), strict=True))


def _blocks(degree: np.ndarray, block: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Blocks of consecutive users with about `block` interactions: first user, interactions before it, degrees."""
    ends = np.cumsum(degree)
    first = 0
    while first < len(degree):
        offset = int(ends[first - 1]) if first else 0
        stop = max(first + 1, int(np.searchsorted(ends, offset + block, "right")))
        yield first, offset, degree[first:stop]
        first = stop


def _chosen(size: GraphSize, ranked: np.ndarray, first: int, offset: int, count: np.ndarray) -> np.ndarray:
    """An item for each interaction, `[interactions]` int32, all different within a user.

    Args:
        size: the dataset's sizes.
        ranked: the item of each popularity rank, `[items]`.
        first: first user of the block.
        offset: number of interactions before that user.
        count: numbers of interactions of the block's users, `[users]`.
    """
    total = int(count.sum())
    owner = np.repeat(np.arange(len(count)), count)
    draws = keyed.integers(("synth-taste", size.seed), first * len(_TASTES), len(count) * len(_TASTES), size.clusters)
    tastes = draws.reshape(len(count), len(_TASTES))
    item = np.full(total, -1, np.int64)
    taken = np.empty(0, np.int64)  # ascending user * items + item
    left = np.arange(total)
    for attempt in range(_ATTEMPTS):
        draw = keyed.uniform(("synth-item", size.seed, attempt), 2 * offset, 2 * total).reshape(total, 2)[left]
        choice = ranked[_ranks(size, draw, tastes[owner[left]] if attempt < _TASTEFUL else None)]
        pair, at = np.unique(owner[left] * size.items + choice, return_index=True)
        new = taken[np.minimum(np.searchsorted(taken, pair), len(taken) - 1)] != pair if len(taken) else at >= 0
        item[left[at[new]]] = choice[at[new]]
        taken = np.sort(np.concatenate([taken, pair[new]]), kind="stable")
        left = left[item[left] < 0]
        if not len(left):
            return item.astype(np.int32)
    for user in np.unique(owner[left]).tolist():  # this user has most popular items already: take any others
        mine = slice(*np.searchsorted(taken, [user * size.items, (user + 1) * size.items]))
        free = np.ones(size.items, bool)
        free[taken[mine] - user * size.items] = False
        rest = left[owner[left] == user]
        order = keyed.uniform(("synth-rest", size.seed, first + user), 0, size.items)
        order[~free] = np.inf
        item[rest] = np.argpartition(order, len(rest))[: len(rest)]
    return item.astype(np.int32)


def _ranks(size: GraphSize, draw: np.ndarray, tastes: np.ndarray | None) -> np.ndarray:
    """Turn uniform numbers `[draws, 2]` into popularity ranks `[draws]`: of any item, or of one in a preferred cluster.

    `tastes` `[draws, 3]` are the preferred clusters of each draw's user; None: draw from all items.
    """
    everywhere = _power_law(draw[:, 1], size.items, _SHIFT)
    if tastes is None:
        return everywhere
    which = np.searchsorted(np.array(_TASTES), draw[:, 0], "right")
    cluster = tastes[np.arange(len(draw)), np.minimum(which, len(_TASTES) - 1)]
    members = (size.items - 1 - cluster) // size.clusters + 1
    inside = cluster + size.clusters * _power_law(draw[:, 1], members, _SHIFT / size.clusters)
    return np.where(which < len(_TASTES), inside, everywhere)


def _power_law(uniform: np.ndarray, count: int | np.ndarray, shift: float) -> np.ndarray:
    """Draw integers r below `count` with a density of (r + shift) ** -exponent, by inverting its integral."""
    power = 1 - _EXPONENT
    low, high = shift**power, (count + shift) ** power
    drawn = ((low + uniform * (high - low)) ** (1 / power) - shift).astype(np.int64)
    return np.clip(drawn, 0, count - 1)


def _write_feature(
    folder: Folder, files: dict[str, FileEntry], size: GraphSize, name: str, width: int, cluster: np.ndarray
) -> FeatureEntry:
    """Write one feature set: a vector is its cluster's vector plus noise, with entries of about `width ** -0.5`."""
    centres = keyed.normal(("synth-centre", size.seed, name), 0, size.clusters * width).reshape(-1, width)
    centres = centres.astype(np.float32)
    # Parts are sized by float32, in which they are generated.
    out = parts.Parts(folder, f"features/{name}", parts.items_per_part(4 * width))
    amplitude = 12**0.5 * _NOISE[name]
    for start in range(0, size.items, out.rows):
        stop = min(start + out.rows, size.items)
        values = keyed.uniform_rows(("synth-vector", size.seed, name), range(start, stop), width)
        values = (values - np.float32(0.5)) * np.float32(amplitude)
        values += centres[cluster[start:stop]]
        values *= np.float32(width**-0.5)
        out.add(vector_table(start, values.astype(np.float16), np.zeros(stop - start, bool)))
    files |= out.close()
    return FeatureEntry(width=width, dtype="float16", missing=0, source="synthetic", parts=list(out.files))
