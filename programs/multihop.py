"""The paper's multi-hop question answering: a query writer for each hop, then an answerer."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from cotune.programs.program import Call, Outputs, Program, Stage
from cotune.programs.reasoning import with_reasoning
from cotune.programs.retrieval import Retriever, retrieve
from cotune.programs.signature import Signature

_SEARCH = "Write a short search query that will find what is still missing to answer the question."
_ANSWER = "Answer the question from the context with a few words."


class MultiHopQA(Program):
    """HotPotQA as in the paper: two query stages, each its own, and an answer stage; contexts deduplicated.

    Args:
        retriever: finds passages for a query.
        k: passages a hop.
        reasoning: chain of thought in every stage, as the paper has it.
    """

    def __init__(self, retriever: Retriever, k: int = 3, reasoning: bool = True) -> None:
        self.retriever, self.k = retriever, k
        hop = Signature.parse("context, question -> search_query: line", instruction=_SEARCH)
        answer = Signature.parse("context, question -> answer: line", instruction=_ANSWER)
        if reasoning:
            hop, answer = with_reasoning(hop), with_reasoning(answer)
        self.first_hop, self.second_hop, self.answer = Stage(hop), Stage(hop), Stage(answer)

    def run(self, question: str) -> Generator[Call, Outputs, Mapping[str, Any]]:
        passages: list[str] = []
        for hop in (self.first_hop, self.second_hop):
            found = yield hop(context=passages, question=question)
            for passage in retrieve(self.retriever, found["search_query"], self.k):
                if passage not in passages:
                    passages.append(passage)
        return (yield self.answer(context=passages, question=question))
