"""The environment variables that travel with a job, and secrets, which never do.

Ray shows a job's runtime environment and command in clear to everyone who may ask the head, and writes them to log
files on every host. Therefore only settings that are no secrets travel; the hosts must have credentials of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distrec.errors import InputError, shown
from distrec.runtime import WORKER_ENVIRONMENT

# Passed on if they are set here: where the object store is and how to talk to it, interfaces, threads.
TRAVELLING = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE",
    "AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE", "AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "OMP_NUM_THREADS",
)  # fmt: skip
# Ray kills a job 3 s after it was told to stop, which is too short for a checkpoint. It reads this from the runtime
# environment of the job.
STOP_WAIT = {"RAY_JOB_STOP_WAIT_TIME_S": "300"}
REMEDY = (
    "Ray shows it to everyone who can ask the cluster; give credentials to the hosts themselves: in the environment of "
    "'ray start', in a profile or file on each host, or as a Kubernetes secret"
)

_SECRET_WORD = re.compile(r"(KEY|KEYS|SECRET|SECRETS|TOKEN|TOKENS|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)\d*$")
_PLACE_WORDS = ("FILE", "PATH", "DIR")  # NAME_FILE says where a secret is
_IN_URL = re.compile(
    r"[a-z][a-z0-9+.-]*://(?:[^/\s?#]*@|\S*[?&;][\w.-]*(?:password|passwd|pwd|token|secret|signature|key)=)", re.I
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SHORTEST = 8  # characters of a secret that is looked for in arguments; shorter ones occur by chance


def travelling(local: Mapping[str, str], given: Sequence[str]) -> dict[str, str]:
    """The variables of a job.

    Args:
        local: the environment of this process.
        given: further variables as `NAME=VALUE`, which come before those of `local`.

    Raises:
        InputError: a variable has no name or value, is set by distrec itself, or holds a secret.
    """
    found = STOP_WAIT | {name: local[name] for name in TRAVELLING if local.get(name)}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise InputError(
                f"option '--env' is {_hidden(text)}, which is not of the form NAME=VALUE; write for example "
                "--env GLOO_SOCKET_IFNAME=eth0."
            )
        if is_secret_name(name):
            raise InputError(
                f"option '--env' names '{shown(name, quoted=False)}', which looks like a secret: {REMEDY}."
            )
        if name in WORKER_ENVIRONMENT:
            raise InputError(f"option '--env' names '{name}', which distrec sets itself; leave it out.")
        found[name] = value
    for name, value in found.items():
        refuse_secrets([value], f"variable '{shown(name, quoted=False)}'", local)
    return found


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name usually holds a secret, such as AWS_SECRET_ACCESS_KEY or RAY_AUTH_TOKEN."""
    words = name.upper().split("_")
    return words[-1] not in _PLACE_WORDS and any(_SECRET_WORD.search(word) for word in words)


def refuse_secrets(texts: Iterable[str], what: str, local: Mapping[str, str]) -> None:
    """Refuse texts that Ray would show: URLs with credentials, and values of secret variables of this process.

    Args:
        texts: the texts.
        what: what they are, for the message, which never shows them.
        local: the environment of this process.

    Raises:
        InputError: a text holds a secret.
    """
    secrets = {name: value for name, value in local.items() if is_secret_name(name) and len(value) >= _SHORTEST}
    for text in texts:
        if has_credentials(text):
            raise InputError(f"{what} holds a URL with credentials: {REMEDY}.")
        for name, value in secrets.items():
            if value in text:
                raise InputError(f"{what} holds the value of your variable '{name}': {REMEDY}.")


def has_credentials(text: str) -> bool:
    """Whether a text holds a URL with a user, a password or a token in it."""
    return _IN_URL.search(text) is not None


def texts_in(value: Any) -> Iterable[str]:
    """All strings in a config's tree, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from texts_in(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from texts_in(inner)


def _hidden(text: str) -> str:
    """`text` for a message, unless it may be a secret."""
    return shown(text) if re.fullmatch(r"[\w.-]{0,20}", text) and not any(map(str.isdigit, text)) else "a text"
