"""The largest values that configs and options may have, each with its reason.

A bound is far above every sensible value and below those at which something breaks: an allocation of terabytes, a
thread pool that the system refuses, a file name that no longer sorts. Sizes that are sensible only together, such as
rows times width, are compared with the memory of the machine (`distrec.training.size`).
"""

from __future__ import annotations

from distrec.errors import InputError, shown

# Texts that users write. The largest config here has 5 KB; the schedule of a long population-based run has about
# 1,000 changes of 5 values.
MOST_BYTES = 1 << 20
MOST_VALUES = 50_000  # with every alias written out; a few seconds of parsing
MOST_DEPTH = 32  # configs have 6 levels; pydantic and JSON stop with an error at a few hundred

MOST_NAME = 128  # characters of a name that becomes a folder's; file systems allow 255 bytes, with our additions
MOST_WORKERS = 10_000  # the largest Ray clusters have a few thousand nodes
MOST_CPUS = 4_096  # CPUs and threads of one worker; the largest machines have about 2,000 hardware threads
MOST_EPOCHS = 999_999  # checkpoints are named by six digits, so that their names sort in training order
MOST_STEPS = 999_999_999  # likewise, by nine digits
MOST_MINUTES = 525_600  # between checkpoints; a year
MOST_BATCH = 1 << 30  # rows of a batch are numbered by 32 bits
MOST_PIECES = 65_536  # micro-batches of a batch; each is a forward and a backward pass of all workers
MOST_RETRIES = 1_000  # a worker that died a thousand times does so for a reason that a retry does not remove
MOST_SECONDS = 31 * 86_400  # a wait of a month; timers of some systems end beyond
MOST_CUTOFF = 10_000  # K; the metrics' discounts are a table of K values, and nobody looks at longer rankings
MOST_CUTOFFS = 100  # each gives five columns of the table of users
MOST_TRIALS = 100_000  # a sweep keeps a folder for each trial, and lists all points of a grid
MOST_SEEDS = 1_000  # of winners; the standard error of a mean over 1,000 runs is 3 % of their spread
MOST_CANDIDATES = 1_000  # values listed for one key of a search space; a range has no such limit

MOST_WIDTH = 65_536  # of a vector; the widest encoders give 16,384 numbers, and a square layer of 65,536 has 17 GB
MOST_LAYERS = 256  # hops on a graph or blocks of a transformer; each keeps its activations for the backward pass
MOST_HEADS = 1_024  # attention heads; a head is at least one column wide
MOST_LENGTH = 16_384  # items or tokens of a sequence; the scores of one attention head are a square of this side
MOST_NEIGHBOURS = 10_000  # per item; lists of all items are kept with a cosine and a number for each neighbour
MOST_INTERESTS = 1_024  # vectors per user, all of which are compared with every item

MOST_ROWS = 2**31 - 1  # users or items are numbered by int32
MOST_NUMBERS = 2**31 - 1  # numbers of an item in a feature set; a fixed-size list in Parquet has an int32 length
MOST_SEED = 2**63 - 1  # seeds are written to JSON and YAML as integers of 64 bits
MOST_MANIFEST = 256 << 20  # bytes of a manifest; a million files need less
MOST_INTERACTIONS = 10**12  # 12 TB as prepared


def check_option(name: str, value: int | None, least: int, most: int) -> None:
    """Check the value of option `--name`; None is an option that was not given.

    Raises:
        InputError: the value is less than `least` or more than `most`.
    """
    if value is not None and not least <= value <= most:
        raise InputError(f"option '--{name}' is {shown(value)}; give {least:,} to {most:,}.")
