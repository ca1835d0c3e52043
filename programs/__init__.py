"""Programs: what runs. Signatures, prompts, stages, templates, rollouts and metrics; no torch, no Lightning."""

from cotune.programs.demos import draw_demos, hide_own_demos, labelled_demos
from cotune.programs.example import Example, content_id
from cotune.programs.faults import Failure, Fault, Faults, FaultyProgramError, faults_of
from cotune.programs.lm import LM, Completion, Request, Sampling
from cotune.programs.metrics import Metric, exact_match, first_line_number
from cotune.programs.multihop import MultiHopQA
from cotune.programs.program import Call, Program, Stage
from cotune.programs.prompt import Demo, Prompt, Prompts, prompts_from_dict, prompts_id, prompts_to_dict
from cotune.programs.reasoning import DescribeThenDecide, Predict
from cotune.programs.retrieval import BM25, Dense, Encoder, Retriever, RetrieverError, SentenceEncoder, retrieve
from cotune.programs.rollout import Rollout, Step, mean_score, rollouts
from cotune.programs.signature import Signature
from cotune.programs.template import ChatTemplate, ParseError, Template

__all__ = [
    "BM25",
    "LM",
    "Call",
    "ChatTemplate",
    "Completion",
    "Demo",
    "Dense",
    "DescribeThenDecide",
    "Encoder",
    "Example",
    "Failure",
    "Fault",
    "Faults",
    "FaultyProgramError",
    "Metric",
    "MultiHopQA",
    "ParseError",
    "Predict",
    "Program",
    "Prompt",
    "Prompts",
    "Request",
    "Retriever",
    "RetrieverError",
    "Rollout",
    "Sampling",
    "SentenceEncoder",
    "Signature",
    "Stage",
    "Step",
    "Template",
    "content_id",
    "draw_demos",
    "exact_match",
    "faults_of",
    "first_line_number",
    "hide_own_demos",
    "labelled_demos",
    "mean_score",
    "prompts_from_dict",
    "prompts_id",
    "prompts_to_dict",
    "retrieve",
    "rollouts",
]
