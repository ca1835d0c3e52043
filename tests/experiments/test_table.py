"""Tables: which runs they need, what is read from them, and what the page says."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import xml.etree.ElementTree
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cotune.experiments.command import TableCommand
from cotune.experiments.cost import Cost, Pace, cost_of
from cotune.experiments.page import markdown, table_record
from cotune.experiments.paper import LMS, TASKS, paper_scores
from cotune.experiments.results import OUTCOME, read_result, rows_of
from cotune.experiments.runs import EQUAL_CALLS, Cell, Run, runs_of, source_of, words_of
from cotune.experiments.strategies import PAPERS, covering, parse_strategy
from cotune.experiments.table_config import TableConfig, TableError, read_table
from cotune.programs import exact_match
from cotune.reporting.plots import table_plot
from cotune.storage.run_identity import RunIdentity, data_sums
from cotune.storage.schedule_text import name_of
from hypothesis import given
from hypothesis import strategies as st
from written_table import config, flat, write_run

from cotune.fit import parts

ROOT = Path(__file__).resolve().parents[2]
CELL = Cell("iris", "tiny", "default")
PWP, PP = parse_strategy("p -> w -> p"), parse_strategy("p -> p")


@cache
def _parsed(*words: str) -> parts.Parts:
    return parts.parts_of(list(words))


def parts_of(words: Sequence[str]) -> parts.Parts:
    """What a command line makes; half a second each, so each is made once."""
    return _parsed(*words)


# Strategies and runs


@given(st.lists(st.lists(st.sampled_from("pw"), max_size=4).map(tuple), min_size=1, max_size=12))
def test_every_strategy_is_a_prefix_of_a_schedule_and_no_schedule_could_be_left_out(wanted: list[Any]) -> None:
    schedules = covering(wanted)
    assert all(any(s[: len(steps)] == steps for s in schedules) for steps in wanted)
    for left_out in schedules:
        rest = [s for s in schedules if s != left_out]
        assert not all(any(s[: len(steps)] == steps for s in rest) for steps in wanted)


def test_vanilla_alone_still_needs_a_run() -> None:
    assert covering([()]) == [("p",)]


def test_the_papers_eight_strategies_are_five_runs_a_seed_with_the_control(tmp_path: Path) -> None:
    runs = runs_of(config(tmp_path))
    assert [(run.schedule, run.seed, run.equal) for run in runs[:5]] == [
        ("p -> w -> p", 0, False),
        ("p -> p", 0, False),
        ("w -> w", 0, False),
        ("w -> p", 0, False),
        ("p -> p", 0, True),
    ]
    assert len({run.name for run in runs}) == len(runs) == 10
    assert source_of(runs[4], config(tmp_path)) == runs[0]


def test_without_the_alternation_or_the_control_there_is_nothing_to_equal(tmp_path: Path) -> None:
    assert not any(run.equal for run in runs_of(config(tmp_path, strategies=["p -> p", "w"])))
    assert not any(run.equal for run in runs_of(config(tmp_path, equal_calls=False)))


def test_a_run_is_a_command_line_whose_later_words_win(tmp_path: Path) -> None:
    options = {"data.sizes": {"train": 3}, "alternate.epochs": 2}
    made = config(tmp_path, options={"alternate.epochs": 9}, lms={"tiny": {"options": options}})
    words = words_of(Run(CELL, PP, 1, equal=True), made, tmp_path / "runs", lm_calls=77)
    assert words[:3] == ["fit", "--config", str(tmp_path / "task.yaml")]
    pairs = dict(zip(words[1::2], words[2::2], strict=True))
    assert pairs["--data.sizes"] == '{"train": 3}'
    assert (pairs["--alternate.epochs"], pairs["--alternate.lm_calls"]) == ("2", "77")
    assert (pairs["--alternate.schedule"], pairs["--seed_everything"]) == ("p -> p", "1")


def test_options_are_set_for_all_tasks_or_for_one_and_come_last(tmp_path: Path) -> None:
    tasks = {"a": {"configs": ["task.yaml"], "options": {"x": 1}}, "b": ["task.yaml"]}
    made = config(tmp_path, tasks=tasks).with_options(["x=5", "b:data.path=some=where"])
    assert made.words("a", "tiny", "default")[-2:] == ["--x", "5"]
    assert made.words("b", "tiny", "default")[-4:] == ["--x", "5", "--data.path", "some=where"]
    for wrong in ("x", "=5", "c:x=1"):
        with pytest.raises(TableError, match=r"sets no option|no task"):
            made.with_options([wrong])


def test_a_part_of_the_table_can_be_asked_for(tmp_path: Path) -> None:
    part = config(tmp_path).only(strategies=["W->P"], seeds=[7])
    assert [(run.schedule, run.seed) for run in runs_of(part)] == [("w -> p", 7)]
    with pytest.raises(TableError, match='the table has no LM "big"; it has tiny'):
        config(tmp_path).only(lms=["big"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": {}}, "tasks is {}"),
        ({"tasks": {"a b": []}}, "the name 'a b' also names folders"),
        ({"lms": {"x": ["nowhere.yaml"]}}, "there is no config .*nowhere.yaml"),
        ({"seeds": ["0"]}, "seeds is"),
        ({"seeds": [-1]}, "whole numbers from 0 to 4294967295"),
        ({"name": "../elsewhere"}, "name is '../elsewhere', and names the folder"),
        ({"name": None}, "name is None, and names the folder"),
        ({"strategies": ["p -> x"]}, 'unknown step "x"'),
        ({"strategies": []}, "strategies is"),
        ({"steps": 3}, 'a table has no "steps"'),
        ({"equal_calls": "no"}, "equal_calls is 'no'"),
        ({"tasks": {"a": {"paper": "MATH"}}}, "the paper has HotPotQA"),
        ({"tasks": {"a": {"presets": {"other": []}}}}, 'an unknown preset, "other"; there are default'),
        ({"tasks": {"a": {"presets": ["default"]}}}, r"presets is \['default'\]; it maps"),
        ({"tasks": {"a": {"configs": 5}}}, "configs is 5; give a file, or a list"),
        ({"options": [1]}, r"options is \[1\]"),
    ],
)
def test_a_config_that_is_wrong_is_refused_with_its_file(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(TableError, match=rf"table\.yaml: .*{said}"):
        config(tmp_path, **changes)


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="cannot be read"):
        read_table(tmp_path / "nowhere.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(TableError, match="holds no mapping"):
        read_table(tmp_path / "list.yaml")


# The configs that come with cotune


@pytest.mark.parametrize("name", ["iris", "small", "presets", "paper"])
def test_every_cell_of_a_shipped_table_parses(name: str) -> None:
    made = read_table(ROOT / "configs" / "table" / f"{name}.yaml")
    for task in made.tasks:
        for preset in made.presets:
            parts = parts_of(made.words(task, next(iter(made.lms)), preset))
            # `paper` is the paper's rule, `default` is the product's.
            assert parts.alternate.options.keep == ("last" if preset == "paper" else "best")
            query_and_key = preset in ("paper", "query-and-key")
            assert parts.module.lm.lora.targets == (["q_proj", "k_proj"] if query_and_key else "all-linear")


def test_each_preset_of_the_presets_table_changes_one_option_of_the_default() -> None:
    made = read_table(ROOT / "configs" / "table" / "presets.yaml")
    for task in made.tasks:
        default = parts_of(made.words(task, "smollm2-135m", "default")).counted
        for preset in set(made.presets) - {"default"}:
            counted = parts_of(made.words(task, "smollm2-135m", preset)).counted
            changed = [name for name in {*default, *counted} if default.get(name) != counted.get(name)]
            assert len(changed) == 1, f"{task}, {preset}: {changed}"


def test_the_paper_preset_is_the_paper_to_the_letter() -> None:
    made = read_table(ROOT / "configs" / "table" / "paper.yaml")
    assert tuple(made.lms) == LMS
    assert [name_of(steps) for steps in made.strategies] == list(PAPERS)
    sizes = {}
    for task in made.tasks:
        parts = parts_of(made.words(task, LMS[0], "paper"))
        lora, sampling, options = parts.module.lm.lora, parts.module.sampling, parts.data.bootstrapping
        assert (lora.r, lora.alpha, lora.dropout) == (32, 64, 0.0)
        assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (0.1, 0.97, 1024)
        assert (parts.alternate.options.epochs, parts.data.batch_size, str(parts.module.lm.dtype)) == (
            5,
            8,
            "torch.bfloat16",
        )
        assert (options.pairs, options.attempts, options.hints, options.demo_share) == ("initial", 1, 0, 0.0)
        search: Any = parts.alternate.search
        assert (search.num_candidates, search.max_demos, search.restart) == (6, 3, True)
        assert not parts.alternate.options.try_both_prompts
        assert all("reasoning" in stage.signature.outputs for stage in parts.module.program.stages.values())
        own = parts.data.sizes
        sizes[made.tasks[task].paper] = (
            own.train,
            own.dev + own.val,
            own.test,
            parts.alternate.options.search_examples,
            own.dev,
        )
    assert sizes == {
        "HotPotQA": (1000, 500, 1500, 100, 250),
        "GSM8K": (1000, 500, 1319, 100, 250),
        "Iris": (50, 50, 50, 15, 35),
    }


def test_the_default_preset_writes_out_the_defaults() -> None:
    """Task by task: laid over a task, it changes nothing."""
    for task in ("iris", "gsm8k", "hotpotqa", "banking77"):  # iris_two_stage has a search of its own
        words = ["--config", str(ROOT / "configs" / f"{task}.yaml")]
        plain = parts_of(words).counted
        assert parts_of([*words, "--config", str(ROOT / "configs" / "default.yaml")]).counted == plain


# Results


def results(tmp_path: Path, made: TableConfig) -> Any:
    return [read_result(run, tmp_path / "runs") for run in runs_of(made)]


def write_cell(tmp_path: Path, *, keep: str = "best") -> TableConfig:
    """Two seeds in which the last step of p -> w -> p is worse on val than the one before."""
    made = config(tmp_path, strategies=["vanilla", "p -> p", "p -> w", "p -> w -> p"])
    for seed in (0, 1):
        val, test = [0.1, 0.3, 0.9, 0.5], [flat(0.0), flat(0.25), flat(0.75 + 0.25 * seed), flat(0.5)]
        write_run(Run(CELL, PWP, seed), tmp_path / "runs", val, test, keep=keep)
        write_run(Run(CELL, PP, seed), tmp_path / "runs", val[:3], test[:3], keep=keep, cached=8, seconds=1.0)
        equal = Run(CELL, PP, seed, equal=True)
        write_run(equal, tmp_path / "runs", val[:3], test[:3], keep=keep, cached=9, seconds=0.5)
    return made


def by_name(made: TableConfig, tmp_path: Path) -> dict[str, Any]:
    return {row.strategy: row for row in rows_of(CELL, made, results(tmp_path, made))}


def test_under_keep_best_a_strategy_is_the_best_prefix_by_val_and_never_by_test(tmp_path: Path) -> None:
    rows = by_name(write_cell(tmp_path), tmp_path)
    assert [attempt.chosen for attempt in rows["p -> w -> p"].attempts] == ["p -> w", "p -> w"]
    assert [attempt.score for attempt in rows["p -> w -> p"].attempts] == [0.75, 1.0]
    assert [attempt.score for attempt in rows["vanilla"].attempts] == [0, 0]


def test_of_equal_scores_the_prefix_that_takes_fewer_tokens_is_chosen_as_a_fit_does_and_then_the_earlier(
    tmp_path: Path,
) -> None:
    made = config(tmp_path, strategies=["p -> w -> p"], seeds=[0, 1])
    for seed, tokens in enumerate(([9, 9, 9, 5], [9, 9, 9, 9])):
        write_run(Run(CELL, PWP, seed), tmp_path / "runs", [0.1, 0.5, 0.5, 0.5], [flat(0.5)] * 4, tokens=tokens)
    (row,) = rows_of(CELL, made, results(tmp_path, made))
    assert [attempt.chosen for attempt in row.attempts] == ["p -> w -> p", "p"]


def test_under_keep_last_it_is_the_last_program_as_in_the_paper(tmp_path: Path) -> None:
    rows = by_name(write_cell(tmp_path, keep="last"), tmp_path)
    assert [attempt.chosen for attempt in rows["p -> w -> p"].attempts] == ["p -> w -> p"] * 2
    assert [attempt.score for attempt in rows["p -> w -> p"].attempts] == [0.5, 0.5]


def test_a_run_that_was_suspended_does_not_move_the_seconds(tmp_path: Path) -> None:
    made = config(tmp_path, strategies=["p -> p"], seeds=[0, 1, 2])
    for seed, seconds in enumerate((2.0, 3.0, 900.0)):
        flats = [flat(0.5)] * 3
        write_run(Run(CELL, PP, seed), tmp_path / "runs", [0.5] * 3, flats, cached=0, seconds=seconds)
    (row,) = table_record(made, results(tmp_path, made))["cells"][0]["rows"]
    assert row["seconds"] == statistics.median(attempt["seconds"] for attempt in row["by_seed"].values()) < 20


def test_calls_are_of_all_steps_and_seconds_from_the_run_that_had_least_from_the_store(tmp_path: Path) -> None:
    rows = by_name(write_cell(tmp_path), tmp_path)
    assert [attempt.lm_calls for attempt in rows["p -> w -> p"].attempts] == [40, 40]
    assert [attempt.seconds for attempt in rows["p -> p"].attempts] == [5 + 5 + 1, 5 + 5 + 1]
    assert [attempt.seconds for attempt in rows[EQUAL_CALLS].attempts] == [5 + 5 + 0.5, 5 + 5 + 0.5]


def test_what_did_not_run_says_why_and_what_came_before_it_counts(tmp_path: Path) -> None:
    made = config(tmp_path, strategies=["vanilla", "w"], seeds=[0, 1])
    outcome = json.dumps({"state": "no traces", "message": "nothing passed"})
    for run in (Run(CELL, ("w",), 0), Run(CELL, ("w",), 1)):
        write_run(run, tmp_path / "runs", [0.0], [flat(0.0)], finished=False)
        (tmp_path / "runs" / run.name / OUTCOME).write_text(outcome)
    rows = by_name(made, tmp_path)
    assert [attempt.score for attempt in rows["vanilla"].attempts] == [0.0, 0.0]
    assert (rows["w"].attempts, rows["w"].missing) == ([], {0: "nothing passed", 1: "nothing passed"})
    page = markdown(table_record(made, results(tmp_path, made)))
    assert "| w | – |" in page
    assert "– w (seeds 0, 1): nothing passed" in page


def test_a_run_without_its_rollouts_on_test_is_refused(tmp_path: Path) -> None:
    made = write_cell(tmp_path)
    (tmp_path / "runs" / Run(CELL, PWP, 0).name / "rollouts" / "test-2.jsonl").unlink()
    with pytest.raises(TableError, match=r"test-2\.jsonl cannot be read"):
        results(tmp_path, made)


def test_a_finished_run_of_other_data_or_of_another_base_is_refused_before_the_page_is_written(
    tiny_model: Path, tmp_path: Path
) -> None:
    rows, model = tmp_path / "rows.csv", tmp_path / "model"
    rows.write_text(header := "question,answer\n" + "".join(f"{i},{i % 3}\n" for i in range(20)))
    shutil.copytree(tiny_model, model)
    options = {"model.program.signature": "question -> answer", "data": "Table", "data.path": str(rows)}
    options |= {"data.inputs": ["question"], "data.labels": ["answer"], "model.lm.model": str(model)}
    options |= {"model.program": "Predict", "data.sizes": {"train": 6, "dev": 3, "val": 3, "test": 3}}
    order = ("model.program", "model.program.signature", "data", "data.path", "data.inputs", "data.labels")
    ordered = {name: options[name] for name in [*order, *(options.keys() - set(order))]}
    made = config(tmp_path, strategies=["p"], seeds=[4], equal_calls=False, options=ordered)
    (run,) = runs_of(made)
    parted = parts.parts_of(words_of(run, made, tmp_path))
    sums = data_sums({name: getattr(parted.data.splits, name) for name in ("train", "dev", "val", "test")})
    folder = tmp_path / "table"
    write_run(run, folder / "runs", [0.1, 0.5], [flat(0.5)] * 2)
    identity = RunIdentity(parted.counted, sums, parted.module.lm.base_identity(), {}, finished=True)
    identity.write(folder / "runs" / run.name)

    def again() -> int:
        asked = argparse.Namespace(dry_run=True, no_warm_up=True, jobs=1)
        return TableCommand(made, folder, asked, parts_of=parts.parts_of, fit=lambda words: 1).make()

    assert again() == 0
    rows.write_text(header.replace("7,1", "7,2"))
    with pytest.raises(TableError, match=r"_p_4 was made of other data .* \(then -> now\): data, \w+ set: "):
        again()
    rows.write_text(header)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(TableError, match=r"another base model \(then -> now\): base model: "):
        again()


# The page


def test_the_page_has_scores_with_errors_differences_calls_and_the_papers_numbers(tmp_path: Path) -> None:
    made = write_cell(tmp_path)
    record = json.loads(json.dumps(table_record(made, results(tmp_path, made))))
    rows = {row["strategy"]: row for row in record["cells"][0]["rows"]}
    best = rows["p -> w -> p"]
    assert (best["mean"], best["seeds"], best["examples"], best["lm_calls"]) == (0.875, 2, 4, 40)
    assert best["standard_error"] == pytest.approx(0.125)
    assert best["to_control"]["mean"] == 0.0  # the control has the same scores here
    assert rows["vanilla"]["to_control"]["mean"] == pytest.approx(-0.875)
    assert rows["p -> p"]["to_control"] is None
    assert rows["vanilla"]["unreadable"] == 1.0
    assert best["paper"] == dict(zip(LMS, (52.7, 65.3, 79.3), strict=True))
    page = markdown(record)
    assert "| p → w → p | 87.5 ± 12.5 | +0.0 [+0.0, +0.0] |" in page
    assert "52.7 / 65.3 / 79.3" in page
    assert "that of the best prefix by val" in page
    assert "2407.10930" in page


def test_an_lm_of_the_paper_stands_beside_its_own_number(tmp_path: Path) -> None:
    made = config(tmp_path, lms={"llama-2-7b-chat": []}, strategies=["vanilla", "w"], seeds=[0])
    page = markdown(table_record(made, results(tmp_path, made)))
    assert "| paper, llama-2-7b-chat |" in page
    assert page.count("| 0.0 |\n") == 1
    assert "0 of 1 runs are finished" in page


def test_the_plot_is_a_picture_of_every_strategy(tmp_path: Path) -> None:
    made = write_cell(tmp_path)
    picture = xml.etree.ElementTree.fromstring(table_plot(table_record(made, results(tmp_path, made))))
    texts = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"vanilla", "p → w → p", "iris, tiny", "equal calls"} <= set(texts)
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}circle"))) == 1 + 5 * (1 + 2)


def test_the_papers_table_has_24_rows_of_three_and_the_means_that_are_known_of_it() -> None:
    rows = {s: [v for task in TASKS for v in paper_scores(task, s).values()] for s in PAPERS}
    assert all(len(row) == 9 for row in rows.values())
    means = {s: sum(v or 0.0 for v in rows[s]) / 9 for s in ("p", "p -> p", "p -> w -> p")}
    assert {s: round(mean, 1) for s, mean in means.items()} == {"p": 50.8, "p -> p": 52.0, "p -> w -> p": 51.8}
    assert paper_scores("Iris", "p -> w -> p -> w") == paper_scores("MATH", "p") == {}


# The cost


def test_the_most_that_a_run_can_cost_follows_from_its_options() -> None:
    words = ["--config", str(ROOT / "configs" / "hotpotqa.yaml"), "--data.bootstrapping.attempts", "2"]
    parts = parts_of([*words, "--alternate.average_last", "2", "--data.bootstrapping.hints", "1"])
    found = cost_of(Run(CELL, ("p", "w"), 0), parts, Pace(100.0, 0.5, 2.0, 7.0))
    runs = 50  # vanilla
    runs += 100 + 12 + (4 + 6) * 50 + 50  # p: bootstrap, some of it with hints, candidates on dev, val
    runs += (2 + 1) * 100 + (5 + 1 + 1 + 1) * 50 + 50  # w: attempts and hints, epochs, average, both prompts, gate
    calls = 3 * (runs + 4 * 100)  # three stages; test after each of three prefixes and at the end
    assert found == Cost(calls, 3 * 100 * 5, calls * 32, calls * 100.0, 7 + calls * 0.5 + 1500 * 2.0)


def test_metrics_of_the_tasks_are_the_papers() -> None:
    assert parts_of(["--config", str(ROOT / "configs" / "iris.yaml")]).data.metric is exact_match
