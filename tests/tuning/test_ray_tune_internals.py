"""What a new version of Ray Tune may change."""

from __future__ import annotations

import subprocess
import sys

import pytest
from ray import tune

from distrec.tuning.ray_tune_internals import keep_keys_out_of_runtime_environments

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def test_ray_tune_still_copies_keys_by_itself() -> None:
    """If this fails, the module is no longer needed."""
    code = "from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE as names; print(*names)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert set(KEYS) <= set(done.stdout.split())


def test_no_key_is_in_the_runtime_environment_of_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.tune.execution.class_cache import _ActorClassCache

    for name in KEYS:
        monkeypatch.setenv(name, "planted")
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "7")
    keep_keys_out_of_runtime_environments()
    actor = _ActorClassCache().get(type("Trainable", (tune.Trainable,), {}))
    variables = actor._default_options["runtime_env"]["env_vars"]
    assert variables["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "7"  # it is where they would be
    assert "planted" not in str(variables)
