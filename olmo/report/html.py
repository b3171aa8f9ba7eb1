"""Pages of one file: a template of web/, filled in, with its styles, programs and data.

Everything is text until the template marks it up (jinja2's autoescape); data for the page's program
is compressed, so nothing in it is ever markup. The page's policy allows its own programs only, and
no request.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import os
import re
from pathlib import Path
from typing import Any

from olmo.runtime.log import format_bytes, format_duration
from olmo.runtime.numbers import to_json
from olmo.runtime.urls import redact

WEB = Path(__file__).with_name("web")
# What is left as it is, a URL; and what is hidden, a home folder and an absolute path but its name.
_PLACE = re.compile(
    r"(?P<url>\b(?!file:)[A-Za-z][\w+.-]*://[^\s/][^\s'\"<>]*)"
    r"|(?<![\w./])/(?:home|Users)/[\w.-]+(?![\w./-])"
    r"|(?:file:(?://)?)?(?:(?<![\w.}])|(?<=-[A-Z]))(?:~\w*)?/{1,2}"
    r"(?:[^\s/:'\"<>|]+/)+(?P<last>[^\s/:'\",;)<>|]*)"
)


def render(
    template: str,
    context: dict[str, Any],
    data: Any,
    is_live: bool = False,
    program: str | None = None,
) -> str:
    """A page. `data` is what its program reads; `is_live` allows requests to its own server.

    `program` is the template whose program it has, by default its own.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(WEB),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": format_duration, "size": format_bytes}
    programs = [vega_bundle(), (WEB / "common.js").read_text(), read_program(program or template)]
    found = environment.get_template(template).render(
        **context,
        style=(WEB / "page.css").read_text(),
        policy=content_policy(programs, is_live),
        programs=[_as_markup(program) for program in programs],
        data=compress(data),
    )
    return found


def read_program(template: str) -> str:
    return (WEB / template).with_suffix(".js").read_text()


def compress(data: Any) -> str:
    """JSON as base64 of gzip, which a page's `unpack` reads."""
    text = to_json(data, separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(text, 6, mtime=0)).decode()


def content_policy(programs: list[str], is_live: bool) -> str:
    """The page's Content-Security-Policy. Vega compiles expressions, which counts as eval."""
    digests = (hashlib.sha256(program.encode()).digest() for program in programs)
    scripts = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    connect = "'self'" if is_live else "'none'"
    return (
        f"default-src 'none'; script-src 'unsafe-eval' {scripts}; style-src 'unsafe-inline'; "
        f"img-src data:; connect-src {connect}; base-uri 'none'; form-action 'none'"
    )


@functools.cache
def vega_bundle() -> str:
    """Vega, Vega-Lite and vega-embed as one program, of the version that altair writes for."""
    import vl_convert

    bundle: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # the stub is wrong
    return bundle.replace("</script", "<\\/script")


def _as_markup(program: str) -> Any:
    from markupsafe import Markup

    if "</script" in program.lower():
        raise ValueError("a program of a page must not contain the end of a script element")
    return Markup(program)  # ours and Vega's, never data


def _hide(found: re.Match[str]) -> str:
    return found["url"] or ("…" if found["last"] is None else f"…/{found['last']}")


def hide_paths(value: Any) -> Any:
    """A value for anyone to see: no credentials of URLs, and of absolute paths the last part.

    >>> hide_paths("/home/me/data/a.npy and https://host/a/b")
    '…/a.npy and https://host/a/b'
    """
    if isinstance(value, str):
        text = redact(value).replace(os.getcwd() + os.sep, "")
        return _PLACE.sub(_hide, text)
    if isinstance(value, dict):
        return {str(hide_paths(str(key))): hide_paths(inner) for key, inner in value.items()}
    return [hide_paths(inner) for inner in value] if isinstance(value, list | tuple) else value
