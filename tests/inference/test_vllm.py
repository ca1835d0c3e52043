"""vLLM servers write what the engine in this process writes, by the weights that are trained, or nothing is kept."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cotune.datamodules import Sizes
from cotune.inference.local import LocalEngine
from cotune.inference.vllm import VLLMError, VLLMServer
from cotune.lightning_modules import LanguageModel, LoRA
from cotune.lightning_modules.lora import lora_layers
from cotune.programs import Completion, Request, Sampling
from cotune.programs.layout import FREE, Choices, Field, Fixed, Layout, Number
from cotune.programs.lm import told_of_completions
from cotune.storage.served_adapter import served_name
from tiny_fit import BrokenOffError, Fit, tiny_fit
from vllm_server import BASE, Fault, VLLMServerProcess, vllm_servers

from cotune.commands.doctor_engine import rollout_findings

FORM: Layout = (Field("why", max_tokens=6), Fixed("\nanswer:"), Field("a", " ", syntax=Choices(("yes", "no", "nor"))))
NUMBERS: Layout = (Fixed("n:"), Field("n", syntax=Number(), max_tokens=7), Fixed("m:"), Field("m", "\n", stops=("e",)))
GREEDY = Sampling(max_new_tokens=12)


def loaded(folder: Path, *, r: int = 4, **settings: Any) -> LanguageModel:
    lm = LanguageModel(str(folder), device="cpu", lora=LoRA(r=r, alpha=8), **settings)
    lm.load(seed=0)
    train(lm, 1)
    return lm


def train(lm: LanguageModel, seed: int) -> None:
    """Another adapter, as a weight step leaves one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in lora_layers(lm.model):
            weight = layer.lora_B["default"].weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)


def here(lm: LanguageModel, requests: list[Request], sampling: Sampling = GREEDY) -> list[Completion]:
    """What the engine in this process writes with the same weights."""
    served, lm.completing.engine = lm.completing.engine, LocalEngine()
    lm.completing.engine.start(lm)
    found = lm.complete(requests, sampling)
    lm.completing.engine = served
    return found


def asked(count: int = 3, **settings: Any) -> list[Request]:
    return [Request([{"role": "user", "content": f"Question {i}"}], seed=i, **settings) for i in range(count)]


@pytest.fixture
def server(tiny_model: Path) -> Iterator[VLLMServerProcess]:
    with vllm_servers(tiny_model) as (one,):
        yield one


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cotune.inference.vllm.server._FIRST_WAIT", 0.01)
    monkeypatch.setattr("cotune.inference.vllm.pool._LOOKS", 0.05)


def engine(*servers: VLLMServerProcess, folder: Path, **options: Any) -> VLLMServer:
    return VLLMServer([f"{one.url}/v1" for one in servers], adapters=str(folder), **{"patience": 0.0, **options})


FEW = asked(3, layout=FORM)
MANY = (
    Field("a", stops=("\n\ne", "e", "a", "i", "o", "u")),
    Fixed("b:"),
    Field("b", stops=tuple("\n" + c for c in "aeiou")),
)
LIFTED: Layout = (Fixed("a:"), Field("a", " ", syntax=Choices(("yes", "no", "nor"), (2.5, -1.0, 1.5))))
MIXED = [
    *FEW,
    *asked(3, layout=LIFTED),
    *asked(1, layout=MANY),
    *asked(2, layout=NUMBERS),
    *asked(1, layout=FREE),
    *asked(1, layout=(Field("a", stops=("e",)),)),
]


def test_servers_write_what_the_local_engine_writes(
    tiny_model: Path, tmp_path: Path, server: VLLMServerProcess
) -> None:
    lm = loaded(tiny_model)
    lm.use(engine(server, folder=tmp_path))
    requests = [*MIXED, *asked(2, layout=FORM, adapter="")]
    expected = here(lm, requests)
    told: list[int] = []
    with told_of_completions(told.append):
        assert lm.complete(requests, GREEDY) == expected
    assert sum(told) == len(requests)
    train(lm, 2)
    after = lm.complete(FEW, GREEDY)
    assert after == here(lm, FEW)
    assert after[0] != expected[0]
    # Ids go there and come back; fixed texts are put there here.
    sent = server.completions()
    assert all(isinstance(body["prompt"], list) and body["return_token_ids"] for body in sent)
    assert {body["model"] for body in sent} == {BASE, *server.adapters}


def test_log_probs_are_those_of_the_local_engine(tiny_model: Path, tmp_path: Path, server: VLLMServerProcess) -> None:
    lm = loaded(tiny_model)
    lm.use(engine(server, folder=tmp_path))
    told = replace(GREEDY, log_probs=True)
    for own, expected in zip(lm.complete(MIXED, told), here(lm, MIXED, told), strict=True):
        assert own.completion_ids == expected.completion_ids
        assert own.log_probs == pytest.approx(expected.log_probs, abs=1e-4)
    server.raw_log_probs = True
    lm.use(engine(server, folder=tmp_path))
    with pytest.raises(VLLMError, match="--logprobs-mode processed_logprobs"):
        lm.complete(asked(), told)


def test_drawn_tokens_keep_to_their_fields_and_follow_from_the_seed(
    tiny_model: Path, tmp_path: Path, server: VLLMServerProcess
) -> None:
    lm = loaded(tiny_model)
    lm.use(engine(server, folder=tmp_path))
    warm = Sampling(temperature=1.0, max_new_tokens=12)
    requests = asked(8, layout=FORM)
    found = lm.complete(requests, warm)
    assert {done.fields[1].text for done in found} <= {" yes", " no", " nor"}
    assert len({done.completion_ids for done in found}) > 4
    assert lm.complete(list(reversed(requests)), warm) == list(reversed(found))


def test_each_adapter_has_a_name_of_its_own_and_old_ones_go(
    tiny_model: Path, tmp_path: Path, server: VLLMServerProcess
) -> None:
    lm = loaded(tiny_model)
    lm.use(engine(server, folder=tmp_path))
    names = []
    for step in range(2, 6):
        train(lm, step)
        lm.complete(asked(1), GREEDY)
        names.append(server.completions()[-1]["model"])
        assert Path(server.adapters[names[-1]], "adapter_model.safetensors").is_file()
    assert len(set(names)) == 4
    assert list(server.adapters) == names[-2:]  # the older ones were unloaded
    assert {path.name for path in tmp_path.iterdir()} == set(names[-3:])  # and their folders kept one step longer
    paths = [path for path, body in server.asked if body.get("lora_name") == names[1]]
    assert paths == ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"]


def test_the_store_tells_engines_apart_and_not_addresses(tiny_model: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "completions.sqlite")
    loaded(tiny_model, completions=store).complete(asked(), GREEDY)
    with vllm_servers(tiny_model, 2) as (one, other):
        for server, cached in ((one, 0), (other, 3)):
            lm = loaded(tiny_model, completions=store)
            lm.use(engine(server, folder=tmp_path / "adapters"))
            lm.complete(asked(), GREEDY)
            assert (lm.usage.calls, lm.usage.cached) == (3, cached)


# Whose weights answer


def test_a_server_that_answers_by_other_weights_ends_the_run_and_keeps_nothing(
    tiny_model: Path, tmp_path: Path, server: VLLMServerProcess
) -> None:
    lm = loaded(tiny_model, completions=str(tmp_path / "completions.sqlite"))
    lm.use(engine(server, folder=tmp_path / "adapters"))
    (before,) = server.adapters
    train(lm, 2)
    lm.complete(asked(1), GREEDY)
    now, paid = list(server.adapters)[-1], lm.paid.calls
    for answering in (BASE, before):
        server.answers_as[now] = answering
        with pytest.raises(VLLMError, match=f'Asked for "{now}" .* "{answering}" is what it answers like'):
            lm.complete(asked(2), GREEDY)
    server.answers_as.clear()
    assert lm.complete(asked(2), GREEDY) == here(lm, asked(2))
    assert lm.paid.calls == paid + 1 + 2  # one was kept from before; here() has two of its own


def test_a_hair_between_two_adapters_is_seen(tiny_model: Path, tmp_path: Path, server: VLLMServerProcess) -> None:
    lm = loaded(tiny_model)
    lm.use(engine(server, folder=tmp_path))
    (before,) = server.adapters
    with torch.no_grad():
        for _, layer in lora_layers(lm.model):
            layer.lora_B["default"].weight.mul_(1.02)
    server.fault = lambda path, body: server.answers_as.setdefault(body.get("lora_name", ""), before) and None
    with pytest.raises(VLLMError, match=rf'"{before}" is what it answers like'):
        lm.complete(asked(1), GREEDY)


def test_answers_without_the_ids_that_were_asked_for_are_no_answers(
    tiny_model: Path, tmp_path: Path, server: VLLMServerProcess
) -> None:
    lm = loaded(tiny_model)
    # One at a time: a request that was given up could be on its way still, and meet the next fault.
    lm.use(engine(server, folder=tmp_path, concurrency=1))
    for fault, error in (
        (Fault(choice={"token_ids": None}), "no ids"),
        (Fault(choice={"token_ids": ["7"]}), "no ids"),
        (Fault(choice={"prompt_token_ids": [1, 2]}), "no ids, those of another prompt"),
        (Fault(changes={"model": "other"}), "or another model"),
        (Fault(status=400, text="max_tokens is too large"), "refuses a request"),
    ):
        once(server, fault)
        with pytest.raises(VLLMError, match=error):
            lm.complete(FEW, GREEDY)


# Servers that go and come


def once(server: VLLMServerProcess, fault: Fault, nth: int = 1) -> None:
    """This goes wrong once, at the nth completion from now on."""
    before, left = len(server.completions()), iter([fault])

    def answer(path: str, body: Mapping[str, Any]) -> Fault | None:
        of_a_row = path == "/v1/completions" and "prompt_logprobs" not in body
        return next(left, None) if of_a_row and len(server.completions()) >= before + nth else None

    server.fault = answer


def test_what_breaks_in_the_middle_of_a_wave_is_asked_again(
    tiny_model: Path, tmp_path: Path, server: VLLMServerProcess
) -> None:
    lm = loaded(tiny_model)
    lm.use(engine(server, folder=tmp_path))
    expected = here(lm, FEW)
    for fault in (Fault(reset=True), Fault(half=True), Fault(status=503, text="busy")):
        once(server, fault, nth=4)
        assert lm.complete(FEW, GREEDY) == expected


def test_a_server_that_has_lost_the_adapter_gets_it_again(
    tiny_model: Path, tmp_path: Path, server: VLLMServerProcess
) -> None:
    lm = loaded(tiny_model)
    lm.use(engine(server, folder=tmp_path))
    expected = here(lm, FEW)
    server.restart()  # between two waves
    assert lm.complete(FEW, GREEDY) == expected
    seen, loads = len(server.completions()), len(server.loads())

    def evict(path: str, body: Mapping[str, Any]) -> None:
        if len(server.completions()) > seen + 3 and len(server.loads()) == loads:
            server.forget()  # and in the middle of one

    server.fault = evict
    assert lm.complete(FEW, GREEDY) == expected
    assert len(server.loads()) > loads == 2


def test_two_of_three_servers_can_go(tiny_model: Path, tmp_path: Path) -> None:
    lm = loaded(tiny_model)
    requests = asked(12, layout=FORM)
    expected = here(lm, requests)
    with vllm_servers(tiny_model, 3) as servers:
        lm.use(engine(*servers, folder=tmp_path, concurrency=2))
        assert lm.complete(requests, GREEDY) == expected
        assert all(len(server.completions()) > 2 for server in servers)
        servers[0].fault = lambda path, body: Fault(reset=True)

        def leave(path: str, body: Mapping[str, Any]) -> Fault | None:
            return Fault(reset=True) if len(servers[1].completions()) > 12 else None

        servers[1].fault = leave
        train(lm, 2)
        assert lm.complete(requests, GREEDY) == here(lm, requests)
        servers[0].fault = servers[1].fault = lambda path, body: None
        for server in servers[:2]:
            server.restart()
        asked_before = [len(server.completions()) for server in servers]
        lm.complete(requests, GREEDY)  # those that are back take part again
        assert all(len(s.completions()) > before for s, before in zip(servers, asked_before, strict=True))
        for server in servers:
            server.stop()
        with pytest.raises(VLLMError, match="no vLLM server answers"):
            lm.complete(requests, GREEDY)


def test_what_a_server_wrote_that_is_gone_before_it_proves_itself_is_written_again(
    tiny_model: Path, tmp_path: Path
) -> None:
    lm = loaded(tiny_model)
    requests = asked(8)
    with vllm_servers(tiny_model, 2) as (stays, goes):
        lm.use(engine(stays, goes, folder=tmp_path))
        (name,) = goes.adapters
        proofs = len([1 for _, body in goes.asked if "prompt_logprobs" in body])

        def gone(path: str, body: Mapping[str, Any]) -> Fault | None:
            if "prompt_logprobs" in body and len(goes.completions()):
                return Fault(reset=True)
            goes.answers_as[name] = BASE  # it answers foreign from now on, and will not say so
            return None

        goes.fault = gone
        assert lm.complete(requests, GREEDY) == here(lm, requests)
        assert goes.completions()
        assert proofs == 1


def of_a_row(path: str, body: Mapping[str, Any]) -> bool:
    return path == "/v1/completions" and "prompt_logprobs" not in body


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (
            Fault(status=500, text="out of blocks"),
            r"3 of 3 prompts .* status 500, out of blocks\. Look into the server's",
        ),
        (Fault(status=429, text="slow down"), r"status 429, slow down\. .* lower model.engine.init_args.concurrency"),
        (Fault(reset=True), r"3 of 3 prompts .* failed with \w+Error"),
    ],
)
def test_a_server_that_passes_the_probe_and_completes_nothing_ends_the_run(
    fault: Fault, error: str, tiny_model: Path, tmp_path: Path, server: VLLMServerProcess
) -> None:
    lm = loaded(tiny_model)
    lm.use(engine(server, folder=tmp_path, patience=0.2))
    server.fault = lambda path, body: fault if of_a_row(path, body) else None
    with pytest.raises(VLLMError, match=error):
        lm.complete(FEW, GREEDY)


def test_a_prompt_that_always_fails_is_named_and_the_others_are_written_once(
    tiny_model: Path, tmp_path: Path, server: VLLMServerProcess
) -> None:
    lm = loaded(tiny_model)
    lm.use(engine(server, folder=tmp_path, concurrency=1))
    requests = [Request([{"role": "user", "content": "a longer question"}]), *asked(3)]
    length = len(here(lm, requests)[0].prompt_ids)
    server.fault = lambda path, body: (
        Fault(status=500, text="cuda") if of_a_row(path, body) and len(body["prompt"]) == length else None
    )
    with pytest.raises(VLLMError, match=f"1 of 4 prompts .* one of {length} tokens failed with status 500, cuda"):
        lm.complete(requests, GREEDY)
    good = [body["prompt"] for body in server.completions() if len(body["prompt"]) < length]
    assert len(good) == len({tuple(prompt) for prompt in good}) == 3


@pytest.mark.parametrize("broken", [0, 1])
def test_a_server_that_fails_each_request_leaves_them_to_the_other(
    broken: int, tiny_model: Path, tmp_path: Path, server: VLLMServerProcess
) -> None:
    with vllm_servers(tiny_model) as (second,):
        both, lm = [server, second], loaded(tiny_model)
        lm.use(engine(*both, folder=tmp_path, patience=0.2))
        both[broken].fault = lambda path, body: Fault(status=500, text="cuda") if of_a_row(path, body) else None
        assert lm.complete(FEW, GREEDY) == here(lm, FEW)


def test_an_outage_of_completions_that_is_shorter_than_the_patience_changes_none(
    tiny_model: Path, tmp_path: Path, server: VLLMServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = loaded(tiny_model)
    lm.use(engine(server, folder=tmp_path, patience=60.0))
    left = [Fault(status=503, text="busy")] * 4 * 3 * 5  # tries, rows, and more rounds than end a run without patience
    server.fault = lambda path, body: left.pop() if of_a_row(path, body) and left else None
    assert lm.complete(FEW, GREEDY) == here(lm, FEW)
    assert capsys.readouterr().out.count("No further completion has ended (status 503, busy); asking again for up") == 1


def test_it_waits_for_the_only_server(tiny_model: Path, tmp_path: Path, server: VLLMServerProcess) -> None:
    lm = loaded(tiny_model)
    lm.use(engine(server, folder=tmp_path, patience=20.0))
    server.stop()
    timer = threading.Timer(0.3, server.restart)
    timer.start()
    assert lm.complete(asked(), GREEDY) == here(lm, asked())
    timer.join()


def test_servers_sleep_while_weights_are_trained_and_prove_themselves_when_they_wake(
    tiny_model: Path, tmp_path: Path, server: VLLMServerProcess
) -> None:
    lm = loaded(tiny_model)
    server.asleep = True  # a run that was killed left it so
    lm.use(engine(server, folder=tmp_path, sleep=True))
    for _ in range(2):
        lm.completing.rest()
        assert server.asleep
        assert lm.complete(FEW, GREEDY) == here(lm, FEW)
        assert not server.asleep
    (name,) = server.adapters
    server.fault = lambda path, body: server.answers_as.update({name: BASE}) if path == "/wake_up" else None
    lm.completing.rest()
    with pytest.raises(VLLMError, match=f'"{BASE}" is what it answers like'):
        lm.complete(FEW, GREEDY)
    server.fault = lambda path, body: Fault(status=404) if path.startswith("/sleep") else None
    with pytest.raises(VLLMError, match=r"cannot sleep .* Start it with --enable-sleep-mode"):
        lm.completing.rest()


def test_what_an_ended_process_left_is_unloaded_and_removed(
    tiny_model: Path, tmp_path: Path, server: VLLMServerProcess
) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = {pid: served_name("0123456789abcdef").replace(f"-{os.getpid()}-", f"-{pid}-") for pid in (ended.pid, 1)}
    for name in names.values():
        server.adapters[name] = str(tmp_path / name)
        (tmp_path / name).mkdir()
    loaded(tiny_model).use(engine(server, folder=tmp_path))
    for pid, name in names.items():
        assert ((name in server.adapters), (tmp_path / name).is_dir()) == ((pid == 1), (pid == 1))


# What is refused before a run


def test_what_a_server_does_not_take_is_said_at_the_start(tiny_model: Path, tmp_path: Path) -> None:
    with vllm_servers(tiny_model, max_rank=2) as (server,):
        with pytest.raises(VLLMError, match=r"higher --max-lora-rank, or lower model.lm.lora.r"):
            loaded(tiny_model).use(engine(server, folder=tmp_path))
        server.max_rank = 16
        unset = Fault(status=404, text="Not Found")
        server.fault = lambda path, body: unset if path == "/v1/load_lora_adapter" else None
        with pytest.raises(VLLMError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
            loaded(tiny_model).use(engine(server, folder=tmp_path))
        with pytest.raises(VLLMError, match='serves tiny, not "other"'):
            loaded(tiny_model).use(engine(server, folder=tmp_path, model="other"))
        lm = loaded(tiny_model)
        lm.model.peft_config["default"].use_dora = True
        with pytest.raises(VLLMError, match="it is a DoRA"):
            lm.use(engine(server, folder=tmp_path))
        server.stop()
        with pytest.raises(VLLMError, match="Are they running, and are the addresses right"):
            loaded(tiny_model).use(engine(server, folder=tmp_path))


def test_the_doctor_says_whether_rollouts_can_come_from_a_server(server: VLLMServerProcess) -> None:
    (found,) = rollout_findings(server.url, BASE, "")
    assert (found.status, found.value) == ("ok", "vLLM 0.32.0: ids both ways, adapters at any time")
    server.fault = lambda path, body: Fault(status=404) if "lora" in path else Fault(choice={"token_ids": None})
    (found,) = rollout_findings(server.url, BASE, "")
    assert found.status == "note"
    assert re.search("no token ids; it loads no adapters .*VLLM_ALLOW_RUNTIME_LORA_UPDATING", found.value)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"urls": []}, "addresses of one or more servers"),
        ({"urls": ["localhost:8000"]}, "not the address of a vLLM server"),
        ({"urls": ["http://me:secret@host"]}, "key_variable"),
        ({"urls": ["http://a", "http://a/v1"]}, "none twice"),
        ({"urls": ["http://a"], "concurrency": 0}, "concurrency 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error) as raised:
        VLLMServer(**options)
    assert "secret" not in str(raised.value)


def test_a_run_that_is_killed_while_its_server_restarts_ends_as_one_that_is_not(
    tiny_model: Path, tmp_path: Path, server: VLLMServerProcess
) -> None:
    def fit(folder: str) -> Fit:
        sizes = Sizes(train=4, dev=2, val=2, test=2)
        made = tiny_fit(tiny_model, tmp_path / folder, "w -> p", epochs=1, sizes=sizes)
        made.lm.use(engine(server, folder=tmp_path / "adapters", sleep=True))
        return made

    whole = fit("whole").run()
    assert len(set(server.loads())) == 2  # untrained, and trained
    assert "/sleep?level=1" in [path for path, _ in server.asked]
    part = fit("part")
    part.lm.breaks_at = len(whole.lm.seen) // 2
    with pytest.raises(BrokenOffError):
        part.run()
    server.restart()
    assert fit("part").run(part.last).outcome == whole.outcome
    assert not [path.name for path in (tmp_path / "adapters").iterdir() if path.name.startswith(".")]


def test_a_copy_connects_itself(tmp_path: Path, server: VLLMServerProcess) -> None:
    assert copy.deepcopy(engine(server, folder=tmp_path)).urls == [server.url]
