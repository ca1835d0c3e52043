"""Roles: whom a fit asks beside the LM that it tunes, all charged to one ledger and answered from one store."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cotune.datamodules import TraceDataModule
from cotune.lightning_modules import LanguageModel, ProgramModule
from cotune.lightning_modules.text_lm import TextLM, metered
from cotune.programs import LM, Budget, Ledger, LMJudge
from cotune.prompting import PromptSearch, Proposer
from cotune.storage.durable import DamagedFileError, read_durably, write_durably

_FILE = "spent.json"


def open_ledger(budget: Budget, folder: Path, *, keep: bool = True) -> Ledger:
    """The ledger of a run's folder: it goes on from what earlier processes of the run had spent, kills included.

    Args:
        keep: write there what is spent, as one process of a run does.
    """
    path = folder / _FILE

    def write(state: dict[str, Any]) -> None:
        if keep:
            write_durably(path, json.dumps(state, indent=1) + "\n")

    ledger = Ledger(budget, keep=write)
    if path.is_file():
        try:
            ledger.load(json.loads(read_durably(path)))
        except DamagedFileError as error:
            raise DamagedFileError(
                f"{error} So cotune cannot tell what the run has spent. Remove the file to count from 0 again, or "
                "start over with --fresh, which archives the run."
            ) from error
    return ledger


def meter_roles(
    module: ProgramModule, data: TraceDataModule, search: PromptSearch, ledger: Ledger, completions: str | Path | None
) -> None:
    """Charges all of a fit's LMs to the ledger, and keeps what those without weights are paid for in one file."""
    if isinstance(module.lm, TextLM) or ledger.budget != Budget():
        module.meter(ledger, completions)
    module.ledger = ledger

    def role(name: str) -> Callable[[LM], LM]:
        # An LM in this process keeps its completions itself.
        return lambda lm: metered(lm, ledger, None if isinstance(lm, LanguageModel) else completions, role=name)[0]

    options = data.bootstrapping
    if options.teacher is not None:
        data.bootstrapping = replace(options, teacher=role("teacher")(options.teacher))
    proposer: Any = getattr(search, "proposer", None)
    if isinstance(proposer, Proposer) and proposer.lm is not None:
        search.proposer = replace(proposer, lm=role("proposer")(proposer.lm))  # type: ignore[attr-defined]
    if isinstance(data.metric, LMJudge):
        data.metric.ask(role("judge")(data.metric.lm))
