"""Rollout jobs as data: how many prompts of which stages, what they share, and how much they write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.peers import Batch

Phase = Literal["cold", "warm", "again"]
Encode = Callable[[Sequence[Mapping[str, str]]], list[int]]
"""A chat -> its token ids, the template's included."""


@dataclass(frozen=True)
class Stage:
    """Prompts that share their first tokens, as those of one stage of a program do. All in tokens, at least."""

    prompts: int
    shared: int
    own: int


@dataclass(frozen=True)
class Job:
    """A batch to generate, in up to three phases.

    Attributes:
        stages: their prompts stand mixed in the batch, by turns.
        new: tokens to write a prompt: exactly, or at most where `ends`.
        ends: whether an end-of-turn token ends a row; then the questions ask for answers of very different length.
        phases: "cold" begins with shared parts never seen before; "warm" keeps those and brings new own parts, as each
            next batch of a search does; "again" asks the same batch once more.
    """

    name: str
    stages: tuple[Stage, ...]
    new: int
    ends: bool = False
    phases: tuple[Phase, ...] = ("cold",)

    def smaller(self, prompts: int) -> Job:
        """The same job with about that many prompts, at least one a stage."""
        each = max(1, prompts // len(self.stages))
        return replace(self, stages=tuple(replace(s, prompts=min(s.prompts, each)) for s in self.stages))


JOBS = {
    job.name: job
    for job in (
        Job("main", (Stage(64, 986, 54),), new=32, phases=("cold", "warm", "again")),
        Job("small", (Stage(32, 375, 20),), new=16, ends=True),
        Job("no sharing", (Stage(1, 0, 320),) * 32, new=32),
        Job("short", (Stage(64, 60, 20),), new=8),
        Job("long", (Stage(16, 2500, 300),), new=64),
        Job("uneven", (Stage(64, 500, 40),), new=96, ends=True),
        Job("two stages", (Stage(32, 800, 60), Stage(32, 500, 60)), new=32),
        Job("hot cache", (Stage(64, 500, 40),), new=16, phases=("cold", "again")),
    )
}
"""The main job, a small one for a quick look, and the six shapes on which no peer may be faster."""

_QUESTIONS = (
    "Answer with one word: which is furthest north?",
    "List ten countries, each with a sentence about its climate.",
    "Which lies north of the other, and why?",
    "Write a short poem about the smallest of them.",
)


def batches(job: Job, round_: int, encode: Encode) -> Iterator[tuple[Phase, Batch]]:
    """The batch of each phase. Another round's share nothing with it beyond the chat template's first tokens."""
    batch: Batch | None = None
    for number, phase in enumerate(job.phases):
        if phase != "again" or batch is None:
            batch = make_batch(job, encode, salt=round_, questions=number)
        yield phase, batch


def make_batch(job: Job, encode: Encode, *, salt: int, questions: int = 0, new: int | None = None) -> Batch:
    """Chats and ids of a job's prompts. Equal salts have equal shared parts within a job, and jobs have none in common:
    no side may find one job's prompts in its cache because another job has asked them. `questions` numbers own parts.
    """
    names = [f"{job.name} {salt}.{at}" for at in range(len(job.stages))]
    columns = [_stage_chats(stage, encode, name, questions) for stage, name in zip(job.stages, names, strict=True)]
    rows = max(map(len, columns))
    chats = [column[row] for row in range(rows) for column in columns if row < len(column)]
    return Batch(chats, [encode(chat) for chat in chats], new or job.new, job.ends)


def _stage_chats(stage: Stage, encode: Encode, salt: str, questions: int) -> list[list[dict[str, str]]]:
    facts = _grown(
        f"Collection {salt}. Answer from these facts.",
        lambda n: f" Country {n} lies {n * 7 % 90} degrees north.",
        lambda text: len(encode([{"role": "system", "content": text}])),
        stage.shared,
    )
    empty = len(encode(_chat(facts, "")))
    return [
        _chat(
            facts,
            _grown(
                f"Question {questions}.{row}: {_QUESTIONS[row % len(_QUESTIONS)]}",
                lambda n, row=row: f" Compare {row * 13 + n}.",  # type: ignore[misc]
                lambda text: len(encode(_chat(facts, text))) - empty,
                stage.own,
            ),
        )
        for row in range(stage.prompts)
    ]


def _chat(system: str, user: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def _grown(text: str, addition: Callable[[int], str], length: Callable[[str], int], least: int) -> str:
    """The text with numbered additions until its length in tokens is reached, doubling and then halving the steps."""
    parts = [addition(n) for n in range(1, max(2, least))]
    low, high = 0, len(parts)
    while low < high:
        middle = (low + high) // 2
        if length(text + "".join(parts[:middle])) >= least:
            high = middle
        else:
            low = middle + 1
    return text + "".join(parts[:low])
