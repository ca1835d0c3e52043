"""Prompting: how prompts improve. Searches, bootstrapping and scoring; knows programs and an LM, never weights."""

from cotune.prompting.bootstrap import Bootstrapped, Solved, bootstrap, demos_of
from cotune.prompting.demos import RandomDemoSearch
from cotune.prompting.evaluate import Proposal, choose, score_candidate
from cotune.prompting.search import Candidate, Found, Progress, PromptSearch, SearchTask

__all__ = [
    "Bootstrapped",
    "Candidate",
    "Found",
    "Progress",
    "PromptSearch",
    "Proposal",
    "RandomDemoSearch",
    "SearchTask",
    "Solved",
    "bootstrap",
    "choose",
    "demos_of",
    "score_candidate",
]
