"""Which variables travel with a job, and what counts as a secret."""

from __future__ import annotations

import pytest

from distrec.errors import InputError
from distrec.submission.environment import (
    TRAVELLING,
    has_credentials,
    is_secret_name,
    refuse_secrets,
    texts_in,
    travelling,
)

SECRET = "wJalrXUtnFEMI/K7MDENG"
HERE = {
    "AWS_ACCESS_KEY_ID": "AKIAEXAMPLEKEY", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": "session-of-mine",
    "RAY_AUTH_TOKEN": "0123456789abcdef", "AWS_ENDPOINT_URL": "http://store:9000", "AWS_REGION": "eu-west-1",
    "AWS_PROFILE": "team", "GLOO_SOCKET_IFNAME": "eth1", "OMP_NUM_THREADS": "4", "PATH": "/bin", "HOME": "/root",
    "AWS_SHARED_CREDENTIALS_FILE": "/root/c", "PWD": "/work/place", "EMPTY_KEY": "",
}  # fmt: skip


def test_only_listed_settings_travel() -> None:
    assert travelling(HERE, []) == {
        "RAY_JOB_STOP_WAIT_TIME_S": "300", "AWS_ENDPOINT_URL": "http://store:9000", "AWS_REGION": "eu-west-1",
        "AWS_PROFILE": "team", "GLOO_SOCKET_IFNAME": "eth1", "OMP_NUM_THREADS": "4",
    }  # fmt: skip
    assert not any(map(is_secret_name, TRAVELLING))


def test_given_variables_come_first() -> None:
    found = travelling(HERE, ["OMP_NUM_THREADS=1", "MINE=a=b", "RAY_JOB_STOP_WAIT_TIME_S=900", "NONE="])
    assert found["OMP_NUM_THREADS"] == "1"
    assert found["MINE"] == "a=b"
    assert found["NONE"] == ""
    assert found["RAY_JOB_STOP_WAIT_TIME_S"] == "900"


@pytest.mark.parametrize("name", [
    "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN", "HF_TOKEN", "wandb_api_key",
    "MLFLOW_TRACKING_PASSWORD", "APIKEY", "DB_PASSWD", "MYTOKEN", "CLIENT_SECRET", "GOOGLE_CREDENTIALS", "KEY2",
])  # fmt: skip
def test_names_of_secrets_are_known(name: str) -> None:
    assert is_secret_name(name)
    with pytest.raises(InputError, match=r"looks like a secret: Ray shows it .* 'ray start'") as error:
        travelling({}, [f"{name}={SECRET}"])
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("name", [
    "AWS_REGION", "TOKENIZERS_PARALLELISM", "RAY_AUTH_MODE", "AWS_SHARED_CREDENTIALS_FILE", "RAY_AUTH_TOKEN_PATH",
    "PWD", "OLDPWD", "KEYBOARD", "MONKEYS_PATH",
])  # fmt: skip
def test_other_names_are_no_secrets(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("http://user:pw@host/x", True), ("tracking.mlflow=https://u:p@h", True), ("http://token@host", True),
        ("postgresql://host/db?user=a&password=b", True), ("https://h/x?X-Amz-Signature=abc", True),
        ("https://h/x?api_key=abc", True), ("HTTP://U:P@H", True),
        ("s3://bucket/mail@example", False), ("http://host:5000/path", False), ("a;key=1", False), ("user@host", False),
        ("https://h/x?page=2", False), ("run.name=a", False),
    ],
)  # fmt: skip
def test_credentials_in_urls_are_found(text: str, found: bool) -> None:
    assert has_credentials(text) == found


@pytest.mark.parametrize(
    ("local", "given", "told"),
    [
        ({}, ["A"], "'--env' is 'A', which is not of the form NAME=VALUE"),
        ({}, ["=x"], "is a text, which is not of the form"),
        ({}, [f"a-b={SECRET}"], "is a text, which is not of the form"),
        ({}, ["X=http://u:secretpw@h"], "variable 'X' holds a URL with credentials: "),
        ({"AWS_ENDPOINT_URL": "http://u:secretpw@h"}, [], "variable 'AWS_ENDPOINT_URL' holds a URL with credentials"),
        (HERE, [f"X=a{SECRET}b"], "variable 'X' holds the value of your variable 'AWS_SECRET_ACCESS_KEY'"),
        ({}, ["MALLOC_ARENA_MAX=2"], "'MALLOC_ARENA_MAX', which distrec sets itself; leave it out."),
    ],
)
def test_variables_that_cannot_travel_are_refused(local: dict[str, str], given: list[str], told: str) -> None:
    with pytest.raises(InputError) as error:
        travelling(local, given)
    assert told in str(error.value)
    assert SECRET not in str(error.value)
    assert "secretpw" not in str(error.value)


def test_values_of_secret_variables_are_found_anywhere() -> None:
    refuse_secrets(["run.name=/work/place", "x=s3://bucket"], "an argument", HERE)
    with pytest.raises(InputError, match=r"an argument holds the value of your variable 'RAY_AUTH_TOKEN'"):
        refuse_secrets(["a", "run.name=0123456789abcdef"], "an argument", HERE)


def test_all_texts_of_a_config_are_looked_at() -> None:
    tree = {"a": ["x", {"b": "y"}], "c": 1, "d": None, "e": {"f": ("z",)}}
    assert set(texts_in(tree)) == {"a", "x", "b", "y", "c", "d", "e", "f", "z"}
