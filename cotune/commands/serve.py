"""cotune serve: a tuned program behind an OpenAI-compatible address, on vLLM or in this process."""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import shutil
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line is parsed before anything heavy is imported
    from cotune.inference.vllm import VLLMServer


_LAST_PORT = 65535


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        "cotune serve",
        allow_abbrev=False,
        description="Answers a tuned program's inputs over HTTP, as chat completions. The user's message is the JSON "
        "of the inputs, or plain text if there is only one input; the answer is the JSON of the outputs.",
        epilog="After SIGTERM or Ctrl-C it answers pending requests, stops vLLM and exits with 0; 2 is an error that "
        "the message explains.",
    )
    made.add_argument("run", metavar="FOLDER", help="a run or what it exported, e.g. runs/iris")
    made.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    made.add_argument("--port", type=int, default=8080, help="default: 8080; 0: any free port")
    made.add_argument("--name", help="model name of the program (default: the name of the run's folder)")
    made.add_argument(
        "--key_variable", metavar="NAME", default="", help="environment variable with the key that requests must send"
    )
    made.add_argument(
        "--engine",
        choices=("vllm", "local"),
        help="what completes prompts: vllm, or local (this process); default: vllm if it is found, else local",
    )
    made.add_argument(
        "--python", default="", metavar="FILE", help="Python of an environment with vLLM, which starts vLLM"
    )
    made.add_argument("--vllm-options", default="", metavar="WORDS", help='more options of vLLM: "--max-num-seqs 64"')
    made.add_argument(
        "--url",
        action="append",
        default=[],
        metavar="URL",
        help="a vLLM server that is already running; may be repeated",
    )
    made.add_argument(
        "--tolerance", type=float, default=0.1, help="how far vLLM's log-probabilities may be off, in nats"
    )
    made.add_argument("--device", help="device on which this process loads the LM (default: cpu if vLLM answers)")
    made.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the base model")
    return made


def main(options: argparse.Namespace) -> int:
    """Runs the command, until a signal.

    Raises:
        BadValueError: the address cannot be had, or options contradict each other.
        ExportError, VLLMError: the export cannot be loaded, or vLLM does not serve it.
    """
    from cotune.errors import BadValueError

    if not 0 <= options.port <= _LAST_PORT:
        raise BadValueError(f"--port {options.port} is no port; give one of 1 to {_LAST_PORT}, or 0 for any free one.")
    from cotune.front import Front
    from cotune.tuned import export_folder, load

    folder = export_folder(options.run)
    key = os.environ.get(options.key_variable, "") if options.key_variable else ""
    if options.key_variable and not key:
        raise BadValueError(f"--key_variable {options.key_variable}: this environment variable is not set.")
    engine, name = _engine(options), options.name or _name(folder)
    stopped = threading.Event()
    try:
        front = Front(options.host, options.port, name=name, key=key)
    except (OSError, UnicodeError) as error:  # a name that is too long for one is a UnicodeError
        why = getattr(error, "strerror", None) or str(error)
        no_port = isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EADDRINUSE
        fix = "another --port" if no_port else "a --host that is an address of this machine, e.g. 127.0.0.1"
        raise BadValueError(f"cannot listen on {options.host}:{options.port} ({why}); give {fix}.") from error
    try:
        given: dict[str, Any] = {"device": options.device or ("cpu" if engine else None)}
        given["trust_remote_code"] = options.trust_remote_code
        front.give(load(folder, engine=engine, **given))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopped.set())
        by = f"vLLM at {', '.join(engine.urls)}" if engine else "this process"
        print(f'"{name}" answers at http://{options.host}:{front.server_port}/v1, by {by}', flush=True)
        if options.host not in ("127.0.0.1", "localhost") and not key:
            print("Anyone who reaches this machine can ask it; --key_variable asks for a key.", flush=True)
        stopped.wait()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # a second one does not wait
        front.end()
    finally:
        front.server_close()
        if engine is not None:
            engine.close()
    return 0


def _engine(options: argparse.Namespace) -> VLLMServer | None:
    """What was asked for, or is there; None for the decoder in this process."""
    from cotune.errors import BadValueError

    python = options.python
    if not (python or options.url or options.engine == "local") and (command := shutil.which("vllm")):
        python = str(Path(command).resolve().with_name("python"))
    if options.engine == "local" and (options.python or options.url):
        raise BadValueError("--engine local takes neither --python nor --url.")
    if not (python or options.url):
        if options.engine == "vllm":
            raise BadValueError("there is no command vllm here: give --python of its environment, or a server's --url.")
        return None
    from cotune.inference.vllm import VLLMServer

    words = shlex.split(options.vllm_options)
    return VLLMServer(options.url, python=python, options=words, tolerance=options.tolerance)


def _name(export: Path) -> str:
    """Of the run that an export is from, or of its own folder."""
    export = export.resolve()
    return export.parent.name if export.name == "export" else export.name
