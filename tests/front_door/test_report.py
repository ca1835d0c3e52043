"""cotune report: what a run did, all of it on one page, and nothing of it as code."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from commands import cotune
from cotune.reporting.charts import curves, timeline
from cotune.reporting.journeys import changes, journeys
from cotune.reporting.page import render_report
from cotune.reporting.prompt_changes import prompt_changes, word_difference
from cotune.reporting.run_record import ReportError, read_run
from cotune.reporting.statistics import interval, standard_error
from written_run import PREFIXES, STAGES, write_run

HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(2)></pre></style>{{ 7*7 }}&amp;\u2028end"""


class Reader(HTMLParser):
    """The elements of a page, and its text as a reader gets it, element by element."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.words: list[str] = []
        self.feed(page)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = [*self._open, tag] if tag in ("style", "title") else self._open

    def handle_endtag(self, tag: str) -> None:
        self._open = self._open[:-1] if tag in ("style", "title") else self._open

    def handle_data(self, data: str) -> None:
        if not self._open:
            self.words.append(data)


def read(folder: Path, **options: Any) -> Reader:
    return Reader(render_report(read_run(folder), **options))


def test_a_judges_noise_widens_the_interval_and_a_budget_that_ended_the_run_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8").split("\n#")[0])
    summary["judge"] = {"asked_twice": 40, "contradicted": 4, "variance": 0.1}
    summary |= {"ended": "budget.lm_calls 30", "costs": {"judge": {"calls": 30, "tokens_in": 900}}}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    text = read(folder).text
    assert "the judge contradicted itself on 4 of 40 answers" in text
    assert "n = 5, 95 % 0.138 to 0.996" in text
    assert "Best so far" in text
    assert "Its budget ended the run before its schedule: budget.lm_calls 30" in text
    assert "Paid, judge: 30 calls, 900 tokens read" in text


def test_every_prefix_has_its_score_its_interval_and_its_cost(tmp_path: Path) -> None:
    text = read(write_run(tmp_path / "run")).text
    for prefix, score in zip(PREFIXES, ("0.200", "0.200", "0.600", "0.600"), strict=True):
        assert f"{prefix.replace('->', '→')} {score}" in text.replace(" kept ", " ")
    assert "n = 5, 95 % 0.231 to 0.882" in text
    assert "1,000 20,000 300 1 min 10 s" in text
    assert "p → w kept" in text


def test_the_test_score_comes_with_its_error_and_how_the_prefix_was_chosen(tmp_path: Path) -> None:
    text = read(write_run(tmp_path / "run")).text
    assert "Test score 0.500" in text
    assert "chosen by its val score" in text
    assert "From vanilla to p → w, over the same 5 val examples: +0.400" in text


def test_every_prefix_has_its_test_score_where_every_prefix_was_tested(tmp_path: Path) -> None:
    tested = [[0, 0], [0, 1], [1, 1], [0, 1]]
    text = read(write_run(tmp_path / "run", tested=tested)).text
    assert "interval test score prompts tried" in text
    for prefix, score in (("vanilla", "0.000"), ("p", "0.500 ± 0.500"), ("p → w kept", "1.000")):
        assert re.search(rf"{prefix} 0\.\d00 [\d.]+–[\d.]+ {score} ", text), prefix
    assert "Nothing was chosen by these scores, and what they took (44 LM calls)" in text
    # Not from a file that an earlier run left there.
    write_run(tmp_path / "other")
    (tmp_path / "other" / "rollouts" / "test-0.jsonl").write_text("")
    text = read(tmp_path / "other").text
    assert "interval prompts tried" in text
    assert "Nothing was chosen" not in text


def test_an_error_of_nothing_is_not_claimed(tmp_path: Path) -> None:
    # All of five wrong does not mean that the score is known exactly.
    text = read(write_run(tmp_path / "run", scores=[[0] * 5])).text
    assert "± 0.000" not in text
    assert "95 % 0.000 to 0.434" in text


@pytest.mark.parametrize("stages", [1, 3])
def test_prompts_are_shown_before_and_after_with_their_demos(stages: int, tmp_path: Path) -> None:
    page = render_report(read_run(write_run(tmp_path / "run", stages=stages)))
    assert page.count("Answer<ins> in one word</ins>.") >= stages
    assert page.count("Answer<del> in one word</del>.") >= stages  # the weight step went back to the initial ones
    text = Reader(page).text
    assert text.count("+ added · example t1 question demo question answer demo answer 1") >= stages
    assert text.count("− removed · example t1") >= stages
    assert text.count(f"system message of {STAGES[-1]}") >= 1
    assert "The step kept the prompts it began with." in text  # step 3


def test_proposals_that_became_no_candidate_are_shown_with_reason_parent_and_minibatch(tmp_path: Path) -> None:
    text = read(write_run(tmp_path / "run")).text
    said = "1 proposal that became no candidate, and why answer no better on the minibatch from random 1"
    assert f"{said} · answer 0.750 → 0.250 on 2 of train Guess." in text
    assert "└ random 1 0.750" in text


def test_every_candidate_is_shown_with_its_score_parent_and_fate(tmp_path: Path) -> None:
    text = read(write_run(tmp_path / "run")).text
    assert "incumbent 0.500 4 of 4 – 0" in text
    assert "random 1 0.750 4 of 4 incumbent 1" in text
    assert "random 2 0.250 1 of 4 incumbent 1 pruned 2 missing answers" in text
    assert "a note of search 1" in text
    assert "a note of search 3" in text


def test_every_example_won_or_lost_is_shown_with_both_answers(tmp_path: Path) -> None:
    text = read(write_run(tmp_path / "run")).text
    assert "vanilla ⟶ to p 1 won 1 lost 0 stayed right 3 stayed wrong" in text
    assert "ex-1 wanted right 1 wrong 1 → right 1" in text
    assert "ex-3 wanted right 3 right 3 → wrong 3" in text
    assert "p ⟶ to p → w 2 won 0 lost" in text
    assert "All in all vanilla ⟶ to p → w 2 won 0 lost" in text


@pytest.mark.parametrize("stages", [1, 3])
def test_a_trace_shows_every_call_of_every_prefix(stages: int, tmp_path: Path) -> None:
    reader = read(write_run(tmp_path / "run", stages=stages))
    for number, stage in enumerate(STAGES[-stages:], start=1):
        assert f"{number}. {stage} 40 + 7 tokens" in reader.text
        assert f"context of {stage}" in reader.text
        assert f"completion of {stage}: wrong 0" in reader.text
        assert f"asked {stage} question 0" in reader.text
    assert reader.text.count("The same as after") >= 5  # step 3 changed nothing


def test_what_the_engine_put_there_is_marked_in_a_completion(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    path = folder / "rollouts/val-0.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["steps"][-1] |= {"completion": "so\n\nanswer: 4", "put_there": [[2, 11]], "closed": ["reasoning"]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = render_report(read_run(folder))
    assert 'so<span class="put">\n\nanswer:</span> 4' in page
    assert "closed at the limit: reasoning" in page


def test_a_format_failure_is_told_from_a_wrong_answer(tmp_path: Path) -> None:
    text = read(write_run(tmp_path / "run")).text
    assert "No answer" in text
    assert 'ex-4 no "answer" here completion of answer: wrong 4' in text
    assert "closed at the limit" in text


def test_gold_answers_are_told_from_what_the_program_solved(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    history = folder / "history.jsonl"
    assert "gold answer" not in read(folder).text
    history.write_text(history.read_text().replace('"gold": 0,', '"gold": 2,'))
    assert "learnt from 3 of 6 train examples and 2 gold answers" in read(folder).text


def test_links_lead_to_what_is_there(tmp_path: Path) -> None:
    tags = read(write_run(tmp_path / "run"), examples=1).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {attributes["href"] for tag, attributes in tags if tag == "a"}
    assert targets <= {f"#{id_}" for id_ in ids}


def test_what_a_run_says_is_never_code(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", stages=3, text=HOSTILE)
    page = render_report(read_run(folder))
    reader = Reader(page)
    assert {tag for tag, _ in reader.tags}.isdisjoint(
        {"script", "img", "iframe", "link", "base", "form", "object"} - {"link"}
    )
    assert not [attributes for _, attributes in reader.tags if any(name.startswith("on") for name in attributes)]
    assert [attributes["href"] for tag, attributes in reader.tags if tag == "link"] == ["data:,"]
    assert page.count("<style>") == page.count("</style>") == 1
    assert "{{ 7*7 }}" in reader.text
    assert reader.text.count("<script>alert(1)</script>") > 50


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    page = render_report(read_run(write_run(tmp_path / "run")))
    assert "http://" not in page
    assert "https://" not in page
    assert "url(" not in page
    assert "default-src 'none'" in page


def test_secrets_of_the_settings_are_not_shown(tmp_path: Path) -> None:
    page = render_report(read_run(write_run(tmp_path / "run")))
    assert "k-1" not in page
    assert "k-2" not in page


def test_an_unfinished_run_is_shown_as_far_as_it_came(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", scores=[[0, 1], [1, 1]], finished=False)
    text = read(folder).text
    assert "This run is not finished. 1 of 3 steps" in text
    assert "Best so far p" in text
    assert "not tested yet" in text
    drawn = timeline(read_run(folder), width=760)
    assert [band.done for band in drawn.bands] == [True, False, False]


def test_a_run_without_rollouts_says_what_is_missing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", recorded=False)
    text = read(folder).text
    assert "No rollouts were recorded" in text
    assert "The prompts of each prefix were not recorded" in text
    assert "0.600" in text


def test_a_run_without_a_config_says_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "config.yaml").unlink()
    assert "There is no config.yaml" in read(folder).text


def test_many_examples_are_folded_in_and_bounded(tmp_path: Path) -> None:
    rng = random.Random(0)
    scores = [[rng.randint(0, 1) for _ in range(500)] for _ in range(4)]
    folder = write_run(tmp_path / "run", scores=scores, stages=3)
    page = render_report(read_run(folder), examples=20)
    assert page.count('<details class="way"') == 20 + 20 + 20
    assert "more are in" in page
    assert len(page) < 2_000_000
    assert all(f"ex-{number}" in page for number in range(500))


def test_a_long_text_is_cut_in_its_middle_and_stands_whole_behind(tmp_path: Path) -> None:
    words = " ".join(f"word{number}" for number in range(1000))
    folder = write_run(tmp_path / "run", scores=[[1]], text=f" {words}", finished=False)
    page = render_report(read_run(folder))
    assert "characters …]" in page
    reader = Reader(page)
    assert f"completion of answer: right 0 {words}" in reader.text
    shown = [
        part for part in map(str.strip, reader.words) if part.startswith("completion of answer") and words not in part
    ]
    assert shown
    assert max(map(len, shown)) < 1000


def test_a_graded_score_is_shown_as_a_number(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", scores=[[0.25, 0.5], [0.75, 0.5]], finished=False)
    page = render_report(read_run(folder))
    assert ">0.25<" in page
    assert ">0.75<" in page


def test_the_command_writes_beside_the_run_or_where_it_is_told(
    finished: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    said = cotune(["report", str(finished.folder), "--out", str(out)], capsys)
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith(str(out))
    assert "note:" not in said.out  # a run of this version records all that the report shows
    text = Reader(out.read_text(encoding="utf-8")).text
    history = (finished.folder / "history.jsonl").read_text().splitlines()
    for record in map(json.loads, history):
        assert f"{record['val_score']:.3f}" in text
        assert all(candidate["why"] in text for candidate in record.get("candidates", []))
    assert "Training curves" in text
    assert "learnt from" in text
    (rate,) = json.loads((finished.folder / "summary.json").read_text())["learning_rates"].values()
    assert f"w: {rate}" in text
    assert cotune(["report", str(finished.folder)], capsys).code == 0
    assert (finished.folder / "report.html").is_file()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "is no run: it has no history.jsonl. Give the folder of a run, e.g. runs/iris."),
        ({"inner/history.jsonl": ""}, "Did you mean one of"),
        ({"config.yaml": "a: 1"}, "has not reached its first boundary"),
        ({"history.jsonl": ""}, "is empty: this run has reached no boundary yet"),
        ({"history.jsonl": '{"loss": 1}\n'}, "is not a record of cotune"),
        ({"history.jsonl": '{"index": 0, "ste'}, 'history.jsonl", line 1, is damaged'),
    ],
)
def test_a_folder_that_is_no_run_is_refused_with_a_reason(
    files: dict[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in files.items():
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_text(text)
    answer = cotune(["report", str(tmp_path / "x")], capsys)
    assert answer.code == 2
    assert said in answer.err
    assert "Traceback" not in answer.err


def test_settings_that_are_no_mapping_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "config.yaml").write_text("- model\n- data\n")
    with pytest.raises(ReportError, match="its settings are no mapping of names to values"):
        read_run(folder)


@pytest.mark.parametrize("name", ["history.jsonl", "config.yaml", "metrics.csv", "summary.json"])
def test_a_file_that_is_not_utf8_is_named(name: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / name).write_bytes("{'a': 'ä'}".encode("latin-1"))
    with pytest.raises(ReportError, match=rf"{name}\" is damaged: it is not UTF-8"):
        read_run(folder)


def test_damaged_rollouts_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "rollouts/val-1.jsonl").write_text('{"half": ')
    with pytest.raises(ReportError, match=r'val-1.jsonl", line 1, is damaged'):
        read_run(folder)


def test_what_was_won_and_lost_is_counted_by_example_not_by_place(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    path = folder / "rollouts/val-1.jsonl"
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    run = read_run(folder)
    first = changes(run, journeys(run))[0]
    assert ([way.example for way in first.won], [way.example for way in first.lost]) == (["ex-1"], ["ex-3"])


def test_word_differences_give_back_both_texts() -> None:
    rng = random.Random(0)
    for _ in range(200):
        before, after = ("".join(rng.choices("ab c.\n", k=rng.randint(0, 12))) for _ in range(2))
        pieces = word_difference(before, after)
        assert "".join(piece for mark, piece in pieces if mark != "add") == before
        assert "".join(piece for mark, piece in pieces if mark != "remove") == after


def test_demos_in_another_order_are_a_change_of_their_own() -> None:
    one, two = ({"inputs": {"q": name}, "outputs": {}, "source": name} for name in "ab")
    (change,) = prompt_changes(
        {"s": {"instruction": "x", "demos": [one, two]}}, {"s": {"instruction": "x", "demos": [two, one]}}
    )
    assert change.moved
    assert change.changed
    assert [mark for mark, _ in change.demos] == ["same", "same"]


def test_statistics_are_those_of_the_textbook() -> None:
    assert interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert standard_error([0, 0, 1, 1]) == pytest.approx(0.28868, abs=1e-5)


def test_a_chart_stays_inside_its_frame(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    drawn = timeline(run, width=320)
    assert all(0 <= dot.high <= dot.y <= dot.low <= drawn.height for dot in drawn.dots)
    assert all(drawn.left <= band.x and band.x + band.width <= drawn.right for band in drawn.bands)
    loss, rate, score = curves(run, width=320)
    assert loss.line
    assert rate.line
    assert len(score.dots) == 2


@pytest.mark.parametrize(("recorded", "points"), [((3, 1), [3, 1]), ((1, 3), [1, 3]), ((None, None), [2, 2])])
def test_each_weight_step_has_the_epochs_that_its_record_says(
    recorded: tuple[int | None, int | None], points: list[int], tmp_path: Path
) -> None:
    """A letter may have its own; runs from before they were recorded had equal ones."""
    run = read_run(write_run(tmp_path / "run"))
    first, prompts, second = (replace(one, step=step) for one, step in zip(run.prefixes[1:], "wpw", strict=True))
    trained = [
        replace(prefix, record={**prefix.record, "epochs": epochs})
        for prefix, epochs in zip((first, second), recorded, strict=True)
    ]
    prefixes = [run.prefixes[0], trained[0], prompts, trained[1]]
    metrics = [{"step": 3.0 * epoch, "epoch": float(epoch), "val/score": 0.5} for epoch in range(4)]
    drawn = timeline(replace(run, prefixes=prefixes, schedule=["w", "p", "d"], metrics=metrics), width=760)
    assert [len(line.split()) for line in drawn.epochs] == points
    assert [band.label for band in drawn.bands] == ["weights", "prompts", "weights (d)"]


def test_a_step_that_was_logged_twice_counts_as_it_was_last(tmp_path: Path) -> None:
    from cotune.reporting.run_record import _read_metrics

    rows = ["step,train/loss,val/score", "0,0.5,", "1,0.4,", "1,,0.25", "1,0.3,", "1,,0.75", "2,0.2,"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows) + "\n")
    found = _read_metrics(tmp_path / "metrics.csv")
    assert [row["train/loss"] for row in found if "train/loss" in row] == [0.5, 0.3, 0.2]
    assert [row["val/score"] for row in found if "val/score" in row] == [0.75]
