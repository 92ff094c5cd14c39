"""ODMT's fixture: names, settings, and the comparisons with their tolerances. Its second run has tied CLS features."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from distrec.config.run import RunConfig
from distrec.data.dataset import Dataset
from distrec.data.histories import PADDING
from distrec.data.sampling import Windows
from distrec.evaluation.ranking import Evaluator
from distrec.methods.batch import WindowBatch
from distrec.methods.distillation import corrected_scores, distilled_softmax
from distrec.methods.odmt import ODMT, Read, distillation_weight
from distrec.tables.features import TokenBlock
from distrec.training.engine import Engine
from tests.oracle.common import set_table
from tests.oracle.compare import Row, absolute, of_largest, relative, trained
from tests.oracle.fixture import Fixture, Pairs, adam, run_config, write
from tests.oracle.gather import dense_gradients, table_gradients, table_weights

FURTHER_RUNS = ("tied",)
MASKED = -1e4
THEIRS = {"id": "id", "text": "te", "image": "im"}
_NAMES = [
    (r"^(id|text|image)_proj\.", r"project.\1."),
    (r"^(id|t|v)_dnns\.", r"nets.\1."),
    (r"^(id|t|v)_user_encoder\.transformer_encoder\.", r"users.\1."),
    (r"^(nets|users)\.t\.", r"\1.text."),
    (r"^(nets|users)\.v\.", r"\1.image."),
    (r"^IMT\.", "imt."),
    (r"transformer_blocks\.", "blocks."),
    (r"multi_head_attention\.layer_norm\.", "attention_norm."),
    (r"feed_forward\.layer_norm\.", "feed_norm."),
    (r"multi_head_attention\.w_Q", "attention.query"),
    (r"multi_head_attention\.w_K", "attention.key"),
    (r"multi_head_attention\.w_V", "attention.value"),
    (r"multi_head_attention\.fc", "attention.out"),
    (r"feed_forward\.w_1", "inner"),
    (r"feed_forward\.w_2", "outer"),
    (r"position_embedding\.weight$", "positions"),
    (r"layer_norm\.", "norm."),
]


def ours(name: str) -> str:
    """Our name for a dense parameter."""
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def dataset(fixture: Fixture, folder: Path) -> Dataset:
    train = fixture["data/train_sequences"]
    users, length = train.shape
    row, column = train.nonzero()
    splits: dict[str, Pairs] = {"train": (row, train[row, column] - 1, column.astype(np.int64))}
    for number, split in enumerate(("valid", "test")):
        last = fixture[f"data/{split}_sequences"][:, -1]
        splits[split] = (np.arange(users), last - 1, np.full(users, length + number, np.int64))
    tokens = {}
    for name in ("text", "image"):
        values, mask = _tokens(fixture, name)
        tokens[f"{name}-tokens"] = (np.where(mask[..., None], values, 0), mask.sum(1))
    return write(folder, users, int(fixture["data/n_items"]), splits, {}, tokens)


def config(fixture: Fixture, zero_stage: int) -> RunConfig:
    h = fixture.hparam
    method = {
        "name": "odmt",
        "dim": h("embedding_dim"),
        "id_dim": h("id_embedding_dim"),
        "init": h("init"),
        "tie_cls_feature": h("init") in (2, 3),
        "length": h("max_seq_len"),
        "merged_att_layers": h("merged_att_layers"),
        "version": "v1" if h("version") == "v1" else "v3",
        "user_layers": h("transformer_block"),
        "user_heads": h("num_attention_heads"),
        "dropout": h("drop_rate"),
        "tau": h("tau"),
        "alpha": h("alpha"),
    }
    optimizer = adam(fixture) | {"name": "adamw", "clip_norm": h("clip_norm")}
    return run_config(method, optimizer, len(fixture["batch/0/ids"]), zero_stage)


def replay(fixture: Fixture, engine: Engine) -> list[Row]:
    """Repeat the recorded run. Collective; the rows are the same on every rank."""
    h, lr, decay = fixture.hparam, engine.config.optimizer.lr, engine.config.optimizer.weight_decay
    report = [*_inputs(fixture, engine), *_start(fixture, engine)]
    every, norms = [], []
    for step in range(h("steps")):
        epoch, samples = h("epoch") - 1, _windows(fixture, step)
        if step == 0:
            report += _outputs(fixture, engine, engine.batches(epoch, step, samples)[0])
        terms, _ = engine.forward_backward(epoch, step, samples)
        every.append(terms)
        if step == 0:
            report += _gradients(fixture, engine)
        engine.update()
        norms.append(engine.grad_norm)
    report += _losses(fixture, every)
    report.append(relative("out/grad_norm_steps", np.array(norms), fixture["out/grad_norm_steps"], 2e-5))
    # The row of the padding is never read, but weight decay changes it in the published program.
    padding = fixture["init/id_encoder.weight"][:1] * (1 - lr * decay) ** h("steps")
    table = table_weights(engine, {"item": "item"})["item"]
    found = {name: np.asarray(x) for name, x in engine.dense.state().items()}
    for name in fixture.keys("after"):
        mine = np.concatenate([padding, table]) if name == "id_encoder.weight" else found[f"{ours(name)}.weight"]
        report += trained(f"after/{name}", mine, fixture[f"after/{name}"], 1e-5, lr)
    return report + _after(fixture, engine, table)


def _method(engine: Engine) -> ODMT:
    assert isinstance(engine.method, ODMT)
    return engine.method


def _tokens(fixture: Fixture, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A modality's tokens and which of them are real, without the padding item."""
    values = fixture[f"data/{name}_tokens"][1:]
    mask = fixture["data/text_mask"][1:] > 0 if name == "text" else np.ones(values.shape[:2], bool)
    return values, mask


def _windows(fixture: Fixture, step: int) -> Windows:
    items = fixture[f"batch/{step}/ids"] - 1  # the padding, 0 there, is -1 here
    assert PADDING == -1
    return Windows(np.arange(len(items)), items, np.empty(0, np.int64))


def _inputs(fixture: Fixture, engine: Engine) -> list[Row]:
    """Compare what is computed from the data: windows, popularity, the table's start (half precision), the ramp."""
    method, users, length = _method(engine), np.arange(engine.space.users.total), fixture.hparam("max_seq_len")
    rows = []
    for split in ("valid", "test"):
        newest = engine.histories(split).newest(users, length) + 1  # type: ignore[arg-type]
        wanted = fixture[f"data/{split}_sequences"][:, :-1]
        rows.append(absolute(f"data/{split}_sequences", newest, wanted, 0))
    train = engine.histories("valid").newest(users, length + 1) + 1
    rows.append(absolute("data/train_sequences", train, fixture["data/train_sequences"], 0))
    popularity = fixture["data/popularity"][1:]
    found = np.where(popularity > 0, method.log_popularity.exp().numpy(), 0)
    rows.append(absolute("data/popularity", found, popularity, 1e-7))
    if fixture.hparam("init"):
        start = table_weights(engine, {"item": "item"})["item"]
        rows.append(of_largest("init/id_encoder.weight", start, fixture["init/id_encoder.weight"][1:], 2**-11))
    weight = distillation_weight(fixture.hparam("alpha"), fixture.hparam("epoch"))
    return [*rows, absolute("hparams/distill_weight", np.array(weight), fixture["hparams/distill_weight"], 1e-12)]


def _start(fixture: Fixture, engine: Engine) -> list[Row]:
    """Set the weights, and set tokens in float32, which ours keep in half precision."""
    method, items, rank = _method(engine), engine.space.items, engine.world.rank
    mine = slice(items.start(rank), items.stop(rank))
    for name in ("text", "image"):
        values, mask = (torch.from_numpy(x[mine].copy()) for x in _tokens(fixture, name))
        setattr(method, name, TokenBlock(values, mask))
    set_table(engine, "item", fixture["init/id_encoder.weight"][1:])
    untrained = set(fixture["nograd"].tolist())
    names = {ours(name): name for name in fixture.keys("init") if name != "id_encoder.weight" and name not in untrained}
    known = {name.removesuffix(".weight") for name in engine.dense.state() if ".exp_avg" not in name}
    for mine_, theirs in names.items():
        engine.dense.set_weight(mine_, torch.from_numpy(fixture[f"init/{theirs}"]))
    return [Row("nograd", float(len(known ^ names.keys())), 0.0, "names trained on one side only")]


def _outputs(fixture: Fixture, engine: Engine, batch: WindowBatch) -> list[Row]:
    """Vectors, logits and unweighted terms of the first batch, with the initial weights."""
    method, world = _method(engine), engine.world
    with torch.no_grad():
        engine.dense.train(True)
        read = method.read(batch)
        rows, columns = world.gather_rows(read.users, read.targets.counts), read.columns
        parts = read.candidates, read.user, read.label
        corrected = corrected_scores(read.users, columns, read.candidates)
        scores = [world.gather_rows(_slots(batch, read, score), read.targets.counts) for score in corrected]
        sums = world.sum_(distilled_softmax(read.users, columns, *parts, method.config.tau).double())
    real, known = batch.windows != PADDING, fixture["batch/0/log_mask"] > 0
    found = {"label_slots": (world.gather_rows(_label_slots(batch, read), read.targets.counts), ..., 0.0)}
    for place, (name, part) in enumerate(method.branches().items()):
        found[f"item_{name}"] = (columns[read.column][real][:, part], real.numpy(), 1e-5)
        found[f"user_{name}"] = (rows[:, part], known, 1e-5)
        found[f"logits_{name}"] = (scores[place], ..., 1e-5)
    # The second run has recorded only some of them.
    report = [
        absolute(f"out/{key}", value.numpy(), fixture[f"out/{key}"][where], tolerance)
        for key, (value, where, tolerance) in found.items()
        if f"out/{key}" in fixture
    ]
    terms = (sums / sum(read.targets.counts)).numpy().reshape(2, -1)
    for key, mine in zip(("loss_ce_terms", "loss_kd_terms_unweighted"), terms, strict=True):
        if f"out/{key}" in fixture:
            report.append(relative(f"out/{key}", mine, fixture[f"out/{key}"], 1e-6))
    return report


def _label_slots(batch: WindowBatch, read: Read) -> torch.Tensor:
    """The place of each of my rows' next item in the flattened windows of the whole batch."""
    places = batch.real[:, :-1].nonzero()
    return batch.numbers[places[:, 0]] * batch.windows.shape[1] + places[:, 1] + 1


def _slots(batch: WindowBatch, read: Read, score: torch.Tensor) -> torch.Tensor:
    """Scores with the columns of the published program: one for each place, with masked ones set to a constant."""
    column, labels = read.column.flatten(), _label_slots(batch, read)
    weights = read.candidates.log_weights(read.user, read.label)
    place = torch.arange(len(column))
    seen = (batch.windows.flatten() != PADDING) & weights[:, column].isfinite()
    seen &= (column != read.label.unsqueeze(1)) | (place == labels.unsqueeze(1))
    return score[:, column].where(seen, MASKED)


def _losses(fixture: Fixture, every: list[dict[str, float]]) -> list[Row]:
    ce = np.array([sum(value for term, value in terms.items() if term != "kd") for terms in every])
    kd = np.array([terms.get("kd", 0.0) for terms in every])
    first = {"loss_ce": ce[0], "loss_kd": kd[0], "loss_total": ce[0] + kd[0]}
    rows = [relative(f"out/{key}", np.array(found), fixture[f"out/{key}"], 1e-6) for key, found in first.items()]
    steps = {"loss_ce_steps": ce, "loss_kd_steps": kd, "loss_steps": ce + kd}
    return rows + [relative(f"out/{key}", found, fixture[f"out/{key}"], 2e-5) for key, found in steps.items()]


def _gradients(fixture: Fixture, engine: Engine) -> list[Row]:
    if not fixture.keys("grad"):
        return []
    found, table = dense_gradients(engine), table_gradients(engine, {"item": "item"})["item"]
    mine = {
        name: np.concatenate([np.zeros_like(table[:1]), table]) if name == "id_encoder.weight" else found[ours(name)]
        for name in fixture.keys("grad")
    }
    return [of_largest(f"grad/{name}", grad, fixture[f"grad/{name}"], 1e-5) for name, grad in mine.items()]


def _after(fixture: Fixture, engine: Engine, table: np.ndarray) -> list[Row]:
    """Item vectors and rankings with the weights after the last step, and how far the tied features moved."""
    method, space, ks = _method(engine), engine.space, [10, engine.space.items.total]
    final, rows = engine.representations("valid"), []
    items = engine.world.gather_blocks(final.items, space.items).numpy()
    for name, part in method.branches().items():
        if f"out/item_all_after_{name}" in fixture:
            wanted = fixture[f"out/item_all_after_{name}"][1:]
            rows.append(absolute(f"out/item_all_after_{name}", items[:, part], wanted, 1e-4))
    for number, name in ((2, "image"), (3, "text")):
        tied = method.config.tie_cls_feature and method.config.init == number
        drift = np.abs(table - _tokens(fixture, name)[0][:, 0]).max() if tied else 0.0
        rows.append(absolute(f"out/cls_drift_{name}", np.array(drift), fixture[f"out/cls_drift_{name}"], 1e-5))
    for split in ("valid", "test"):
        final = engine.representations(split)  # type: ignore[arg-type]
        held_out = space.data.interactions(split)  # type: ignore[arg-type]
        masked = [engine.train_rows, *([space.data.interactions("valid")] if split == "test" else [])]
        evaluator = Evaluator(engine.world, space.users, space.items, held_out, masked, ks)
        for name, part in {"fused": slice(None), **method.branches()}.items():
            ranked = evaluator.rank(final.users[:, part].contiguous(), final.items[:, part].contiguous(), method.score)
            metrics = ranked.metrics()
            if name == "fused":
                key = f"metrics/{split}_ranks"
                rows.append(absolute(key, ranked.rank + 1, fixture[key], 0))
            for metric in ("hit@10", "ndcg@10"):
                key = f"metrics/{split}_{metric}_{THEIRS.get(name, 'fu')}"
                rows.append(absolute(key, np.array(metrics[metric]), fixture[key], 1e-6))
    return rows
