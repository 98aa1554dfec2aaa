"""Takes passwords, keys and signatures out of text that is logged or kept."""

from __future__ import annotations

import re

HIDDEN = "***"

_NAMES = (
    r"[\w.\-]{0,40}(?:token|secret|passw(?:or)?d|passphrase|signature|credential|access[_\-]?key(?:[_\-]?id)?|api[_\-]?key"
    r"|account[_\-]?key|connection[_\-]?string)[\w.\-]{0,40}"
)
_RULES = [
    # A password may have a slash, as keys of stores do; but the digits of a port are none.
    (re.compile(r"(://)[^\s'\"/@:]+:(?!\d{1,5}/)[^\s'\"@]*@"), rf"\1{HIDDEN}@"),
    (re.compile(r"(://)[^\s'\"/]*@"), rf"\1{HIDDEN}@"),
    # A query has nothing that names a file, and stores put signatures there under many names.
    (re.compile(r"(://[^\s?'\"]*\?)[^\s'\"]*[^\s'\",:;.)\]}]"), rf"\1{HIDDEN}"),
    (re.compile(rf"(?i)(\b(?:{_NAMES}|sig|pwd|authorization)=)[^\s&'\",;]+"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)([?&](?:key|auth|sas)=)[^\s&'\",;]+"), rf"\1{HIDDEN}"),
    (re.compile(rf"(?i)((['\"])(?:{_NAMES}|key|sig|pwd|auth)\2\s*[:=]\s*(['\"]))(?:(?!\3).)+"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)(\b(?:bearer|basic)\s+)[\w.~+/=\-]{8,}"), rf"\1{HIDDEN}"),
]


def redacted(text: str) -> str:
    """The text with `***` for what gives access: user and password in a URL, its query, and values of such names.

    Redacted text stays as it is when it is redacted again.
    """
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text
