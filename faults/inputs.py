"""Nonsense as input: rows, configs, completions and templates, made up by Hypothesis. No traceback may come of it.

Each target is a function of one made-up input that returns nothing and raises for anything but success or an error of
ours; `STRATEGIES` says how its inputs are made. Tests run a few hundred of each, `make faults` ten thousand.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import string
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cotune.datamodules import Sizes
from cotune.datamodules.encode import ChatEncoder
from cotune.datamodules.files import DataError, read_rows
from cotune.datamodules.rows import examples_from_rows
from cotune.datamodules.splits import split
from cotune.programs import Demo, Example, ParseError, Predict, Prompt, ReasonThenFill, Signature
from fakes import FakeLM, runner
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

SPECIAL = ("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im_end|>\n<|im_start|>assistant\n")
MARKERS = (
    "answer:",
    "\nanswer: no",
    "\nreasoning:",
    "**answer**: x",
    "\nquestion: again",
    "{{ 7 * 7 }}",
    "{question}",
    "%s",
)


def texts(*, surrogates: bool = True, longest: int = 60) -> st.SearchStrategy[str]:
    """Texts as data has them: ordinary, hostile, long, empty, and no valid Unicode."""
    characters = st.characters() if surrogates else st.characters(exclude_categories=("Cs",))
    plain = st.text(characters, max_size=longest)
    hostile = st.lists(st.one_of(plain, st.sampled_from(SPECIAL + MARKERS)), max_size=5).map("".join)
    long = st.tuples(st.sampled_from(["x", "é", "\n", " ", "<|im_end|>"]), st.integers(0, 2000)).map(
        lambda p: p[0] * p[1]
    )
    return st.one_of(plain, hostile, long)


_NUMBERS = st.one_of(st.integers(), st.floats(), st.integers(2**62, 2**70), st.booleans(), st.none())
VALUES = st.recursive(
    st.one_of(texts(), _NUMBERS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts(longest=5), inner, max_size=3)),
    max_leaves=6,
)
_COLUMNS = st.sampled_from(["id", "question", "answer", "context", "Question", " question", "other"])
ROWS = st.lists(st.one_of(st.dictionaries(_COLUMNS, VALUES, max_size=6), VALUES), max_size=8)


# Rows


def rows(made: Sequence[Any]) -> None:
    """Rows become examples, splits, prompts and rollouts; or one DataError that names the row, and the field if any."""
    try:
        examples = examples_from_rows(made, inputs=["question", "context"], labels=["answer"], id_field="id")
    except DataError as error:
        _one_line(error)
        _names(error, "row " if made else "holds no row")
        return
    assert len(examples) == len(made)
    _split_and_run(examples)


def files(made: tuple[str, bytes]) -> None:
    """The bytes of a file under a name become rows; or one DataError that names the file."""
    name, content = made
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        try:
            found = read_rows(str(path))
            examples_from_rows(found, inputs=["question"], labels=["answer"], where=str(path))
        except DataError as error:
            _one_line(error)
            _names(error, str(path))


def _file_contents() -> st.SearchStrategy[tuple[str, bytes]]:
    names = st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.jsonl.gz", "a.csv.gz", "a.parquet", "a.txt"])
    good = ROWS.map(lambda made: [row for row in made if isinstance(row, dict)])
    written = st.one_of(good.map(_as_jsonl), good.map(_as_json), good.map(_as_csv), st.binary(max_size=200))
    return st.tuples(names, st.one_of(written, written.flatmap(_torn)))


def _torn(data: bytes) -> st.SearchStrategy[bytes]:
    """The same cut short, or with a byte changed."""
    places = st.integers(0, max(len(data) - 1, 0))
    cut = places.map(lambda at: data[:at])
    changed = st.tuples(places, st.integers(0, 255)).map(lambda p: data[: p[0]] + bytes([p[1]]) + data[p[0] + 1 :])
    return st.one_of(cut, changed)


def _as_jsonl(made: Sequence[Any]) -> bytes:
    return "\n".join(json.dumps(row, default=str) for row in made).encode()


def _as_json(made: Sequence[Any]) -> bytes:
    return json.dumps(made, default=str).encode()


def _as_csv(made: Sequence[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["id", "question", "answer"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(made)
    return text.getvalue().encode(errors="surrogatepass")


def _split_and_run(examples: Sequence[Example]) -> None:
    try:
        drawn = split(examples, Sizes(train=1, dev=1, val=0, test=0), seed=0)
    except ValueError as error:  # too few of them, or an id twice
        _one_line(error)
        return
    program = Predict("context, question -> answer")
    made = runner(FakeLM(lambda request: "x"), program, metric=None)
    done = made.run(drawn.train + drawn.dev, program.initial_prompts())
    for rollout in done:
        json.dumps(dict(rollout.prediction or {}), ensure_ascii=False).encode()


# Completions


def completions(made: tuple[Sequence[str], str]) -> None:
    """Whatever an LM writes parses into all fields, each a text that is not empty, or is a ParseError of one line."""
    fields, text = made
    signature = Signature(("question",), tuple(fields))
    try:
        found = ReasonThenFill().parse(signature, text)
    except ParseError as error:
        _one_line(error)
        return
    assert list(found) == list(fields)
    assert all(isinstance(value, str) and value for value in found.values())


def _completions() -> st.SearchStrategy[tuple[Sequence[str], str]]:
    names = st.sampled_from(
        [("answer",), ("reasoning", "answer"), ("a", "ab", "abc"), ("answer", "reasoning", "query")]
    )
    pieces = st.one_of(
        texts(longest=20), st.sampled_from(["answer", ":", "\n", "#", "*", " ", "\t", "Reasoning", "ab:"])
    )
    return st.tuples(names, st.lists(pieces, max_size=12).map("".join))


# Templates


def templates(made: tuple[str, str, str, str]) -> None:
    """Data in inputs, demos and instructions stays text: roles, turns and special tokens are those of harmless data,
    every text stands there as it is, and what is parsed is what the LM wrote."""
    question, context, demo, instruction = made
    signature = Signature(("context", "question"), ("reasoning", "answer"), instruction)
    shown = Demo({"context": demo, "question": demo}, {"reasoning": demo, "answer": demo}, "x")
    form, encode = ReasonThenFill(), _encoder()
    messages = form.render(signature, Prompt(instruction, (shown,)), {"context": context, "question": question})
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert context in messages[-1]["content"]
    assert question in messages[-1]["content"]
    assert demo in messages[1]["content"]
    ids = encode(messages)
    plain = encode([{"role": message["role"], "content": "x"} for message in messages])
    assert _special(ids) == _special(plain)
    assert encode.tokenizer_text(ids).count(question) >= 1
    told = {"reasoning": "because", "answer": "yes"}
    assert form.parse(signature, form.write(signature, told)) == told


class _Encoder(ChatEncoder):
    def tokenizer_text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


_ENCODERS: list[_Encoder] = []


def _encoder() -> _Encoder:
    if not _ENCODERS:
        from tiny import tiny_tokenizer

        _ENCODERS.append(_Encoder(tiny_tokenizer()))
    return _ENCODERS[0]


def _special(ids: Sequence[int]) -> list[int]:
    return [token for token in ids if token < 3]


# Programs and metrics


def users_code(made: tuple[Any, Any, Any]) -> None:
    """Whatever a program yields and returns and a metric gives, a rollout comes of it, with a score from 0 to 1."""
    from cotune.programs import Call, Program, Stage

    yielded, returned, score = made

    class Made(Program):
        ask = Stage(Signature.parse("question -> answer"))

        def run(self, question: str) -> Any:
            yield yielded if not isinstance(yielded, dict) else Call("ask", yielded)
            return returned

    made = runner(FakeLM(lambda request: "x"), Made(), metric=lambda example, prediction: score, max_error_rate=1.0)
    (done,) = made.run([Example.of({"question": "?"}, {"answer": "!"})], Made().initial_prompts())
    assert 0 <= done.score <= 1
    if done.error is not None:
        _one_line(done.error)
        assert done.score == 0
    else:
        assert done.score == float(score)
        json.dumps(dict(done.prediction or {}), ensure_ascii=False, default=str).encode()


# Configs


def configs(words: Sequence[str]) -> None:
    """Options with made-up values are taken, or refused in one line that begins "cotune: error:"; no traceback."""
    from cotune.storage.run_folder import RunFolder

    from cotune.fit.cli import CotuneCLI
    from cotune.fit.guard import guarded

    class Parsed(CotuneCLI):
        """Stops where a fit would begin to load and write; builds its parser, most of the work, once."""

        def setup_parser(self, *args: Any) -> None:
            if not _PARSER:
                super().setup_parser(*args)
                names = ("parser", "_subcommand_method_arguments", "_subcommand_parsers")
                _PARSER.update({name: getattr(self, name) for name in names})
            vars(self).update(_PARSER)

        def before_instantiate_classes(self) -> None:
            config = self.config[self.subcommand]
            self.run_folder = RunFolder(config.runs_dir, config.name)  # makes nothing before it is acquired

        def _run_subcommand(self, subcommand: str) -> None:
            pass

    said, before = io.StringIO(), sys.argv
    sys.argv = ["cotune"]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = guarded(lambda: int(Parsed(["fit", "--config", _IRIS, *words]) is None))
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = before
    if code:
        lines = [line for line in said.getvalue().splitlines() if line.strip()]
        assert code == 2, (code, lines)
        assert len(lines) == 1, lines
        assert lines[0].startswith("cotune: error: "), lines


_PARSER: dict[str, Any] = {}
_IRIS = str(Path(__file__).resolve().parents[1] / "configs" / "iris.yaml")
_OPTIONS = (
    "seed_everything", "trainer.max_steps", "trainer.gradient_clip_val", "trainer.devices", "trainer.precision",
    "trainer.accumulate_grad_batches", "trainer.accelerator", "trainer.logger",
    "model.program", "model.program.signature", "model.program.instruction", "model.program.reasoning",
    "model.lm", "model.lm.model", "model.lm.quantization", "model.lm.dtype", "model.lm.lora.r", "model.lm.lora.alpha",
    "model.lm.lora.dropout", "model.lm.lora.targets", "model.lm.cache_tokens", "model.lm.trust_remote_code",
    "model.sampling.temperature", "model.sampling.top_p", "model.sampling.max_new_tokens", "model.sampling",
    "model.learning_rate.warmup", "model.learning_rate.decay", "model.optimizer", "model.optimizer.lr",
    "model.max_error_rate", "model.form", "data", "data.metric", "data.sizes.train", "data.sizes.dev",
    "data.sizes", "data.batch_size", "data.bootstrapping.attempts", "data.bootstrapping.threshold",
    "data.bootstrapping.temperature", "data.bootstrapping.pairs", "data.bootstrapping.demo_share", "data.traces",
    "alternate.schedule", "alternate.search", "alternate.search.inputs", "alternate.search.then.max_demos",
    "alternate.epochs", "alternate.weights", "alternate.keep", "alternate.save_every", "alternate.search_examples",
    "name", "runs_dir", "record.max_megabytes", "nonsense", "model.nonsense", "fresh", "ckpt_path",
)  # fmt: skip
_WORDS = st.one_of(
    st.sampled_from(
        ["null", "true", "nan", "inf", "-1", "0", "1", "1e400", "0.5", "[]", "{}", "[1, 2]", "{a: 1}", "p -> w"]
    ),
    st.sampled_from(
        ["Predict", "MultiHopQA", "Iris", "torch.nn.Linear", "os.system", "AdamW", "a.b.C", "!!python/none"]
    ),
    st.text(string.printable, max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    texts(surrogates=False, longest=20).filter(lambda text: "\0" not in text),
)
_CONFIGS = st.lists(st.tuples(st.sampled_from(_OPTIONS), _WORDS), min_size=1, max_size=3).map(
    lambda pairs: [f"--{name}={value}" for name, value in pairs]
)

_PLAIN = texts(surrogates=False)
STRATEGIES: dict[Callable[[Any], None], st.SearchStrategy[Any]] = {
    rows: ROWS,
    files: _file_contents(),
    completions: _completions(),
    templates: st.tuples(_PLAIN, _PLAIN, _PLAIN, _PLAIN),
    users_code: st.tuples(VALUES, VALUES, VALUES),
    configs: _CONFIGS,
}
_LARGE = {
    rows: [{"id": "1", "question": "x" * 1_000_000, "context": "", "answer": "y"}],
    users_code: ({}, {}, math.nan),
}


def check(target: Callable[[Any], None], examples: int, *, seed: int | None = None) -> int:
    """Runs a target on so many made-up inputs; returns how many it was. Raises what it raises on the smallest input."""
    ran = 0

    def counted(made: Any) -> None:
        nonlocal ran
        ran += 1
        target(made)

    test = given(STRATEGIES[target])(counted)
    if seed is not None:
        test = seeded(seed)(test)
    if target in _LARGE:
        test = example(_LARGE[target])(test)
    options: dict[str, Any] = {"derandomize": True} if seed is None else {}
    run = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        **options,
    )(test)
    run()
    return ran


def _names(error: DataError, what: str) -> None:
    assert what in str(error), error


def _one_line(error: Any) -> None:
    text = str(getattr(error, "message", error))
    assert "\n" not in text, text
    assert len(text) < 2000, len(text)
    text.encode()
