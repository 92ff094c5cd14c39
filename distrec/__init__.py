"""distrec: multimodal recommenders trained at any size.

`distrec.train(config)` is `distrec train CONFIG` from Python.
"""

from typing import Any

__all__ = ["train"]


def __getattr__(name: str) -> Any:
    if name == "train":  # on first use: importing distrec stays quick and imports no torch
        from distrec.training.launch import train

        return train
    raise AttributeError(f"module 'distrec' has no attribute '{name}'")
