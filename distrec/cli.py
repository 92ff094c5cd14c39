"""`distrec <verb>`.

Exit status: 0 done, 1 failed, 2 bad input, 3 non-finite loss, 130 interrupted, 141 the reader of the output is gone.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence

from distrec.arguments import parse
from distrec.errors import (
    CLOSED_PIPE,
    DONE,
    FAILED,
    InputError,
    Interrupted,
    NonFiniteLoss,
    WorkersFailed,
    exit_status,
    shown,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit status."""
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()  # here, where a closed pipe can be handled
    except BrokenPipeError:
        if not _output_is_closed():
            traceback.print_exc()
            return FAILED
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE


def _run(arguments: Sequence[str] | None) -> int:
    parsed = parse(arguments)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, until training handles both
    try:
        return _VERBS[parsed.verb](parsed) or DONE
    except (InputError, Interrupted, NonFiniteLoss, KeyboardInterrupt) as error:
        print(f"distrec {parsed.verb}: {str(error) or 'interrupted'}", file=sys.stderr)
        return exit_status(error)
    except WorkersFailed as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(f"distrec {parsed.verb}: {error}", file=sys.stderr)
        return exit_status(error)
    except BrokenPipeError:
        raise
    except Exception as error:
        traceback.print_exc()
        return exit_status(error)


def _output_is_closed() -> bool:
    """Whether the reader of the standard output is gone, as in `distrec … | head`; another pipe may have broken."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # reports errors only
    return bool(poll.poll(0))


def _demo_data(arguments: argparse.Namespace) -> None:
    from distrec.data.demo import write_demo

    write_demo(arguments.out, arguments.seed)


def _synth_graph(arguments: argparse.Namespace) -> None:
    from distrec.data.synth import GraphSize, write_graph

    image = arguments.dim if arguments.image_dim is None else arguments.image_dim
    size = GraphSize(arguments.users, arguments.items, arguments.edges, arguments.dim, image, arguments.seed)
    write_graph(arguments.out, size)


def _prepare(arguments: argparse.Namespace) -> None:
    from distrec.data.prepare import prepare

    prepare(arguments.config, arguments.source, arguments.out, arguments.overrides)


def _check(arguments: argparse.Namespace) -> None:
    from distrec.data.check import check

    check(arguments.data)


def _encode(arguments: argparse.Namespace) -> None:
    from distrec.runtime import check_stack, quiet

    check_stack()
    quiet()
    from distrec.encoders.encode import encode

    options = {name: value for name, value in vars(arguments).items() if name not in ("verb", "data")}
    encode(arguments.data, **options)


def _train(arguments: argparse.Namespace) -> None:
    if arguments.print_config:
        from distrec.config import commented, load_run
        from distrec.methods.registry import METHODS, resolve

        config = resolve(load_run(arguments.config, arguments.overrides))
        print(commented(config, method=METHODS[config.method["name"]].Config), end="")
        return
    from distrec.training.display import summary_table
    from distrec.training.launch import train

    print(summary_table(train(arguments.config, arguments.overrides)))


def _plan(arguments: argparse.Namespace) -> None:
    from distrec.sizing.command import command

    options = {name: value for name, value in vars(arguments).items() if name not in ("verb",)}
    command(**options)


def _tune(arguments: argparse.Namespace) -> None:
    if arguments.print_config:
        from distrec.config import commented
        from distrec.tuning.entries import resolve_entries
        from distrec.tuning.sweep import load_sweep

        sweep = load_sweep(arguments.config, arguments.overrides)
        resolve_entries(sweep)  # refuses a sweep that could not start
        print(commented(sweep), end="")
        return
    from distrec.tuning.tune import tune

    folder = tune(arguments.config, arguments.overrides)
    print(f"done. The report: distrec report {folder.folder}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from distrec.training.evaluate import compare, evaluate

    rule = {"mask": arguments.mask, "ks": arguments.ks}
    if len(arguments.runs) == 1 and not arguments.beside:
        evaluate(arguments.runs[0], arguments.split, arguments.workers, **rule)
    else:
        compare(arguments.runs, arguments.split, arguments.workers, arguments.beside, **rule)


def _report(arguments: argparse.Namespace) -> None:
    from distrec.tuning.report import report

    report(arguments.sweep, examples=not arguments.no_examples)


def _drill(arguments: argparse.Namespace) -> int:
    from distrec.runtime import quiet

    quiet()
    from distrec.training.drill import drill

    return drill(arguments.folder, arguments.faults)


def _doctor(arguments: argparse.Namespace) -> int:
    from distrec.runtime import quiet

    quiet()
    from distrec.doctor.examine import doctor

    options = {"place": arguments.storage, "address": arguments.address, "as_json": arguments.json}
    return doctor(arguments.config, arguments.overrides, **options)


def _submit(arguments: argparse.Namespace) -> int:
    parsed, given = _inner(arguments)
    from distrec.submission.submit import submit

    return submit(parsed, given, arguments.address, arguments.env, wait=not arguments.no_wait)


def _manifest(arguments: argparse.Namespace) -> None:
    parsed, given = _inner(arguments)
    from distrec.kubernetes.manifest import Options, manifest, told

    options = {name: value for name, value in vars(arguments).items() if name not in ("verb", "job")}
    print(told(Options(**options), manifest(parsed, given, Options(**options))))


def _inner(arguments: argparse.Namespace) -> tuple[argparse.Namespace, list[str]]:
    """The verb that `submit` or `manifest` is given, parsed, and its arguments."""
    verb, *given = arguments.job or [""]
    if verb in ("submit", "manifest") or not verb or verb.startswith("-"):
        raise InputError(
            f"{shown(verb)} is no verb that a job can run; name one first, as in "
            f"'distrec {arguments.verb} train CONFIG'."
        )
    return parse(arguments.job), given


_VERBS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "demo-data": _demo_data,
    "synth": _synth_graph,
    "prepare": _prepare,
    "check": _check,
    "encode": _encode,
    "train": _train,
    "plan": _plan,
    "tune": _tune,
    "evaluate": _evaluate,
    "report": _report,
    "drill": _drill,
    "doctor": _doctor,
    "submit": _submit,
    "manifest": _manifest,
}

if __name__ == "__main__":
    sys.exit(main())
