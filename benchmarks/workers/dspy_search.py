"""DSPy's side of the alternation: random search and trace collection on a server. Runs in the environment "dspy"."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.workers.protocol import serve

Rows = Sequence[Mapping[str, str]]


class Search:
    """One program of one `Predict`, whose prompts (demos) are kept between calls."""

    def start(
        self, *, signature: str, instruction: str, descriptions: Mapping[str, str], max_tokens: int, threads: int
    ) -> dict[str, Any]:
        """Builds the program. `threads` are DSPy's own, which keep the server's batch full."""
        import dspy

        # A cache of its own, empty at first: what DSPy does not ask twice it may keep, as in a user's first run.
        dspy.configure_cache(enable_disk_cache=True, disk_cache_dir=tempfile.mkdtemp(prefix="cotune-benchmark-dspy-"))
        self.dspy, self.max_tokens, self.threads = dspy, max_tokens, threads
        described = dspy.Signature(signature, instruction)
        for name, text in descriptions.items():
            described = described.with_updated_fields(name, desc=text)
        self.inputs = list(described.input_fields)
        self.signature, self.program = described, dspy.Predict(described)
        # The fallback to JSON would ask a second time, with another prompt, for every answer that does not parse.
        self.adapter = dspy.ChatAdapter(use_json_adapter_fallback=False)
        return {"versions": {"dspy": dspy.__version__}}

    def connect(self, *, url: str, model: str) -> None:
        """Talks to this server from now on, greedily."""
        lm = self.dspy.LM(f"openai/{model}", api_base=url, api_key="none", temperature=0.0, max_tokens=self.max_tokens)
        self.dspy.configure(lm=lm, adapter=self.adapter)

    def search(self, *, train: Rows, dev: Rows, candidates: int, demos: int, labelled: int) -> dict[str, Any]:
        """A prompt step: keeps the best program. Says how many were tried, and the best score in [0, 1]."""
        optimizer = self.dspy.BootstrapFewShotWithRandomSearch(
            metric=_exact,
            max_bootstrapped_demos=demos,
            max_labeled_demos=labelled,
            num_candidate_programs=candidates,
            num_threads=self.threads,
            max_errors=10**6,  # an answer that does not parse is data here, as on the other side
        )
        self.program = optimizer.compile(
            self.dspy.Predict(self.signature), trainset=self._examples(train), valset=self._examples(dev)
        )
        tried = self.program.candidate_programs
        return {"tried": len(tried), "score": tried[0]["score"] / 100, "demos": len(self.program.demos)}

    def score(self, *, rows: Rows) -> float:
        """The program's mean score."""
        return float(self._evaluate(rows).score) / 100

    def collect(self, *, rows: Rows) -> list[dict[str, Any]]:
        """Runs the program and turns its successes into training pairs with the zero-shot prompt."""
        successes = [(example, output) for example, output, score in self._evaluate(rows).results if score]
        return [
            self.adapter.format_finetune_data(
                signature=self.signature,
                demos=[],
                inputs={name: example[name] for name in self.inputs},
                outputs={name: output[name] for name in self.signature.output_fields},
            )
            for example, output in successes
        ]

    def _evaluate(self, rows: Rows) -> Any:
        evaluate = self.dspy.Evaluate(
            devset=self._examples(rows), metric=_exact, num_threads=self.threads, max_errors=10**6, failure_score=0.0
        )
        return evaluate(self.program)

    def _examples(self, rows: Rows) -> list[Any]:
        return [self.dspy.Example(**row).with_inputs(*self.inputs) for row in rows]


def _exact(example: Any, prediction: Any, trace: Any = None) -> bool:
    return bool(str(prediction.answer).strip().strip(".").lower() == example.answer.lower())


if __name__ == "__main__":
    search = Search()
    serve(
        {
            "start": search.start,
            "connect": search.connect,
            "search": search.search,
            "score": search.score,
            "collect": search.collect,
        }
    )
