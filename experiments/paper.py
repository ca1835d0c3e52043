"""The paper's numbers: test accuracy in per cent, to stand beside a table's own."""

from __future__ import annotations

SOURCE = "Soylu, Potts, Khattab: Fine-Tuning and Prompt Optimization (EMNLP 2024, arXiv 2407.10930), Table 1; 3 seeds"

TASKS = ("HotPotQA", "GSM8K", "Iris")
LMS = ("mistral-7b-instruct-v0.2", "llama-2-7b-chat", "llama-3-8b-instruct")

_ROWS: dict[str, tuple[tuple[float | None, ...], ...]] = {
    # strategy: (HotPotQA, GSM8K, Iris), each for the three LMs; None where the paper has a dash
    "vanilla": ((17.2, 13.2, 31.6), (40.3, 24.0, 72.7), (26.0, 0.0, 48.0)),
    "p": ((33.8, 33.3, 46.9), (46.4, 26.0, 77.9), (57.3, 56.7, 79.3)),
    "w": ((22.9, 12.2, 34.8), (40.7, 24.0, 75.1), (29.3, None, 37.3)),
    "p -> p": ((33.8, 32.6, 46.5), (47.7, 24.7, 77.6), (59.3, 64.0, 82.0)),
    "w -> w": ((24.0, 13.0, 34.4), (42.8, 24.1, 44.1), (38.0, None, 39.3)),
    "p -> w": ((36.3, 32.7, 42.8), (47.3, 27.3, 77.6), (30.7, 26.7, 44.0)),
    "w -> p": ((33.0, 34.2, 43.6), (48.3, 26.6, 78.9), (66.7, None, 78.7)),
    "p -> w -> p": ((37.6, 34.8, 46.7), (46.8, 26.3, 77.0), (52.7, 65.3, 79.3)),
}


def paper_scores(task: str, strategy: str) -> dict[str, float | None]:
    """LM -> accuracy in per cent (None: a dash), {} where the paper has no such row or task.

    >>> paper_scores("Iris", "w -> p")
    {'mistral-7b-instruct-v0.2': 66.7, 'llama-2-7b-chat': None, 'llama-3-8b-instruct': 78.7}
    """
    if task not in TASKS or strategy not in _ROWS:
        return {}
    return dict(zip(LMS, _ROWS[strategy][TASKS.index(task)], strict=True))
