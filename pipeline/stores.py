"""How the store behind a URL is opened, and asked again while it fails for reasons that pass.

Where a store is and who asks is not ours to say: fsspec reads it from `FSSPEC_<PROTOCOL>_<OPTION>` variables and the
files below `~/.config/fsspec`, and the store's package from variables of its own (`AWS_*`, `GOOGLE_*`, `AZURE_*`).
"""

from __future__ import annotations

import errno
import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, TypeVar

import fsspec

from pipeline.records import InputError
from pipeline.redaction import redacted

REQUESTS = 32
"""Requests to a store at once, where many are to be asked."""

_ATTEMPTS_WITHIN = 6
"""Attempts of s3fs at each request of a call that makes many."""

_SAID_SECONDS = 10.0

_STATUS = {408, 425, 429, 500, 502, 503, 504}
_CODES = (
    *("ConditionalRequestConflict", "OperationAborted", "RequestTimeout", "SlowDown", "Throttl", "TooManyRequests"),
    "XAmzContentSHA256Mismatch",  # of a body that was damaged on its way
)
_UNKNOWN_TO_IT = ("AuthenticationFailed", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "RequestTimeTooSkewed")
"""Codes by which a store refuses who asks, and not only what is asked for."""
_WITHOUT_CREDENTIALS = {
    "ClientAuthenticationError",
    "CredentialRetrievalError",
    "DefaultCredentialsError",
    "NoCredentialsError",
    "RefreshError",
}
"""Exceptions of azure, botocore and google where who asks is not known even here."""
_ERRNO = {
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.ETIMEDOUT,
}
_KINDS = {
    "ChunkedEncodingError",
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectionError",
    "HTTPClientError",
    "IncompleteRead",
    "IncompleteReadError",
    "ProxyError",
    "ResponseParserError",
    "ServiceRequestError",
    "ServiceResponseError",
    "TransportError",
}
"""Exceptions of aiohttp, azure, botocore, google, requests and urllib3; by name, as none needs to be installed."""

_Result = TypeVar("_Result")
_log = logging.getLogger(__name__)
_said = float("-inf")
_answered: dict[str, Callable[[], Any]] = {}
"""By store, the last read of a file that it has answered."""


class StoreError(OSError):
    """A file could not be written or removed."""


class AwayError(InputError):
    """A file could not be read of which nobody knows what is wrong with it, if anything.

    Its store has failed for longer than it is asked again, also for a file that it gave before, or does not accept the
    credentials any more.
    """


class NotGivenError(InputError):
    """A store does not give a file, though it gives others."""


def patience_s() -> float:
    """For how long a request that fails is made again: BPR_STORE_PATIENCE_S, 120 unless set."""
    return _seconds("BPR_STORE_PATIENCE_S", 120.0)


def timeout_s() -> float:
    """For how long a store may be silent within one request: BPR_STORE_TIMEOUT_S, 20 unless set."""
    return max(0.001, _seconds("BPR_STORE_TIMEOUT_S", 20.0))


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise InputError(f"{name} is {text!r}: expected seconds")
    return value


def open_store(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system behind a URL, and the path in it."""
    try:
        fs, path = fsspec.core.url_to_fs(url, **_options(url))
    except (ImportError, ValueError) as error:  # a store whose package is not installed, or that does not exist
        raise InputError(f"{url}: {error}") from None
    if "s3" in _protocols(fs):
        from s3fs.core import set_custom_error_handler

        set_custom_error_handler(is_transient)
        # Its own repetitions, two layers deep where it reads, would multiply those of `asked` and outlast `patience_s`.
        fs.retries = 1
        # With more it asks for the size of every file before it reads it.
        fs.max_concurrency = 1
    return fs, path


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return "file" in _protocols(fs)


def takes_pieces(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether a file can be sent in pieces and left uncommitted."""
    return bool({"s3", "gs"} & {*_protocols(fs)})


@lru_cache
def of_many_requests(fs: fsspec.AbstractFileSystem) -> fsspec.AbstractFileSystem:
    """The same store for a call that lists a million files or sends a large one in pieces.

    It makes each request again by itself, where it can, so that one that fails does not cost those before it.
    """
    if "s3" not in _protocols(fs):
        return fs
    own = type(fs)(*fs.storage_args, **fs.storage_options, skip_instance_cache=True)
    own.retries, own.max_concurrency = _ATTEMPTS_WITHIN, fs.max_concurrency
    return own


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _options(url: str) -> dict[str, Any]:
    """By protocol, what makes a store fit for many processes that write at once; what the user has set goes before."""
    found: dict[str, Any] = {}
    for link in url.split("::"):
        protocol = fsspec.core.split_protocol(link)[0]
        if protocol in (None, "file", "local", "memory"):
            continue
        # A listing that was kept would hide what other processes have written since.
        options: dict[str, Any] = {"use_listings_cache": False}
        if protocol in ("s3", "s3a"):
            given = _configured("s3", "s3a")
            defaults = {
                # Two layers that repeat would multiply.
                "retries": {"total_max_attempts": 1},
                "connect_timeout": min(10.0, timeout_s()),
                "read_timeout": timeout_s(),
                "max_pool_connections": REQUESTS,
            }
            options["config_kwargs"] = defaults | given.get("config_kwargs", {})
        elif protocol in ("http", "https"):
            from aiohttp import ClientTimeout

            given = _configured("http", "https")
            timeout = ClientTimeout(total=None, sock_connect=min(10.0, timeout_s()), sock_read=timeout_s())
            options["client_kwargs"] = {"timeout": timeout} | given.get("client_kwargs", {})
        found[str(protocol)] = options
    return found


def _configured(*names: str) -> dict[str, Any]:
    """The options that fsspec's configuration has for a protocol under any of its names."""
    return {option: value for name in names for option, value in fsspec.config.conf.get(name, {}).items()}


def asked(url: str, call: Callable[[], _Result], *, reading: bool, again: bool = True) -> _Result:
    """The result of a call of a store, made again while it fails for a reason that passes, for `patience_s()`.

    With `again` False it is made once, as where only a part of a call was lost.
    FileNotFoundError and FileExistsError pass through. All else that does not pass becomes one line that names the URL:
    InputError (AwayError where it is no matter of the one file, NotGivenError where it is), or StoreError where
    `reading` is False.
    """
    started, wait, failed = time.monotonic(), 0.2, math.inf
    while True:
        try:
            result = call()
            if isinstance(result, bytes):
                _answered[_store_of(url)] = call
            return result
        except Exception as error:
            passing = is_transient(error)
            # A listing may have taken longer than patience until it failed for the first time.
            failed = min(failed, time.monotonic())
            left = failed + patience_s() - time.monotonic()
            if not (passing and again) or left <= 0:
                _give_up(url, error, time.monotonic() - started if passing else None, reading)
            # All workers of a cluster meet the same fault at once; they must not come back at once.
            pause = min(random.uniform(0.5, 1.0) * wait, left)
            _say(url, error, time.monotonic() - started + pause)
        time.sleep(pause)
        wait = min(2 * wait, 20.0)


def _give_up(url: str, error: Exception, after_s: float | None, reading: bool) -> None:
    if isinstance(error, FileNotFoundError | FileExistsError) and after_s is None:
        raise error
    reason = describe(error) + (f"; tried for {after_s:.0f} s" if after_s is not None else "")
    if reading:
        kind = InputError
        if any(map(_is_of_who_asks, _causes(error))):
            kind = AwayError
        elif after_s is not None:
            kind = NotGivenError if _still_answers(url) else AwayError
        raise kind(f"{url}: cannot be read ({reason})") from None
    raise StoreError(redacted(f"{url}: cannot be written ({reason})")) from None


def _store_of(url: str) -> str:
    """Protocol and bucket or server."""
    return "/".join(url.split("/")[:3])


def _still_answers(url: str) -> bool:
    """Whether the store of a file that it does not give still gives another one."""
    try:
        return _answered[_store_of(url)]() is not None
    except Exception:
        return False


def describe(error: BaseException) -> str:
    """One line on what a store has said."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(str(text).split())[:300] or type(error).__name__


def _say(url: str, error: Exception, waited_s: float) -> None:
    global _said
    if waited_s > 2.0 and time.monotonic() - _said > _SAID_SECONDS:
        _said = time.monotonic()
        _log.warning("%s", redacted(f"{url}: asking the store again ({describe(error)})"))


def is_transient(error: BaseException) -> bool:
    """Whether the same request may well succeed soon: what a store, or the way to it, fails with under load."""
    causes = list(_causes(error))
    if any(kind.__name__ in _KINDS for cause in causes for kind in type(cause).__mro__):
        return True
    if status := [found for cause in causes if (found := _status(cause)) is not None]:
        return any(code in _STATUS for code in status) or any(_has_code(cause, _CODES) for cause in causes)
    if isinstance(error, (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)):
        return False
    return any(
        isinstance(cause, ConnectionError | TimeoutError) or (isinstance(cause, OSError) and cause.errno in _ERRNO)
        for cause in causes
    )


def _is_of_who_asks(error: BaseException) -> bool:
    """Whether a store has refused who asks, so that it would refuse whatever is asked for."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return _status(error) == 401 or _has_code(error, _UNKNOWN_TO_IT) or bool(kinds & _WITHOUT_CREDENTIALS)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__


def _status(error: BaseException) -> int | None:
    """The HTTP status that an exception of botocore, aiohttp, azure or gcsfs tells of."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = next((v for name in ("status", "status_code", "code") if (v := getattr(error, name, None))), None)
    try:
        return int(found) if found is not None else None
    except (TypeError, ValueError):
        return None


def _has_code(error: BaseException, codes: tuple[str, ...]) -> bool:
    response = getattr(error, "response", None)
    code = response.get("Error", {}).get("Code", "") if isinstance(response, dict) else ""
    return any(known in str(code) for known in codes)
