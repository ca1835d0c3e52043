"""Templates: a signature, a prompt and inputs become chat messages; a completion becomes output fields."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from cotune.programs.prompt import Demo, Prompt
from cotune.programs.signature import Signature

Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""


class ParseError(ValueError):
    """A completion does not hold what the signature asks for. It ends its rollout with score 0, and is counted."""


class Template(Protocol):
    """How a stage talks to the LM. Text of the data goes in by concatenation only: it is never itself a template."""

    def render(self, signature: Signature, prompt: Prompt, inputs: Mapping[str, str]) -> list[dict[str, str]]:
        """The messages of one call, ending with the user's turn."""
        ...

    def complete(self, signature: Signature, outputs: Mapping[str, str]) -> str:
        """The completion that `parse` reads as `outputs`: a demo's assistant turn."""
        ...

    def parse(self, signature: Signature, text: str) -> dict[str, str]:
        """The output fields in a completion.

        Raises:
            ParseError: an output field is missing or empty.
        """
        ...

    def stops(self, signature: Signature) -> tuple[str, ...]:
        """Strings at which generation may end, because nothing after them is wanted."""
        ...


class ChatTemplate:
    """A field a line, `name: value`; demos as earlier turns of the chat. The default.

    Small models hold a format best when there is little of it. With one output field the completion is the bare value;
    with several, each stands behind its name. `parse` reads either, in any letter case, and takes what a small model
    leaves out at the front: text before the first marker belongs to the first field.
    """

    missing = "(not given)"

    def render(self, signature: Signature, prompt: Prompt, inputs: Mapping[str, str]) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": self._system(signature, prompt)}]
        for demo in prompt.demos:
            messages.append({"role": "user", "content": _lines(signature.inputs, demo.inputs, self.missing)})
            messages.append({"role": "assistant", "content": self._demo(signature, demo)})
        messages.append({"role": "user", "content": _lines(signature.inputs, inputs, self.missing)})
        return messages

    def complete(self, signature: Signature, outputs: Mapping[str, str]) -> str:
        if len(signature.outputs) == 1:
            return outputs.get(signature.outputs[0], self.missing)
        return _lines(signature.outputs, outputs, self.missing)

    def parse(self, signature: Signature, text: str) -> dict[str, str]:
        found = _split_at_markers(signature.outputs, text)
        for name in signature.outputs:
            if not found.get(name):
                raise ParseError(f'the completion has no "{name}": {_short(text)}')
        return {name: found[name] for name in signature.outputs}

    def stops(self, signature: Signature) -> tuple[str, ...]:
        # A model that goes on after its answer begins to invent the next example: its first line is an input field's.
        return tuple(f"\n{name}:" for name in signature.inputs)

    def _system(self, signature: Signature, prompt: Prompt) -> str:
        lines = [prompt.instruction]
        lines += [
            f"{name}: {signature.descriptions[name]}" for name in signature.inputs if name in signature.descriptions
        ]
        if len(signature.outputs) == 1:
            (name,) = signature.outputs
            about = signature.descriptions.get(name)
            lines.append(f"Reply with the {name} only" + (f": {about}." if about else "."))
        else:
            lines.append("Reply with these lines:")
            lines += [f"{name}: {signature.descriptions.get(name, f'the {name}')}" for name in signature.outputs]
        return "\n".join(lines)

    def _demo(self, signature: Signature, demo: Demo) -> str:
        return self.complete(signature, demo.outputs)


def _lines(names: Sequence[str], values: Mapping[str, str], missing: str) -> str:
    return "\n".join(f"{name}: {values.get(name, missing)}" for name in names)


def _split_at_markers(names: Sequence[str], text: str) -> dict[str, str]:
    """Field -> text after its marker. Markers count at the start of a line, in the order of the fields, once each."""
    found: dict[str, str] = {}
    current, start, position = names[0], 0, 0
    for index, name in enumerate(names):
        marker = re.compile(rf"^[ \t*#]*{re.escape(name)}[ \t*]*:[ \t*]*", re.IGNORECASE | re.MULTILINE)
        match = marker.search(text, position)
        if match is None:
            continue
        if index > 0:
            found[current] = text[start : match.start()].strip()
        current, start, position = name, match.end(), match.end()
    found[current] = text[start:].strip()
    return found


def _short(text: str, limit: int = 80) -> str:
    shown = text.strip().replace("\n", "\\n")
    return repr(shown if len(shown) <= limit else shown[: limit - 1] + "…")
