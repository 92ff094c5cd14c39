"""The imports of the server process from which `tests.distributed` forks workers.

The server silently ignores errors in the modules that it preloads. `tests/test_distributed.py` therefore checks in a
worker that the libraries are loaded.
"""

from importlib import import_module

from distrec.runtime import quiet

LOADED = ("torchrec", "deepspeed", "distrec.training.loop", "distrec.training.launch")

quiet()  # before the libraries, since some of them log during import
for name in LOADED:
    import_module(name)
