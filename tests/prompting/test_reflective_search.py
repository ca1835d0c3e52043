"""ReflectiveSearch: what is rewritten from what, what a proposal has to pass, what it costs, and that it repeats."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import pytest
from cotune.programs import (
    Call,
    Completion,
    Demo,
    Example,
    FaultyProgramError,
    Program,
    Prompt,
    Request,
    Score,
    Signature,
    Stage,
    prompts_id,
)
from cotune.prompting import Found, JointSearch, PromptSearch, ReflectiveSearch, SearchTask
from cotune.prompting.search import Review
from fakes import FakeLM, doubles, search_task
from hypothesis import given, settings
from hypothesis import strategies as st
from killed import same_when_killed

WORDS = {"plan": ("ask", "sort", "list"), "work": ("unit", "sign", "round")}
"""The words that each stage's instruction should have; each counts a sixth."""


class PlanWork(Program):
    """Two stages; the fake LM gives back each one's instruction, so a metric can see it."""

    plan = Stage(Signature.parse("number -> plan", instruction="Plan."))
    work = Stage(Signature.parse("number, plan -> answer", instruction="Work."))

    def run(self, number: int) -> Generator[Call, Mapping[str, str], Mapping[str, Any]]:
        planned = yield self.plan(number=number)
        return {**(yield self.work(number=number, plan=planned["plan"])), **planned}


class Skipping(PlanWork):
    """Never plans."""

    def run(self, number: int) -> Generator[Call, Mapping[str, str], Mapping[str, Any]]:
        return {"plan": "", **(yield self.work(number=number, plan="none"))}


def missing(prediction: Mapping[str, Any]) -> list[tuple[str, str]]:
    texts = {"plan": prediction["plan"], "work": prediction["answer"]}
    return [(stage, word) for stage in WORDS for word in WORDS[stage] if word not in texts[stage]]


def told(example: Example, prediction: Mapping[str, Any]) -> Score:
    """The share of words, with feedback that names each stage's first missing one."""
    gaps = missing(prediction)
    stages = {stage: f"lacks <{word}>" for stage, word in reversed(gaps)}
    return Score(1 - len(gaps) / 6, " ".join(stages.values()), {}, stages)


def untold(example: Example, prediction: Mapping[str, Any]) -> float:
    return 1 - len(missing(prediction)) / 6


def obeying(text: str) -> str:
    """What a proposer writes that adds to the instruction every word that feedback says it lacks."""
    now = text.split("now:\n```\n")[1].split("\n```")[0]
    lacks = {part.split(">")[0] for part in text.split("lacks <")[1:]}
    return f"```\n{' '.join([now, *sorted(lacks)])}\n```"


class Roles(FakeLM):
    """The program's LM, which gives back its instruction, and the proposer, which is a function of what it is asked."""

    def __init__(self, propose: Callable[[str], str | Completion] = obeying) -> None:
        super().__init__(self._answer)
        self.propose = propose

    def _answer(self, request: Request) -> str | Completion:
        if request.adapter == "":
            return self.propose(request.messages[0]["content"])
        return request.messages[0]["content"].rpartition("\nReply with")[0].replace("\n", " ")

    @property
    def reflections(self) -> list[str]:
        return [request.messages[0]["content"] for request in self.requests if request.adapter == ""]


DEV = doubles(101, 102, 103, 104)


def task(lm: Any, program: Program | None = None, **changes: Any) -> SearchTask:
    given = {"train": doubles(*range(1, 13)), "dev": DEV, "metric": told, **changes}
    return search_task(lm, program or PlanWork(), **given)


def search(lm: Any = None, program: Program | None = None, *, options: Any = None, **changes: Any) -> Found:
    return ReflectiveSearch(**{"max_runs": 400, **(options or {})}).search(task(lm or Roles(), program, **changes))


def count(found: Found, what: str) -> int:
    """The number at the end of the note that begins with `what`; 1 for a note without, 0 for no note."""
    for note in found.notes:
        if note.startswith(what):
            number = note.rpartition(": ")[2]
            return int(number) if number.isdigit() else 1
    return 0


def test_what_feedback_asks_for_is_learnt() -> None:
    found = search()
    assert found.score == 1
    for stage, words in WORDS.items():
        assert all(word in found.prompts[stage].instruction for word in words)
    assert "ended with a full score on dev" in found.notes


class Person:
    """Refuses what asks, edits what sorts, and takes the rest."""

    def __init__(self) -> None:
        self.asked: list[Review] = []

    def review(self, asked: Sequence[Review]) -> list[str]:
        self.asked += asked
        return ["" if "ask" in one.proposed else one.proposed.replace("sort", "sort list ask") for one in asked]


@pytest.mark.parametrize(
    "search", [ReflectiveSearch(approve=True), JointSearch(approve=True, num_instructions=3, trials=6)]
)
def test_a_person_takes_refuses_or_edits_each_text_before_a_run(search: PromptSearch) -> None:
    written = iter(("Plan, ask.", "Plan, sort.", *(f"Work {number}, unit." for number in range(999))))
    lm, person = Roles(lambda text: next(written)), Person()
    found = search.search(task(lm, reviewer=person))
    assert (found.rejected[0].text, found.rejected[0].why) == ("Plan, ask.", "refused by a person")
    sent = {request.messages[0]["content"].split("\n")[0] for request in lm.requests if request.adapter != ""}
    assert "Plan, sort list ask." in sent
    assert not {"Plan, ask.", "Plan, sort."} & sent
    assert person.asked[0] == Review("plan", "Plan.", "Plan, ask.")
    with pytest.raises(ValueError, match="has no reviewer"):
        search.search(task(lm))


def test_without_feedback_the_expected_results_are_shown() -> None:
    lm = Roles(lambda text: f"```\n{'ask sort list unit sign round' if 'Expected' in text else 'nothing'}\n```")
    found = search(lm, metric=untold)
    assert found.score == 1
    assert "Expected\n  answer: " in lm.reflections[0]


def test_a_full_score_at_the_start_costs_no_more_than_dev() -> None:
    lm = Roles()
    found = search(lm, metric=lambda example, prediction: 1.0)
    assert lm.calls == 2 * len(DEV)
    assert (found.score, len(found.candidates)) == (1, 1)


def test_minibatches_that_are_all_right_are_skipped_counted_and_end_the_search() -> None:
    lm = Roles()
    found = search(lm, metric=lambda example, prediction: float(int(example.id) < 100))
    assert lm.reflections == []
    assert count(found, "minibatches skipped: all right") == 4
    assert "ended after 4 minibatches in a row that were all right" in found.notes


@pytest.mark.parametrize(
    ("proposal", "why"),
    [
        ("", "empty"),
        ('{"new_instruction": "Plan well."}', "JSON"),
        ("Could you give me more examples?", "a question or an excuse"),
        (Completion("word " * 1000), "longer than max_chars (4000)"),
        (Completion("```\nPlan w", finished="length"), "cut at max_tokens (512)"),
        (Completion("", finished="too_long"), "the request does not fit the proposer's context window"),
    ],
)
def test_a_proposer_of_no_use_costs_no_run_and_is_given_up(proposal: str | Completion, why: str) -> None:
    found = search(Roles(lambda text: proposal))
    assert [candidate.why for candidate in found.candidates] == ["incumbent"]
    assert found.prompts == PlanWork().initial_prompts()
    # Ten rounds of four parents' minibatches, none made twice: at most all of train.
    assert found.calls == {"program": 2 * (len(DEV) + 12), "proposer": 40}
    assert count(found, f"proposals rejected: {why}") == 40
    assert {one.why for one in found.rejected} == {why}
    assert "ended after 10 rounds in a row without a proposal that was worth a run" in found.notes


def test_a_proposer_that_is_seldom_of_use_is_not_asked_without_end() -> None:
    seen: list[str] = []

    def seldom(text: str) -> str:
        seen.append(text)
        return "" if len(seen) % 8 else f"```\nDo it in way {len(seen)}.\n```"

    lm = Roles(seldom)
    found = search(lm)
    assert len(lm.reflections) == ReflectiveSearch(max_runs=400).about_proposals(2, len(DEV)) == 66
    assert "ended after 66 proposals" in found.notes


def test_the_same_text_for_ever_is_tried_once_a_stage() -> None:
    found = search(Roles(lambda text: "Do it well."))
    whys = [one.why for one in found.rejected]
    assert whys.count("no better on the minibatch") == 2
    assert set(whys) == {"no better on the minibatch", "tried before"}


def test_a_stage_that_is_never_called_is_never_rewritten() -> None:
    lm = Roles()
    found = search(lm, Skipping(), options={"choose_stage": "turns"})
    assert lm.reflections
    assert all('improve the instruction of the stage "work"' in text for text in lm.reflections)
    assert count(found, 'minibatches that never called stage "plan"') == len(lm.reflections)


def test_where_no_stage_may_be_rewritten_the_search_ends_and_says_why() -> None:
    found = search(program=Skipping(), options={"frozen": ["work"]})
    assert count(found, "minibatches skipped: they called no stage that may be rewritten") == 40
    assert found.calls["proposer"] == 0


def test_frozen_stages_stay() -> None:
    found = search(options={"frozen": ["plan"], "max_runs": 150})
    assert {candidate.prompts["plan"].instruction for candidate in found.candidates} == {"Plan."}
    assert "round" in found.prompts["work"].instruction
    with pytest.raises(ValueError, match='frozen stage "check" is not in'):
        search(options={"frozen": ["check"]})


def test_a_kept_part_stays_in_every_candidate() -> None:
    prompts = {"plan": Prompt("[Law.] Plan."), "work": Prompt("Work.")}
    options = {"keep": ("[", "]"), "max_runs": 200}
    drops = Roles(lambda text: obeying(text).replace("[Law.]", ""))
    found = search(drops, initial=prompts, incumbent=prompts, options=options)
    assert count(found, "proposals rejected: a part to keep is missing or changed") > 0
    assert all("[Law.]" in candidate.prompts["plan"].instruction for candidate in found.candidates)


def test_turns_go_through_the_stages() -> None:
    lm = Roles(lambda text: "")
    search(lm, options={"choose_stage": "turns"})
    stages = [text.split('the stage "')[1].split('"')[0] for text in lm.reflections[:6]]
    assert stages == ["plan", "work"] * 3


def test_blame_finds_the_stage() -> None:
    def only_work(example: Example, prediction: Mapping[str, Any]) -> Score:
        return Score(0.5, "no", {}, {"work": "your doing"})

    lm = Roles(lambda text: "")
    search(lm, metric=only_work)
    assert all('the instruction of the stage "work"' in text for text in lm.reflections)


def test_an_answer_that_cannot_be_read_blames_its_stage() -> None:
    class Mute(Roles):
        def _answer(self, request: Request) -> str | Completion:
            said = super()._answer(request)
            return "" if said == "Work." else said

    lm = Mute(lambda text: "Take heed.")
    found = search(lm, metric=untold)
    assert 'the instruction of the stage "work"' in lm.reflections[0]
    assert found.candidates[0].errors == {"format": 4}


def test_a_proposal_has_to_gain_on_its_minibatch() -> None:
    worse = Roles(lambda text: f"```\n{text.count('Run')} of no use\n```")
    found = search(worse, metric=untold, options={"max_runs": 60})
    rejected = [one for one in found.rejected if one.why == "no better on the minibatch"]
    assert rejected
    for one in rejected:
        (scores,) = one.lineage["rewritten"].values()
        assert len(scores["minibatch"]) == len(scores["before"]) == len(scores["after"]) == 3
        assert sum(scores["after"]) <= sum(scores["before"])
    assert len(found.candidates) == 1


def test_tolerance_lets_equals_through() -> None:
    def number(text: str) -> str:
        return f"try {len(text)} {hash_of(text)}"

    strict = search(Roles(number), metric=untold, options={"max_runs": 60})
    lenient = search(Roles(number), metric=untold, options={"max_runs": 60, "tolerance": 0.1})
    assert len(strict.candidates) == 1 < len(lenient.candidates)
    assert lenient.prompts == PlanWork().initial_prompts()  # equal on dev: the earlier stays


def hash_of(text: str) -> str:
    return prompts_id({"x": Prompt(text)})


def test_rewrites_of_two_stages_in_a_round_make_one_child() -> None:
    found = search(options={"choose_stage": "turns"})
    child = found.candidates[1]
    assert child.why == 'round 1: "plan" and "work" rewritten'
    assert set(child.lineage["rewritten"]) == {"plan", "work"}
    assert child.lineage["parents"] == [found.candidates[0].id] == [child.parent]


def test_where_two_rewrites_hurt_each_other_each_is_scored_alone() -> None:
    def either(example: Example, prediction: Mapping[str, Any]) -> Score:
        has = [word in prediction[name] for name, word in (("plan", "ask"), ("answer", "unit"))]
        return Score(0.5 if sum(has) == 1 else 0.1, "lacks <ask> lacks <unit>")

    found = search(metric=either, options={"choose_stage": "turns", "max_runs": 80, "max_merges": 0})
    whys = [candidate.why for candidate in found.candidates]
    assert whys[:4] == [
        "incumbent",
        'round 1: "plan" and "work" rewritten',
        'round 1: "plan" rewritten',
        'round 1: "work" rewritten',
    ]
    assert found.score == 0.5


def test_two_lineages_are_merged() -> None:
    """A third of dev wants each stage's word, and a third wants no change, so the first prompts stay on the front."""

    def thirds(example: Example, prediction: Mapping[str, Any]) -> Score:
        has = {"plan": "ask" in prediction["plan"], "work": "unit" in prediction["answer"]}
        if int(example.id) % 3 == 2:
            return Score(1 - sum(has.values()) / 2)
        stage = "plan" if int(example.id) % 3 else "work"
        return Score(float(has[stage]), "" if has[stage] else {"plan": "lacks <ask>", "work": "lacks <unit>"}[stage])

    options = {"proposals": 1, "minibatch": 2, "choose_stage": "turns", "max_runs": 300}
    dev = doubles(102, 103, 104)
    runs = [search(metric=thirds, dev=dev, options=options, seed=seed) for seed in range(4)]
    merged = [candidate for found in runs for candidate in found.candidates if "merge of" in candidate.why]
    assert merged
    for candidate in merged:
        assert set(candidate.lineage["sources"]) == {"plan", "work"}
        assert len(set(candidate.lineage["sources"].values())) == len(candidate.lineage["parents"]) == 2
    none = [search(metric=thirds, dev=dev, options={**options, "max_merges": 0}, seed=seed) for seed in range(4)]
    assert not [candidate for found in none for candidate in found.candidates if "merge of" in candidate.why]


def test_objectives_are_led_and_recorded() -> None:
    def two(example: Example, prediction: Mapping[str, Any]) -> Score:
        one = told(example, prediction)
        return Score(one.value, one.feedback, {"brief": 1 / (1 + len(prediction["plan"]))}, one.stages)

    found = search(metric=two)
    values = [candidate.lineage["objectives"]["brief"] for candidate in found.candidates]
    assert values[0] == 1 / (1 + len("Plan."))
    assert max(values) == values[0]


def test_broken_feedback_is_a_fault_that_is_counted() -> None:
    def now_and_then(example: Example, prediction: Mapping[str, Any]) -> Score:
        return Score(0.5, 7 if example.id == "103" else "lacks <ask>")  # type: ignore[arg-type]

    found = search(metric=now_and_then, options={"max_runs": 50})
    assert found.faults["metric"].example == "103"
    assert found.faults["metric"].count == len(found.candidates)
    with pytest.raises(FaultyProgramError, match="which is not text"):
        search(metric=lambda example, prediction: Score(0.5, 7))  # type: ignore[arg-type]


def test_a_run_never_sees_a_demo_made_of_its_own_example() -> None:
    demo = Demo({"number": "3"}, {"plan": "SECRET"}, source="3")
    prompts = {"plan": Prompt("Plan.", (demo,)), "work": Prompt("Work.")}
    lm = Roles()
    search(lm, incumbent=prompts)
    own = [
        any("SECRET" in message["content"] for message in request.messages)
        for request in lm.requests
        if request.adapter and request.messages[-1]["content"] == "number: 3"
    ]
    others = [request for request in lm.requests if any("SECRET" in m["content"] for m in request.messages)]
    assert own
    assert not any(own)
    assert others


def test_nothing_of_dev_reaches_the_proposer() -> None:
    lm = Roles()
    search(lm)
    assert lm.reflections
    assert not any(example.id in text for text in lm.reflections for example in DEV)


def test_a_round_is_one_batch_for_parents_reflections_children_and_dev() -> None:
    lm = Roles()
    found = search(lm, options={"max_merges": 0})
    rounds = max(candidate.lineage.get("round", 0) for candidate in found.candidates)
    stages, per_pass = 2, 3  # minibatches of parents and of children, and dev; each is a batch for either stage
    assert len(lm.batches) <= stages + rounds * (per_pass * stages + 1)


@settings(max_examples=25, deadline=None, database=None)
@given(st.integers(0, 120), st.integers(1, 5), st.integers(1, 5), st.integers(0, 3), st.integers(0, 4))
def test_the_contract_holds_and_the_budget_too(
    budget: int, minibatch: int, proposals: int, merges: int, s: int
) -> None:
    lm = Roles()
    options = ReflectiveSearch(budget, minibatch, proposals, merges)
    before = dict(vars(options))
    given = task(lm, seed=s)
    found = options.search(given)
    runs = sum(request.adapter != "" for request in lm.requests) / 2
    assert runs <= options.most_runs(12, len(DEV))
    assert vars(options) == before
    assert found.candidates[0].why == "incumbent"
    assert found.score == max(candidate.score for candidate in found.candidates)
    assert len({candidate.id for candidate in found.candidates}) == len(found.candidates)
    assert all(len(candidate.scores) == len(DEV) for candidate in found.candidates)
    assert found.calls == {"program": 2 * runs, "proposer": len(lm.reflections)}
    assert len(lm.reflections) <= options.about_proposals(2, len(DEV))
    assert options.search(task(Roles(), seed=s)) == found
    json.dumps([one.to_dict() for one in (*found.candidates, *found.rejected)])


def test_the_seed_changes_what_is_drawn() -> None:
    examples = [one.lineage["rewritten"]["plan"]["minibatch"] for one in first_children(0, 1)]
    assert examples[0] != examples[1]


def first_children(*seeds: int) -> list[Any]:
    return [search(seed=seed, options={"choose_stage": "turns"}).candidates[1] for seed in seeds]


def test_every_train_example_is_drawn_once_in_a_pass() -> None:
    found = search(Roles(lambda text: ""), options={"proposals": 1, "minibatch": 5})
    drawn = [one.lineage["rewritten"].popitem()[1]["minibatch"] for one in found.rejected[:3]]
    assert [len(one) for one in drawn] == [5, 5, 5]
    assert {name for one in drawn for name in one} == {str(n) for n in range(1, 13)}


def test_lm_calls_of_the_task_take_the_place_of_max_runs() -> None:
    hard = Roles(lambda text: f"```\n{hash_of(text)}\n```")
    found = search(hard, metric=untold, options={"max_runs": 10}, lm_calls=200)
    assert 200 <= sum(found.calls.values()) <= 200 + 60


def test_another_proposer_writes_and_is_counted_apart() -> None:
    writer = FakeLM(lambda request: obeying(request.messages[0]["content"]))
    lm = Roles()
    found = search(lm, options={"proposer": writer})
    assert lm.reflections == []
    assert found.score == 1
    assert found.calls == {"program": lm.calls, "proposer": writer.calls}
    assert f"LM calls: {lm.calls} of the program, {writer.calls} of the proposer" in found.notes


def test_no_train_is_no_error() -> None:
    found = search(train=[])
    assert found.prompts == PlanWork().initial_prompts()
    assert "train is empty: there is nothing to reflect on" in found.notes


def test_the_incumbent_and_the_initial_prompts_both_start() -> None:
    found = search(incumbent={"plan": Prompt("Plan ask."), "work": Prompt("Work.")})
    assert [candidate.why for candidate in found.candidates[:2]] == ["incumbent", "zero-shot"]
    assert found.prompts != PlanWork().initial_prompts()


def test_a_search_killed_anywhere_repeats_itself() -> None:
    same_when_killed(lambda lm: search(lm, options={"max_runs": 60}), Roles)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ({"max_runs": -1}, "max_runs -1 is below 0"),
        ({"minibatch": 0}, "minibatch 0 is below 1"),
        ({"proposals": 0}, "proposals 0 is below 1"),
        ({"max_merges": -1}, "max_merges -1 is below 0"),
        ({"choose_stage": "random"}, 'choose_stage "random" is neither'),
        ({"tolerance": 2.0}, "tolerance 2.0 is outside"),
        ({"max_chars": 0}, "max_chars 0 is below 1"),
    ],
)
def test_arguments_out_of_range_are_named(argument: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ReflectiveSearch(**argument)
