"""What `distrec` can be told: the verbs and their options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from distrec.errors import InputError, shown

_PRINT_CONFIG = "show the config with every setting and its description, and stop"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The verb and its options; those of this process by default. A wrong one ends the process with status 2.

    Overrides `key=value` may be anywhere, which argparse does not support for positionals.
    """
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    if parsed.verb in ("submit", "manifest"):
        parsed.job = rest  # in the order in which they were given
        return parsed
    overrides = [word for word in rest if not word.startswith("-")]
    if rest and (len(overrides) < len(rest) or not hasattr(parsed, "overrides")):
        parser.error(f"distrec {parsed.verb} has no argument {shown(rest[0])}; see 'distrec {parsed.verb} --help'.")
    if overrides:
        parsed.overrides = [*parsed.overrides, *overrides]
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="distrec", description="Multimodal recommenders, trained at any size.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    demo = verbs.add_parser("demo-data", help="write the embedded demo shop")
    demo.add_argument("--out", required=True, help="folder to write")
    demo.add_argument("--seed", type=_whole, default=7)

    synth = verbs.add_parser("synth", help="write a random dataset of any size, already prepared")
    kinds = synth.add_subparsers(dest="kind", required=True, metavar="KIND")
    graph = kinds.add_parser("graph", help="users, items, interactions and clustered features 'text' and 'image'")
    for name, what in (
        ("users", "number of users"),
        ("items", "number of items"),
        ("edges", "number of interactions"),
        ("dim", "width of feature set 'text'"),
    ):
        graph.add_argument(f"--{name}", type=_whole, required=True, metavar="N", help=what)
    graph.add_argument(
        "--image-dim", type=_whole, metavar="N", help="width of feature set 'image'; by default that of 'text'"
    )
    graph.add_argument("--out", required=True, help="new folder or s3:// prefix of the prepared dataset")
    graph.add_argument("--seed", type=_whole, default=7)

    prepare = verbs.add_parser("prepare", help="turn raw data into a prepared dataset")
    prepare.add_argument("config", help="a data config, such as configs/data/movielens.yaml")
    prepare.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    prepare.add_argument("--source", required=True, help="folder or s3:// prefix of the raw data")
    prepare.add_argument("--out", required=True, help="folder or s3:// prefix of the prepared dataset")

    check = verbs.add_parser("check", help="verify a prepared dataset")
    check.add_argument("data", help="folder or s3:// prefix of a prepared dataset")

    encode = verbs.add_parser(
        "encode",
        help="encode raw texts and images into features",
        epilog="--tokens needs space: with the default encoders up to 150 KB per item in float16, which is 1.5 GB for "
        "the 9,742 items of MovieLens, and as much again in the cache. With --image-pool 3, it is 49 KB per item.",
    )
    encode.add_argument("data", help="folder or s3:// prefix of a prepared dataset")
    encode.add_argument("--text", help="text encoder: a name, the folder of a transformers model, or none")
    encode.add_argument("--image", help="image encoder: a name, the folder of a transformers model, or none")
    encode.add_argument(
        "--max-tokens",
        type=_whole,
        metavar="N",
        help="without --tokens: tokens after which a text is cut; 128 by default",
    )
    encode.add_argument(
        "--tokens",
        action="store_true",
        help="write 'text-tokens' and 'image-tokens', the whole last layer, instead of one vector per item",
    )
    encode.add_argument("--text-tokens", type=_whole, metavar="N", help="with --tokens: tokens per text; 30 by default")
    encode.add_argument(
        "--image-pool", type=_whole, metavar="N", help="with --tokens: average feature maps down to N x N"
    )
    encode.add_argument(
        "--cut",
        type=_whole,
        metavar="N",
        help="with --tokens: write 'text-tokens-cutN' and 'image-tokens-cutN', the hidden states before the last N "
        "layers, for a method that trains these layers",
    )
    encode.add_argument("--workers", type=_whole, default=2, help="Ray actors; 0 encodes in this process")
    encode.add_argument("--threads", type=_whole, default=1, help="CPU threads per worker")
    encode.add_argument("--batch", type=_whole, help="contents per forward pass; the encoder's own by default")
    encode.add_argument("--cache", help="folder that keeps encoded contents; inside the dataset by default")

    train = verbs.add_parser("train", help="train a model, or continue a run")
    train.add_argument("config", help="a run config, such as configs/lightgcn/demo.yaml")
    train.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    train.add_argument("--print-config", action="store_true", help=_PRINT_CONFIG)

    plan = verbs.add_parser(
        "plan",
        help="predict the memory, exchanges and checkpoints of a run, before it starts",
        description="Rehearse one worker of a run on this machine, in a few steps and without the others, and print "
        "what it needs.",
    )
    plan.add_argument("config", help="a run config, such as configs/lightgcn/demo.yaml")
    plan.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    plan.add_argument(
        "--workers", type=_whole, nargs="+", default=[], metavar="N", help="numbers of workers; default: the config's"
    )
    plan.add_argument("--machine-memory", metavar="SIZE", help="memory of a machine, such as 16Gi, to be filled")
    plan.add_argument(
        "--storage-rate", type=_whole, default=200, metavar="MB/S", help="what the storage writes; default: 200 MB/s"
    )
    plan.add_argument("--probe", action="store_true", help="measure 20 steps, and say how long an epoch takes")
    plan.add_argument("--json", action="store_true", help="print a JSON list, with one object per number of workers")

    tune = verbs.add_parser("tune", help="search over methods and their settings, or continue a sweep")
    tune.add_argument("config", metavar="SWEEP", help="a sweep config, such as configs/sweeps/demo.yaml")
    tune.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    tune.add_argument("--print-config", action="store_true", help=_PRINT_CONFIG)

    evaluate = verbs.add_parser("evaluate", help="rank a split with the best weights of trained runs")
    evaluate.add_argument("runs", nargs="+", metavar="RUN", help="<run.storage>/<run.name>; several are compared")
    evaluate.add_argument("--split", choices=("valid", "test"), default="test", help="the split to rank; default: test")
    evaluate.add_argument(
        "--mask",
        choices=("train", "train+valid", "none"),
        help="items to leave out of a user's ranking; by default as the run was trained ('evaluate.mask')",
    )
    evaluate.add_argument(
        "--ks", type=_whole, nargs="+", default=[], metavar="K", help="cut-offs in addition to the run's 'evaluate.ks'"
    )
    evaluate.add_argument("--workers", type=_whole, default=0, help="Ray Train workers; 0 evaluates in this process")
    evaluate.add_argument(
        "--beside", metavar="FILE", help="JSON file of further metrics for the table: {split: {name: {metric: value}}}"
    )

    report = verbs.add_parser("report", help="write a sweep's results so far as one HTML page, Markdown and JSON")
    report.add_argument("sweep", metavar="SWEEP_DIR", help="<run.storage>/<run.name> of a sweep, or its s3:// prefix")
    report.add_argument(
        "--no-examples",
        action="store_true",
        help="leave out users' histories and recommendations with the items' titles and pictures, so that a report on "
        "licensed data can be published",
    )

    drill = verbs.add_parser(
        "drill",
        help="kill and freeze a worker of a run that trains, and measure how the run goes on",
        description="Do to the workers of a run that trains on a Ray cluster what happens on clusters, one fault after "
        "the other, and print how long the run took to notice and to train on, and which rows were lost or doubled.",
    )
    drill.add_argument("folder", metavar="RUN", help="<run.storage>/<run.name> of a run that is being trained")
    drill.add_argument(
        "--faults",
        nargs="+",
        choices=("kill", "freeze"),
        default=["kill", "freeze"],
        metavar="FAULT",
        help="kill (SIGKILL) and freeze (SIGSTOP), in the given order; by default both",
    )

    doctor = verbs.add_parser("doctor", help="check this machine, a run's storage and a cluster, and name remedies")
    doctor.add_argument("config", nargs="?", help="config of a run that is to be trained")
    doctor.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    doctor.add_argument("--storage", help="folder or s3:// prefix; by default 'run.storage' of the config")
    doctor.add_argument(
        "--address",
        metavar="URL",
        help="address of a cluster's dashboard, such as http://head:8265; by default RAY_API_SERVER_ADDRESS",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON in place of a table")

    submit = verbs.add_parser(
        "submit",
        help="run a verb as a job of a Ray cluster, and follow it",
        usage="distrec submit VERB [ARGUMENT ...] [--address URL] [--env NAME=VALUE] [--no-wait]",
        description="Send the current folder to a Ray cluster, run a verb there with its own arguments, show its log, "
        "and end with its exit status.",
        allow_abbrev=False,  # what is not an option of submit is an argument of the verb
    )
    submit.add_argument(
        "--address",
        metavar="URL",
        help="address of the cluster's dashboard, such as http://head:8265; by default RAY_API_SERVER_ADDRESS",
    )
    submit.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="environment variable of the job, not a secret; may be given several times",
    )
    submit.add_argument("--no-wait", action="store_true", help="print the job's id and do not follow it")

    manifest = verbs.add_parser(
        "manifest",
        help="write a verb as manifests for Kubernetes",
        usage="distrec manifest VERB [ARGUMENT ...] --out FOLDER [--overlay NAME] [OPTION ...]",
        description="Write train, tune or encode with its own arguments as a folder for 'kubectl apply -k': a RayJob "
        "for KubeRay, a RayCluster, or a Job that submits to a cluster that exists.",
        allow_abbrev=False,  # what is not an option of manifest is an argument of the verb
    )
    manifest.add_argument("--out", required=True, metavar="FOLDER", help="new folder to write")
    manifest.add_argument(
        "--kind", choices=("RayJob", "RayCluster", "Job"), default="RayJob", help="what is started; RayJob by default"
    )
    manifest.add_argument(
        "--overlay",
        dest="overlays",
        action="append",
        default=[],
        metavar="NAME",
        help="what is added: cpu, gpu, kueue, volcano, autoscaling, token, s3, pvc, monitoring; may be given several "
        "times",
    )
    manifest.add_argument("--name", help="name of the object; by default the run's")
    manifest.add_argument("--image", help="image of head, workers and submitter; by default distrec:<version>")
    manifest.add_argument(
        "--image-extra",
        dest="image_extras",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="a package that the image has and the lock files have not, such as mlflow-skinny",
    )
    manifest.add_argument("--memory", help="memory of a worker pod, such as 8Gi; by default as 'plan' says")
    manifest.add_argument("--pods", type=_whole, metavar="N", help="for tune: worker pods; by default those of a trial")
    manifest.add_argument("--queue", help="queue of Kueue or Volcano; default: default")
    manifest.add_argument("--secret", help="Secret with the keys of overlay s3, or with the token for a Job")
    manifest.add_argument("--claim", help="volume claim of overlay pvc; default: distrec")
    manifest.add_argument("--mount", metavar="PATH", help="where overlay pvc mounts it; default: /data")
    manifest.add_argument("--address", metavar="URL", help="for a Job: the dashboard, such as http://head:8265")
    return parser


def _whole(text: str) -> int:
    """The value of an option that is a whole number, read as in a config."""
    from distrec.config.text import read_yaml

    try:
        value = read_yaml(text, f"value {shown(text)}")
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if type(value) is not int:
        raise argparse.ArgumentTypeError(f"value {shown(text)} is not a whole number; give one.")
    return value
