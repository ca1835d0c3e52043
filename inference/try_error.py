"""TryError: why one try of a request to an endpoint failed, and what the server's words for it mean."""

from __future__ import annotations

import email.utils
import re
import time
from typing import Any

_TOO_LONG = re.compile(
    r"context.?(length|window|size)|maximum.{0,20}(context|length|tokens)|too (long|many tokens)", re.I
)
_SPENT = re.compile(
    r"insufficient.(quota|credit|balance|funds)|exceeded your current quota|billing.(hard.)?limit|(out of|no) credit"
    r"|key limit exceeded",
    re.I,
)
"""A 429 or 403 of an empty account. A 429 that says where to pay for higher limits is an ordinary one."""
_FLAGGED = re.compile(r"flagged|moderation|content.?(policy|filter|management)|guardrail|safety", re.I)
_NOT_TAKEN = (
    r"(?:\b(?:unsupported|unknown|unrecogni[sz]ed|unexpected|unavailable|invalid|deprecated|forbidden|only|must)\b"
    r"|(?:\bnot|n't)\s(?:\w+\s)?(?:support|permit|allow|recogni[sz]|available|take|accept))"
)


class TryError(Exception):
    """One try that failed.

    Args:
        what: it was, in words.
        status: of HTTP; 0 for none.
        text: what the server said.
        wait: seconds that it orders to wait.
        parameter: that it names as the one at fault.
        look_at: what may be wrong, where the status does not say it.
    """

    def __init__(
        self,
        what: str,
        status: int = 0,
        text: str = "",
        wait: float = 0.0,
        parameter: str = "",
        look_at: str = "is it running, and is the address right?",
    ) -> None:
        super().__init__(what)
        self.status, self.text, self.wait, self.parameter = status, text, wait, parameter
        self._look_at = look_at

    def way_out(self, concurrency: int) -> str:
        """What to look at where every try fails so, with so many requests under way at once."""
        if self.status == 429:
            return (
                f"it allows fewer requests than come; lower this LM's concurrency (now {concurrency}), or wait and "
                "start the same command again."
            )
        if self.status:
            return "its log or its status page; when it answers again, start the same command again."
        return self._look_at

    @property
    def too_long(self) -> bool:
        """Whether the prompt is longer than the model's context."""
        return bool(_TOO_LONG.search(self.text))

    @property
    def spent(self) -> bool:
        """Whether the account has nothing left to pay with."""
        return self.status == 402 or (self.status in (403, 429) and _SPENT.search(self.text) is not None)

    @property
    def may_be_content(self) -> bool:
        """Whether it is a 403, which servers answer to a key without rights and to content that they will not have."""
        return self.status == 403 and not self.spent

    @property
    def flagged(self) -> bool:
        """Whether the server speaks of the content, and not of the key."""
        return _FLAGGED.search(self.text) is not None

    def blames(self, name: str) -> bool:
        """Whether the server says that it is this parameter that it does not take. A bare name is not enough: the
        message may quote the prompt.

        >>> TryError("", text="Unsupported value: 'temperature' does not support 0.").blames("temperature")
        True
        >>> TryError("", text="Blocked: 'At which temperature does it melt?'").blames("temperature")
        False
        """
        if self.parameter:
            return self.parameter.split(".")[0] == name
        word = rf"(?<!\w)(?-i:{name})(?!\w)"
        near = re.compile(rf"{_NOT_TAKEN}.{{0,60}}?{word}|{word}.{{0,60}}?{_NOT_TAKEN}", re.I | re.S)
        return not self.too_long and near.search(self.text) is not None


def status_fault(error: Any) -> TryError:
    """The fault of an answer with another status than 200, from the client's error."""
    body = error.body if isinstance(error.body, dict) else {}
    said = str(body.get("message") or error.message)
    text = f"{said} {body.get('code') or ''} {body.get('type') or ''}"
    parameter = str(body.get("param") or "")
    return TryError(f"status {error.status_code}, {said}", error.status_code, text, _ordered(error.response), parameter)


def answer_fault(content: bytes, said: Any, error: Exception) -> TryError:
    """The fault of an answer with status 200 that holds no completion: what it says went wrong, or how it begins."""
    told = said.get("error") if isinstance(said, dict) else None
    if told:
        text = str(told.get("message") or told) if isinstance(told, dict) else str(told)
        return TryError(
            f"an error in place of a completion: {text}",
            text=text,
            look_at="what it says went wrong, and the log of the server behind that address.",
        )
    shown = content[:120].decode(errors="replace")
    return TryError(
        f"an answer that holds no completion ({type(error).__name__}): {shown}",
        text=shown,
        look_at="is it an endpoint with chat completions, and does the address end with the API's version (/v1)?",
    )


def connection_fault(error: BaseException) -> TryError:
    """The fault of a connection: the innermost exception says it best."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    if isinstance(error, ConnectionRefusedError):
        return TryError("the connection is refused")
    return TryError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def _ordered(response: Any) -> float:
    """The seconds of a Retry-After header, which may be a number or a date; 0 without one."""
    given = str(response.headers.get("retry-after") or "")
    try:
        return max(0.0, float(given))
    except ValueError:
        date = email.utils.parsedate_tz(given)
        return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else 0.0
