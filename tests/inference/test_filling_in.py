"""Batches that fill layouts in write what an LM that is asked one token at a time writes, and read no prompt twice."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cotune.inference import Codec
from cotune.inference.engine import Generated, Prompted
from cotune.inference.local.decoder import Decoder
from cotune.lightning_modules import LanguageModel, LoRA
from cotune.programs import Request, Sampling
from cotune.programs.layout import FREE, Choices, Field, Fixed, Layout, Number
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

TOKENIZER = tiny_tokenizer()  # a token a byte
EOS = 2
WORDS = Choices(("yes", "no", "maybe", "maybe not"))
SHAPES: dict[str, Layout] = {
    "reason, then answer": (Field("why", max_tokens=9), Fixed("\nanswer:"), Field("answer", max_tokens=6)),
    "fixed first": (Fixed("so"), Field("a", max_tokens=4), Fixed("b:"), Field("b", max_tokens=3), Fixed("!")),
    "choices": (Field("why", max_tokens=5), Fixed(" a:"), Field("a", " ", max_tokens=9, syntax=WORDS)),
    "numbers": (Fixed("n:"), Field("n", syntax=Number(), max_tokens=7), Fixed("m:"), Field("m", "\n", syntax=Number())),
    "three": tuple(
        part for name in "abc" for part in (Fixed(f"<{name}>"), Field(name, max_tokens=5, may_be_empty=True))
    ),
}


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


def noise(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 259) for _ in range(length)]


def prompts(count: int, *, shared: int = 60, seed: int = 0) -> list[list[int]]:
    return [noise(shared, seed) + noise(3 + i % 7, seed * 100 + i + 1) for i in range(count)]


def decoder(model: Any, *, ends: Sequence[int] = (EOS,), cache_tokens: int = 1 << 20, window: int = 1024) -> Decoder:
    return Decoder(model, codec=Codec(TOKENIZER, end_ids=ends), window=window, cache_tokens=cache_tokens)


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False).input_ids)


def text_of(ids: Sequence[int]) -> str:
    return str(TOKENIZER.decode(ids, skip_special_tokens=True))


class OneByOne:
    """Fills a layout in with plain passes over the whole text, a token at a time: the slow way, written anew."""

    def __init__(self, model: Any, prompt: Sequence[int], ends: Sequence[int]) -> None:
        self.model, self.prompt, self.ends = model, list(prompt), ends
        self.written: list[int] = []

    def fill(self, layout: Layout) -> list[int]:
        for place, part in enumerate(layout):
            if isinstance(part, Fixed):
                self.written += ids_of(part.text)
            elif part.syntax is None:
                ended = self.free(part, last=place == len(layout) - 1)
                if ended:
                    return self.written
            else:
                self.guided(part)
        if isinstance(layout[-1], Fixed) or layout[-1].syntax is not None:
            self.written.append(self.ends[0])
        return self.written

    def free(self, field: Field, *, last: bool) -> bool:
        """Whether the whole ends here."""
        start = len(self.written)
        for _ in range(field.max_tokens or 99):
            blank = not text_of(self.written[start:]).strip() and not field.may_be_empty
            token = self.likeliest([i for i in range(259) if not (blank and i in self.ends)])
            if token in self.ends:
                break
            self.written.append(token)
            token = -1
        if last:
            self.written += [token] if token in self.ends else []
            return True
        # The beginning of a character is left out; what is none after three bytes never will be one.
        whole = [n for n in range(min(4, 1 + len(self.written) - start)) if not self.broken(n)]
        del self.written[len(self.written) - (whole or [0])[0] :]
        return False

    def broken(self, taken: int) -> bool:
        return text_of(self.written[: len(self.written) - taken]).endswith("\ufffd")

    def guided(self, field: Field) -> None:
        start, limit = len(self.written), field.max_tokens or 32
        while True:
            so_far = text_of(self.written[start:])
            allowed = [i for i in range(3, 259) if begins(field, so_far + text_of([i]))]
            if not allowed:
                return
            ended = len(self.written) - start >= limit
            token = self.likeliest(range(259) if whole(field, so_far) else allowed) if not ended else -1
            if token not in allowed:
                kept = so_far
                while not whole(field, kept):
                    kept = kept[:-1]
                self.written[start:] = ids_of(kept)
                return
            self.written.append(token)

    def likeliest(self, among: Sequence[int]) -> int:
        with torch.inference_mode():
            logits = self.model(torch.tensor([self.prompt + self.written])).logits[0, -1]
        return max(among, key=lambda i: float(logits[i]))


NUMBER = r"-?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?"
BEGINNING = r"-?(\d{0,3}|\d+|\d{1,3}(,\d{3})*,\d{0,3}|(\d{1,3}(,\d{3})+|\d+)\.\d*)"


def begins(field: Field, text: str) -> bool:
    """Whether a value of the field begins like this."""
    if len(text) <= len(field.lead):
        return field.lead.startswith(text)
    if not text.startswith(field.lead):
        return False
    value = text[len(field.lead) :]
    if isinstance(field.syntax, Choices):
        return any(choice.startswith(value) for choice in field.syntax.texts)
    return re.fullmatch(BEGINNING, value) is not None


def whole(field: Field, text: str) -> bool:
    """Whether the field may end here: numbers also behind a comma or a point that no digit follows."""
    value = text.removeprefix(field.lead)
    if isinstance(field.syntax, Choices):
        return text.startswith(field.lead) and value in field.syntax.texts
    return text.startswith(field.lead) and re.search(r"\d", value) is not None


@pytest.mark.parametrize("ends", [[EOS], [EOS, *range(40, 60)]], ids=["few ends", "many ends"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_writes_what_is_written_one_by_one(model: Any, shape: str, ends: list[int]) -> None:
    layout = SHAPES[shape]
    asked = prompts(7, seed=len(shape))
    expected = [OneByOne(model, prompt, ends).fill(layout) for prompt in asked]
    for cache_tokens in (1 << 20, 400):
        found = decoder(model, ends=ends, cache_tokens=cache_tokens).generate(
            [Prompted(prompt, layout) for prompt in asked], Sampling(max_new_tokens=64)
        )
        assert [result.ids for result in found] == expected


def mixed(count: int, seed: int = 3) -> list[Prompted]:
    """Prompts of all layouts, in one batch."""
    layouts = [*SHAPES.values(), FREE]
    return [Prompted(ids, layouts[i % len(layouts)], seed=i) for i, ids in enumerate(prompts(count, seed=seed))]


@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=30), Sampling(1.0, 0.9, 30, log_probs=True)])
def test_rows_at_different_places_of_different_layouts_do_not_disturb_each_other(
    model: Any, sampling: Sampling
) -> None:
    asked = mixed(18)
    together = decoder(model, ends=[EOS, *range(40, 60)]).generate(asked, sampling)
    alone = [decoder(model, ends=[EOS, *range(40, 60)]).generate([one], sampling)[0] for one in asked]
    assert [plain(result) for result in together] == [plain(result) for result in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)
    assert decoder(model, ends=[EOS, *range(40, 60)]).generate(asked, sampling) == together, "equal to the bit"


@pytest.mark.parametrize("shape", SHAPES)
def test_what_cannot_be_decoded_together_is_filled_in_as_the_model_itself_generates(model: Any, shape: str) -> None:
    layout, ends = SHAPES[shape], [EOS, *range(40, 60)]
    asked = prompts(7, seed=len(shape))
    apart = Decoder(
        model,
        codec=Codec(TOKENIZER, end_ids=ends),
        window=1024,
        cache_tokens=400,
        together=lambda tokens: tokens < 64 + len(asked[0]),  # some rows fit, others do not
    )
    found = apart.generate([Prompted(prompt, layout) for prompt in asked], Sampling(max_new_tokens=64))
    assert [result.ids for result in found] == [OneByOne(model, prompt, ends).fill(layout) for prompt in asked]


def test_one_at_a_time_the_same_tokens_are_drawn(model: Any) -> None:
    asked, sampling = mixed(12), Sampling(1.0, 0.9, 30, log_probs=True)
    codec = Codec(TOKENIZER, end_ids=[EOS, *range(40, 60)])
    apart = Decoder(model, codec=codec, window=1024, cache_tokens=400, together=lambda tokens: False)
    found = apart.generate(asked, sampling)
    together = decoder(model, ends=[EOS, *range(40, 60)]).generate(asked, sampling)
    assert [plain(result) for result in found] == [plain(result) for result in together]
    for one, other in zip(found, together, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)


def plain(result: Generated) -> tuple[Any, ...]:
    return result.ids, result.text, result.finished, result.fields, result.forced


@contextmanager
def rows_read(model: Any) -> Iterator[list[tuple[int, int]]]:
    """(tokens, rows that get a next token) of every pass inside."""
    read: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: read.append((given["input_ids"].numel(), given["logits_to_keep"].numel())),
        with_kwargs=True,
    )
    yield read
    hook.remove()


def test_no_prompt_is_read_twice_and_no_fixed_text_more_than_once(model: Any) -> None:
    layout = (Field("why", max_tokens=9), Fixed("\nanswer:"), Field("answer", max_tokens=6))
    asked = prompts(5, shared=150)
    with rows_read(model) as read:
        found = decoder(model, ends=[259]).generate(
            [Prompted(ids, layout) for ids in asked], Sampling(max_new_tokens=20)
        )
    own = sum(len(ids) - 150 for ids in asked)
    written = sum(len(result.ids) - 1 for result in found)  # nothing comes behind the last
    # Bytes of a character that was cut at the limit were read, the last one apart, and taken back.
    taken_back = sum(max(0, 9 - result.fields[0].end - 1) for result in found)
    assert sum(tokens for tokens, _ in read) == 150 + own + written + taken_back
    assert max(len(result.ids) for result in found) > 6 + len("\nanswer:")


def test_steps_without_a_fixed_text_read_one_token_a_row(model: Any) -> None:
    layout = (Field("a", max_tokens=8), Fixed("\nanswer:"), Field("b", max_tokens=8))
    with rows_read(model) as read:
        decoder(model, ends=[259]).generate([Prompted(ids, layout) for ids in prompts(4)], Sampling(max_new_tokens=20))
    wide = [tokens for tokens, rows in read[2:] if tokens > rows]
    assert len(wide) == 1, "all four at once"
    assert len(read) == 2 + 15


def test_forced_texts_move_no_draw(model: Any) -> None:
    sampling = Sampling(1.0, 1.0, 12)
    prompt = noise(20, 5)
    free, formed = (
        decoder(model, ends=[259]).generate([Prompted(ids, layout, seed=4)], sampling)[0]
        for ids, layout in ((prompt + ids_of("so:"), FREE), (prompt, (Fixed("so:"), Field("a", may_be_empty=True))))
    )
    assert formed.ids == ids_of("so:") + free.ids


def test_a_prompt_without_room_for_its_layout_is_too_long(model: Any) -> None:
    layout = (Field("why"), Fixed("\nanswer:"), Field("answer", syntax=WORDS))
    tight = decoder(model, window=80)
    least = tight.plan(layout).least
    assert least > len("\nanswer:") + len("maybe not")
    fits, over = noise(80 - least, 1), noise(81 - least, 2)
    found = tight.generate([Prompted(fits, layout), Prompted(over, layout)], Sampling(max_new_tokens=500))
    assert found[1] == Generated([], "", "too_long")
    assert found[0].fields[1].text in WORDS.texts
    assert len(fits) + len(found[0].ids) <= 80


def test_a_completion_without_a_choice_needs_no_model(model: Any) -> None:
    layout = (Fixed("a:"), Field("a", syntax=Choices(("b",))))
    with rows_read(model) as read:
        (found,) = decoder(model).generate([Prompted([5, 6], layout)], Sampling())
    assert not read
    assert (found.text, found.ids[-1], found.finished) == ("a:b", EOS, "eos")
    assert found.forced == (True, True, False, True)


def test_out_of_memory_begins_the_completions_again(model: Any) -> None:
    class Scarce:
        def __init__(self) -> None:
            self.config, self.device, self.calls = model.config, model.device, 0

        def __call__(self, **inputs: Any) -> Any:
            self.calls += 1
            if self.calls == 14:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return model(**inputs)

    asked, sampling = mixed(6), Sampling(1.0, 0.9, 30)
    with pytest.warns(UserWarning, match="out of memory with"):
        found = decoder(Scarce()).generate(asked, sampling)
    assert found == decoder(model).generate(asked, sampling)


# Log-probabilities


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_log_probs_are_those_of_the_tokens_that_were_allowed_at_the_temperature(model: Any, temperature: float) -> None:
    layout = SHAPES["choices"]
    sampling = Sampling(temperature, 0.9, 30, log_probs=True)
    prompt = noise(30, 9)
    (found,) = decoder(model).generate([Prompted(prompt, layout, seed=1)], sampling)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + found.ids])).logits[0, len(prompt) - 1 :].double()
    answer = found.fields[1]
    for place, (token, log_prob) in enumerate(zip(found.ids, found.log_probs, strict=True)):
        if found.forced[place]:
            assert log_prob == 0
            continue
        allowed = list(range(259)) if place else [i for i in range(259) if i != EOS]
        if answer.start <= place < answer.end:
            so_far = text_of(found.ids[answer.start : place])
            field = layout[2]
            assert isinstance(field, Field)
            if not whole(field, so_far):
                allowed = [i for i in range(3, 259) if begins(field, so_far + text_of([i]))]
        scaled = logits[place][allowed] / (temperature or 1.0)
        expected = float(scaled.log_softmax(0)[allowed.index(token)])
        assert log_prob == pytest.approx(expected, abs=1e-4)
    assert not any(map(math.isinf, found.log_probs))


def test_log_probs_are_empty_unless_asked_for(model: Any) -> None:
    (found,) = decoder(model).generate([Prompted(noise(9, 1))], Sampling(max_new_tokens=4))
    assert found.log_probs == ()


# Through the LM


def loaded(folder: Path, **settings: Any) -> LanguageModel:
    lm = LanguageModel(str(folder), device="cpu", lora=LoRA(r=4, alpha=8), **settings)
    lm.load(seed=0)
    return lm


def test_an_lm_tells_fields_and_forced_ids_and_stores_them(tiny_model: Path, tmp_path: Path) -> None:
    layout = SHAPES["choices"]
    asked = [Request([{"role": "user", "content": f"Question {i}"}], seed=i, layout=layout) for i in range(4)]
    sampling = Sampling(0.8, 1.0, 20, log_probs=True)
    stored = {"completions": str(tmp_path / "completions.sqlite")}
    first, again, without = (loaded(tiny_model, **settings) for settings in (stored, stored, {}))
    found = first.complete(asked, sampling)
    assert found == again.complete(asked, sampling) == without.complete(asked, sampling)
    assert again.usage.cached == 4
    for completion in found:
        why, answer = completion.fields
        assert completion.text == f"{why.text} a:{answer.text}"
        assert answer.text.strip() in WORDS.texts
        assert len(completion.forced) == len(completion.log_probs) == len(completion.completion_ids)
        assert all(a.end <= b.start for a, b in pairwise(completion.fields))
    other = first.complete([Request(asked[0].messages, layout=(*layout, Fixed(".")))], sampling)
    assert other[0].text.endswith(".")
