"""How many examples a claim over all inputs is tried on: few by default, new ones each time; or as many as EXAMPLES."""

from __future__ import annotations

import os

from hypothesis import settings


def claimed(by_default: int) -> settings:
    return settings(max_examples=int(os.environ.get("EXAMPLES", by_default)), deadline=None, database=None)
