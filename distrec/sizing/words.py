"""`distrec plan` as text: a table with a column per number of workers, and what to do if a machine is too small."""

from __future__ import annotations

import re
from collections.abc import Sequence

from distrec.config.run import RunConfig
from distrec.errors import InputError, shown
from distrec.sizing.plan import Needs

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("KMGT", 1)}
_REMEDY = {
    "tables": "lower the method's widths",
    "moments of tables": "lower the method's widths",
    "gradients of tables": "lower the method's widths",
    "interactions": "prepare fewer interactions, since every worker holds all of them",
    "order of the epoch": "prepare fewer interactions, since every worker holds the order of all of them",
    "histories": "prepare fewer interactions, since every worker holds all histories",
    "graphs": "lower the number of neighbours, or prepare fewer interactions",
    "features and other arrays of the method": "encode into narrower vectors or fewer tokens",
    "dense module": "raise 'dense.zero_stage', or lower the method's widths and layers",
    "evaluation": "hold out fewer interactions",
    "checkpoint being written": "use a local 'run.storage', or lower the method's widths",
}
_BATCH = (
    "lower 'train.global_batch', raise 'train.accumulate' if the method can, or set 'dense.activation_checkpointing'"
)


def bytes_of(text: str) -> int:
    """The bytes that a quantity such as 16Gi, 16G or 17179869184 means, written as in Kubernetes.

    Raises:
        InputError: it is no such quantity, or less than one byte.
    """
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)([kKMGT]i?|)", text)
    unit = _UNITS.get(found[2]) if found else None
    size = int(float(found[1]) * unit) if found and unit else 0
    if size < 1:
        raise InputError(f"option '--machine-memory' is {shown(text)}; give a quantity such as 16Gi or 16G.")
    return size


def plan_text(plans: Sequence[Needs], config: RunConfig, rate: float, machine: int | None, probed: bool) -> str:
    """The plans as a readable table.

    Args:
        plans: one for each number of workers.
        config: the run config.
        rate: of the storage, in MB/s.
        machine: bytes of memory of a machine; None: not asked.
        probed: whether steps were measured long enough to say how long an epoch takes.
    """
    share = plans[0].share
    how = "with this dataset"
    if share < 1:
        how = f"with random data of 1/{1 / share:.0f} and 1/{2 / share:.0f} of this dataset's size; all is extrapolated"
    rows: list[tuple[str, list[str]]] = [("", [_workers(plan) for plan in plans])]
    rows.append(("held between steps", [""] * len(plans)))
    names = dict.fromkeys(name for plan in plans for name in plan.held)
    for name in sorted(names, key=lambda name: -max(plan.held.get(name, 0) for plan in plans)):
        rows.append((f"  {name}", [_size(plan.held.get(name, 0)) for plan in plans]))
    rows.append(("resident at most, up to the end of", [""] * len(plans)))
    phases = dict.fromkeys(name for plan in plans for name in plan.phases)
    what = {"process": "imports", "steps": "first steps", "test": "ranking at the end"}
    rows += [(f"  {what.get(name, name)}", [_size(plan.phases[name]) for plan in plans]) for name in phases]
    rows.append(("PEAK OF A WORKER", [_size(plan.peak) for plan in plans]))
    rows.append(("received per step", [_size(plan.received) for plan in plans]))
    rows.append(("checkpoint", [_size(plan.checkpoint) for plan in plans]))
    rows.append((f"  seconds at {rate:g} MB/s", [f"{plan.checkpoint / rate / 1e6:.1f}" for plan in plans]))
    rows.append(("steps per epoch", [f"{plan.steps:,}" for plan in plans]))
    if probed:
        rows.append(("seconds per step, without waiting", [f"{plan.step_seconds:.3g}" for plan in plans]))
        rows.append(("hours per epoch, without waiting", [f"{plan.epoch_hours:.3g}" for plan in plans]))
    if machine is not None:
        rows.append((f"workers per machine of {_size(machine)}", [f"{per_machine(plan, machine)}" for plan in plans]))
        rows.append(("machines", [str(machines(plan, machine) or "does not fit") for plan in plans]))
    first = max(len(name) for name, _ in rows)
    width = max(len(cell) for _, cells in rows for cell in cells)
    lines = [f"{config.method['name']} on {config.data}: memory of the worker that needs the most, rehearsed {how}"]
    lines += [f"  {name:<{first}}  {'  '.join(f'{cell:>{width}}' for cell in cells)}".rstrip() for name, cells in rows]
    if machine is not None and not per_machine(plans[-1], machine):
        lines.append(f"  to fit: {remedy(plans[-1])}.")
    return "\n".join(lines)


def per_machine(plan: Needs, machine: int) -> int:
    """How many of the workers fit into a machine with `machine` bytes of memory."""
    return min(machine // plan.peak, plan.processes)


def machines(plan: Needs, machine: int) -> int:
    """How many machines with `machine` bytes of memory hold all workers; 0 if not even one worker fits."""
    fitting = per_machine(plan, machine)
    return -(-plan.processes // fitting) if fitting else 0


def remedy(plan: Needs) -> str:
    """What lowers a worker's peak: it depends on whether what it holds or what it does for a while takes the most."""
    largest = max(plan.held, key=lambda name: plan.held[name])
    doing = plan.peak - plan.phases["process"] - sum(plan.held.values())
    if doing > plan.held[largest]:
        built = plan.phases["build"]
        if plan.peak - built > built - plan.phases["process"]:
            return f"most is needed while a step runs: {_BATCH}; or use more workers or larger machines"
        return "most is needed while graphs and features are built: use more workers or larger machines"
    what = _REMEDY.get(largest, "use more workers")
    return f"most is held for {largest}: {what}; or use more workers or larger machines"


def _workers(plan: Needs) -> str:
    return f"{plan.workers} worker{'' if plan.workers == 1 else 's'}" if plan.workers else "no workers"


def _size(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}" if count < 10 * size else f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
