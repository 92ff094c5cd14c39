"""A Ray cluster as its job server shows it: addresses, calls that end in bounded time, and submission ids."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from distrec.errors import InputError, shown
from distrec.submission.environment import has_credentials
from distrec.submission.ray_internals import cluster_version, quiet_client

T = TypeVar("T")

ADDRESS, RAY_ADDRESS = "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"
_ANSWER = 20.0  # seconds in which the head must answer a question
_AGENT = 90.0  # seconds in which a head that has just started must accept jobs
_GAP = 1.0  # seconds between two tries


def choose_address(given: str | None, environment: Mapping[str, str]) -> str:
    """The address of the job server: `--address`, or else that of the environment.

    Raises:
        InputError: there is none, it is not http, or it holds a password.
    """
    address, source = given, "option '--address'"
    if address is None and environment.get(ADDRESS):
        address, source = environment[ADDRESS], f"variable '{ADDRESS}'"
    elif address is None and environment.get(RAY_ADDRESS, "").startswith(("http://", "https://")):
        address, source = environment[RAY_ADDRESS], f"variable '{RAY_ADDRESS}'"
    remedy = "give the address of the cluster's dashboard, such as --address http://HEAD:8265"
    if address is None:
        raise InputError(f"no cluster is named; {remedy}, or set {ADDRESS}.")
    if has_credentials(address):
        raise InputError(
            f"{source} holds credentials, which process lists show; give the address alone, and a token as a file "
            "that RAY_AUTH_TOKEN_PATH names."
        )
    if not re.fullmatch(r"https?://[^/\s?#]+(/[^\s?#]*)?", address):
        raise InputError(f"{source} is {shown(address)}, which is not an http address; {remedy}.")
    return address.rstrip("/")


class TokenRefused(InputError):
    """The cluster wants another token than this process sends."""


class OtherVersion(InputError):
    """The cluster runs another version of Ray."""


class NoAnswer(Exception):
    """The head did not answer, or answered that it cannot at the moment."""


class UnknownJob(Exception):
    """The head does not know the job."""


def within(seconds: float | None, call: Callable[[], T]) -> T:
    """The result of `call`, which runs in a thread of its own, since Ray's client sets no limits to its requests.

    Raises:
        NoAnswer: it took longer.
    """
    results: list[T] = []
    failures: list[BaseException] = []

    def attempt() -> None:
        try:
            results.append(call())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    if failures:
        raise failures[0]
    if not results:
        raise NoAnswer(f"no answer within {seconds:.0f} s")
    return results[0]


class Cluster:
    """The job server of a cluster. Every method raises `InputError` if the cluster refuses this process's token.

    Attributes:
        address: its URL, without credentials.
        client: Ray's `JobSubmissionClient`.
    """

    def __init__(self, address: str):
        """Connect.

        Args:
            address: from `choose_address`.

        Raises:
            InputError: nothing answers there, something else than a Ray dashboard does, it wants another token, or it
                runs another version of Ray.
        """
        self.address = address
        quiet_client()
        import ray
        from ray.job_submission import JobSubmissionClient

        there = f"address '{address}'"
        before = os.environ.get(ADDRESS)
        os.environ[ADDRESS] = address  # Ray's client prefers the environment to its argument
        try:
            self.client = within(_ANSWER, lambda: JobSubmissionClient(address))
        except (NoAnswer, ConnectionError) as error:
            why = f"{error}" if isinstance(error, NoAnswer) else "no connection"
            raise InputError(
                f"{there} cannot be reached ({why}); start the cluster, or give the address of its dashboard, which "
                "must be reachable from here."
            ) from None
        except Exception as error:
            self._refuse_token(error)
            raise InputError(
                f"{there} does not answer like a Ray dashboard ({_first_line(error)}); give the address that "
                "'ray start --head' prints for the dashboard."
            ) from None
        finally:
            del os.environ[ADDRESS]
            os.environ.update({} if before is None else {ADDRESS: before})
        if (version := cluster_version(self.client)) != ray.__version__:
            raise OtherVersion(
                f"the cluster at {there} runs Ray {version}, but this environment has {ray.__version__}; install the "
                "same environment here and on all hosts."
            )

    def submit(self, name: str, **job: Any) -> str:
        """Submit a job as `<name>-<n>` with the first n that is free; returns this id.

        Args:
            name: what the id begins with.
            job: the other arguments of `JobSubmissionClient.submit_job`.

        Raises:
            InputError: the cluster refuses the job or the upload.
            KeyboardInterrupt: Ctrl-C; the message says that the job may have been submitted.
        """
        number, until, told = self._attempts(name) + 1, time.monotonic() + _AGENT, False
        while True:
            try:
                return str(self.client.submit_job(submission_id=f"{name}-{number}", **job))
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"interrupted while submitting; if the cluster has the job, it is '{name}-{number}', and "
                    f"'ray job stop --address {self.address} {name}-{number}' stops it"
                ) from None
            except Exception as error:
                self._refuse_token(error)
                if f"{name}-{number} already exists" in str(error):
                    number += 1  # another submission was faster
                elif re.search("No available agent|head node agent", str(error)) and time.monotonic() < until:
                    if not told:
                        print("waiting for the cluster, which has just started, to accept jobs", flush=True)
                    told = True
                    time.sleep(_GAP)
                else:
                    raise InputError(
                        f"the cluster at address '{self.address}' did not take the job ({_first_line(error)}); see "
                        "the dashboard's log on the head."
                    ) from None

    def details(self, job: str) -> Any:
        """Ray's `JobDetails` of a job.

        Raises:
            NoAnswer: the head cannot be asked at the moment.
            UnknownJob: it does not know the job.
        """
        return self._ask(lambda: self.client.get_job_info(job))

    def log(self, job: str) -> str:
        """The whole log of a job. Raises the same as `details`."""
        return str(self._ask(lambda: self.client.get_job_logs(job)))

    def stop(self, job: str) -> None:
        """Ask the cluster to stop a job; a job that has ended stays as it is. Raises the same as `details`."""
        self._ask(lambda: self.client.stop_job(job))

    def _ask(self, question: Callable[[], T]) -> T:
        try:
            return within(_ANSWER, question)
        except NoAnswer:
            raise
        except Exception as error:
            self._refuse_token(error)
            if "status code 404" in str(error):
                raise UnknownJob from None
            raise NoAnswer(_first_line(error)) from None

    def _attempts(self, name: str) -> int:
        """The highest n of the cluster's jobs `<name>-<n>`; 0 if there is none."""
        try:
            jobs = self._ask(self.client.list_jobs)
        except (NoAnswer, UnknownJob) as error:
            raise InputError(
                f"address '{self.address}' does not list its jobs ({_first_line(error)}); give the address of a Ray "
                "dashboard."
            ) from None
        return last_number(name, (job.submission_id for job in jobs))

    def _refuse_token(self, error: BaseException) -> None:
        """Raise an `InputError` if the cluster wanted another token."""
        from ray.exceptions import AuthenticationError

        if not isinstance(error, AuthenticationError):
            return
        wanted = "refuses this token" if "failed" in error.message else "asks for a token, and none was sent"
        raise TokenRefused(
            f"the cluster at address '{self.address}' {wanted}; set RAY_AUTH_MODE=token, and put the cluster's token "
            "into the file ~/.ray/auth_token or one that RAY_AUTH_TOKEN_PATH names."
        ) from None


def last_number(name: str, ids: Iterable[str | None]) -> int:
    """The highest n among the ids `<name>-<n>`; 0 if there is none."""
    numbers = [0]
    for found in ids:
        if found is not None and found.startswith(f"{name}-"):
            with suppress(ValueError):
                numbers.append(int(found.removeprefix(f"{name}-")))
    return max(numbers)


def _first_line(error: BaseException) -> str:
    """What an error says, for a message: its first line, or the last one of a traceback from the head."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return shown(lines[-1] if "Traceback" in str(error) else lines[0], 200, quoted=False).rstrip(".")
