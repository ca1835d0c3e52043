"""Programs: what runs. Signatures, prompts, stages, forms, rollouts and metrics; no torch, no Lightning."""

from cotune.programs.budget import Budget, BudgetedLM, BudgetSpentError, Ledger, RoleSpentError
from cotune.programs.demos import draw_demos, hide_own_demos, labelled_demos
from cotune.programs.example import Example, content_id
from cotune.programs.faults import Fault, Faults, FaultyProgramError, faults_of
from cotune.programs.form import Form, Lines, Markers, ParseError, ReasonThenFill, Tags, Unreadable
from cotune.programs.json_form import Json
from cotune.programs.judge import LMJudge, Noise
from cotune.programs.layout import Choices, Field, Fixed, Layout, Number, Pattern, Schema
from cotune.programs.lm import LM, Completion, Filled, LMUnavailableError, Message, Request, Sampling, completed
from cotune.programs.metrics import BatchMetric, Metric, exact_match, f1, first_line_number, number_match
from cotune.programs.multihop import MultiHopQA
from cotune.programs.program import Call, NamedValues, Program, Stage
from cotune.programs.prompt import Demo, Prompt, Prompts, prompts_from_dict, prompts_id, prompts_to_dict
from cotune.programs.reasoning import DescribeThenDecide, Predict
from cotune.programs.retrieval import BM25, Dense, Encoder, Retriever, RetrieverError, SentenceEncoder, retrieve
from cotune.programs.rollout import Failure, PredictionError, Rollout, Step, mean_score, mean_tokens
from cotune.programs.runner import Runner
from cotune.programs.samples import Vote, settled
from cotune.programs.score import Score
from cotune.programs.signature import In, Out, Signature
from cotune.programs.types import FieldTypeError, Line, Reasoning
from cotune.programs.usage import Usage

__all__ = [
    "BM25",
    "LM",
    "BatchMetric",
    "Budget",
    "BudgetSpentError",
    "BudgetedLM",
    "Call",
    "Choices",
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
    "Field",
    "FieldTypeError",
    "Filled",
    "Fixed",
    "Form",
    "In",
    "Json",
    "LMJudge",
    "LMUnavailableError",
    "Layout",
    "Ledger",
    "Line",
    "Lines",
    "Markers",
    "Message",
    "Metric",
    "MultiHopQA",
    "NamedValues",
    "Noise",
    "Number",
    "Out",
    "ParseError",
    "Pattern",
    "Predict",
    "PredictionError",
    "Program",
    "Prompt",
    "Prompts",
    "ReasonThenFill",
    "Reasoning",
    "Request",
    "Retriever",
    "RetrieverError",
    "RoleSpentError",
    "Rollout",
    "Runner",
    "Sampling",
    "Schema",
    "Score",
    "SentenceEncoder",
    "Signature",
    "Stage",
    "Step",
    "Tags",
    "Unreadable",
    "Usage",
    "Vote",
    "completed",
    "content_id",
    "draw_demos",
    "exact_match",
    "f1",
    "faults_of",
    "first_line_number",
    "hide_own_demos",
    "labelled_demos",
    "mean_score",
    "mean_tokens",
    "number_match",
    "prompts_from_dict",
    "prompts_id",
    "prompts_to_dict",
    "retrieve",
    "settled",
]
