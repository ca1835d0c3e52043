"""Form search: in which form the stages do best, before another search improves their prompts in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cotune.errors import BadValueError
from cotune.programs.forms import STRAIGHT, form_named, in_form
from cotune.prompting.around import SearchAround, joined
from cotune.prompting.evaluate import CountingLM, Proposal, choose
from cotune.prompting.search import Found, PromptSearch, SearchTask, searched


class FormSearch(SearchAround):
    """Tries the program's prompts in several forms, and then another search in the best form.

    The chosen form is part of the prompts: rollouts, traces and training rows of later weight steps use it,
    and so does the export. All stages have the same form.

    Args:
        forms: names of the forms to try besides the current one: "lines", "tags", "markers", "json" (needs llguidance),
            "reason then fill". Append ", straight", e.g. "tags, straight", to make reasoning stages answer directly.
        then: the search that follows, with the rest of `lm_calls`.
    """

    def __init__(
        self, forms: Sequence[str] = (f"reason then fill{STRAIGHT}", "lines", "tags"), then: PromptSearch | None = None
    ) -> None:
        if not forms:
            raise BadValueError("forms is empty: name the forms to try, or use the search in `then` alone.")
        for name in forms:
            form_named(name)
        super().__init__(then)
        self.forms = tuple(forms)

    def most_runs(self, train: int, dev: int) -> int | None:
        most = self.then.most_runs(train, dev)
        return None if most is None else most + len(self.forms) * dev

    def search(self, task: SearchTask) -> Found:
        calls = CountingLM(task.runner.lm)
        counted = replace(task, runner=replace(task.runner, lm=calls))
        tried = choose(counted, [Proposal(in_form(task.initial, name), f"form: {name}") for name in self.forms])
        initial = in_form(task.initial, tried.prompts)
        left = max(0, task.lm_calls - calls.calls)
        rest = replace(task, initial=initial, incumbent=tried.prompts, lm_calls=left)
        return joined([tried, searched(self.then, rest)])
