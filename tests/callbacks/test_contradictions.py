"""Contradictions: what no run can get right is said before or at the first batch; what can be right is let through."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
from cotune.callbacks.contradictions import (
    ContradictionError,
    check_fields,
    check_gold,
    check_predictions,
    check_texts,
    check_window,
    cut_note,
    window_note,
)
from cotune.programs import (
    Completion,
    Example,
    Failure,
    Json,
    Predict,
    Program,
    ReasonThenFill,
    Rollout,
    Score,
    Stage,
    Step,
    exact_match,
    f1,
    first_line_number,
    labelled_demos,
    number_match,
)
from fakes import Loop


def labelled(*answers: Any, name: str = "answer") -> list[Example]:
    return [Example.of({"question": f"q{n}"}, {name: answer}, id=f"e{n}") for n, answer in enumerate(answers)]


def run(example: Example, *, prompt: int = 10, written: int = 2, finished: Any = "eos", **more: Any) -> Rollout:
    completion = Completion("text", (0,) * prompt, (0,) * written, finished)
    step = Step("predict", {}, {}, [], completion)
    return Rollout(example, (step,), more.get("prediction"), more.get("score", 0.0), more.get("error"))


def test_a_label_that_is_no_output_of_the_program_is_refused_with_the_mapping_that_mends_it() -> None:
    program = Predict("question -> colour", reasoning=True)
    said = r'"answer" is no output of the program; it gives reasoning, colour.*data.labels \{colour: answer\}'
    for metric in (exact_match, number_match, f1, first_line_number):
        with pytest.raises(ContradictionError, match=said):
            check_fields(program, metric, labelled("red"))


def test_a_label_of_another_name_is_no_matter_to_another_metric_or_program() -> None:
    check_fields(Predict("question -> colour"), lambda example, prediction: 1.0, labelled("red"))
    check_fields(Loop(), exact_match, labelled("red", name="computed"))


@pytest.mark.parametrize("label", ["purple", ["purple", "pink"], 7])
def test_a_label_that_its_fields_type_does_not_know_is_refused(label: object) -> None:
    program = Predict("question -> answer", types={"answer": ["red", "blue"]})
    with pytest.raises(ContradictionError, match=r"example e1: the label answer .* This holds for 1 of 2 labels"):
        check_fields(program, exact_match, labelled("red", label))
    check_fields(program, exact_match, labelled("Red", ["purple", "blue"]))


def test_labels_that_the_metric_scores_as_wrong_are_said_with_the_count_and_refused_where_none_passes() -> None:
    def strict(example: Example, prediction: Mapping[str, Any]) -> Score:
        return Score(float(prediction["answer"] == "red"), "it is not red")

    with pytest.raises(ContradictionError, match=r"e0: the metric strict .*\(answer 'blue'\) 0 \(it is not red\)"):
        check_gold(strict, labelled("blue", "green"), threshold=1.0)
    (said,) = check_gold(strict, labelled("red", "blue", "red"), threshold=1.0)
    assert "example e1: the metric strict" in said
    assert "1 of 3 labels" in said
    assert check_gold(strict, labelled("red"), threshold=1.0) == []


def test_a_label_that_is_wrong_once_its_type_has_read_it_is_refused() -> None:
    program = Predict("question -> answer: float")
    with pytest.raises(ContradictionError, match=r"answer '50%', which its type reads as 50\.0\) 0 "):
        check_gold(exact_match, labelled("50%"), threshold=1.0, program=program)
    right = labelled("7", "1,200.0", 7, ["7", "8"])
    assert check_gold(exact_match, right, threshold=1.0, program=program) == []
    assert check_gold(exact_match, labelled("50%"), threshold=1.0, program=Loop()) == []  # may predict what it likes


def test_a_label_that_is_a_list_is_tried_as_a_list_where_the_field_is_one() -> None:
    def one_word(example: Example, prediction: Mapping[str, Any]) -> float:
        return float(prediction["answer"] in example.labels["answer"])

    examples, listed = labelled(["lamp", "desk"]), Predict("question -> answer: list[str]")
    with pytest.raises(ContradictionError, match=r"one_word .*\(answer \['lamp', 'desk'\]\) 0, so no run"):
        check_gold(one_word, examples, threshold=1.0, program=listed)
    assert check_gold(one_word, examples, threshold=1.0, program=Predict("question -> answer")) == []
    for metric in (exact_match, f1):
        assert check_gold(metric, examples, threshold=1.0, program=listed) == []


class Own(Program):
    """Not one of cotune's: what it predicts is its own business."""

    say = Stage("question -> answer: float")

    def run(self, question: str) -> Any:
        return (yield self.say(question=question))


def test_of_an_own_program_it_is_said_that_the_metric_passes_a_label_but_not_what_its_type_reads() -> None:
    def as_written(example: Example, prediction: Mapping[str, Any]) -> float:
        return float(prediction["answer"] == example.labels["answer"])

    (said,) = check_gold(as_written, labelled("7.50", 7.5, "8.0"), threshold=1.0, program=Own())
    assert said.startswith("example e0: its field's type reads the label answer '7.50' as 7.5, which the metric")
    assert "So it is with 2 of 3 labels" in said
    assert check_gold(exact_match, labelled("7.50", "1,200"), threshold=1.0, program=Own()) == []

    def of_texts(example: Example, prediction: Mapping[str, Any]) -> float:
        return float(prediction["answer"].strip() == example.labels["answer"])

    assert check_gold(of_texts, labelled("7.50"), threshold=1.0, program=Own()) == []  # it may predict texts


def test_of_several_answers_one_of_the_type_will_do() -> None:
    program, examples = Predict("question -> answer: int"), labelled(["seven", "7"])
    check_fields(program, exact_match, examples)
    assert check_gold(exact_match, examples, threshold=1.0, program=program) == []
    assert [made.outputs for made in labelled_demos(program, examples)["predict"]] == [{"answer": "7"}]


def test_labels_that_the_form_cannot_write_are_said_with_the_reason_and_refused_where_it_can_write_none() -> None:
    program, broken = Predict("question -> answer", reasoning=True), "yes\nquestion: and then?"
    (said,) = check_texts(program, ReasonThenFill(), labelled("red", broken, 3, None))
    assert said.startswith("example e1: the form ReasonThenFill cannot write the label answer so that it is read back")
    assert "ends its field in this form: 'yes" in said
    assert "1 of 3 labels" in said
    with pytest.raises(ContradictionError, match=r"2 of 2 labels\. Fix the data, or use another"):
        check_texts(program, ReasonThenFill(), labelled(broken, broken))
    assert check_texts(program, Json(), labelled(broken, ["a", broken])) == []


def test_asking_a_slow_metric_ends_and_says_of_how_many_labels_it_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("cotune.callbacks.contradictions.time.monotonic", lambda: next(clock))
    (said,) = check_gold(exact_match, labelled(*"abcdefghij"), threshold=1.0)
    assert said.startswith("whether the metric scores labels as right was tried on 5 of 10 examples")


def test_a_threshold_below_1_is_all_that_a_label_must_reach() -> None:
    examples = labelled("red")
    assert check_gold(lambda example, prediction: 0.5, examples, threshold=0.5) == []
    with pytest.raises(ContradictionError, match=r"0\.5, so no run on it can reach 1"):
        check_gold(lambda example, prediction: 0.5, examples, threshold=1.0)


@pytest.mark.parametrize(
    "metric",
    [
        lambda example, prediction: float(prediction["titles"] == "x"),
        lambda example, prediction: float(prediction.get("titles") == "x"),
        lambda example, prediction: float("titles" in prediction),
        lambda example, prediction: float(prediction.titles == "x"),
        lambda example, prediction: float(getattr(prediction, "titles", "") == "x"),
        lambda example, prediction: 1 / 0,
    ],
)
def test_a_metric_that_needs_more_than_the_labels_is_not_refused(metric: Any) -> None:
    (said,) = check_gold(metric, labelled("red", "blue"), threshold=1.0)
    assert said.startswith(
        "whether the metric scores labels as right could not be tried on 2 of 2 examples (example e0"
    )


def test_a_metric_that_asks_for_attributes_is_asked_about_the_labels_as_well() -> None:
    def of_attributes(example: Example, prediction: Any) -> float:
        return float(copy.deepcopy(prediction).missed == example.labels["missed"] and prediction.missed != "blue")

    assert check_gold(of_attributes, labelled("red", name="missed"), threshold=1.0) == []
    with pytest.raises(ContradictionError, match="scores the right answer itself"):
        check_gold(of_attributes, labelled("blue", name="missed"), threshold=1.0)


@pytest.mark.parametrize("metric", [exact_match, f1, number_match, first_line_number])
def test_cotunes_metrics_score_labels_of_any_kind_as_right(metric: Any) -> None:
    assert check_gold(metric, labelled(7, 7.0, "1,200", [3, "4"], "-0.5"), threshold=1.0) == []


def test_the_metric_cannot_change_the_examples() -> None:
    examples = labelled(["b", "a"])

    def sorts(example: Example, prediction: Mapping[str, Any]) -> float:
        example.labels["answer"].sort()
        return 1.0

    check_gold(sorts, examples, threshold=1.0)
    assert examples[0].labels == {"answer": ["b", "a"]}


def test_a_label_that_no_prediction_has_is_refused_at_the_first_predictions() -> None:
    done = [run(e, prediction={"colour": "red"}) for e in labelled("red", "blue")]
    with pytest.raises(ContradictionError, match='"answer" is in no prediction; predictions have colour'):
        check_predictions(done, exact_match)
    (said,) = check_predictions(done, lambda example, prediction: 0.0)
    assert said.startswith('all scores are 0, and the label "answer" is in no prediction')
    assert check_predictions([run(e, prediction={"answer": "x"}) for e in labelled("red")], exact_match) == []
    assert check_predictions([run(labelled("red")[0], error=Failure("format", "no"))], exact_match) == []


def test_prompts_that_never_fit_are_refused_and_those_that_fit_now_and_then_are_counted() -> None:
    one, other = labelled("red", "blue")
    long, short = run(one, prompt=70, written=0, finished="too_long"), run(other, prediction={"answer": "x"})
    with pytest.raises(ContradictionError, match=r"window of 64 tokens .* 2 of 2 prompts are longer than it"):
        check_window([long, long], 64, 12)
    check_window([long, short], 64, 12)
    assert window_note([short], 64) == []
    assert (
        "1 of 2 runs scored 0 because a prompt was longer than the model's window of 64"
        in window_note([long, short], 64)[0]
    )


def test_prompts_that_leave_no_room_for_an_answer_are_refused() -> None:
    (one,) = labelled("red")
    with pytest.raises(ContradictionError, match="1 of 1 prompts leave next to nothing of it"):
        check_window([run(one, prompt=62, written=2, finished="length")], 64, 12)
    check_window([run(one, prompt=62, written=2, finished="eos")], 64, 12)
    check_window([run(one, prompt=62, written=2, finished="length", score=1.0)], 64, 12)
    check_window([run(one, prompt=40, written=12, finished="length")], 64, 12)


def test_answers_that_are_all_cut_off_are_said() -> None:
    (one,) = labelled("red")
    cut = run(one, finished="length", error=Failure("format", "no answer"))
    assert "1 of 1 completions were cut before their answer, at 8 new tokens" in cut_note([cut], 8)[0]
    assert cut_note([cut, run(one)], 8) == []
