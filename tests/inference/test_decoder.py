"""Generation: batches that share prefixes write the same tokens as Hugging Face does, prompt by prompt."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from cotune.inference import Codec
from cotune.inference.engine import Generated, Prompted
from cotune.inference.local.decoder import Decoder, GenerationMemoryError
from cotune.inference.local.prefixes import group_by_shared_prefix, group_cost
from cotune.lightning_modules import LanguageModel, LoRA
from cotune.lightning_modules.lora import attach, lora_layers
from cotune.programs import Request, Sampling
from cotune.programs.layout import Field
from cotune.programs.lm import told_of_completions
from cotune.programs.shared_prefix import shared_prefix
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

EOS = 2
TOKENIZER = tiny_tokenizer()
CODEC = Codec(TOKENIZER, end_ids=[EOS])


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False).input_ids)


@pytest.fixture(scope="module")
def model(tiny_model: Any) -> Any:
    """The tiny model with an adapter whose B is not zero, so that forgetting the adapter would show."""
    model = attach(AutoModelForCausalLM.from_pretrained(tiny_model), LoRA(r=4, alpha=8), seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    for _, layer in lora_layers(model):
        weight = layer.lora_B["default"].weight
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model


def decoder(model: Any, *, end_ids: Sequence[int] = (EOS,), window: int = 1024, cache_tokens: int = 1 << 20) -> Decoder:
    return Decoder(model, codec=Codec(TOKENIZER, end_ids=end_ids), window=window, cache_tokens=cache_tokens)


def one_by_one(
    model: Any, prompts: Sequence[Sequence[int]], new: int, *, end_ids: Sequence[int] = (EOS,), window: int = 1024
) -> list[list[int]]:
    """Greedy ids by Hugging Face's own loop, a prompt at a time."""
    found = []
    for ids in prompts:
        asked = torch.tensor([list(ids)])
        written = model.generate(
            input_ids=asked,
            attention_mask=torch.ones_like(asked),
            max_new_tokens=min(new, window - len(ids)),
            do_sample=False,
            eos_token_id=list(end_ids),
            pad_token_id=0,
        )
        found.append(written[0, len(ids) :].tolist())
    return found


def greedy(decoder: Decoder, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    return [r.ids for r in decoder.generate([Prompted(ids) for ids in prompts], Sampling(max_new_tokens=new))]


def noise(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 259) for _ in range(length)]


def families(*, shared: int, own: Sequence[int], seed: int) -> list[list[int]]:
    """Prompts with one prefix of `shared` tokens, and as many of their own as `own` says."""
    return [noise(shared, seed) + noise(n, seed * 100 + i + 1) for i, n in enumerate(own)]


SHAPES = {
    "one prefix, mixed lengths": families(shared=60, own=[1, 9, 4, 30, 9], seed=1),
    "nothing shared": [noise(n, 10 + n) for n in (3, 17, 40, 41)],
    "identical prompts": [noise(25, 3)] * 4,
    "several groups": families(shared=90, own=[5, 6, 7], seed=4) + families(shared=70, own=[3, 12], seed=5),
    "a prompt that is a prefix of another": [noise(50, 6)[:n] for n in (50, 20, 49, 1)],
    "one request": [noise(33, 7)],
    "one token": [[5]],
    "groups that stand interleaved": [
        p
        for pair in zip(
            families(shared=80, own=[4, 5, 6], seed=8), families(shared=75, own=[9, 2, 3], seed=9), strict=True
        )
        for p in pair
    ],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_are_those_of_hugging_face_one_by_one(model: Any, shape: str) -> None:
    prompts = SHAPES[shape]
    assert greedy(decoder(model), prompts, 12) == one_by_one(model, prompts, 12)


@pytest.mark.parametrize("seed", range(6))
def test_greedy_tokens_are_those_of_hugging_face_on_random_prompts(model: Any, seed: int) -> None:
    rng = random.Random(seed)
    prompts: list[list[int]] = []
    for _ in range(rng.randint(2, 7)):
        root = rng.choice(prompts)[: rng.randint(0, 120)] if prompts and rng.random() < 0.7 else noise(100, seed)
        prompts.append([*root, *noise(rng.randint(1, 40), rng.randrange(1 << 30))])
    end_ids = [EOS, *rng.sample(range(3, 259), 8)]  # eight more ends, so that rows do end at different steps
    cache_tokens = rng.choice([1, 200, 1 << 20])
    found = greedy(decoder(model, end_ids=end_ids, cache_tokens=cache_tokens), prompts, 20)
    assert found == one_by_one(model, prompts, 20, end_ids=end_ids)


def test_a_small_memory_cuts_groups_into_batches_and_changes_no_token(model: Any) -> None:
    prompts = families(shared=60, own=[8, 3, 20, 5, 5], seed=11)
    narrow = decoder(model, cache_tokens=100)
    assert greedy(narrow, prompts, 10) == one_by_one(model, prompts, 10)
    with rows_at_once(model) as sizes:
        greedy(narrow, prompts, 10)
    assert max(sizes) == 3  # half of 100 holds 3 rows of 14 tokens, and one of 29


def test_a_row_longer_than_the_memory_runs_alone(model: Any) -> None:
    prompts = families(shared=40, own=[5, 6], seed=12)
    assert greedy(decoder(model, cache_tokens=1), prompts, 4) == one_by_one(model, prompts, 4)


def test_prompts_near_the_window_are_cut_by_their_own_length_not_their_neighbours(model: Any) -> None:
    prompts = families(shared=50, own=[2, 13, 12, 5], seed=13)
    found = decoder(model, window=64, end_ids=[]).generate([Prompted(p) for p in prompts], Sampling(max_new_tokens=8))
    assert [len(r.ids) for r in found] == [8, 1, 2, 8]
    assert [r.finished for r in found] == ["length"] * 4
    assert [r.ids for r in found] == [ids[:8] for ids in one_by_one(model, prompts, 8, end_ids=[259], window=64)]


def test_a_prompt_longer_than_the_window_is_too_long_and_nothing_of_it_is_cut(model: Any) -> None:
    prompts = [noise(64, 14), noise(20, 15), noise(65, 16)]
    found = decoder(model, window=64).generate([Prompted(p) for p in prompts], Sampling(max_new_tokens=4))
    assert [found[0], found[2]] == [Generated([], "", "too_long")] * 2
    assert [found[1].ids] == one_by_one(model, [prompts[1]], 4)


def test_no_prompts_no_results(model: Any) -> None:
    assert decoder(model).generate([], Sampling()) == []


@contextmanager
def passes(model: Any) -> Iterator[list[tuple[int, int]]]:
    """(tokens, rows that get a next token) of every forward pass inside."""
    seen: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["input_ids"].numel(), kwargs["logits_to_keep"].numel())),
        with_kwargs=True,
    )
    yield seen
    hook.remove()


@contextmanager
def rows_at_once(model: Any) -> Iterator[list[int]]:
    """How many rows each decoding pass inside has."""
    sizes: list[int] = []
    with passes(model) as seen:
        yield sizes
    sizes += [rows for tokens, rows in seen if tokens == rows]


def test_rows_that_have_ended_leave_the_batch(model: Any) -> None:
    prompts = families(shared=60, own=[3, 4, 5, 6], seed=17)
    free = one_by_one(model, prompts, 12, end_ids=[259])
    end_ids = [free[0][1], free[1][5]]
    lengths = [len(ids) for ids in one_by_one(model, prompts, 12, end_ids=end_ids)]
    assert len(set(lengths)) > 1  # or this would test nothing
    with rows_at_once(model) as sizes:
        greedy(decoder(model, end_ids=end_ids), prompts, 12)
    assert sizes == [sum(length > step for length in lengths) for step in range(1, max(lengths))]


def test_completions_are_told_of_as_they_end(model: Any) -> None:
    told: list[int] = []
    with told_of_completions(told.append):
        greedy(decoder(model, cache_tokens=256), families(shared=0, own=[20, 21, 22, 23, 24, 25], seed=4), 12)
    assert sum(told) == 6
    assert len(told) > 1, "all at the end"


def test_waiting_rows_join_when_a_quarter_of_the_slots_is_free(model: Any) -> None:
    prompts = [noise(6, 100 + i) for i in range(12)]
    alone = one_by_one(model, prompts, 12, end_ids=[259])
    end_ids = [alone[0][2], alone[1][4], alone[5][1]]
    expected = one_by_one(model, prompts, 12, end_ids=end_ids)
    slots = 4
    with passes(model) as seen:
        assert greedy(decoder(model, end_ids=end_ids, cache_tokens=2 * slots * 17), prompts, 12) == expected
    joined = [rows for tokens, rows in seen if tokens > rows]
    assert sum(joined) == len(prompts)
    assert max(rows for _, rows in seen) == slots
    assert len(joined) > len(prompts) / slots  # not batch after batch


def test_what_prompts_share_is_computed_once_in_blocks(model: Any) -> None:
    prompts = families(shared=300, own=[3, 4, 5], seed=18)
    with passes(model) as seen:
        greedy(decoder(model), prompts, 1)
    assert [tokens for tokens, _ in seen] == [128, 128, 44, 3 + 4 + 5]


# What is kept from call to call


def test_a_prefix_is_kept_while_the_weights_stay(model: Any) -> None:
    version = [0]
    kept = Decoder(model, codec=CODEC, window=1024, cache_tokens=4096, weights=lambda: version[0])
    first, second = families(shared=300, own=[3, 4], seed=19), families(shared=300, own=[5, 6], seed=19)
    greedy(kept, first, 4)
    with passes(model) as seen:
        assert greedy(kept, second, 4) == one_by_one(model, second, 4)
    assert seen[0][0] == 5 + 6
    version[0] = 1
    with passes(model) as seen:
        greedy(kept, second, 4)
    assert seen[0][0] == 128


def test_a_longer_prefix_takes_over_whole_blocks_of_a_kept_one_and_has_the_same_bits(model: Any) -> None:
    base = noise(300, 20)
    short = [[*base[:200], *noise(4, i)] for i in (1, 2)]
    longer = [[*base, *noise(4, i)] for i in (3, 4)]
    warm = Decoder(model, codec=CODEC, window=1024, cache_tokens=4096, weights=lambda: 0)
    greedy(warm, short, 1)
    with passes(model) as seen:
        greedy(warm, longer, 1)
    assert [tokens for tokens, _ in seen[:2]] == [128, 44]
    cold = decoder(model)
    greedy(cold, longer, 1)
    for mine, theirs in zip(states(warm, base), states(cold, base), strict=True):
        assert torch.equal(mine, theirs)


def states(decoder: Decoder, ids: Sequence[int]) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [tensor for pair in decoder.prefix(tuple(ids)).states.layers.values() for tensor in pair]


def test_rows_kept_on_request_are_not_computed_again(model: Any) -> None:
    prompts = families(shared=300, own=[380, 390, 400], seed=21)
    keeping = Decoder(model, codec=CODEC, window=1024, cache_tokens=4096, weights=lambda: 0, keep_rows=True)
    expected = greedy(keeping, prompts, 6)
    with passes(model) as seen:
        assert greedy(keeping, prompts, 6) == expected
    assert seen[0] == (3, 3), "one pass, though whole prompts would have taken several"


def test_kept_prefixes_stay_within_the_memory(model: Any) -> None:
    kept = Decoder(model, codec=CODEC, window=1024, cache_tokens=1000, weights=lambda: 0)
    for seed in range(6):
        greedy(kept, families(shared=150, own=[3, 4], seed=100 + seed), 1)
    assert len(kept._prefixes._states) == 3  # half of 1000 holds three prefixes of 150


# Memory


def test_out_of_memory_halves_the_batch_and_changes_no_token(model: Any) -> None:
    prompts = families(shared=60, own=[8, 6, 9, 7, 5], seed=22)
    expected = one_by_one(model, prompts, 10)
    scarce = decoder(Scarce(model, rows=2))
    with pytest.warns(UserWarning, match="out of memory with 5 completions at a time: continuing with 2"):
        assert greedy(scarce, prompts, 10) == expected


@pytest.mark.filterwarnings("ignore:out of memory with")
def test_out_of_memory_for_one_row_names_it_and_the_ways_out(model: Any) -> None:
    with pytest.raises(GenerationMemoryError, match=r"a prompt of 5 tokens and up to 4 new ones. Ways out: model.lm"):
        greedy(decoder(Scarce(model, rows=0)), [noise(5, 1)], 4)


def test_one_row_that_runs_out_of_memory_is_tried_again_without_what_was_kept(model: Any) -> None:
    prompts = [noise(5, 1)]
    passing = Scarce(model, rows=0, times=1)
    with pytest.warns(UserWarning, match="out of memory with 1 completions"):
        assert greedy(decoder(passing), prompts, 4) == one_by_one(model, prompts, 4)


class Scarce:
    """A model that runs out of memory with more than so many rows, always or a number of times."""

    def __init__(self, model: Any, rows: int, times: float = float("inf")) -> None:
        self.model, self.config, self.device = model, model.config, model.device
        self.rows, self.times = rows, times

    def __call__(self, **inputs: Any) -> Any:
        if inputs["logits_to_keep"].numel() > self.rows and self.times > 0:
            self.times -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.model(**inputs)


# Ends


class Dictated:
    """Stands in for a model: writes given ids in each row, whatever the prompt is."""

    def __init__(self, model: Any, writes: Sequence[int]) -> None:
        self.model, self.config, self.device = model, model.config, model.device
        self.writes, self.at = writes, 0

    def __call__(self, **inputs: Any) -> Any:
        out = self.model(**inputs)
        out.logits[:] = -1.0
        out.logits[..., self.writes[self.at]] = 1.0
        self.at += 1
        return out


def written(model: Any, text: str, stops: tuple[str, ...], new: int = 40) -> Generated:
    """What comes of a model that would write this text, a token a byte, and then end its turn."""
    dictated = Dictated(model, [*ids_of(text), EOS])
    (found,) = decoder(dictated).generate([until(stops)], Sampling(max_new_tokens=new))
    (field,) = found.fields
    assert (field.text, field.start, field.ended) == (found.text, 0, found.finished)
    assert found.ids[: field.end] == ids_of(found.text)
    return replace(found, fields=())


def until(stops: tuple[str, ...]) -> Prompted:
    return Prompted([5, 6, 7], (Field("text", stops=stops, may_be_empty=True),))


@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [
        ("Paris\nquestion: and", ("\nquestion:",), "Paris"),
        ("a b END c", ("END", " b"), "a"),
        ("abab|", ("ba",), "a"),
        ("STOP", ("STOP",), ""),
        ("é ü|ä", ("|",), "é ü"),
        ("naïve → 日本語。次", ("。",), "naïve → 日本語"),
        ("smile 😀😀😀 on", ("😀😀😀",), "smile "),
        ("日本語日本語終わりです", ("日本語終わりです",), "日本語"),
        ("xé", ("é", "zz"), "x"),
    ],
)
def test_a_stop_string_cuts_text_and_ids_before_it(model: Any, text: str, stops: tuple[str, ...], kept: str) -> None:
    assert written(model, text, stops) == Generated(ids_of(kept), kept, "stop")


def test_generation_ends_at_the_token_that_completes_the_stop(model: Any) -> None:
    dictated = Dictated(model, ids_of("ab\nq: never read"))
    decoder(dictated).generate([until(("\nq:",))], Sampling(max_new_tokens=40))
    assert dictated.at == len("ab\nq:")


def test_text_that_only_begins_like_a_stop_goes_on(model: Any) -> None:
    assert written(model, "a\nques b", ("\nquestion:",)) == Generated([*ids_of("a\nques b"), EOS], "a\nques b", "eos")


def test_the_end_of_turn_is_in_the_ids_and_not_in_the_text(model: Any) -> None:
    assert written(model, "hi", ()) == Generated([*ids_of("hi"), EOS], "hi", "eos")


def test_max_new_tokens_cuts_and_says_so(model: Any) -> None:
    assert written(model, "hello", (), new=3) == Generated(ids_of("hel"), "hel", "length")


def test_a_stop_at_the_last_allowed_token_is_a_stop(model: Any) -> None:
    assert written(model, "ab|c", ("|",), new=3) == Generated(ids_of("ab"), "ab", "stop")


def test_an_end_at_the_last_allowed_token_is_an_end(model: Any) -> None:
    assert written(model, "ab", (), new=3) == Generated([*ids_of("ab"), EOS], "ab", "eos")


# Sampling within a batch


WARM = Sampling(temperature=1.0, top_p=0.9, max_new_tokens=12)


def test_the_batch_has_no_influence_on_what_a_request_draws(model: Any) -> None:
    rng = random.Random(0)
    prompts = [*families(shared=60, own=[3, 14, 5, 6], seed=21), noise(30, 22), noise(60, 23)]
    asked = [Prompted(ids, seed=rng.getrandbits(63)) for ids in prompts]
    ours = decoder(model, window=80)  # the second prompt has room for 6 tokens, its neighbours for 12
    together = ours.generate(asked, WARM)
    assert [ours.generate([one], WARM)[0] for one in asked] == together
    order = rng.sample(range(len(asked)), len(asked))
    assert ours.generate([asked[i] for i in order], WARM) == [together[i] for i in order]
    assert len({tuple(r.ids) for r in together}) == len(together)


def test_a_limit_far_beyond_the_window_takes_no_more_numbers_than_there_is_room_for_and_the_same(model: Any) -> None:
    asked = [Prompted(noise(40, seed), seed=seed) for seed in range(4)]
    ours = decoder(model, window=80, end_ids=())
    found = ours.generate(asked, replace(WARM, max_new_tokens=10**13))  # so many numbers fit into no memory
    assert {len(r.ids) for r in found} == {40}
    assert [r.ids[:12] for r in found] == [r.ids for r in ours.generate(asked, WARM)]


def test_equal_prompts_with_other_seeds_draw_otherwise_and_with_equal_seeds_alike(model: Any) -> None:
    asked = [Prompted(noise(40, 24), seed=seed) for seed in (1, 2, 1)]
    first, second, third = decoder(model).generate(asked, WARM)
    assert first == third != second


def test_sampling_leaves_the_global_generator_alone(model: Any) -> None:
    before = torch.random.get_rng_state()
    decoder(model).generate([Prompted(noise(9, 25), seed=3)], WARM)
    assert torch.equal(torch.random.get_rng_state(), before)


# Grouping


def cost(groups: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]]) -> int:
    """The cost that `group_by_shared_prefix` says it minimises."""
    total = 0
    for group in groups:
        shared = shared_prefix([prompts[i] for i in group]) if len(group) > 1 else 0
        total += group_cost(shared) + shared + sum(len(prompts[i]) - shared for i in group)
    return total


def partitions(items: Sequence[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    first, *rest = items
    for smaller in partitions(rest):
        yield [[first], *smaller]
        for at, group in enumerate(smaller):
            yield [*smaller[:at], [first, *group], *smaller[at + 1 :]]


def random_tree(rng: random.Random) -> list[list[int]]:
    """Up to seven prompts that share runs of up to 120 tokens with an earlier one, or are it, or its beginning."""
    prompts: list[list[int]] = []
    for _ in range(rng.randint(1, 7)):
        kind = rng.random()
        if prompts and kind < 0.15:
            prompts.append(list(rng.choice(prompts)))
        elif prompts and kind < 0.3:
            whole = rng.choice(prompts)
            prompts.append(whole[: rng.randint(1, len(whole))])
        else:
            root = rng.choice(prompts) if prompts else []
            prompts.append(root[: rng.randint(0, len(root))] + [rng.randrange(9)] * rng.randint(1, 120))
    return prompts


@pytest.mark.parametrize("seed", range(60))
def test_no_grouping_costs_less(seed: int) -> None:
    prompts = random_tree(random.Random(seed))
    groups = group_by_shared_prefix(prompts)
    assert sorted(i for group in groups for i in group) == list(range(len(prompts)))
    assert cost(groups, prompts) == min(cost(p, prompts) for p in partitions(range(len(prompts))))


@pytest.mark.parametrize("apart", [1, 40, 200])
def test_no_grouping_of_sibling_branches_costs_less(apart: int) -> None:
    prompts = [[1] * 300 + [10 + branch] * apart + [leaf] for branch in range(3) for leaf in range(2)]
    groups = group_by_shared_prefix(prompts)
    assert cost(groups, prompts) == min(cost(p, prompts) for p in partitions(range(6)))


def test_a_short_prompt_does_not_keep_the_others_from_sharing() -> None:
    prompts = [[1] * 10, [1] * 10 + [2] * 200 + [3], [1] * 10 + [2] * 200 + [4]]
    assert group_by_shared_prefix(prompts) == [[0], [1, 2]]


def test_strays_stand_together_beside_a_deep_group() -> None:
    deep = [[1] * 60 + [2] * 200 + [i] for i in range(5)]
    strays = [[1] * 60 + [10 + i] * 5 for i in range(4)]
    assert group_by_shared_prefix(deep + strays) == [[0, 1, 2, 3, 4], [5, 6, 7, 8]]


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_the_prompts_changes_no_group(seed: int) -> None:
    rng = random.Random(seed)
    prompts = random_tree(rng)
    order = rng.sample(range(len(prompts)), len(prompts))
    shuffled = group_by_shared_prefix([prompts[i] for i in order])
    as_sets = {frozenset(order[i] for i in group) for group in shuffled}
    assert as_sets == {frozenset(group) for group in group_by_shared_prefix(prompts)}


def test_a_chain_of_extensions_longer_than_pythons_stack_is_grouped() -> None:
    prompts = [[1] * n for n in range(1, 1501)]
    groups = group_by_shared_prefix(prompts)
    assert sorted(i for group in groups for i in group) == list(range(1500))
    assert cost(groups, prompts) < cost([[i] for i in range(1500)], prompts) / 10


def test_no_prompts_no_groups() -> None:
    assert group_by_shared_prefix([]) == []


@pytest.mark.slow
def test_the_embedded_model_writes_what_hugging_face_writes() -> None:
    lm = LanguageModel()
    lm.load()
    passage = " ".join(f"Fact {i}: the number {i} is followed by {i + 1}." for i in range(22))
    requests = [
        Request([{"role": "system", "content": passage}, {"role": "user", "content": f"What follows {i} times {i}?"}])
        for i in range(2)
    ]
    found = lm.complete(requests, Sampling(max_new_tokens=8))
    prompts = [c.prompt_ids for c in found]
    assert 330 < shared_prefix(prompts) < 420
    expected = one_by_one(lm.model.eval(), prompts, 8, end_ids=lm.end_ids, window=lm.window)
    assert [list(c.completion_ids) for c in found] == expected
