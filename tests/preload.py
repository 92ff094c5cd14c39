"""What the server imports that `tests.distributed` forks workers from.

A module of its own, because the server drops an error in what it preloads without a word: `tests/test_distributed.py`
asks a worker whether this one was loaded.
"""

from importlib import import_module

from distrec.runtime import quiet

LOADED = ("torchrec", "deepspeed", "distrec.training.loop", "distrec.training.launch")

quiet()  # before the libraries, some of which speak while they are imported
for name in LOADED:
    import_module(name)
