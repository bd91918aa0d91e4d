"""JSON schema's `format`s of texts, as regular expressions of the whole text.

Each allows texts that are of the format, not always all of them: no leap seconds, no years before 1000, no
quoted or literal addresses.
"""

from __future__ import annotations

_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_WORD = "[0-9a-fA-F]{1,4}"
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_YEAR = "[12][0-9]{3}"
_LEAP_YEAR = "(?:[12][0-9](?:0[48]|[2468][048]|[13579][26])|(?:1[26]|2[048])00)"
_DATE = (
    f"(?:{_YEAR}-(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])|{_YEAR}-(?:0[13-9]|1[0-2])-(?:29|30)"
    f"|{_YEAR}-(?:0[13578]|1[02])-31|{_LEAP_YEAR}-02-29)"
)
_CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_CLOCK}:[0-5][0-9](?:\.[0-9]{{1,9}})?(?:Z|[+-]{_CLOCK})"
_DAY_TIME = "T(?:[0-9]+H(?:[0-9]+M)?(?:[0-9]+S)?|[0-9]+M(?:[0-9]+S)?|[0-9]+S)"
_DAYS = "(?:[0-9]+Y(?:[0-9]+M(?:[0-9]+D)?)?|[0-9]+M(?:[0-9]+D)?|[0-9]+D)"
_HOSTNAME = rf"{_LABEL}(?:\.{_LABEL}){{0,8}}"
_URI_CHARACTER = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})"


def _address_of_words() -> str:
    """IPv6: eight words, or fewer with one gap of at least a word's width."""
    whole = f"(?:{_WORD}:){{7}}{_WORD}"
    gaps = [
        f"(?:{_WORD}(?::{_WORD}){{0,{before - 1}}})?::(?:{_WORD}(?::{_WORD}){{0,{6 - before}}})?"
        for before in range(1, 7)
    ]
    return "|".join([whole, *gaps])


FORMATS = {
    "date": _DATE,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": f"P(?:[0-9]+W|{_DAYS}(?:{_DAY_TIME})?|{_DAY_TIME})",
    "email": rf"[A-Za-z0-9_+-]+(?:\.[A-Za-z0-9_+-]+)*@{_HOSTNAME}",
    "hostname": _HOSTNAME,
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "ipv6": _address_of_words(),
    "time": _TIME,
    "uri": rf"[A-Za-z][A-Za-z0-9+.-]*:(?://)?{_URI_CHARACTER}+(?:/{_URI_CHARACTER}*)*"
    rf"(?:\?(?:{_URI_CHARACTER}|[/?])*)?(?:#(?:{_URI_CHARACTER}|[/?])*)?",
    "uuid": "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
}
