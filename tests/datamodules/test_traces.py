"""Traces as batches: what a training pair holds, and which pairs an epoch's batches hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cotune.datamodules import (
    Bootstrapping,
    EpochBatches,
    NoTracesError,
    Pair,
    PairMaker,
    Sizes,
    Splits,
    Trace,
    TraceDataModule,
    Vocabulary,
    load_traces,
    save_traces,
    split,
)
from cotune.programs import Demo, Lines, Predict, Prompt
from fakes import EOS, Loop, doubles

WINDOW = 400


def encode(messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Bytes, so that tests can read what a pair holds."""
    return list("\n".join(f"{m['role']}: {m['content']}" for m in messages).encode())


def trace(number: int, *, call: int = 0, complete: bool = True, stage: str = "double") -> Trace:
    answer = str(2 * number)
    ids = (*answer.encode(), EOS) if complete else tuple(answer.encode())
    return Trace(
        example=f"e{number}",
        attempt=0,
        score=1.0,
        stage=stage,
        call=call,
        inputs={"number": str(number)},
        outputs={"answer": answer},
        messages=[],
        completion=answer,
        completion_ids=ids,
        complete=complete,
        prompts="",
    )


def maker(*, window: int = WINDOW, demos: Sequence[Demo] = ()) -> PairMaker:
    prompts = {"double": Prompt("Double.", tuple(demos))}
    return PairMaker(Loop(1), Lines(), prompts, encode, end_id=EOS, window=window)


def batches(
    count: int, *, batch_size: int = 4, seed: str = "0", made: PairMaker | None = None, **options: Any
) -> EpochBatches:
    traces = [trace(n) for n in range(count)]
    return EpochBatches(traces, made or maker(), Bootstrapping(**options), batch_size=batch_size, seed=seed)


def text(pair: Pair) -> str:
    return bytes(pair.prompt_ids).decode()


def asked(pair: Pair) -> str:
    """The number that the pair's own call asks."""
    return text(pair).rpartition("number: ")[2]


def demos_in(pair: Pair) -> list[str]:
    return [line.removeprefix("user: number: ") for line in text(pair).splitlines() if line.startswith("user: ")][:-1]


def all_pairs(epoch: EpochBatches) -> list[list[Pair]]:
    return [[pair for pairs in epoch.pairs(i).values() for pair in pairs] for i in range(len(epoch))]


# A pair


def test_a_pair_is_the_prompt_and_the_very_ids_that_were_written() -> None:
    pair = maker().pair(trace(21))
    expected = Lines().render(Loop(1).double.signature, Prompt("Double."), {"number": "21"})
    assert list(pair.prompt_ids) == encode(expected)
    assert pair.completion_ids == [*b"42", EOS]


def test_a_completion_that_ended_by_a_stop_string_gets_its_end_of_turn() -> None:
    assert maker().pair(trace(21, complete=False)).completion_ids == [*b"42", EOS]


def test_pairs_carry_the_prompts_of_the_maker_whatever_the_trace_was_generated_from() -> None:
    shown = maker(demos=[Demo({"number": "7"}, {"answer": "14"}, "e7")])
    assert demos_in(shown.pair(trace(3))) == ["7"]
    assert demos_in(maker().pair(trace(3))) == []


def test_a_pair_never_shows_its_own_example_as_a_demo() -> None:
    demos = [Demo({"number": str(n)}, {"answer": str(2 * n)}, f"e{n}") for n in (3, 7)]
    assert demos_in(maker(demos=demos).pair(trace(3))) == ["7"]


def test_given_demos_stand_instead_of_the_prompts_own() -> None:
    own = maker(demos=[Demo({"number": "7"}, {"answer": "14"}, "e7")])
    assert demos_in(own.pair(trace(3), [Demo({"number": "9"}, {"answer": "18"}, "e9")])) == ["9"]


def test_an_end_of_turn_that_is_appended_weighs_as_the_token_before_it_and_is_judged_by_nobody() -> None:
    stopped = replace(trace(21, complete=False), ce=(0, 0.5), pg=(1, 2), kl=(3, 4), sampled=(-1, -2), group="g")
    pair = maker().pair(replace(stopped, candidates=((1, 2), (3, 4)), reference=((-1, -2, -3), (-4, -5, -6))))
    assert (pair.ce, pair.pg, pair.kl) == ([0, 0.5, 0.5], [1, 2, 0], [3, 4, 0])
    assert (pair.candidates, pair.reference) == ([(1, 2), (3, 4), (-1, -1)], [(-1, -2, -3), (-4, -5, -6), (0, 0, 0)])
    assert (pair.sampled, pair.group) == ([-1, -2, 0], "g")
    whole = maker().pair(replace(trace(21), ce=(0, 0.5, 1), pg=()))
    assert (whole.ce, whole.pg) == ([0, 0.5, 1], ())


# Traces of another tokenizer


def backwards(digest: str = "backwards") -> Vocabulary:
    """A tokenizer with the bytes in reverse: the same ids are other texts."""
    return Vocabulary(
        digest,
        "student",
        lambda text: [255 - b for b in text.encode()],
        lambda ids: bytes(255 - i for i in ids).decode(),
    )


def student(vocabulary: Vocabulary) -> PairMaker:
    return replace(maker(), vocabulary=vocabulary)


def test_traces_of_the_same_tokenizer_keep_their_ids() -> None:
    own = replace(trace(21), tokenizer="backwards", base="teacher")
    assert not student(backwards()).is_foreign(own)
    assert student(backwards()).pair(own).completion_ids == [*b"42", EOS]


@pytest.mark.parametrize("complete", [True, False])
def test_traces_of_another_tokenizer_are_trained_on_as_their_text(complete: bool) -> None:
    foreign = replace(trace(21, complete=complete), tokenizer="bytes", base="teacher", forced=(True, False, False))
    pair = student(backwards()).pair(foreign)
    assert pair.completion_ids == [255 - ord("4"), 255 - ord("2"), EOS]


def test_what_another_lm_wrote_around_its_outputs_is_not_learnt() -> None:
    foreign = replace(trace(21), tokenizer="bytes", completion="<think>hm</think>The answer: 42")
    pair = student(backwards()).pair(foreign)
    assert pair.completion_ids == [255 - ord("4"), 255 - ord("2"), EOS]


def test_traces_that_do_not_name_their_tokenizer_are_known_by_their_text() -> None:
    def text_of(ids: Sequence[int]) -> str:
        return bytes(255 - i for i in ids if i < 256).decode(errors="replace")

    reader = student(replace(backwards(), decode=text_of))
    assert reader.is_foreign(trace(21))
    assert reader.pair(trace(21)).completion_ids == [255 - ord("4"), 255 - ord("2"), EOS]
    own = replace(trace(21), completion_ids=(255 - ord("4"), 255 - ord("2"), EOS))
    assert not reader.is_foreign(own)
    assert reader.pair(own).completion_ids == list(own.completion_ids)


def test_a_trace_of_an_lm_without_ids_is_trained_on_as_its_text() -> None:
    """As an endpoint gives it: text alone."""
    pair = student(backwards()).pair(replace(trace(21), completion_ids=()))
    assert pair.completion_ids == [255 - ord("4"), 255 - ord("2"), EOS]


def typed(signature: str) -> PairMaker:
    program = Predict(signature)
    return replace(
        student(backwards()), program=program, prompts=program.initial_prompts(), encode=lambda messages: [1]
    )


def test_a_value_in_a_text_is_trained_on_and_shown_as_its_type_writes_it() -> None:
    said = replace(trace(21, stage="predict"), completion_ids=(), outputs={"answer": "$1,200."})
    own = typed("number -> answer: int").own(said)
    assert (bytes(255 - i for i in own.completion_ids), own.demo.outputs) == (b"1200", {"answer": "1200"})
    with pytest.raises(ValueError, match=r'"e21" \(stage predict\): "answer": .* is none of no, yes\. This program'):
        typed("number -> answer: Literal['no', 'yes']").pair(said)


def test_texts_that_the_form_cannot_write_are_left_out_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    good = replace(trace(21, stage="predict"), completion_ids=(), outputs={"answer": "42"})
    bad = replace(good, outputs={"answer": "42\nnumber: 5"})
    data = module()
    assert data.begin_weight_step([bad, good], typed("number -> answer"), step=0) == 0
    assert "1 traces are left out: the form cannot write their outputs" in capsys.readouterr().out
    (pairs,) = all_pairs(data.epoch_batches())
    assert [pair.completion_ids for pair in pairs] == [[255 - ord("4"), 255 - ord("2"), EOS]]
    with pytest.raises(NoTracesError, match=r"none of 1 fits .* \(1 of them the form cannot write\)"):
        data.begin_weight_step([bad], typed("number -> answer"), step=0)


def test_weights_on_another_tokenizers_ids_are_refused_by_name() -> None:
    foreign = replace(trace(21), tokenizer="bytes", base="teacher", pg=(1, 1, 1))
    with pytest.raises(ValueError, match=r'"e21" \(stage double\): it has weights .* another tokenizer \("teacher"\)'):
        student(backwards()).pair(foreign)


def test_a_weight_step_says_how_many_of_its_traces_are_of_another_tokenizer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    traces = [replace(trace(1), tokenizer="bytes", base="teacher"), replace(trace(2), tokenizer="backwards")]
    module().begin_weight_step(traces, student(backwards()), step=0)
    assert '1 of 2 traces are of another tokenizer ("teacher"): only their outputs are used' in capsys.readouterr().out


# An epoch


@pytest.mark.parametrize(("rows", "batch_size"), [(1, 4), (4, 4), (5, 4), (9, 4), (31, 8), (3, 1), (7, 100)])
def test_each_row_comes_once_an_epoch_in_batches_of_like_size(rows: int, batch_size: int) -> None:
    epoch = batches(rows, batch_size=batch_size)
    seen = all_pairs(epoch)
    assert sorted(int(asked(pair)) for batch in seen for pair in batch) == list(range(rows))
    sizes = {len(batch) for batch in seen}
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert len(epoch) == -(-rows // batch_size)


def test_batches_depend_on_the_seed_alone_and_not_on_what_was_asked_before() -> None:
    first, second = (batches(20, demo_share=0.5, seed="a") for _ in range(2))
    backwards = [first.pairs(i) for i in reversed(range(len(first)))][::-1]
    assert backwards == [second.pairs(i) for i in range(len(second))]
    assert all_pairs(batches(20, demo_share=0.5, seed="b")) != all_pairs(second)


def test_balanced_stages_have_as_many_pairs_each_and_every_row_comes_at_least_once() -> None:
    traces = [*(trace(n) for n in range(7)), *(trace(n, stage="halve") for n in range(2))]
    epoch = EpochBatches(traces, maker(), Bootstrapping(balance_stages=True), batch_size=4, seed="0")
    rows = Counter(place for batch in epoch.plan for place in batch)
    assert set(rows) == set(range(9))
    assert sum(rows[place] for place in range(7)) == sum(rows[place] for place in (7, 8)) == 7
    assert max(rows[place] for place in range(7)) == 1


def test_the_rows_of_a_group_stand_in_one_batch_in_their_order() -> None:
    traces = [replace(trace(n), group=f"g{n // 2}" if n < 12 else "") for n in range(20)]
    seen = set()
    for seed in range(10):
        epoch = EpochBatches(traces, maker(), Bootstrapping(), batch_size=4, seed=str(seed))
        assert sorted(place for batch in epoch.plan for place in batch) == list(range(20))
        for batch in epoch.plan:
            grouped = [place for place in batch if place < 12]
            assert all(b == a + 1 for a, b in zip(grouped[::2], grouped[1::2], strict=True))
            assert [pair.group for pair in epoch.pairs(epoch.plan.index(batch))["double"]] == [
                traces[place].group for place in batch
            ]
        seen.add(str(epoch.plan))
    assert len(seen) == 10


def test_a_group_whose_rows_are_repeated_is_repeated_as_a_whole() -> None:
    traces = [*(trace(n) for n in range(6)), *(replace(trace(n, stage="halve"), group="g") for n in range(2))]
    epoch = EpochBatches(traces, maker(), Bootstrapping(balance_stages=True), batch_size=3, seed="0")
    assert all(batch.count(6) == batch.count(7) for batch in epoch.plan)
    assert sum(batch.count(6) for batch in epoch.plan) == 3


def test_the_rows_are_shuffled() -> None:
    assert batches(20).plan != batches(20, seed="1").plan
    assert [i for part in batches(20).plan for i in part] != list(range(20))


def test_a_batch_is_its_pairs_collated() -> None:
    epoch = batches(8)
    batch, pairs = epoch[0], epoch.pairs(0)["double"]
    assert batch.tokens == sum(len(pair.completion_ids) for pair in pairs)
    (segment,) = batch.segments
    assert segment.pairs == tuple(pairs)
    assert bytes(segment.shared).decode().startswith("system: Double.")


def test_a_stage_called_twice_in_a_rollout_trains_twice() -> None:
    twice = [trace(3), trace(6, call=1)]
    epoch = EpochBatches(twice, maker(), Bootstrapping(), batch_size=8, seed="0")
    assert sorted(asked(pair) for pair in epoch.pairs(0)["double"]) == ["3", "6"]


# Demos of a batch


def test_no_demo_is_of_a_row_of_its_batch() -> None:
    for seed in range(20):
        for batch in all_pairs(batches(9, demo_share=1.0, seed=str(seed))):
            rows = {asked(pair) for pair in batch}
            assert all(demos_in(pair) for pair in batch)
            assert not rows & {number for pair in batch for number in demos_in(pair)}


def test_a_batch_has_one_draw_of_one_to_fresh_demos_demos() -> None:
    counts: Counter[int] = Counter()
    for seed in range(40):
        for batch in all_pairs(batches(12, demo_share=1.0, fresh_demos=3, seed=str(seed))):
            assert len({tuple(demos_in(pair)) for pair in batch}) == 1
            counts[len(demos_in(batch[0]))] += 1
    assert set(counts) == {1, 2, 3}


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (1.0, 200, 200), (0.5, 75, 125)])
def test_the_share_of_batches_with_demos_is_the_one_asked_for(share: float, low: int, high: int) -> None:
    with_demos = 0
    for seed in range(50):
        with_demos += sum(
            bool(demos_in(batch[0])) for batch in all_pairs(batches(16, demo_share=share, seed=str(seed)))
        )
    assert low <= with_demos <= high


def test_where_no_other_row_is_left_to_show_no_demo_is_shown() -> None:
    assert [demos_in(pair) for pair in all_pairs(batches(2, demo_share=1.0))[0]] == [[], []]


def test_a_row_that_fits_only_without_demos_goes_without() -> None:
    room = len(maker().pair(trace(10)).prompt_ids) + len(trace(10).completion_ids)
    epoch = batches(20, demo_share=1.0, made=maker(window=room))
    pairs = [pair for batch in all_pairs(epoch) for pair in batch]
    assert len(pairs) == 20
    assert all(demos_in(pair) == [] for pair in pairs)


# The data module


class Doubling(TraceDataModule):
    def load(self) -> Splits:
        return split(doubles(*range(20)), self.sizes, seed=self.seed)


def module(**settings: Any) -> Doubling:
    return Doubling(sizes=Sizes(8, 4, 5, 3), **settings)


def plans(data: TraceDataModule) -> list[list[int]]:
    return data.epoch_batches().plan


def test_traces_too_long_for_the_window_are_counted_and_left_out() -> None:
    data = module(batch_size=2)
    room = len(maker().pair(trace(9)).prompt_ids) + len(trace(9).completion_ids) - 1
    long, fits = [trace(n) for n in (9, 10)], [trace(n) for n in (1, 2, 3)]
    assert data.begin_weight_step([*long, *fits], maker(window=room), step=0) == 2
    assert data.steps_per_epoch == 2
    shown = sorted(asked(pair) for batch in all_pairs(data.epoch_batches()) for pair in batch)
    assert shown == ["1", "2", "3"]


def test_nothing_to_train_on_is_an_error_that_says_why() -> None:
    data = module()
    with pytest.raises(NoTracesError, match="no traces to train on yet"):
        data.train_dataloader()
    with pytest.raises(NoTracesError, match="none was given"):
        data.begin_weight_step([], maker(), step=0)
    with pytest.raises(NoTracesError, match="none of 1 fits the window of 5 tokens"):
        data.begin_weight_step([trace(1)], maker(window=5), step=0)


def test_each_epoch_and_each_weight_step_has_its_own_order_and_can_be_asked_again() -> None:
    data, traces = module(batch_size=3), [trace(n) for n in range(12)]
    seen = []
    for step in (0, 1):
        for epoch in (0, 1, 2):
            data.begin_weight_step(traces, maker(), step=step, epoch=epoch)
            seen.append(plans(data))
            assert plans(data) == seen[-1]
    assert len({str(plan) for plan in seen}) == 6
    other = module(batch_size=3, seed=1)
    other.begin_weight_step(traces, maker(), step=0)
    assert plans(other) != seen[0]


def test_the_loader_gives_the_batches_in_their_order() -> None:
    data = module(batch_size=3)
    data.begin_weight_step([trace(n) for n in range(7)], maker(), step=0)
    loaded, epoch = list(data.train_dataloader()), data.epoch_batches()
    assert len(loaded) == data.steps_per_epoch == 3
    for batch, index in zip(loaded, range(3), strict=True):
        assert batch == epoch[index]


def test_examples_come_as_lists_in_the_order_of_their_set() -> None:
    data = module(val_batch_size=2)
    data.setup("fit")
    val = list(data.val_dataloader())
    assert [len(batch) for batch in val] == [2, 2, 1]
    assert [example for batch in val for example in batch] == list(data.splits.val)
    assert [example for batch in data.test_dataloader() for example in batch] == list(data.splits.test)


def test_traces_of_another_run_are_read_when_named(tmp_path: Path) -> None:
    assert module().reuse_traces(Loop(1)) is None
    save_traces([trace(1)], tmp_path / "t")
    assert module(traces=str(tmp_path / "t")).reuse_traces(Loop(1)) == [trace(1)]


def test_those_of_examples_that_are_scored_on_are_refused(tmp_path: Path) -> None:
    splits = module().splits
    leaked = [replace(trace(1), example=one.id) for one in (splits.train[0], splits.val[0], splits.test[0])]
    save_traces(leaked, tmp_path / "t")
    with pytest.raises(ValueError, match="examples that this run scores on: 1 of test, 1 of val"):
        module(traces=str(tmp_path / "t")).reuse_traces(Loop(1))


def test_those_of_a_step_that_learns_from_failing_runs_are_refused(tmp_path: Path) -> None:
    save_traces([replace(trace(1), example="elsewhere", ce=())], tmp_path / "t")
    with pytest.raises(ValueError, match="of a step that learns from runs as they are"):
        module(traces=str(tmp_path / "t")).reuse_traces(Loop(1))


def test_a_call_that_could_not_be_read_is_read_back_where_its_step_keeps_such(tmp_path: Path) -> None:
    unread = replace(trace(1), outputs={}, ce=())
    save_traces([unread], tmp_path / "t")
    assert load_traces(tmp_path / "t", Loop(1)) == [unread]
    save_traces([replace(unread, ce=None)], tmp_path / "w")
    with pytest.raises(ValueError, match="of another program"):
        load_traces(tmp_path / "w", Loop(1))


def test_no_batch_is_without_a_group() -> None:
    data = module(batch_size=1)
    data.begin_weight_step([replace(trace(n), group=f"pair {n // 2}") for n in range(6)], maker(), step=0)
    assert sorted(map(sorted, plans(data))) == [[0, 1], [2, 3], [4, 5]]
    assert data.steps_per_epoch == 3


@pytest.mark.parametrize("sizes", [{"batch_size": 0}, {"val_batch_size": 0}])
def test_batches_of_nothing_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        module(**sizes)


def test_a_fold_without_folds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.fold 3 needs data\.folds.* leave out data\.fold"):
        module(fold=3)
    assert module(fold=3, folds=5).splits.val


def test_a_vote_of_one_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r'data\.val_vote "majority" needs data\.val_samples above 1'):
        module(val_vote="majority")
    assert module(val_vote="majority", val_samples=2).val_vote == "majority"
