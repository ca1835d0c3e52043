"""Rejection sampling: learn what passing runs wrote, as the paper does."""

from __future__ import annotations

from cotune.datamodules import Collected, Trace
from cotune.lightning_modules.objectives.objective import Weighted


class Rejection(Weighted):
    """Completion loss on the calls of passing runs; where `gold_answers` asks for it, on gold answers of the others."""

    def rows(self, collected: Collected) -> list[Trace]:
        """Every stage call of each passing run that is not an earlier one over again, and then the gold answers."""
        passing = [trace for attempt in collected.successes for trace in collected.traces(attempt)]
        return passing + collected.gold_traces()
