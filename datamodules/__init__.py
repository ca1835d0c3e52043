"""Data modules: examples in four disjoint sets, and traces of the program as training data."""

from cotune.datamodules.bootstrapping import Bootstrapping, Runs
from cotune.datamodules.collate import Batch, Bearing, Pair, Segment, collate
from cotune.datamodules.collect import NoTracesError, collect, collect_runs
from cotune.datamodules.collected import Attempt, Collected, Report
from cotune.datamodules.encode import ChatEncoder, Vocabulary
from cotune.datamodules.files import DataError
from cotune.datamodules.pair_maker import PairMaker
from cotune.datamodules.splits import Sizes, Splits, split
from cotune.datamodules.table import Table
from cotune.datamodules.tasks.banking77 import Banking77
from cotune.datamodules.tasks.gsm8k import GSM8K
from cotune.datamodules.tasks.hotpotqa import HotPotQA
from cotune.datamodules.tasks.iris import Iris
from cotune.datamodules.trace import Trace, load_traces, save_traces
from cotune.datamodules.traces import EpochBatches, TraceDataModule

__all__ = [
    "GSM8K",
    "Attempt",
    "Banking77",
    "Batch",
    "Bearing",
    "Bootstrapping",
    "ChatEncoder",
    "Collected",
    "DataError",
    "EpochBatches",
    "HotPotQA",
    "Iris",
    "NoTracesError",
    "Pair",
    "PairMaker",
    "Report",
    "Runs",
    "Segment",
    "Sizes",
    "Splits",
    "Table",
    "Trace",
    "TraceDataModule",
    "Vocabulary",
    "collate",
    "collect",
    "collect_runs",
    "load_traces",
    "save_traces",
    "split",
]
