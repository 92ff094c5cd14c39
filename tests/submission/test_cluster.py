"""Addresses of clusters, servers that are no Ray dashboard, and the numbers of submission ids."""

from __future__ import annotations

import http.server
import os
import time

import pytest
import ray

from distrec.errors import InputError
from distrec.submission import cluster
from distrec.submission.cluster import Cluster, choose_address, last_number, within
from distrec.submission.ray_internals import cluster_version
from tests.one_answer import server


@pytest.mark.parametrize(
    ("given", "environment", "chosen"),
    [
        ("http://h:8265/", {"RAY_API_SERVER_ADDRESS": "http://other"}, "http://h:8265"),
        (None, {"RAY_API_SERVER_ADDRESS": "https://a/b", "RAY_ADDRESS": "http://c"}, "https://a/b"),
        (None, {"RAY_ADDRESS": "http://c:1"}, "http://c:1"),
    ],
)
def test_an_address_is_chosen(given: str | None, environment: dict[str, str], chosen: str) -> None:
    assert choose_address(given, environment) == chosen


@pytest.mark.parametrize(
    ("given", "environment", "told"),
    [
        (None, {}, "no cluster is named; give the address of the cluster's dashboard, such as --address http://HEAD"),
        (None, {"RAY_ADDRESS": "10.0.0.1:6379"}, "no cluster is named"),
        (None, {"RAY_ADDRESS": "auto"}, "no cluster is named"),
        ("h:8265", {}, "option '--address' is 'h:8265', which is not an http address"),
        ("ray://h:10001", {}, "is not an http address"),
        ("", {}, "option '--address' is '', which"),
        (None, {"RAY_API_SERVER_ADDRESS": "auto"}, "variable 'RAY_API_SERVER_ADDRESS' is 'auto'"),
        ("http://u:secretpw@h:8265", {}, "option '--address' holds credentials"),
        (None, {"RAY_API_SERVER_ADDRESS": "http://u:secretpw@h"}, "variable 'RAY_API_SERVER_ADDRESS' holds"),
    ],
)
def test_other_addresses_are_refused(given: str | None, environment: dict[str, str], told: str) -> None:
    with pytest.raises(InputError) as error:
        choose_address(given, environment)
    assert told in str(error.value)
    assert "secretpw" not in str(error.value)


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (200, "<html>", "does not answer like a Ray dashboard"),
        (200, "[1]", "does not answer like a Ray dashboard"),
        (200, '{"version": "4"}', "does not answer like a Ray dashboard"),
        (404, "", "does not answer like a Ray dashboard (Version check returned 404"),
        (503, "", "does not answer like a Ray dashboard (503 Server Error"),
        (200, '{"ray_version": "2.40.0"}', f"runs Ray 2.40.0, but this environment has {ray.__version__}; install"),
        (200, '{"ray_version": "1.2.0"}', "Ray version 1.2.0 is running on the cluster"),
        (401, "", "asks for a token, and none was sent; set RAY_AUTH_MODE=token"),
        (403, "", "refuses this token; set"),
    ],
)
def test_servers_that_do_not_take_jobs_are_named(status: int, body: str, told: str) -> None:
    with server(status, body) as url, pytest.raises(InputError) as error:
        Cluster(url)
    assert told in str(error.value)
    assert url in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_at_an_address_is_found_at_once() -> None:
    with pytest.raises(InputError, match=r"'http://127.0.0.1:1' cannot be reached \(no connection\); start"):
        Cluster("http://127.0.0.1:1")


def test_a_server_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_ANSWER", 0.5)
    with server(200, "") as url:
        monkeypatch.setattr(http.server.BaseHTTPRequestHandler, "handle", lambda self: time.sleep(3))
        with pytest.raises(InputError, match=r"cannot be reached \(no answer within 0 s\)"):
            Cluster(url)


def test_the_environment_does_not_override_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    with server(200, f'{{"ray_version": "{ray.__version__}"}}') as url:
        made = Cluster(url)
        assert made.client.get_address() == url
        assert cluster_version(made.client) == ray.__version__
    assert os.environ["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:1"


def test_numbers_of_ids() -> None:
    ids = ["a-1", "a-7", "a-b-9", "a-10x", "ab-20", None, "a-", "a-3", "a", "-40"]
    assert last_number("a", ids) == 7
    assert last_number("a-b", ids) == 9
    assert last_number("c", ids) == 0


def test_what_a_call_raises_is_raised_here() -> None:
    assert within(5, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0)
