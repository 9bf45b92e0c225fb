"""URIs that are told or kept, without what they let in by."""

from __future__ import annotations

import re

_CREDENTIALS = re.compile(r"(?<=://)[^/\s]*@")


def without_credentials(text: str) -> str:
    """A text with URIs in it, such as http://user:password@server, without the user and the password of each."""
    return _CREDENTIALS.sub("", text)
