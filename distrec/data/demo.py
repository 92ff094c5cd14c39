"""`distrec demo-data`: generate a small shop. Its customers have hidden tastes for what pictures and texts show.

The shop has 2,000 users, 1,000 items and 40,000 interactions; the same seed gives the same bytes. At each time, a user
chooses item i, among the items on sale that the user has not chosen yet, with a probability proportional to
`exp(popularity_i + sum of the user's tastes for i's values)`. This probability is known, hence also the best possible
ranking: `oracle.json` holds its metrics. Some items go on sale late. They have few or no training interactions, so only
their content shows who will like them.

Train comes before valid, and valid before test, in time. Every item is on sale before the first valid interaction, so
the choice probability alone determines both held-out splits.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from distrec.data import keyed
from distrec.data.demo_items import ATTRIBUTES, VALUES, describe, picture
from distrec.data.manifest import COLD
from distrec.data.storage import open_folder
from distrec.errors import InputError

USERS, ITEMS, INTERACTIONS = 2_000, 1_000, 40_000
KS = (5, 10, 20, 50)

# Standard deviations over users.
_TASTE = {"shape": 0.9, "colour": 1.2, "pattern": 0.9, "material": 1.1, "occasion": 1.1}
_POPULARITY = 0.7
_NEW_ITEMS = 240  # a quarter of them goes on sale at the very end of the training period
_NO_PICTURE, _NO_DESCRIPTION = 40, 60
_START, _DAY = 1_704_067_200, 86_400  # 2024-01-01 UTC
_TRAIN_DAYS, _VALID_DAYS, _TEST_DAYS = 300, 30, 30


def write_demo(out: str, seed: int = 7) -> None:
    """Write the demo shop's raw files: `interactions.csv`, `items.csv`, `images/`, `oracle.json`.

    Args:
        out: a folder or `s3://` prefix.
        seed: determines the shop.

    Raises:
        InputError: `out` is a file or lies below one.
    """
    values = attributes(seed)
    utility = utilities(seed)
    user, item, time, split = _interactions(utility, seed)

    folder = open_folder(out)
    if file := folder.in_the_way():
        raise InputError(f"option '--out' is '{out}', which is not a folder, since '{file}' is a file; give a folder.")
    folder.make()
    order = np.lexsort((item, user, time))
    names = ("train", "valid", "test")
    rows = [(_user(user[at]), _item(item[at]), int(time[at]), names[split[at]]) for at in order]
    folder.write_bytes(_csv(("user", "item", "timestamp", "split"), rows), "interactions.csv")

    lacking = keyed.permutation(("demo-lacking", seed), ITEMS)
    no_picture = set(lacking[:_NO_PICTURE].tolist())
    no_description = set(lacking[_NO_PICTURE : _NO_PICTURE + _NO_DESCRIPTION].tolist())
    catalogue = []
    for index in range(ITEMS):
        mine = {name: VALUES[name][values[name][index]] for name in ATTRIBUTES}
        title, description = describe(mine, seed, index)
        file = "" if index in no_picture else f"{_item(index)}.jpg"
        if file:
            folder.write_bytes(picture(mine, seed, index), "images", file)
        catalogue.append((_item(index), title, "" if index in no_description else description, file))
    folder.write_bytes(_csv(("item", "title", "description", "image"), catalogue), "items.csv")
    folder.write_json(_oracle(utility, user, item, split), "oracle.json")


def _user(index: int) -> str:
    return f"u{index:04d}"


def _item(index: int) -> str:
    return f"i{index:04d}"


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return sink.getvalue().encode()


def attributes(seed: int) -> dict[str, np.ndarray]:
    """The hidden value of each attribute of every item, `[items]`, as an index into `VALUES`."""
    return {name: keyed.integers(("demo-value", seed, name), 0, ITEMS, len(VALUES[name])) for name in ATTRIBUTES}


def utilities(seed: int) -> np.ndarray:
    """Log of the unnormalised choice probability, `[users, items]`: popularity plus tastes for the item's values."""
    values = attributes(seed)
    utility = np.tile(_POPULARITY * keyed.normal(("demo-popularity", seed), 0, ITEMS), (USERS, 1))
    for name, spread in _TASTE.items():
        width = len(VALUES[name])
        taste = spread * keyed.normal(("demo-taste", seed, name), 0, USERS * width).reshape(USERS, width)
        utility += taste[:, values[name]]
    return utility


def _activity(seed: int) -> np.ndarray:
    """Number of interactions of each user, `[users]`: at least 8, with a long tail and a sum of 40,000."""
    share = np.exp(0.7 * keyed.normal(("demo-activity", seed), 0, USERS))
    spare = INTERACTIONS - 8 * USERS
    count = np.floor(share * (spare / share.sum())).astype(np.int64)
    count[np.argsort(-share, kind="stable")[: spare - count.sum()]] += 1
    return count + 8


def _interactions(utility: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """User, item, timestamp and split (0 train, 1 valid, 2 test) of every interaction, user by user in time order."""
    new = keyed.permutation(("demo-new", seed), ITEMS)[:_NEW_ITEMS]
    launch = np.zeros(ITEMS)
    launch[new] = _TRAIN_DAYS * (0.7 + 0.4 * keyed.uniform(("demo-launch", seed), 0, _NEW_ITEMS)).clip(max=1.0)
    counts = _activity(seed)
    users, items, times, splits = [], [], [], []
    for user, count in enumerate(counts.tolist()):
        held = max(int(0.2 * count), 2)
        sizes = (count - held, held // 2, held - held // 2)
        split = np.repeat((0, 1, 2), sizes)
        start = np.array((0, _TRAIN_DAYS, _TRAIN_DAYS + _VALID_DAYS))[split]
        length = np.array((_TRAIN_DAYS, _VALID_DAYS, _TEST_DAYS))[split]
        day = np.sort(start + length * keyed.uniform(("demo-time", seed, user), 0, count))
        # The largest of utility + Gumbel noise is a draw with probability proportional to exp(utility).
        noise = keyed.uniform(("demo-choice", seed, user), 0, count * ITEMS).reshape(count, ITEMS)
        score = utility[user] - np.log(-np.log1p(noise - 1 + 2**-54))
        taken = np.zeros(ITEMS, bool)
        for at in range(count):
            choice = int(np.where(taken | (launch > day[at]), -np.inf, score[at]).argmax())
            taken[choice] = True
            items.append(choice)
        users.append(np.full(count, user))
        times.append(_START + np.floor(day * _DAY).astype(np.int64))
        splits.append(split)
    return np.concatenate(users), np.array(items), np.concatenate(times), np.concatenate(splits)


def _oracle(utility: np.ndarray, user: np.ndarray, item: np.ndarray, split: np.ndarray) -> dict[str, Any]:
    """Metrics of the best possible rankings on valid and test, with training items masked."""
    chance = np.exp(utility - utility.max(1, keepdims=True))
    chance /= chance.sum(1, keepdims=True)
    same_for_all = np.broadcast_to(chance.mean(0), chance.shape)
    train = np.zeros(utility.shape, bool)
    train[user[split == 0], item[split == 0]] = True
    cold = train.sum(0) <= COLD
    report: dict[str, Any] = {
        "about": {
            "oracle": "items ranked by the true choice probability of the user (tastes and popularity)",
            "popularity": "items ranked by the mean choice probability over users: the best ranking without taste",
            "cold": f"only held-out items with at most {COLD} training interactions count; all items are ranked",
            "protocol": "full ranking, training items masked, mean over users with a held-out item",
        },
        "cold_items": int(cold.sum()),
        "items_without_training": int((train.sum(0) == 0).sum()),
    }
    for number, name in ((1, "valid"), (2, "test")):
        held = np.zeros(utility.shape, bool)
        held[user[split == number], item[split == number]] = True
        report[name] = {
            "oracle": _metrics(chance, train, held),
            "popularity": _metrics(same_for_all, train, held),
            "oracle_cold": _metrics(chance, train, held & cold),
            "popularity_cold": _metrics(same_for_all, train, held & cold),
        }
    return report


def _metrics(scores: np.ndarray, train: np.ndarray, held: np.ndarray) -> dict[str, float]:
    """Recall@K and NDCG@K of a full ranking with training items masked; ties go to the smaller item index."""
    length = held.sum(1)
    some = length > 0
    ranked = np.argsort(np.where(train, np.inf, -scores)[some], axis=1, kind="stable")[:, : max(KS)]
    hits = np.take_along_axis(held[some], ranked, axis=1)
    discount = 1 / np.log2(np.arange(2, max(KS) + 2))
    ideal = np.cumsum(discount)
    result = {}
    for k in KS:
        result[f"recall@{k}"] = round(float((hits[:, :k].sum(1) / length[some]).mean()), 6)
        best = ideal[np.minimum(length[some], k) - 1]
        result[f"ndcg@{k}"] = round(float((hits[:, :k] @ discount[:k] / best).mean()), 6)
    return result
