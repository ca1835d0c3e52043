"""What a run leaves behind for its readers: prompts, candidates and rollouts of every boundary."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from cotune.callbacks.record_boundaries import RecordBoundaries, rollout_lines, rollout_record
from cotune.programs import Completion, Example, Failure, Filled, Rollout, prompts_from_dict, prompts_id
from cotune.programs.rollout import Step
from cotune.reporting.journeys import pieces
from tiny_fit import BrokenOffError, Fit, tiny_fit

from cotune.commands.predict import answer_line


@pytest.fixture(scope="module")
def recorded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Fit, Path]:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    fit = tiny_fit(tiny_model, folder, callbacks=[RecordBoundaries()]).run()
    fit.trainer.test(fit.module, datamodule=fit.data, verbose=False)
    return fit, folder


def test_each_boundary_has_its_val_rollouts_whose_mean_is_its_score(recorded: tuple[Fit, Path]) -> None:
    fit, folder = recorded
    for record in fit.alternate.history:
        rows = _rows(folder / f"rollouts/val-{record['index']}.jsonl")
        assert [row["example"] for row in rows] == [example.id for example in fit.data.splits.val]
        assert sum(row["score"] for row in rows) / len(rows) == pytest.approx(record["val_score"])
    assert len(list((folder / "rollouts").glob("val-*"))) == 4


def test_a_recorded_rollout_shows_every_call_as_it_was_made(recorded: tuple[Fit, Path]) -> None:
    fit, folder = recorded
    row = _rows(folder / "rollouts/test.jsonl")[0]
    rollout = fit.module.rollouts(fit.data.splits.test, metric=fit.data.metric)[0]
    (step,) = row["steps"]
    assert (row["labels"], row["score"]) == (rollout.example.labels, rollout.score)
    assert step["messages"] == [dict(message) for message in rollout.steps[0].messages]
    assert step["completion"] == rollout.steps[0].completion.text
    assert step["completion_tokens"] == len(rollout.steps[0].completion.completion_ids) > 0
    assert (row["cut"], step["outputs"]) == ("", dict(rollout.steps[0].outputs))


def test_prompts_and_candidates_are_those_of_the_history(recorded: tuple[Fit, Path]) -> None:
    fit, folder = recorded
    for record in fit.alternate.history:
        known = json.loads((folder / f"boundaries/{record['index']}.json").read_text())
        assert prompts_id(prompts_from_dict(known["prompts"])) == record["prompts"]
        assert [c["id"] for c in known.get("candidates", [])] == [c["id"] for c in record.get("candidates", [])]


def test_a_resumed_run_records_each_rollout_once(tiny_model: Path, tmp_path: Path) -> None:
    first = tiny_fit(tiny_model, tmp_path, "p -> p", callbacks=[RecordBoundaries()])
    first.lm.breaks_at = 10
    with pytest.raises(BrokenOffError):
        first.run()
    before = {path.name: path.read_text() for path in (tmp_path / "rollouts").iterdir()}
    tiny_fit(tiny_model, tmp_path, "p -> p", callbacks=[RecordBoundaries()]).run(first.last)
    assert {name: (tmp_path / "rollouts" / name).read_text() for name in before} == before
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == [f"val-{i}.jsonl" for i in range(3)]
    assert all(len(_rows(path)) == 10 for path in (tmp_path / "rollouts").iterdir())


def test_a_file_stays_within_its_limit_and_every_score_stays_in_it() -> None:
    done = [_rollout(f"e{i}", "x" * 2000) for i in range(20)]
    lines = rollout_lines(done, max_bytes=30_000, max_characters=5000)
    rows = [json.loads(line) for line in lines]
    assert sum(len(line) + 1 for line in lines) <= 30_000
    assert [row["score"] for row in rows] == [0.5] * 20
    # The first keep all, the last only their scores, and each says which it is.
    assert [row["cut"] for row in rows] == sorted((row["cut"] for row in rows), key=["", "messages", "steps"].index)
    assert rows[0]["steps"][0]["messages"]
    assert not rows[-1]["steps"]


def test_a_long_text_is_cut_in_its_middle_and_says_so() -> None:
    (line,) = rollout_lines([_rollout("e", "a" * 300 + "b" * 300)], max_bytes=10**6, max_characters=200)
    text = json.loads(line)["steps"][0]["completion"]
    assert text == "a" * 100 + " […400 characters left out…] " + "b" * 100


def test_a_record_tells_what_the_engine_put_there_and_which_text_it_closed() -> None:
    text = "so\n\nanswer: 4"
    fields = (Filled("reasoning", "so", 0, 1, "length"), Filled("answer", " 4", 5, 6, "eos"))
    done = _rollout("e", text)
    step = replace(done.steps[0], completion=Completion(text, fields=fields))
    (recorded,) = rollout_record(replace(done, steps=(step,)))["steps"]
    assert recorded["closed"] == ("reasoning",)
    assert pieces(recorded) == [(False, "so"), (True, "\n\nanswer:"), (False, " 4")]
    assert pieces(rollout_record(done)["steps"][0]) == [(False, text)]


def test_a_text_that_no_file_can_hold_does_not_end_the_run() -> None:
    (line,) = rollout_lines([_rollout("e", "half a \ud83d sign")], max_bytes=10**6, max_characters=200)
    assert json.loads(line)["steps"][0]["completion"] == "half a ? sign"


def test_a_record_in_a_prediction_is_a_mapping_in_the_file() -> None:
    done = replace(
        _rollout("e", ""), error=None, prediction={"order": Failure("type", "none"), "on": date(2024, 7, 26)}
    )
    (line,) = rollout_lines([done], max_bytes=10**6, max_characters=200)
    assert json.loads(line)["prediction"] == {"order": {"kind": "type", "message": "none"}, "on": "2024-07-26"}
    assert json.loads(answer_line(1, done))["order"] == {"kind": "type", "message": "none"}


def test_a_key_in_what_the_users_code_raised_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCH_API_KEY", "sk-0123456789")
    error = Failure("program", "HTTPError at search?key=sk-0123456789")
    row = rollout_record(replace(_rollout("e", "text"), error=error))
    assert row["error"] == {"kind": "program", "message": "HTTPError at search?key=***"}


def test_no_rollouts_are_recorded_at_0_megabytes(tiny_model: Path, tmp_path: Path) -> None:
    tiny_fit(tiny_model, tmp_path, "p", callbacks=[RecordBoundaries(max_megabytes=0)]).run()
    assert (tmp_path / "boundaries/1.json").is_file()
    assert not (tmp_path / "rollouts").exists()


@pytest.mark.parametrize(("option", "value"), [("max_megabytes", -1), ("max_characters", 3)])
def test_limits_that_make_no_sense_are_refused(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option} {value} is below"):
        RecordBoundaries(**{option: value})  # type: ignore[arg-type]


def _rollout(name: str, text: str) -> Rollout:
    step = Step("answer", {"question": "?"}, {}, [{"role": "user", "content": text}], Completion(text))
    return Rollout(
        Example(name, {"question": "?"}, {"answer": "!"}), (step,), None, 0.5, Failure("format", "unreadable")
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
