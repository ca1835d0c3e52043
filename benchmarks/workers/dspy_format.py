"""DSPy's chat format without a server: how it asks a question with reasoning, and what it reads in a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.workers.protocol import serve


def render(questions: Sequence[str]) -> dict[str, Any]:
    """The messages of each question, and the text that ends a completion."""
    adapter, signature = _chain_of_thought()
    return {
        "messages": [adapter.format(signature, [], {"question": question}) for question in questions],
        "stop": "[[ ## completed ## ]]",
    }


def read(texts: Sequence[str]) -> list[str | None]:
    """The field "answer" of each completion; None where DSPy does not parse it."""
    adapter, signature = _chain_of_thought()
    found: list[str | None] = []
    for text in texts:
        try:
            found.append(str(adapter.parse(signature, text)["answer"]))
        except Exception:  # whatever it raises, the answer is lost to its user
            found.append(None)
    return found


def _chain_of_thought() -> tuple[Any, Any]:
    import dspy

    return dspy.ChatAdapter(), dspy.ChainOfThought("question -> answer").predict.signature


if __name__ == "__main__":
    serve({"render": render, "read": read})
