"""Proposing: an LM writes instructions, and each is read and checked before a rollout is spent on it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from cotune.errors import BadValueError, WrongTypeError
from cotune.programs import LM, Completion, Program, Request, Sampling
from cotune.programs.budget import complete_within
from cotune.programs.faults import quoted
from cotune.programs.lm import completion_of_plain
from cotune.programs.ranks import Ranks
from cotune.prompting.evaluate import CountingLM
from cotune.prompting.search import PromptSearch, Review, Reviewer, SearchTask, at_least

_FENCE = re.compile(r"^[ \t]*(`{3,})([^\n`]*)$", re.MULTILINE)
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_PREAMBLE = re.compile(
    r"\A(?:(?:sure|certainly|of course|okay|ok|here)\b[^\n]*|[^\n.]{0,40}\b(?:instructions?|prompt))\**:\**[ \t]*\n+",
    re.IGNORECASE,
)
_ASKS_BACK = re.compile(
    r"\A(?:i'?m sorry|i am sorry|i apologi[sz]e|i can(?:no|')t|i am unable|as an ai|(?:could|can|would|will|do) you\b"
    r"|(?:please|kindly) (?:provide|share|clarify|specify|tell|give me)|what (?:would|do) you|how (?:can|may) i)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Written:
    """What came of one request for an instruction: the text, and why it cannot be used; "" where it can."""

    text: str
    flaw: str = ""


@dataclass(frozen=True)
class Proposer:
    """An LM that writes instructions, one plain-text completion each, and the rules that every text has to keep.

    Attributes:
        lm: None for the LM that runs the program, its adapter off.
        temperature: of its sampling.
        max_tokens: longest completion. One that is cut there is not used.
        max_chars: longest instruction.
        keep: two markers, e.g. ("<keep>", "</keep>"): whatever stands between them in an instruction, markers included,
            stands unchanged in everything that replaces it.
        frozen: stages whose instruction stays.
        approve: a person is asked about each text.
        max_instruction_tokens: longest instruction in tokens of the program's LM; None for any.
        reviewer, count: who asks, and the tokens of a text; of the task.
    """

    lm: LM | None = None
    temperature: float = 1.0
    max_tokens: int = 512
    max_chars: int = 4000
    keep: tuple[str, str] | None = None
    frozen: tuple[str, ...] = ()
    approve: bool = False
    max_instruction_tokens: int | None = None
    reviewer: Reviewer | None = None
    count: Callable[[str], int] = len

    def __post_init__(self) -> None:
        at_least(1, "max_tokens", self.max_tokens, "it is the longest completion of the proposer")
        at_least(1, "max_chars", self.max_chars, "it is the longest instruction in characters")
        if self.max_instruction_tokens is not None:
            at_least(1, "max_instruction_tokens", self.max_instruction_tokens, "null sets no limit")
        if self.keep is not None and (len(self.keep) != 2 or not all(self.keep)):
            raise BadValueError(f'keep {self.keep!r} is not two markers, e.g. ["<keep>", "</keep>"].')

    def stages(self, program: Program) -> list[str]:
        """The stages that may be rewritten.

        Raises:
            ValueError: a frozen stage is none of the program's, or all of them are frozen.
        """
        known = list(program.stages)
        for stage in self.frozen:
            if stage not in known:
                raise BadValueError(
                    f'frozen stage "{stage}" is not in {type(program).__name__}, which has {", ".join(known)}.'
                )
        free = [stage for stage in known if stage not in self.frozen]
        if not free:
            raise BadValueError(
                "all stages are frozen, so there is no instruction to rewrite; leave one out of `frozen`."
            )
        return free

    def rules(self, current: str) -> str:
        """What the LM is told about the text that it is to write, as the end of a request."""
        kept = [f"Keep this part word for word, markers included: {span}" for span in self.kept(current)]
        tokens = "" if self.max_instruction_tokens is None else f" and {self.max_instruction_tokens} tokens"
        return "\n".join(
            [
                *kept,
                f"Use at most {self.max_chars} characters{tokens}. Write plain text, no JSON, and ask nothing back.",
                "Reply with the new instruction only, between two lines of three backticks.",
            ]
        )

    def kept(self, instruction: str) -> list[str]:
        """The spans of an instruction that must not change, markers included."""
        if self.keep is None:
            return []
        first, last = map(re.escape, self.keep)
        return re.findall(f"{first}.*?{last}", instruction, re.DOTALL)

    def write(self, asked: Sequence[str], seeds: Sequence[int]) -> list[Completion]:
        """One completion for each request, in one LM batch; "refused" for those that `max_calls` do not last for."""
        assert self.lm is not None
        requests = [
            Request([{"role": "user", "content": text}], seed=seed, adapter="")
            for text, seed in zip(asked, seeds, strict=True)
        ]
        sampling = Sampling(temperature=self.temperature, max_new_tokens=self.max_tokens)
        return complete_within(self.lm, requests, sampling)

    def read_all(
        self, done: Sequence[Completion], asked: Sequence[tuple[str, str]], tried: Mapping[str, set[str]]
    ) -> list[Written]:
        """What each completion holds, once a person has approved or edited it where one is to be asked.

        Args:
            asked: the stage of each, and the instruction that it is to replace.
            tried: stage -> its texts so far, as for `read`; those that can be used are added.
        """
        found = []
        for completion, (stage, current) in zip(done, asked, strict=True):
            found.append(self.read(completion, current, tried[stage]))
            if not found[-1].flaw:
                tried[stage].add(same(found[-1].text))
        if self.reviewer is None:
            return found
        open_ = [at for at, written in enumerate(found) if not written.flaw]
        answers = self.reviewer.review([Review(*asked[at], found[at].text) for at in open_]) if open_ else []
        given = isinstance(answers, (list, tuple)) and all(isinstance(answer, str) for answer in answers)
        if not given or len(answers) != len(open_):
            raise WrongTypeError(
                f"{type(self.reviewer).__name__}.review returned {quoted(answers)} for {len(open_)} texts; return for "
                'each the text to take, and "" for one that is refused.'
            )
        for at, answer in zip(open_, answers, strict=True):
            stage, current = asked[at]
            if not answer:
                found[at] = replace(found[at], flaw="refused by a person")
            elif answer != found[at].text:
                others = tried[stage] - {same(found[at].text)}  # an edit may be of letter case alone
                found[at] = Written(answer, self._flaw(answer, current, others))
                tried[stage].add(same(answer))
        return found

    def read(self, completion: Completion, current: str, tried: Collection[str]) -> Written:
        """The instruction that a completion holds, and what is wrong with it.

        Args:
            current: the instruction that it is to replace.
            tried: texts for this stage that were tried or rejected before, as `same` makes them.
        """
        text = _instruction_in(completion.text)
        if completion.finished == "too_long":
            return Written(text, "the request does not fit the proposer's context window")
        if completion.finished == "refused":
            return Written(text, "the proposer would not answer, or has made its max_calls")
        if completion.finished == "length":
            return Written(completion.text.strip(), f"cut at max_tokens ({self.max_tokens})")
        # Within a fence "Please give the team" is an instruction, outside it may be the proposer's own words.
        if not _blocks(_THOUGHT.sub("", completion.text)) and _ASKS_BACK.match(text):
            return Written(text, "a question or an excuse")
        return Written(text, self._flaw(text, current, tried))

    def _flaw(self, text: str, current: str, tried: Collection[str]) -> str:
        if not text:
            return "empty"
        if _is_json(text):
            return "JSON"
        if len(text) > self.max_chars:
            return f"longer than max_chars ({self.max_chars})"
        if self.max_instruction_tokens is not None and self.count(text) > self.max_instruction_tokens:
            return f"longer than max_instruction_tokens ({self.max_instruction_tokens})"
        if any(span not in text for span in self.kept(current)):
            return "a part to keep is missing or changed"
        return "tried before" if same(text) in tried or same(text) == same(current) else ""


class WritingSearch(PromptSearch):
    """A search that has an LM write instructions.

    Args:
        proposer: the LM that writes; None for the one that runs the program, its adapter off.
        temperature, max_tokens: of the proposer. A text that is cut at max_tokens is not used.
        max_chars: longest instruction.
        keep: two markers; what stands between them in an instruction stays word for word.
        frozen: stages whose prompt is not changed.
        max_instruction_tokens: longest instruction in tokens of the LM that runs the program, which has to be in this
            process; None for any.
        approve: ask a person about each text before a run is spent on it: to take it, to refuse it or to edit it.
    """

    def __init__(
        self,
        proposer: LM | None = None,
        temperature: float = 1.0,
        max_tokens: int = 512,
        max_chars: int = 4000,
        keep: tuple[str, str] | None = None,
        frozen: Sequence[str] = (),
        approve: bool = False,
        max_instruction_tokens: int | None = None,
    ) -> None:
        self.proposer = Proposer(
            proposer, temperature, max_tokens, max_chars, keep, tuple(frozen), approve, max_instruction_tokens
        )


class _OnceLM:
    """An LM that the first of several processes asks, for all: what is drawn or paid for is so once. It refuses what
    its `max_calls` do not last for."""

    def __init__(self, lm: LM, ranks: Ranks) -> None:
        self._lm, self._ranks = lm, ranks

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        if self._ranks.count == 1:
            return complete_within(self._lm, requests, sampling)

        def asked() -> list[dict[str, Any]]:
            return [asdict(one) for one in complete_within(self._lm, requests, sampling)] if self._ranks.first else []

        return [completion_of_plain(one) for one in self._ranks.share_out(asked, self._lm)[0]]


@dataclass
class Spent:
    """Counts the LM calls of a search by role.

    Attributes:
        program, proposer: the LM of each role, which counts.
    """

    program: CountingLM
    proposer: CountingLM

    @classmethod
    def of(cls, task: SearchTask, proposer: Proposer) -> tuple[Spent, SearchTask, Proposer]:
        """The counters, and the task and the proposer that count with them. A proposer that has to be loaded is.

        Raises:
            ValueError: a person is to be asked, and the task has no reviewer; or tokens are to be counted, and the LM
                has no tokenizer.
        """
        codec = getattr(task.runner.lm, "codec", None)
        if proposer.max_instruction_tokens is not None and codec is None:
            raise BadValueError("max_instruction_tokens needs an LM with a tokenizer in this process; use max_chars.")
        if proposer.approve and task.reviewer is None:
            raise BadValueError(
                "approve asks a person, but this SearchTask has no reviewer; give it one, or leave approve out."
            )
        load = getattr(proposer.lm, "load", None)
        if callable(load):
            load()
        asked = _OnceLM(task.runner.lm if proposer.lm is None else proposer.lm, task.runner.ranks)
        spent = cls(CountingLM(task.runner.lm), CountingLM(asked))
        counted = replace(task, runner=replace(task.runner, lm=spent.program))
        reviewer = task.reviewer if proposer.approve else None
        count = len if codec is None else lambda text: len(codec.encode(text))
        return spent, counted, replace(proposer, lm=spent.proposer, reviewer=reviewer, count=count)

    @property
    def calls(self) -> dict[str, int]:
        return {"program": self.program.calls, "proposer": self.proposer.calls}

    @property
    def total(self) -> int:
        return self.program.calls + self.proposer.calls

    def note(self) -> str:
        return f"LM calls: {self.program.calls} of the program, {self.proposer.calls} of the proposer"


def _instruction_in(text: str) -> str:
    """The instruction in what an LM wrote: the longest fenced block, else all of it without a line that leads in.

    >>> _instruction_in("Sure, here is a better one:\\n```text\\nName the species.\\n```\\nI hope it helps!")
    'Name the species.'
    >>> _instruction_in('Here is the new instruction:\\n"Name the species."')
    'Name the species.'
    """
    text = _THOUGHT.sub("", text).strip()
    if blocks := _blocks(text):
        return max(blocks, key=len)
    text = _PREAMBLE.sub("", text, count=1).strip().strip("`").strip()
    quoted = len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1]
    return text[1:-1].strip() if quoted else text


def _blocks(text: str) -> list[str]:
    """The fenced blocks of a text, those within them included.

    Within a block a fence opens another if it names a language, is longer, or follows the block's text up to a colon. A
    block that is never closed ends at the last fence that could close it, else with the text.
    """
    found: list[str] = []
    open_: list[int] = []  # the backticks of each fence that is open
    start = last = len(text)
    for fence in _FENCE.finditer(text):
        size, bare = len(fence[1]), not fence[2].strip()
        if not open_:
            start, last, open_ = fence.end(), len(text), [size]
            continue
        if bare and size == open_[0]:
            last = fence.start()
        leads_in = len(open_) == 1 and text[start : fence.start()].rstrip().endswith(":")
        if bare and size == open_[-1] and not leads_in:
            open_.pop()
            if not open_:
                found.append(text[start : fence.start()].strip())
        elif size >= open_[-1]:
            open_.append(size)
    rest = text[start:last].strip() if open_ else ""
    return found or ([rest] if rest else [])


def same(text: str) -> str:
    """What two texts have in common that differ in white space and letter case alone.

    >>> same("Name  the species.\\n") == same("name the species.")
    True
    """
    return " ".join(text.split()).lower()


def proposal_seed(seed: int, what: str) -> int:
    """A 63-bit seed of a proposal's sampling, from what the proposal is."""
    return int.from_bytes(hashlib.sha256(f"{seed}|proposal|{what}".encode()).digest()[:8], "big") >> 1


def fenced(text: str) -> str:
    """The text between two fences that it does not hold itself.

    >>> fenced("Name it.")
    '```\\nName it.\\n```'
    """
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}\n{text}\n{fence}"


def cut(text: str, limit: int) -> str:
    """The text, or its beginning and end where it is longer than `limit`.

    >>> cut("a" * 10, 4)
    'aa … (6 characters left out) … aa'
    """
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} … ({len(text) - 2 * half} characters left out) … {text[len(text) - half :]}"


def _is_json(text: str) -> bool:
    if text[0] in "{[":
        with suppress(ValueError):
            json.loads(text)
            return True
    return False
