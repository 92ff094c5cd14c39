from pathlib import Path
from typing import Any

import pytest
import yaml

from distrec.config import RunConfig, decode, digest, load_run
from distrec.errors import InputError

BASE: dict[str, Any] = {"data": "d", "run": {"name": "r"}, "method": {"name": "lightgcn"}}


def refused(tree: dict[str, Any]) -> str:
    with pytest.raises(InputError) as error:
        decode(RunConfig, BASE | tree)
    return str(error.value)


def test_only_data_run_name_and_method_are_required(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(BASE))
    config = load_run(file, ["train.seed=7", "optimizer.lr=5e-4", "optimizer.lr_decay={factor: 0.96, epochs: 50}"])
    assert (config.train.seed, config.optimizer.lr) == (7, 5e-4)
    assert decode(RunConfig, config.model_dump()) == config, "a resolved config reads back as itself"
    for key in BASE:
        with pytest.raises(InputError, match=f"key '{key}' is missing"):
            decode(RunConfig, {name: value for name, value in BASE.items() if name != key})


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"run": {"name": "a/b"}}, "run.name"),
        ({"run": {"name": ""}}, "run.name"),
        ({"run": {"name": "..x"}}, "run.name"),
        ({"train": {"workers": -1}}, "train.workers"),
        ({"train": {"workers": 1.5}}, "train.workers"),
        ({"train": {"global_batch": 0}}, "train.global_batch"),
        ({"train": {"seed": 2**63}}, "train.seed"),
        ({"train": {"metric": "recall20"}}, "train.metric"),
        ({"train": {"metric": "recall@0"}}, "train.metric"),
        ({"train": {"cpus_per_worker": 0}}, "train.cpus_per_worker"),
        ({"optimizer": {"name": "lamb"}}, "optimizer.name"),
        ({"optimizer": {"lr": 0}}, "optimizer.lr"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "optimizer.betas"),
        ({"optimizer": {"lr_decay": {"factor": 1.1, "epochs": 1}}}, "optimizer.lr_decay.factor"),
        ({"dense": {"zero_stage": 4}}, "dense.zero_stage"),
        ({"evaluate": {"mask": "all"}}, "evaluate.mask"),
        ({"evaluate": {"ks": [10, 5]}}, "evaluate.ks"),
        ({"evaluate": {"ks": [5, 5]}}, "evaluate.ks"),
        ({"evaluate": {"ks": [0]}}, "evaluate.ks"),
        ({"evaluate": {"ks": []}}, "evaluate.ks"),
        ({"evaluate": {"ks": [10**9]}}, "evaluate.ks"),
        ({"evaluate": {"ks": list(range(1, 102))}}, "evaluate.ks"),
        ({"train": {"metric": f"recall@{10**9}"}}, "train.metric"),
        ({"train": {"metric": "recall@" + "9" * 5000}}, "train.metric"),
        ({"train": {"workers": 10**9}}, "train.workers"),
        ({"train": {"threads": 10**8}}, "train.threads"),
        ({"train": {"cpus_per_worker": 1e9}}, "train.cpus_per_worker"),
        ({"train": {"global_batch": 10**12}}, "train.global_batch"),
        ({"train": {"accumulate": 10**9}}, "train.accumulate"),
        ({"train": {"epochs": 10**6}}, "train.epochs"),
        ({"train": {"checkpoint_every": 10**9}}, "train.checkpoint_every"),
        ({"run": {"name": "a" * 129}}, "run.name"),
    ],
)
def test_a_value_out_of_range_names_its_key(tree: dict[str, Any], key: str):
    told = refused(tree)
    assert told.startswith(f"key '{key}' is ")
    assert len(told) < 200


@pytest.mark.parametrize(("epoch", "factor"), [(0, 1.0), (25, 0.96**0.5), (50, 0.96), (75, 0.96**1.5)])
def test_the_learning_rate_decays_with_a_fractional_exponent(epoch: int, factor: float):
    optimizer = {"lr": 2e-3, "lr_decay": {"factor": 0.96, "epochs": 50}}
    assert decode(RunConfig, BASE | {"optimizer": optimizer}).optimizer.lr_at(epoch) == pytest.approx(2e-3 * factor)
    assert decode(RunConfig, BASE | {"optimizer": {"lr": 2e-3}}).optimizer.lr_at(epoch) == 2e-3


def test_identity_is_what_decides_the_trajectory():
    """Method, optimizer, seed, batch, data and ranking rule make a run; workers, ZeRO stage and epochs may change."""

    def identity(manifest: str = "m", **sections: Any) -> str:
        return digest(decode(RunConfig, BASE | sections).identity(manifest))

    same = identity()
    for section in (
        {"train": {"workers": 5, "epochs": 1, "threads": 3, "patience": 1, "checkpoint_every": 9, "accumulate": 2}},
        {"dense": {"zero_stage": 3, "activation_checkpointing": True}},
        {"evaluate": {"test": False}},
        {"data": "elsewhere"},
        {"run": {"name": "r", "storage": "s3://x"}},
    ):
        assert identity(**section) == same
    others = [
        identity(method={"name": "bprmf"}), identity(method={"name": "lightgcn", "dim": 32}), identity(manifest="n"),
        identity(train={"seed": 2}), identity(train={"global_batch": 7}), identity(optimizer={"lr": 1e-4}),
        identity(optimizer={"tables": "sparse"}), identity(optimizer={"clip_norm": 1.0}),
        identity(evaluate={"mask": "none"}), identity(evaluate={"ks": [20]}), identity(train={"metric": "ndcg@20"}),
        identity(dense={"precision": "bf16", "zero_stage": 1}),
    ]  # fmt: skip
    assert len({same, *others}) == 1 + len(others)


def test_digest_sees_values_not_the_order_of_keys():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 1.5}) != digest({"a": "1"})
