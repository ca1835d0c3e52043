"""Alternate on a tiny model: a real Trainer, real LoRA and real searches, a second each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cotune.callbacks import Alternate, Boundary, BoundaryListener
from cotune.callbacks.epoch_choice import EpochChoice
from cotune.callbacks.schedule import WeightStep
from cotune.callbacks.step_work import StepWork
from cotune.datamodules import Bootstrapping, NoTracesError, Sizes
from cotune.errors import WrongTypeError
from cotune.lightning_modules import LoRA
from cotune.programs import (
    Completion,
    FaultyProgramError,
    Predict,
    Request,
    Sampling,
    mean_score,
    mean_tokens,
    prompts_from_dict,
    prompts_id,
)
from cotune.prompting import PromptSearch, SearchTask
from lightning.pytorch import Callback, Trainer
from tiny_fit import Fit, digest, tiny_fit


@pytest.fixture(scope="module")
def watched(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Fit, Seen, Copies, list[str]]:
    """A finished "p -> w -> p", what was seen of it, and the adapters that its searches ran with."""
    seen, copies, searches = Seen(), Copies(), list[str]()
    fit = tiny_fit(tiny_model, tmp_path_factory.mktemp("pwp"), callbacks=[copies, seen])
    real = fit.alternate.search.search

    def search(task: Any) -> Any:
        searches.append(task.runner.lm.fingerprint())
        return real(task)

    fit.alternate.search.search = search  # type: ignore[method-assign]
    return fit.run(), seen, copies, searches


@pytest.fixture(scope="module")
def pwp(watched: tuple[Fit, Seen, Copies, list[str]]) -> Fit:
    return watched[0]


def test_every_prefix_of_the_schedule_has_a_val_score(pwp: Fit) -> None:
    assert [record["prefix"] for record in pwp.alternate.history] == ["vanilla", "p", "p -> w", "p -> w -> p"]
    assert all(0 <= record["val_score"] <= 1 for record in pwp.alternate.history)


def test_a_search_that_returns_no_found_ends_the_fit_with_its_name(tiny_model: Path, tmp_path: Path) -> None:
    class Bare(PromptSearch):
        def search(self, task: SearchTask) -> Any:
            return task.incumbent

    with pytest.raises(WrongTypeError, match=r"^Bare\.search returned \{'predict'.*; return a Found"):
        tiny_fit(tiny_model, tmp_path, "p", search=Bare()).run()


def test_a_schedule_may_begin_with_the_weights(tiny_model: Path, tmp_path: Path) -> None:
    fit = tiny_fit(tiny_model, tmp_path, "w -> p").run()
    assert [record["prefix"] for record in fit.alternate.history] == ["vanilla", "w", "w -> p"]
    assert fit.trainer.current_epoch == 2


def test_a_schedule_without_weight_steps_trains_nothing(tiny_model: Path, tmp_path: Path) -> None:
    fit = tiny_fit(tiny_model, tmp_path, "p -> p", keep="last")
    fit.module.configure_model()
    before = fit.lm.fingerprint()
    fit.run()
    assert fit.lm.fingerprint() == before
    assert fit.trainer.global_step == fit.trainer.current_epoch == 0
    assert fit.alternate.history[-1]["prefix"] == "p -> p"


def test_the_fit_ends_with_the_best_prefix(tiny_model: Path, tmp_path: Path) -> None:
    fit = tiny_fit(tiny_model, tmp_path, "w -> p -> w", callbacks=[seen := Seen()]).run()
    scores = [record["val_score"] for record in fit.alternate.history]
    # Of equals the one that takes fewer tokens: the fourth, with shorter answers than the first.
    ranks = [(boundary.val_score, -mean_tokens(boundary.rollouts)) for boundary in seen.boundaries]
    best = ranks.index(max(ranks))
    assert fit.alternate.best["index"] == best
    assert fit.lm.fingerprint() == seen.adapters[best]
    assert fit.module.prompts == seen.boundaries[best].prompts
    again = fit.module.rollouts(fit.data.splits.val, metric=fit.data.metric)
    assert mean_score(again) == scores[best]


def test_keep_last_ends_with_the_last_prefix(tiny_model: Path, tmp_path: Path) -> None:
    fit = tiny_fit(tiny_model, tmp_path, keep="last", callbacks=[seen := Seen()]).run()
    assert fit.alternate.best["prefix"] == "p -> w -> p"
    assert fit.lm.fingerprint() == seen.adapters[-1]
    assert fit.module.prompts == seen.boundaries[-1].prompts


def test_training_changes_the_adapter_although_rollouts_came_before(watched: Any) -> None:
    fit, seen, *_ = watched
    vanilla, prompted, trained, prompted_again = seen.adapters
    assert vanilla == prompted != trained == prompted_again
    changed = [n for n, p in fit.module.named_parameters() if p.requires_grad]
    assert all("lora" in name for name in changed)


@pytest.mark.parametrize("better", ["initial", "current"])
def test_new_weights_are_scored_with_both_prompts_and_keep_the_better(
    better: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = tiny_fit(tiny_model, tmp_path, callbacks=[seen := Seen()])
    initial = prompts_id(fit.module.initial_prompts)
    real = StepWork._score

    def score(self: StepWork, module: Any, examples: Any, what: str, prompts: Any = None) -> Any:
        done = real(self, module, examples, what, prompts)
        used = prompts_id(prompts if prompts is not None else module.prompts)
        good = what == "val" or ("initial" if used == initial else "current") == better
        return [_with_score(rollout, float(good)) for rollout in done]

    monkeypatch.setattr(StepWork, "_score", score)
    fit.run()
    searched, trained = seen.boundaries[1], seen.boundaries[2]
    assert prompts_id(searched.prompts) != initial
    assert trained.scores == {"initial": float(better == "initial"), "current": float(better == "current")}
    assert trained.prompts == (fit.module.initial_prompts if better == "initial" else searched.prompts)
    assert trained.val_score == 1


def test_the_last_prompt_step_sees_the_tuned_weights(watched: Any) -> None:
    _, seen, _, searches = watched
    assert searches == [seen.adapters[0], seen.adapters[2]]
    assert searches[0] != searches[1]


@pytest.mark.parametrize("pairs", ["initial", "current"])
def test_training_pairs_carry_the_prompts_that_were_asked_for_and_the_paper_keeps_those(
    pairs: Any, tiny_model: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"bootstrapping": Bootstrapping(attempts=2, pairs=pairs), "try_both_prompts": False}
    fit = tiny_fit(tiny_model, tmp_path, "p -> w", callbacks=[seen := Seen()], **options).run()
    kept = fit.module.initial_prompts if pairs == "initial" else seen.boundaries[1].prompts
    assert seen.boundaries[2].prompts == kept
    assert set(seen.boundaries[2].scores) == {pairs}
    demos = seen.boundaries[1].prompts["predict"].demos
    assert demos
    batches = fit.data.epoch_batches()
    rows = [pair for index in range(len(batches)) for pair in batches.pairs(index)["predict"]]
    turns = [fit.lm.tokenizer.decode(pair.prompt_ids).count("<|im_start|>user") for pair in rows]
    # A row whose own example is the demo does without it.
    assert set(turns) == {1} if pairs == "initial" else turns.count(1 + len(demos)) > len(turns) // 2


@pytest.mark.parametrize(("weights", "same"), [("fresh", True), ("continue", False)])
def test_a_second_weight_step_continues_or_starts_fresh(
    weights: Any, same: bool, tiny_model: Path, tmp_path: Path
) -> None:
    fit = tiny_fit(tiny_model, tmp_path, "w -> w", weights=weights, callbacks=[starts := Starts()]).run()
    first, second = starts.of_weight_steps(epochs=2)
    norm_of_first, norm_of_second = first["B"], second["B"]
    assert norm_of_first == 0
    assert (norm_of_second == 0) is same
    assert (second["moments"] == 0) is same
    assert fit.alternate.history[-1]["prefix"] == "w -> w"


def test_a_weight_step_that_gains_nothing_leaves_weights_and_prompts_as_before(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = tiny_fit(
        tiny_model,
        tmp_path,
        "w -> w",
        gate=True,
        metric=lambda example, prediction: 1.0,
        callbacks=[seen := Seen(), starts := Starts()],
    ).run()
    assert len(set(seen.adapters)) == 1
    assert starts.of_weight_steps(epochs=2)[1] == {"B": 0, "moments": 0}
    (note,) = fit.alternate.history[1]["notes"]
    assert note.startswith("nothing gained: val score 1.000 against 1.000 before (0 examples better, 0 worse)")
    assert f"[0/2] weight step: {note}" in capsys.readouterr().out


def test_a_weight_step_that_gains_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    score = [0.5]
    fit = tiny_fit(
        tiny_model,
        tmp_path,
        "w",
        gate=True,
        metric=lambda example, prediction: score[0],
        bootstrapping=Bootstrapping(threshold=0.5),
        callbacks=[seen := Seen(), Paid(score)],
    ).run()
    assert seen.adapters[0] != seen.adapters[1]
    assert "notes" not in fit.alternate.history[1]


def test_dropout_acts_in_training_and_never_in_rollouts(tiny_model: Path, tmp_path: Path) -> None:
    modes = Modes()
    fit = tiny_fit(tiny_model, tmp_path, lora=LoRA(r=4, alpha=8, dropout=0.3), callbacks=[modes])
    fit.module.configure_model()
    for name, module in fit.lm.model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(
                lambda m, *_: modes.while_generating.append(m.training) if modes.rolling else None
            )
            modes.names.append(name)
    real = fit.lm.complete

    def complete(requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        modes.rolling = True
        try:
            return real(requests, sampling)
        finally:
            modes.rolling = False

    fit.run()
    assert modes.names
    assert not any(modes.while_generating)
    assert modes.while_training
    assert all(modes.while_training)


def test_the_checkpoint_is_plain_small_and_of_one_piece(pwp: Fit) -> None:
    saved = torch.load(pwp.last, weights_only=True)
    assert set(saved["state_dict"]) == set(pwp.lm.adapter_state())
    base = sum(p.numel() for p in pwp.lm.parameters() if not p.requires_grad) * 4
    adapter = sum(t.numel() for t in pwp.lm.adapter_state().values()) * 4
    assert sum(t.numel() for t in saved["state_dict"].values()) * 4 == adapter < base
    best = pwp.alternate.best
    assert prompts_id(prompts_from_dict(saved["prompts"])) == best["prompts"]
    assert saved["callbacks"]["Alternate"]["best"]["index"] == best["index"]
    assert all(torch.equal(saved["state_dict"][n], t) for n, t in pwp.lm.adapter_state().items())


def test_a_checkpoint_at_a_boundary_holds_the_weights_prompts_and_score_that_belong_together(
    watched: Any, tiny_model: Path, tmp_path: Path
) -> None:
    fit, seen, copies, _ = watched
    assert set(copies.paths) == {0, 2}
    for index, path in copies.paths.items():
        boundary = seen.boundaries[index]
        saved = torch.load(path, weights_only=True)
        assert prompts_from_dict(saved["prompts"]) == boundary.prompts
        assert saved["callbacks"]["Alternate"]["history"][-1]["val_score"] == boundary.val_score
        again = tiny_fit(tiny_model, tmp_path / "again")
        again.module.configure_model()
        again.module.load_state_dict(saved["state_dict"])
        done = again.module.rollouts(fit.data.splits.val, metric=fit.data.metric, prompts=boundary.prompts)
        assert mean_score(done) == boundary.val_score


def test_the_lm_calls_in_the_history_are_those_the_lm_counted(pwp: Fit) -> None:
    asked = sum(len(requests) for requests, _ in pwp.lm.seen)
    assert sum(record["lm_calls"] for record in pwp.alternate.history) == asked
    assert pwp.lm.usage.calls == asked


def test_search_examples_bounds_what_a_prompt_step_bootstraps_from(tiny_model: Path, tmp_path: Path) -> None:
    fit = tiny_fit(tiny_model, tmp_path, "p", search_examples=5).run()
    assert [record["prefix"] for record in fit.alternate.history] == ["vanilla", "p"]
    assert any("of 5 train examples" in note for note in fit.alternate.history[1]["notes"])


def test_another_seed_gives_another_run(pwp: Fit, tiny_model: Path, tmp_path: Path) -> None:
    """That the same seed gives the same one is shown where prefixes are tested."""
    other = tiny_fit(tiny_model, tmp_path / "other", seed=1).run()
    assert other.outcome["history"] != pwp.outcome["history"]


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        (
            {"sizes": Sizes(train=12, dev=0, val=10, test=4)},
            ValueError,
            "the dev set is empty.*prompt.*data.sizes.dev",
        ),
        ({"sizes": Sizes(train=12, dev=6, val=0, test=4)}, ValueError, "the val set is empty.*set data.sizes.val"),
        ({"trainer": {"max_epochs": 3}}, ValueError, "max_epochs 3 does not work here.*alternate.epochs"),
        ({"trainer": {"reload_dataloaders_every_n_epochs": 2}}, ValueError, "every_n_epochs 2.*set it to 1"),
    ],
)
def test_a_wrong_set_up_is_refused_before_the_model_is_loaded(
    changes: dict[str, Any], error: type[Exception], said: str, tiny_model: Path, tmp_path: Path
) -> None:
    fit = tiny_fit(tiny_model, tmp_path, **changes)
    with pytest.raises(error, match=said):
        fit.run()
    assert fit.lm.model is None


def test_a_schedule_without_prompt_steps_needs_no_dev_set(tiny_model: Path, tmp_path: Path) -> None:
    fit = tiny_fit(tiny_model, tmp_path, "w", sizes=Sizes(train=12, dev=0, val=10, test=4)).run()
    assert [record["prefix"] for record in fit.alternate.history] == ["vanilla", "w"]


def test_val_is_run_several_times_where_draws_differ(tiny_model: Path, tmp_path: Path) -> None:
    fit = tiny_fit(tiny_model, tmp_path, "p")
    fit.data.val_samples = 3
    with pytest.raises(ValueError, match=r"val_samples is 3, but at .* all runs of an example"):
        fit.run()
    again = tiny_fit(tiny_model, tmp_path, "p")
    again.data.val_samples, again.module.sampling = 3, Sampling(temperature=0.7, max_new_tokens=8)
    vanilla = again.run().alternate.history[0]
    assert vanilla["lm_calls"] == 3 * len(again.data.splits.val)


def test_gold_answers_for_a_stage_that_also_reasons_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    fit = tiny_fit(tiny_model, tmp_path, bootstrapping=Bootstrapping(attempts=2, gold_answers=True))
    fit.module.program = Predict("petal_length -> reasoning, answer")
    with pytest.raises(ValueError, match=r"labels: answer; stages: predict: reasoning, answer\).*bootstrapping.hints"):
        fit.run()
    assert fit.lm.model is None


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="epochs 0 is below 1"):
        Alternate(epochs=0)
    with pytest.raises(ValueError, match="search_examples 0 is below 1"):
        Alternate(search_examples=0)


def test_without_traces_the_run_stops_and_says_what_to_change(tiny_model: Path, tmp_path: Path) -> None:
    fit = tiny_fit(tiny_model, tmp_path, "w", metric=lambda example, prediction: 0.0)
    with pytest.raises(NoTracesError, match=r"no run reached a score of 1.*0 of 12.*attempts \(now 2\).*threshold"):
        fit.run()


def test_a_metric_that_always_raises_stops_the_run(tiny_model: Path, tmp_path: Path) -> None:
    def broken(example: Any, prediction: Any) -> float:
        raise KeyError("label")

    with pytest.raises(FaultyProgramError, match=r"the metric failed on .* of 10 examples.*label"):
        tiny_fit(tiny_model, tmp_path, metric=broken).run()


class Seen(Callback, BoundaryListener):
    """Keeps every boundary, and the adapter's fingerprint at it."""

    def __init__(self) -> None:
        self.boundaries: list[Boundary] = []
        self.adapters: list[str] = []

    def on_boundary(self, trainer: Trainer, module: Any, boundary: Boundary) -> None:
        self.boundaries.append(boundary)
        self.adapters.append(module.lm.fingerprint())


class Copies(Callback, BoundaryListener):
    """Copies last.ckpt as a boundary left it, when a prompt step has ended after it; by the boundary's index."""

    def __init__(self) -> None:
        self.paths: dict[int, Path] = {}

    def on_boundary(self, trainer: Trainer, module: Any, boundary: Boundary) -> None:
        last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        if boundary.step == "p":
            copy = last.with_name(f"before-{boundary.index}.ckpt")
            copy.write_bytes(last.read_bytes())
            self.paths[boundary.index - 1] = copy


class Starts(Callback):
    """What adapter and optimiser hold at the start of every epoch's first batch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            adapter = pl_module.lm.adapter_state()
            norm = sum(float(t.abs().sum()) for name, t in adapter.items() if "lora_B" in name)
            self.epochs.append({"B": norm, "moments": len(trainer.optimizers[0].state)})

    def of_weight_steps(self, *, epochs: int) -> list[dict[str, float]]:
        return self.epochs[::epochs]


class Paid(Callback):
    """The metric gives more from the first step of training on."""

    def __init__(self, score: list[float]) -> None:
        self.score = score

    def on_train_batch_end(self, *_: Any) -> None:
        self.score[0] = 0.9


class Modes(Callback):
    """The modes of the dropout layers, in rollouts and in training."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.rolling = False
        self.while_generating: list[bool] = []
        self.while_training: list[bool] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        layers = dict(pl_module.lm.model.named_modules())
        self.while_training += [layers[name].training for name in self.names]


def _with_score(rollout: Any, score: float) -> Any:
    return replace(rollout, score=score)


# Test scores of prefixes, for tables


def test_each_prefix_is_scored_on_test_if_asked_and_nothing_else_changes(
    pwp: Fit, tiny_model: Path, tmp_path: Path
) -> None:
    fit = tiny_fit(tiny_model, tmp_path, test_prefixes=True, callbacks=[seen := Seen()]).run()
    extra = ("test_score", "test_cost")
    tested = [{name: record.pop(name) for name in extra} for record in fit.alternate.history]
    assert fit.outcome == pwp.outcome
    ids = [[rollout.example.id for rollout in boundary.tested or ()] for boundary in seen.boundaries]
    assert ids == [[example.id for example in fit.data.splits.test]] * 4
    assert [record["test_score"] for record in tested] == [mean_score(b.tested or ()) for b in seen.boundaries]
    assert [record["test_cost"]["lm_calls"] for record in tested] == [4] * 4


def test_test_is_not_touched_unless_asked(pwp: Fit) -> None:
    asked = {m["content"] for requests, _ in pwp.lm.seen for r in requests for m in r.messages[-1:]}
    test = {f"petal_length: {e.inputs['petal_length']}" for e in pwp.data.splits.test}
    train = {f"petal_length: {e.inputs['petal_length']}" for e in pwp.data.splits.train}
    assert not any("test_score" in record for record in pwp.alternate.history)
    assert not any(content.splitlines()[0] in test - train for content in asked if content not in _seen_elsewhere(pwp))


def _seen_elsewhere(fit: Fit) -> set[str]:
    """Last turns that examples of the other sets have; two flowers may share a length."""
    others = [e for name in ("train", "dev", "val") for e in getattr(fit.data.splits, name)]
    return {"\n".join(f"{name}: {value}" for name, value in e.inputs.items()) for e in others}


# A control that spends as many LM calls


def test_the_last_prompt_step_spends_the_calls_it_is_given(tiny_model: Path, tmp_path: Path) -> None:
    # No candidate is ever beyond improvement: a full score would end the trying of others before its first call.
    metric = lambda example, prediction: 0.5 * digest(example, prediction)  # noqa: E731
    plain = tiny_fit(tiny_model, tmp_path / "plain", "p -> p", metric=metric).run()
    before = sum(record["lm_calls"] for record in plain.alternate.history)
    wanted = before + 40
    more = tiny_fit(tiny_model, tmp_path / "more", "p -> p", lm_calls=wanted, metric=metric).run()
    spent = sum(record["lm_calls"] for record in more.alternate.history)
    assert wanted <= spent < wanted + 6  # dev has six examples: the last candidate is scored to its end
    assert more.alternate.history[:2] == _timeless(plain.alternate.history[:2], more.alternate.history[:2])
    first, longer = (fit.alternate.history[2]["candidates"] for fit in (plain, more))
    assert [c["id"] for c in longer[: len(first)]] == [c["id"] for c in first]
    assert len(longer) > len(first)


def _timeless(records: Sequence[dict[str, Any]], clock: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records with another run's seconds."""
    names = ("seconds", "generating_seconds")
    return [{**record, **{n: other[n] for n in names}} for record, other in zip(records, clock, strict=True)]


def test_calls_to_spend_need_a_prompt_step_at_the_end() -> None:
    with pytest.raises(ValueError, match='lm_calls needs a schedule that ends with "p"; this is "p -> w"'):
        Alternate("p -> w", lm_calls=100)


# The average of late epochs


def test_the_average_of_late_adapters_is_offered_like_an_epoch(tiny_model: Path, tmp_path: Path) -> None:
    adapters: list[dict[str, torch.Tensor]] = []

    class Keep(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            adapters.append(pl_module.lm.adapter_state())

    options: dict[str, Any] = {"epochs": 3, "average_last": 2, "keep_best_epoch": False, "keep": "last"}
    fit = tiny_fit(tiny_model, tmp_path, "w", **options)
    fit.trainer.callbacks.insert(0, Keep())
    fit.run()
    for name, tensor in fit.lm.adapter_state().items():
        torch.testing.assert_close(tensor, (adapters[1][name] + adapters[2][name]) / 2)
    last = fit.alternate.history[-1]
    assert (last["prefix"], last["epoch"], last["averaged"]) == ("w", 3, 2)


def test_an_average_that_is_no_better_than_the_best_epoch_is_not_kept(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny_fit(tiny_model, tmp_path / "plain", "w").run()
    real = StepWork._score

    def worse(self: StepWork, module: Any, examples: Any, what: str, prompts: Any = None) -> Any:
        done = real(self, module, examples, what, prompts)
        return [_with_score(r, 0.0) for r in done] if what.startswith("average") else done

    monkeypatch.setattr(StepWork, "_score", worse)
    fit = tiny_fit(tiny_model, tmp_path / "average", "w", average_last=2).run()
    assert fit.outcome["adapter"] == plain.outcome["adapter"]
    assert "averaged" not in fit.alternate.history[-1]


@pytest.mark.parametrize("count", [-1, 1, 6])
def test_an_average_of_one_epoch_or_of_more_than_there_are_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"average_last {count} must be 0 .* w has 5"):
        Alternate(epochs=5, average_last=count)


def test_an_average_is_measured_against_the_steps_own_epochs() -> None:
    Alternate("w", epochs=2, average_last=6, steps={"w": WeightStep(epochs=8)})
    with pytest.raises(ValueError, match=r"average_last 4 must be 0 .* d has 3"):
        Alternate("p -> w -> d", epochs=5, average_last=4, steps={"d": WeightStep(rounds=3)})


# Diagnosis


def test_each_boundary_says_what_the_step_won_and_lost(pwp: Fit) -> None:
    first, *rest = pwp.alternate.history
    assert "won" not in first["diagnosis"]
    for record in pwp.alternate.history:
        found = record["diagnosis"]
        assert found["passed"] + found["wrong"] + found["closed"] + sum(record["failures"].values()) == 10
        assert found["passed"] == round(record["val_score"] * 10)
        assert sum(record["diagnosis"]["unreadable"].values()) == record["failures"].get("format", 0)
        assert sum(total for _, total in found["by_label"].values()) == 10
    for before, after in zip(pwp.alternate.history, rest, strict=False):
        gained = len(after["diagnosis"]["won"]) - len(after["diagnosis"]["lost"])
        assert gained == after["diagnosis"]["passed"] - before["diagnosis"]["passed"]


def test_a_weight_step_says_whose_traces_passed_by_stage_and_by_label(pwp: Fit) -> None:
    traces = pwp.alternate.history[2]["traces"]
    assert traces["by_stage"] == {"predict": traces["solved"]}
    assert sum(solved for solved, _ in traces["by_label"].values()) == traces["solved"]
    assert {label: total for label, (_, total) in traces["by_label"].items()} == {
        label: sum(e.labels["answer"] == label for e in pwp.data.splits.train)
        for label in ("setosa", "versicolor", "virginica")
    }


def test_a_steps_last_epoch_is_scored_although_an_earlier_one_was() -> None:
    choice = EpochChoice(keep_best=True)
    choice.offer(0.5, {}, epoch=2)  # trainer.check_val_every_n_epoch 2
    resumed = EpochChoice(keep_best=True)
    resumed.load_state_dict(choice.state_dict())
    assert resumed.wants(3)
    resumed.offer(0.4, {}, epoch=3)
    assert not resumed.wants(3)
    assert resumed.record["epoch"] == 2
