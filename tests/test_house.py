"""The house rules: which folder may import which, what the wheel holds, and what no module does."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from sources import nodes, parsed

import cotune

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it on 3.10

ROOT = Path(__file__).resolve().parents[1]

# The import table: a folder may import itself and these. CONTRIBUTING.md shows the same lines.
MAY_IMPORT = {
    "storage": set(),
    "programs": set(),
    "prompting": {"programs"},
    "inference": {"programs", "storage"},
    "datamodules": {"programs", "storage"},
    "lightning_modules": {"programs", "datamodules", "inference", "storage"},
    "callbacks": {"programs", "prompting", "datamodules", "inference", "lightning_modules", "storage", "reporting"},
    "reporting": {"programs", "storage"},
}
MAY_IMPORT["experiments"] = set(MAY_IMPORT)
MAY_IMPORT["cotune"] = set(MAY_IMPORT)
WEIGHT_LIBRARIES = {"torch", "lightning", "pytorch_lightning", "transformers", "peft", "accelerate", "bitsandbytes"}
UNPICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "diskcache"}

BUILT_IN = {
    "ValueError",
    "TypeError",
    "RuntimeError",
    "FileNotFoundError",
    "ImportError",
    "NotImplementedError",
    "OSError",
}
TAKEN_WITHIN = {
    *(
        "programs/form.py",
        "programs/metrics.py",
        "programs/program.py",
        "programs/runner.py",
        "programs/set_metrics.py",
        "programs/types.py",
    ),
    *("datamodules/disguise.py", "datamodules/splits.py", "datamodules/tasks/gsm8k.py"),
    *("inference/automata.py", "inference/endpoint.py", "inference/grammars.py"),
    *("lightning_modules/probe.py", "lightning_modules/training/packed_attention.py", "storage/durable.py"),
}
"""Where an error of Python's is raised that another part of cotune catches, or a rollout records."""

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MODULES = [path for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))]
OTHERS = [
    path for folder in ("tests", "faults", "benchmarks", "docs") for path in sorted((ROOT / folder).rglob("*.py"))
]


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def top_folder(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


each_module = pytest.mark.parametrize("path", MODULES, ids=named)


@each_module
def test_no_function_is_longer_than_a_screen(path: Path) -> None:
    """Nor more complex than ruff's C901 allows, which pyproject.toml sets to 20."""
    functions = [node for node in nodes(parsed(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: lines for name, lines in long.items() if lines > 60} == {}


@each_module
def test_imports_go_one_way(path: Path) -> None:
    folder = top_folder(path)
    allowed = MAY_IMPORT[folder] | {folder, "errors"}
    wrong = {name for name in imported(path) if (room := room_of(name)) is not None and room not in allowed}
    assert not wrong, f"{named(path)} may import {sorted(allowed)}, and imports {sorted(wrong)}"


@pytest.mark.parametrize("path", [*MODULES, *OTHERS], ids=named)
def test_the_package_is_imported_by_its_cotune_name(path: Path) -> None:
    bare = {name for name in imported(path) if name.split(".")[0] in MAY_IMPORT.keys() - {"cotune"}}
    assert not bare, f"{named(path)}: write cotune.{sorted(bare)[0]}; the bare name exists only in this repository"


@pytest.mark.parametrize("path", [p for p in MODULES if top_folder(p) in {"programs", "prompting"}], ids=named)
def test_programs_and_prompts_know_no_weights(path: Path) -> None:
    assert not {name for name in imported(path) if name.split(".")[0] in WEIGHT_LIBRARIES}


def test_what_a_user_can_mend_is_a_cotune_error() -> None:
    """The command line shows any other error with its traceback."""
    raised = {named(path): built_in_errors(path) for path in MODULES}
    wrong = {name: found for name, found in raised.items() if found and name not in TAKEN_WITHIN}
    assert not wrong, "raise BadValueError, MissingFileError … of cotune.errors, or a CotuneError of the module's own"


def test_errors_import_nothing_and_all_others_may_import_them() -> None:
    assert not [name for name in imported(ROOT / "cotune/errors.py") if room_of(name)]


@each_module
def test_nothing_unpickles(path: Path) -> None:
    assert not {name for name in imported(path) if name.split(".")[0] in UNPICKLERS}
    unsafe = [call.lineno for call in calls(path) if ast.unparse(call.func) == "torch.load" and not weights_only(call)]
    assert "torch.load" not in set(imported(path)), f"{named(path)}: call it as torch.load, so that this test sees it"
    assert not unsafe, f"{named(path)}, lines {unsafe}: torch.load needs weights_only=True"


@each_module
def test_a_module_says_what_it_is_for(path: Path) -> None:
    first = (ast.get_docstring(parsed(path), clean=False) or "").split("\n")[0]
    assert first.strip(), f"{named(path)}: the docstring's first line says what the module is for"
    assert path.name != "utils.py", f"{named(path)}: a file is named after its noun"


@each_module
def test_what_a_module_offers_says_what_it_is(path: Path) -> None:
    """Its functions and classes without an underscore; what only the module itself uses has one."""
    body = parsed(path).body
    offered = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"]
    assert not [node.name for node in offered if not ast.get_docstring(node)]


def test_the_walk_sees_imports_wherever_they_hide(tmp_path: Path) -> None:
    hiding = tmp_path / "hiding.py"
    hiding.write_text(
        "from cotune import callbacks\n"
        "def late():\n    import cotune.prompting.search\n    from cotune.datamodules.traces import TraceDataModule\n"
        "def later():\n    importlib.import_module('cotune.programs')\n"
    )
    assert {room_of(name) for name in imported(hiding)} == {"callbacks", "prompting", "datamodules", "programs"}


def test_contributing_shows_the_import_table() -> None:
    shown = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
    table = {(words := line.split())[0]: set(words[2:]) for line in shown if " imports " in line and line[0] != "-"}
    assert {room: allowed - {"nothing"} for room, allowed in table.items() if room in MAY_IMPORT} == MAY_IMPORT


def test_pyproject_lists_the_folders_on_disk() -> None:
    with_code = {named(path.parent) for path in [*MODULES, *ROOT.glob("*/__init__.py")]}
    on_disk = with_code - {"tests", "faults", "benchmarks", "docs"}
    packages = PROJECT["tool"]["setuptools"]["packages"]
    folders = {(ROOT / "src" / package.replace(".", "/")).resolve() for package in packages}
    assert {folder.relative_to(ROOT).as_posix() for folder in folders} == on_disk


def test_the_folder_above_a_clone_imports_the_package_and_not_the_clone(tmp_path: Path) -> None:
    (tmp_path / "cotune").symlink_to(ROOT)
    code = "import cotune, cotune.programs, cotune.commands.table; print(cotune.__version__)"
    for where in (tmp_path, ROOT, ROOT / "src"):
        done = subprocess.run([sys.executable, "-c", code], cwd=where, capture_output=True, text=True, check=False)
        assert done.stdout.strip() == cotune.__version__, done.stderr


def test_type_checkers_find_the_whole_package_by_path() -> None:
    """One real path on sys.path that has cotune and nothing beside it, whose folders are all there."""
    code = "import sys; print(sys.path)"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, check=True)
    found, *_ = [
        path for path in ast.literal_eval(done.stdout.decode()) if path and (Path(path) / "cotune/py.typed").is_file()
    ]
    rooms = [path.name for path in (Path(found) / "cotune").iterdir() if (path / "__init__.py").is_file()]
    assert MAY_IMPORT.keys() - {"cotune"} <= set(rooms)
    assert not [path for path in Path(found).glob("*/__init__.py") if path.parent.name in ("programs", "callbacks")]


def test_hosted_ci_calls_commands_that_there_are() -> None:
    targets = {
        line.split(":")[0] for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines() if ":" in line
    }
    for path in (ROOT / ".github").rglob("*.yml"):
        jobs = yaml.safe_load(path.read_text(encoding="utf-8")).get("jobs", {})
        steps = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
        assert {run.split()[1] for run in steps if run.startswith("make ")} <= targets
    supported = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    assert supported["jobs"]["tests"]["strategy"]["matrix"]["python"][0] == PROJECT["project"]["requires-python"][2:]


def test_the_version_stands_in_one_place_and_the_citation_agrees() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (PROJECT["project"]["dynamic"], str(cited["version"])) == (["version"], cotune.__version__)


def test_the_wheel_holds_every_module(tmp_path: Path) -> None:
    pytest.importorskip("setuptools.build_meta", reason="building needs setuptools: `make setup` installs it")
    with zipfile.ZipFile(build_wheel(tmp_path)) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    on_disk = {named(path) for path in MODULES}
    expected = {name if name.startswith("cotune/") else f"cotune/{name}" for name in on_disk}
    templates = {named(path) for path in (ROOT / "reporting/templates").iterdir()}
    configs = {named(path) for path in (ROOT / "configs").rglob("*.yaml")}
    data = {
        f"cotune/{name}" for name in (*templates, *configs, "py.typed", "constraints.txt", "datamodules/tasks/iris.csv")
    }
    assert held == expected | data


def imported(path: Path) -> Iterator[str]:
    """Every module that the file imports, absolute, also inside functions; `from a import b` gives `a.b`."""
    for node in nodes(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(part for part in (own_package(path, node.level), node.module) if part)
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"__import__", "importlib.import_module"}:
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))


def own_package(path: Path, level: int) -> str:
    """What the dots of a relative import stand for."""
    if level == 0:
        return ""
    folders = path.relative_to(ROOT).parent.parts
    package = folders if folders[0] == "cotune" else ("cotune", *folders)
    return ".".join(package[: len(package) - level + 1])


def room_of(name: str) -> str | None:
    """The folder that an imported name belongs to; None for other people's packages."""
    first, *rest = name.split(".")
    if first != "cotune":
        return None
    return rest[0] if rest and rest[0] in {*MAY_IMPORT, "errors"} else "cotune"


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in nodes(parsed(path)) if isinstance(node, ast.Call))


def built_in_errors(path: Path) -> list[int]:
    """Lines that raise an error of Python's own, or make a public class of one."""
    raises = (node for node in nodes(parsed(path)) if isinstance(node, ast.Raise))
    lines = [r.lineno for r in raises if isinstance(r.exc, ast.Call) and ast.unparse(r.exc.func) in BUILT_IN]
    classes = (node for node in nodes(parsed(path)) if isinstance(node, ast.ClassDef) and not node.name.startswith("_"))
    return lines + [c.lineno for c in classes if c.bases and ast.unparse(c.bases[0]) in BUILT_IN]


def weights_only(call: ast.Call) -> bool:
    return any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in call.keywords)


def build_wheel(folder: Path) -> Path:
    """Builds offline and outside the repository: a build/ folder there would feed deleted modules into the next one."""
    settings = folder / "build.cfg"
    settings.write_text(f"[build]\nbuild_base = {folder / 'build'}\n[egg_info]\negg_base = {folder}\n")
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", build, str(folder)]
    environment = {**os.environ, "DIST_EXTRA_CONFIG": str(settings)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))
