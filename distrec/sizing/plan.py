"""What a run needs, before it runs."""

from __future__ import annotations

from distrec.config.run import RunConfig
from distrec.data.dataset import Dataset
from distrec.methods.registry import build_method, resolve
from distrec.training.size import least_bytes

_PROCESS = 1 << 30


def worker_bytes(config: RunConfig) -> int:
    """The predicted peak memory of the hungriest worker in bytes, at the smallest number of workers of the config.

    Raises:
        InputError: the config is invalid, or its dataset does not exist or lacks what the method reads.
    """
    config = resolve(config)
    data = Dataset.open(config.data)
    parts = least_bytes(config, data, build_method(config, data))
    return _PROCESS + 2 * sum(parts.values()) // max(config.train.least_workers, 1)
