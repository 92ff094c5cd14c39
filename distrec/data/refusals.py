"""What an object store's refusals mean: which of them a wait can mend, and the remedy for the others."""

from __future__ import annotations

from typing import Any

from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, SSLError
from botocore.exceptions import ConnectionError as NoConnection

_TRY_AGAIN = {  # codes that come with a status below 500, too
    "RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests",
    "BandwidthLimitExceeded", "InternalError", "ServiceUnavailable", "BadDigest", "XAmzContentSHA256Mismatch",
    "IncompleteBody", "ConditionalRequestConflict", "OperationAborted",
}  # fmt: skip
_FULL = {"QuotaExceeded", "QuotaExceededException", "XMinioStorageFull", "InsufficientStorage"}
_KEYS = "in AWS_… variables or in the profile that AWS_PROFILE names"
_REMEDIES = {
    "AccessDenied": "ask for the right to {verb} there",
    "AllAccessDisabled": "ask for the right to {verb} there",
    "InvalidAccessKeyId": f"the store does not know the access key: correct it {_KEYS}",
    "SignatureDoesNotMatch": f"the secret key does not belong to the access key: correct it {_KEYS}",
    "ExpiredToken": f"the credentials have expired: put new ones {_KEYS}, and start again",
    "InvalidToken": f"the store does not know the session token: correct it {_KEYS}",
    "RequestTimeTooSkewed": "the clock of this host differs from the store's by more than 15 minutes: set it",
    "NoSuchBucket": "create the bucket, or correct its name",
    "AuthorizationHeaderMalformed": "give the bucket's region in AWS_DEFAULT_REGION or in the profile",
    "PermanentRedirect": "give the bucket's region in AWS_DEFAULT_REGION or in the profile",
    "NoCredentialsError": f"give an access key and a secret key {_KEYS}",
    "PartialCredentialsError": f"give both an access key and a secret key {_KEYS}",
    "ProfileNotFound": "set AWS_PROFILE to a profile of ~/.aws/config or of the file that AWS_CONFIG_FILE names",
    "ConfigParseError": "correct the file that AWS_CONFIG_FILE names, or ~/.aws/config",
    "SSLError": "give the store's certificate authority in AWS_CA_BUNDLE",
}


class Unanswered(OSError):
    """A store gave no usable answer for as long as we were patient. The message is what it did instead."""


def mendable(response: tuple[Any, dict[str, Any]] | None, error: Exception | None) -> str | None:
    """What a store did, in a few words, if the same request may succeed later; otherwise None.

    Args:
        response: its answer and the parsed content, as botocore gives them; None if there was none.
        error: what was raised in place of an answer.
    """
    if response is None:
        certificate = isinstance(error, SSLError) and "CERTIFICATE" in str(error).upper()
        if certificate or not isinstance(error, HTTPClientError | NoConnection):
            return None
        return str(error.kwargs.get("error") or "") or str(error)
    status, told = response[0].status_code, response[1].get("Error", {})
    code = str(told.get("Code", ""))
    if code in _FULL or status in (501, 507) or not (status >= 500 or status in (408, 429) or code in _TRY_AGAIN):
        return None
    return f"{status} {code if code != str(status) else told.get('Message', '')}".strip()


def code_of(error: BaseException) -> str:
    """The S3 error code behind an error of s3fs, such as AccessDenied, or the name of an error of botocore.

    Empty if neither is behind it. A refused HEAD request has only its HTTP status.
    """
    for behind in (error, error.__cause__):
        if isinstance(behind, ClientError):
            return str(behind.response["Error"].get("Code", ""))
        if isinstance(behind, BotoCoreError):
            return type(behind).__name__
    return ""


def is_full(error: BaseException) -> bool:
    """Whether a store has no room left or a quota is used up."""
    return code_of(error) in _FULL or code_of(error) == "507"


def reason_of(error: BaseException) -> str:
    """What happened, in a few words: the code, if there is one, and the message."""
    code, told = code_of(error), getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"{code}: {told}" if isinstance(error.__cause__, ClientError) and not code.isdigit() else told


def remedy_of(error: BaseException, verb: str) -> str | None:
    """What to do about a refusal, as the end of a sentence; None if nothing better than a general advice is known."""
    remedy = _REMEDIES.get(code_of(error))
    return remedy.format(verb=verb) if remedy else None
