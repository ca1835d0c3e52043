"""Prompting: how prompts improve. Searches, bootstrapping and scoring; knows programs and an LM, never weights."""

from cotune.prompting.bootstrap import Bootstrapped, Solved, bootstrap, demos_of
from cotune.prompting.calibrate import CalibratedSearch
from cotune.prompting.demos import RandomDemoSearch
from cotune.prompting.evaluate import Proposal, choose, score_candidate
from cotune.prompting.form_search import FormSearch
from cotune.prompting.joint import JointSearch
from cotune.prompting.propose import Proposer, WritingSearch
from cotune.prompting.reflect import ReflectiveSearch
from cotune.prompting.search import Candidate, Found, Progress, PromptSearch, Rejected, Review, Reviewer, SearchTask

__all__ = [
    "Bootstrapped",
    "CalibratedSearch",
    "Candidate",
    "FormSearch",
    "Found",
    "JointSearch",
    "Progress",
    "PromptSearch",
    "Proposal",
    "Proposer",
    "RandomDemoSearch",
    "ReflectiveSearch",
    "Rejected",
    "Review",
    "Reviewer",
    "SearchTask",
    "Solved",
    "WritingSearch",
    "bootstrap",
    "choose",
    "demos_of",
    "score_candidate",
]
