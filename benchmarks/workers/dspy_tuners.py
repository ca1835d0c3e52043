"""DSPy's optimisers on a server, within a number of LM calls. Runs in the environment "dspy"."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import dspy

from benchmarks.workers.protocol import serve

Rows = Sequence[Mapping[str, Any]]

_ANY = 10**9
"""Errors that DSPy may meet: an answer that it cannot read is scored 0, as on the other side."""


class SpentError(RuntimeError):
    """The calls are used up: DSPy scores what was asked for as wrong, so that no later program can win by it."""


class Meter:
    """Counts calls, and refuses those above a number. Calls that DSPy's cache answers count, as they do in cotune."""

    def __init__(self) -> None:
        self.asked, self.most = 0, _ANY
        self._alone = threading.Lock()

    def take(self) -> None:
        with self._alone:
            if self.asked >= self.most:
                raise SpentError(f"all {self.most} calls are used up")
            self.asked += 1


class Metered(dspy.LM):  # type: ignore[misc]
    """An LM whose calls the meter counts, copies of it included."""

    def __init__(self, meter: Meter, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.meter = meter

    supports_response_schema = True  # the server does, which DSPy cannot know of a model without a name

    @property
    def supported_params(self) -> set[str]:
        return {*super().supported_params, "response_format"}

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.meter.take()
        return super().__call__(*arguments, **options)


class Tuners:
    """A program of one stage, tuned once. A process serves one tuning, so that no cache outlives it."""

    def start(
        self,
        *,
        inputs: Sequence[str],
        labels: Sequence[str] | None,
        instruction: str,
        reasoning: bool,
        adapter: str,
        url: str,
        model: str,
        new: int,
        proposal: int,
        threads: int,
    ) -> dict[str, str]:
        """Builds the program.

        Args:
            labels: what the answer can be; None for a number.
            adapter: "chat", DSPy's own default, or "json", which asks the server for output of the answer's schema.
            new, proposal: most tokens of an answer, and of a proposed instruction.
            threads: DSPy's own, which keep the server's batch full.
        """
        dspy.configure_cache(enable_disk_cache=False, disk_cache_dir=tempfile.mkdtemp(prefix="cotune-benchmark-dspy-"))
        self.meter, self.threads = Meter(), threads
        served: dict[str, Any] = {"model": f"openai/{model}", "api_base": url, "api_key": "none"}
        lm = Metered(self.meter, **served, temperature=0.0, max_tokens=new)
        self.proposer = Metered(self.meter, **served, temperature=1.0, max_tokens=proposal)
        dspy.configure(lm=lm, adapter=dspy.JSONAdapter() if adapter == "json" else dspy.ChatAdapter())
        self.numeric = labels is None
        answer: Any = float if labels is None else Literal[tuple(labels)]
        fields: dict[str, Any] = {name: (str, dspy.InputField()) for name in inputs}
        signature = dspy.Signature({**fields, "answer": (answer, dspy.OutputField())}, instruction)
        self.inputs = list(inputs)
        self.plain = dspy.ChainOfThought(signature) if reasoning else dspy.Predict(signature)
        self.found = self.plain
        return {"dspy": dspy.__version__}

    def tune(self, *, how: str, train: Rows, dev: Rows, calls: int, seed: int, demos: int) -> dict[str, Any]:
        """Tunes the plain program. A search that still goes on when the calls are used up ends on what it has found."""
        self.meter.most = self.meter.asked + calls
        began = self.meter.asked
        sets = {"trainset": self._examples(train), "valset": self._examples(dev)}
        common: dict[str, Any] = {"num_threads": self.threads}
        shots: dict[str, Any] = {"max_bootstrapped_demos": demos, "max_labeled_demos": demos, "max_errors": _ANY}
        # More of them than the calls suffice for, so that the calls are what ends the search.
        trials = calls // len(dev) + 1
        if how == "random search":
            search = dspy.BootstrapFewShotWithRandomSearch(
                self._right, **common, **shots, num_candidate_programs=trials
            )
            self.found = search.compile(self.plain, **sets)
        elif how == "MIPROv2":
            mipro = dspy.MIPROv2(
                self._right,
                prompt_model=self.proposer,
                auto=None,
                num_candidates=max(6, min(18, trials // 2)),  # between what its settings "light" and "heavy" have
                seed=9 + seed,
                **common,
                **shots,
            )
            self.found = mipro.compile(self.plain.deepcopy(), **sets, num_trials=trials, minibatch=False)
        elif how == "GEPA":
            # Between two rounds it can be stopped; within one a refused call would be an error of its proposer.
            last, self.meter.most = self.meter.most - len(dev) - 10, _ANY
            gepa = dspy.GEPA(
                self._told,
                reflection_lm=self.proposer,
                max_metric_calls=calls,
                seed=seed,
                gepa_kwargs={"stop_callbacks": lambda _: self.meter.asked >= last},
                **common,
            )
            self.found = gepa.compile(self.plain, **sets)
        else:
            raise ValueError(f'how "{how}" is none of "random search", "MIPROv2", "GEPA".')
        self.meter.most = _ANY
        predictor = self.found.predictors()[0]
        tried = getattr(self.found, "candidate_programs", [])
        return {
            "calls": self.meter.asked - began,
            "tried": len(tried),
            "instruction": predictor.signature.instructions,
            "demos": [{name: str(value) for name, value in dict(demo).items()} for demo in predictor.demos],
        }

    def score(self, *, rows: Rows, tuned: bool) -> dict[str, Any]:
        """1 or 0 for each row, and how many of the outputs DSPy could not read."""
        evaluate = dspy.Evaluate(
            devset=self._examples(rows), metric=self._right, num_threads=self.threads, max_errors=_ANY
        )
        results = evaluate(self.found if tuned else self.plain).results
        return {
            "right": [int(bool(score)) for _, _, score in results],
            "unreadable": sum(getattr(prediction, "answer", None) is None for _, prediction, _ in results),
        }

    def _right(self, example: Any, prediction: Any, trace: Any = None) -> bool:
        said, label = getattr(prediction, "answer", None), example.answer
        if said is None:
            return False
        return abs(float(said) - float(label)) < 1e-6 if self.numeric else bool(said == label)

    def _told(self, example: Any, prediction: Any, trace: Any = None, name: Any = None, calls: Any = None) -> Any:
        """With the right answer for the LM that reflects, which GEPA is made for."""
        right = self._right(example, prediction)
        said = "This is right." if right else f"This is wrong. The right answer is: {example.answer}"
        return dspy.Prediction(score=float(right), feedback=said)

    def _examples(self, rows: Rows) -> list[Any]:
        return [dspy.Example(**row).with_inputs(*self.inputs) for row in rows]


if __name__ == "__main__":
    tuners = Tuners()
    serve({"start": tuners.start, "tune": tuners.tune, "score": tuners.score})
