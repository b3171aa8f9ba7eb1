"""Secrets in URLs: sent to the server, and never logged, written to files or used in keys.

    url = stash_secrets("https://me:word@host/a.gz?id=7&X-Amz-Signature=ab") # where it is read
    url                                                                      # https://host/a.gz?id=7
    restore_secrets(url)                                                     # for the request alone

The secrets are kept in the environment of this process, which its child processes inherit: user and
password by host, as in ~/.netrc; a signature by its URL. Everything between input and request (keys
of actions, records, listings, configs, command lines, logs) has the URL without them.

Imports nothing of ours.
"""

from __future__ import annotations

import hashlib
import os
import re
from typing import Any, TypeVar
from urllib.parse import quote

Given = TypeVar("Given")

# Up to the @, even if a password contains an unescaped / or #: then the text after the : is no
# port. In hf://name@revision/file the name is no user.
_USER = r"(?<!hf://)(?:[^\s/?#]*@|[^\s/?#:\[]*:(?!\d*(?:[/?#\s]|$))\S*?@)"
_USERINFO = re.compile(rf"(?<=://){_USER}")
_URL = re.compile(rf"[A-Za-z][\w.+-]*://{_USER}?[^\s#]*")
_ORIGIN = re.compile(rf"([A-Za-z][\w.+-]*://)({_USER})?([^\s/?#]*)")
# Query parameters that are secrets, and those that belong to them and are removed with them.
_SECRET = re.compile(
    r"(x-(amz|goog)-(signature|credential|security-token)|signature|sig|awsaccesskeyid|jwt|sas"
    r"|\w*(token|secret|passw(or)?d)|pwd|auth(orization)?|credentials?|(\w*api|access|private)"
    r"[_-]?key)=|key=[\w-]{20,}",
    re.I,
)
_COMPANION = re.compile(
    r"(x-(amz|goog)-[\w-]*|expires|policy|key-pair-id|googleaccessid|algorithm|s[eptvr]|spr|sip"
    r"|srt|ss|sk(oid|tid|t|e|s|v))=",
    re.I,
)


def redact(text: str) -> str:
    """A URL, or a text with URLs, without users, passwords and signatures.

    >>> redact("gave up: http://me:word@host/a?id=7&sig=5d%3D&se=2026")
    'gave up: http://host/a?id=7'
    """
    return _URL.sub(lambda found: _strip(found[0]), text) if "://" in text else text


def _strip(url: str) -> str:
    url = _USERINFO.sub("", url)
    address, _, query = url.partition("?")
    words = re.split("[&;]", query)
    if not any(map(_SECRET.match, words)):
        return url
    kept = [word for word in words if not (_SECRET.match(word) or _COMPANION.match(word))]
    return address + "?" * bool(kept) + "&".join(kept)


def stash_secrets(value: Given) -> Given:
    """A value read from outside, with its URLs redacted; their secrets are kept for the request.

    Args:
        value: a text, or lists and mappings of texts; anything else is returned as it is.

    Raises:
        ValueError: two URLs of a list differ in their secrets only.
    """
    made: Any = value
    if isinstance(value, str) and "://" in value:
        for url in _URL.findall(value):
            _remember(url)
        made = redact(value)
    elif isinstance(value, dict):
        made = {name: stash_secrets(inner) for name, inner in value.items()}
    elif type(value) in (list, tuple):
        made = type(made)(stash_secrets(inner) for inner in made)
        if made != value:
            _check_distinct(value, made)
    return made


def _check_distinct(given: Any, made: Any) -> None:
    first: dict[Any, Any] = {}
    for before, after in zip(given, made, strict=True):
        if isinstance(after, str) and first.setdefault(after, before) != before:
            raise ValueError(
                f"two URLs differ in their secrets only: {after}; expected different files"
            )


def _remember(url: str) -> None:
    shown = _strip(url)
    for scheme, user, host in _ORIGIN.findall(url):  # two in mirror=mirror
        if user:
            kept = quote(user[:-1], safe="%:!$&'()*+,;=~")
            os.environ[_env_name(f"user of {scheme}{host}")] = kept
    if (signed := _USERINFO.sub("", url)) != shown:
        os.environ[_env_name(shown)] = signed


def restore_secrets(url: str) -> str:
    """A redacted URL with its secrets, to request it from its server."""
    if "://" not in url:
        return url
    url = os.environ.get(_env_name(url), url)
    origin = _ORIGIN.match(url)
    user = os.environ.get(_env_name(f"user of {origin[0]}")) if origin else None
    return url if user is None else url.replace("://", f"://{user}@", 1)


def check_no_secrets(url: str) -> None:
    """Raises ValueError for a URL that had secrets, if the client of its scheme accepts none."""
    if restore_secrets(url) != url:
        raise ValueError(
            f"{url}: expected credentials in the environment or the cloud's own configuration, "
            "found some in the URL, which only http(s) accepts; set AWS_PROFILE, for example"
        )


def _env_name(of: str) -> str:
    return f"OLMO_URL_{hashlib.sha256(of.encode()).hexdigest()[:24]}"
