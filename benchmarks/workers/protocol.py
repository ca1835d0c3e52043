"""JSON lines between a benchmark and a peer's process. Standard library only: every peer's environment imports it.

The benchmark writes one request a line to the worker's stdin, `{"call": NAME, ...arguments}`; the worker writes one
answer a line, `{"answer": ...}` or `{"error": TEXT}`. It ends with its stdin.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

Handler = Callable[..., Any]
"""Takes the request's arguments by name; what it returns must be JSON."""


def serve(handlers: Mapping[str, Handler]) -> None:
    """Answers requests until stdin ends.

    The process's own stdout is led to stderr first: libraries print there, in this process and in its children, and
    a stray line would be taken for an answer.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            said = {"answer": handlers[request.pop("call")](**request)}
        except Exception:  # reported to the benchmark, which raises
            said = {"error": traceback.format_exc()}
        answers.write(json.dumps(said) + "\n")
        answers.flush()
