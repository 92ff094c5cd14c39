"""The verb `distrec plan`."""

from __future__ import annotations

from collections.abc import Sequence
from json import dumps

from distrec.config.bounds import MOST_WORKERS, check_option
from distrec.config.run import load_run
from distrec.runtime import check_stack
from distrec.sizing.plan import plan, until_it_fits
from distrec.sizing.rehearsal import STEPS
from distrec.sizing.words import bytes_of, machines, per_machine, plan_text

PROBE = 20  # steps
_MOST_RATE = 1_000_000  # MB/s; the fastest parallel file systems write a few


def command(
    config: str,
    overrides: Sequence[str],
    workers: Sequence[int],
    machine_memory: str | None,
    storage_rate: int,
    probe: bool,
    json: bool,
) -> None:
    """Print what a run needs with each number of workers.

    Args:
        config: path of a run config.
        overrides: `dotted.key=value` settings.
        workers: numbers of workers; empty: those of the config.
        machine_memory: memory of a machine, as in Kubernetes; None: not asked. Without `workers`, more of them are
            tried until one fits.
        storage_rate: MB/s that the storage writes.
        probe: measure `PROBE` steps, and say how long an epoch takes.
        json: print JSON instead of a table.

    Raises:
        InputError: the config, its dataset or an option is invalid.
    """
    check_stack()
    for number in workers:
        check_option("workers", number, 0, MOST_WORKERS)
    check_option("storage-rate", storage_rate, 1, _MOST_RATE)
    machine = None if machine_memory is None else bytes_of(machine_memory)
    run = load_run(config, overrides)
    steps = PROBE if probe else STEPS
    plans = plan(run, workers, steps)
    if machine is not None and not workers:
        plans = until_it_fits(run, plans, machine, steps)
    if not json:
        print(plan_text(plans, run, storage_rate, machine, probe))
        return
    trees = []
    for found in plans:
        tree = found.tree() | {"checkpoint_seconds": found.checkpoint / storage_rate / 1e6}
        if machine is not None:
            tree |= {"workers_per_machine": per_machine(found, machine), "machines": machines(found, machine)}
        if not probe:
            del tree["step_seconds"], tree["epoch_hours"]
        trees.append(tree)
    print(dumps(trees, indent=2))
