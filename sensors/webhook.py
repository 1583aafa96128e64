"""One POST of JSON to a webhook whose URL is a secret."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from resources.errors import MediaError, printable


class AlertUndelivered(MediaError):
    """The receiver of alerts did not take one."""

    code, retryable, http_status = "alert_undelivered", True, 502
    remedy = "Nothing is lost: it is posted again with the next tick. Check alerts.webhook_url and its receiver."


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Following a redirect would turn the POST into a GET, and might carry failures to a stranger."""

    def redirect_request(self, *_: Any) -> None:
        """Follow none: the answer is an error as it stands."""


def post(url: str, body: Mapping[str, Any], timeout_s: float) -> None:
    """POST `body`; returns once the receiver answered 2xx.

    Raises AlertUndelivered, whose message tells scheme and host of the URL alone.
    """
    # The schemes were checked with the settings; the openers for files and FTP are not among these.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=ssl.create_default_context()),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        _NoRedirects(),
    ):
        opener.add_handler(handler)
    address, headers = _addressed(url)
    request = urllib.request.Request(address, json.dumps(body).encode(), headers, method="POST")  # noqa: S310
    try:
        with opener.open(request, timeout=timeout_s):
            return
    except urllib.error.HTTPError as error:
        reason = f"answered {error.code}"
        error.close()
    except (OSError, HTTPException, ValueError) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        reason = f"did not answer ({type(cause).__name__})"
    # Outside of the handlers: what they caught may know the whole URL.
    raise AlertUndelivered(f"{masked(url)} {reason}.")


def _addressed(url: str) -> tuple[str, dict[str, str]]:
    """The URL without name and password, which urllib would take for a part of the host, and the headers."""
    headers = {"content-type": "application/json; charset=utf-8", "user-agent": "media-assets"}
    parts = urlsplit(url)
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        headers["authorization"] = f"Basic {b64encode(login).decode()}"
    return urlunsplit(parts._replace(netloc=parts.netloc.rsplit("@", 1)[-1])), headers


def masked(url: str) -> str:
    """Scheme and host of a URL; the rest may hold secrets."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "the webhook"
    return printable(f"{parts.scheme}://{parts.hostname}{port}/…", 200)
