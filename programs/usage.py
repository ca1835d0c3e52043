"""Usage: what an LM's completions have cost, in calls, tokens and dollars."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Usage:
    """Counts that add up.

    Attributes:
        calls: completions that were paid for.
        stored: completions that a store had, and nobody paid for.
        tokens_in, tokens_out: of the paid calls, as the endpoint counts them.
        dollars: of the paid calls, as far as prices are known.
        retries: requests that were sent again, because the first failed.
        refused: requests that the endpoint would not answer.
        estimated: calls whose tokens are a guess from the texts' lengths, since the answer did not say.

    >>> Usage(calls=2, tokens_in=30) + Usage(calls=1, tokens_in=5, dollars=0.25)
    Usage(calls=3, stored=0, tokens_in=35, tokens_out=0, dollars=0.25, retries=0, refused=0, estimated=0)
    """

    calls: int = 0
    stored: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    dollars: float = 0.0
    retries: int = 0
    refused: int = 0
    estimated: int = 0

    @property
    def tokens(self) -> int:
        return self.tokens_in + self.tokens_out

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __sub__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, field.name) - getattr(other, field.name) for field in fields(self)))

    def __str__(self) -> str:
        """A line for logs and reports.

        >>> str(Usage(calls=1200, stored=7, tokens_in=50_000, tokens_out=2_000, dollars=0.123))
        '1,200 calls (and 7 from the store), 50,000 tokens read and 2,000 written, $0.12'
        """
        parts = [
            f"{self.calls:,} call{'s' * (self.calls != 1)}"
            + (f" (and {self.stored:,} from the store)" * bool(self.stored)),
            f"{self.tokens_in:,} tokens read and {self.tokens_out:,} written",
            *([f"${self.dollars:,.2f}"] if self.dollars else []),
            *([f"{self.retries:,} sent again"] if self.retries else []),
            *([f"{self.refused:,} refused"] if self.refused else []),
            *([f"tokens of {self.estimated:,} guessed"] if self.estimated else []),
        ]
        return ", ".join(parts)
