"""The one use of Ray Tune's internals: something that it does and that no setting turns off.

`tests/tuning/test_ray_tune_internals.py` fails if a new version of Ray changes what this module relies on.
"""

from __future__ import annotations

from ray.tune.execution import class_cache


def keep_keys_out_of_runtime_environments() -> None:
    """Keep Ray Tune from copying this process's storage keys into the runtime environment of every trial.

    Ray writes runtime environments, in clear, to `runtime_env_agent.log` on every host that runs a trial, and every
    user of the host may read it. Trials do not need the copies: they find the keys where other workers do, in the
    environment of their node.

    Relies on the set `ENV_VARS_TO_PROPAGATE`, which Ray Tune reads when it starts a trial.
    """
    names = class_cache.ENV_VARS_TO_PROPAGATE
    names.difference_update([name for name in names if name.startswith("AWS_")])
