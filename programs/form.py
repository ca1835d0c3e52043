"""Forms: how the fields of a stage are asked for, written and read. A config selects one by `model.form`."""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from cotune.errors import BadValueError
from cotune.programs.layout import Field, Fixed, Layout, Schema
from cotune.programs.lm import Completion
from cotune.programs.prompt import Prompt
from cotune.programs.signature import Signature
from cotune.programs.types import Line, choices_of, syntax_of


class Unreadable(ValueError):  # noqa: N818 (users raise it as a statement about an answer)
    """What the LM wrote cannot be used. A program raises it where its own code finds that an answer is no answer: the
    run ends with score 0 and the reason, and is counted among the LM's failures, never as a fault of the program.

    For example: `raise Unreadable("the plan is no JSON")`.
    """


class ParseError(Unreadable):
    """A completion does not hold what the signature asks for. It ends its rollout with score 0, and is counted."""


class Form(ABC):
    """How a stage talks to the LM. Text of the data goes in by concatenation only: it is never itself a template.

    Engines in this process fill the layout in, so that what they complete can always be read. `parse` is for LMs that
    only give text. A form of one's own has a `layout` and says in `ask` what the LM should do; the rest follows.
    """

    missing = "(not given)"
    """What stands for an input or a demo's output that there is no value of."""

    shows_missing_reasoning = False
    """Whether a demo without reasoning shows that it is missing, as forms whose every field is asked for do."""

    def used(self, signature: Signature) -> Signature:
        """What of a signature the form asks for: all of it, unless it leaves the reasoning out."""
        return signature

    @abstractmethod
    def layout(self, signature: Signature) -> Layout:
        """The fixed texts and fields of a completion, every output once and in order."""

    def typed_layout(self, signature: Signature) -> Layout:
        """The layout that engines get: a field for which it names no syntax is held to its type.

        Raises:
            BadValueError: an output has no field, or two. A form that reads by itself may name them as it likes.
        """
        layout, outputs = tuple(self.layout(signature)), self.used(signature).outputs
        names = [part.name for part in layout if isinstance(part, Field)]
        reads_itself = type(self).read is not Form.read or type(self).parse is not Form.parse
        if not reads_itself and any(names.count(output) != 1 for output in outputs):
            raise BadValueError(
                f"the layout of {type(self).__name__} has the fields {', '.join(names) or 'none'}, but the outputs are "
                f"{', '.join(outputs)}; give each output one Field of its name."
            )
        return tuple(_typed(signature, part) if isinstance(part, Field) else part for part in layout)

    def ask(self, signature: Signature, prompt: Prompt) -> str:
        """The system's turn: the instruction, and what the fields' names do not say."""
        return "\n".join([prompt.instruction, *self.about(signature)])

    def about(self, signature: Signature) -> list[str]:
        """A line for each field that has a description or choices, the reasoning apart."""
        said = {name: hint(signature, name) for name in (*signature.inputs, *signature.outputs)}
        return [f"{name}: {text}" for name, text in said.items() if text and name != signature.reasoning]

    def render(self, signature: Signature, prompt: Prompt, inputs: Mapping[str, str]) -> list[dict[str, str]]:
        """The messages of one call, ending with the user's turn; demos are earlier turns of the chat."""
        turns = [{"role": "system", "content": self.ask(signature, prompt)}]
        for demo in prompt.demos:
            turns.append({"role": "user", "content": self.show(signature, demo.inputs)})
            turns.append({"role": "assistant", "content": self.write(signature, demo.outputs)})
        turns.append({"role": "user", "content": self.show(signature, inputs)})
        return turns

    def show(self, signature: Signature, inputs: Mapping[str, str]) -> str:
        """A user's turn: a line for each input."""
        return "\n".join(f"{name}: {inputs.get(name, self.missing)}" for name in signature.inputs)

    def write(self, signature: Signature, outputs: Mapping[str, str]) -> str:
        """The completion that holds these outputs: a demo's turn."""
        written: list[str] = []
        for part in self.layout(signature):
            if isinstance(part, Fixed):
                written.append(part.text)
            elif part.name in outputs or part.name != signature.reasoning or self.shows_missing_reasoning:
                written.append(part.lead + outputs.get(part.name, self.missing).strip())
        return "".join(written).lstrip("\n")

    def read(self, signature: Signature, completion: Completion) -> dict[str, str]:
        """Each output's text: by position where the engine filled the layout in, else found in the text.

        Raises:
            ParseError: an output is not there, or is no valid Unicode.
        """
        if completion.fields:
            return encodable({field.name: field.text.strip() for field in completion.fields})
        return encodable(self.parse(signature, completion.text))

    def parse(self, signature: Signature, text: str) -> dict[str, str]:
        """Each output's text, found by the fixed texts around it, whatever white space stands in these.

        Raises:
            ParseError: a fixed text is missing, or an output is empty.
        """
        found: dict[str, str] = {}
        rest, current = text, ""
        for part in self.layout(signature):
            if isinstance(part, Field):
                current, found[part.name] = part.name, rest.strip()
                continue
            mark = _fixed(part.text).search(rest)
            if mark is None:
                after_what = f' after "{current}"' if current else ""
                raise ParseError(f'the completion has no "{" ".join(part.text.split())}"{after_what}: {short(text)}')
            if current:
                found[current] = rest[: mark.start()].strip()
            rest = rest[mark.end() :]
        for name, value in found.items():
            if not value:
                raise ParseError(f'the completion has no "{name}": {short(text)}')
        return found

    def repair(self, signature: Signature, fault: str) -> str:
        """The user's turn that asks again for a completion which could not be read, and shows how it should look.

        Args:
            fault: what was wrong with it, in words.
        """
        shown = "".join(
            part.text if isinstance(part, Fixed) else f"{part.lead}({_wanted(signature, part)})"
            for part in self.typed_layout(signature)
        )
        why = fault.rstrip(".")
        return f"That cannot be read: {why}. Write the reply again in this form and with nothing else:\n\n{shown}"

    def unwritable(self, signature: Signature, outputs: Mapping[str, str]) -> str:
        """Why these outputs cannot be read back from what `write` makes of them; "" where they can.

        A text that holds what marks another field's beginning would be cut there by every reader, and one that holds a
        stop of its own field can be written by no LM. Outputs that are not given count as missing.
        """
        texts = {name: text.strip() for name, text in outputs.items()}
        for part in self.typed_layout(signature):
            if isinstance(part, Field) and any(stop in texts.get(part.name, "") for stop in part.stops):
                return f'"{part.name}" holds text that ends its field in this form: {short(texts[part.name])}'
        complete = {name: texts.get(name, self.missing) for name in signature.outputs}
        try:
            read = self.parse(signature, self.write(signature, complete))
        except ParseError as error:
            return str(error)
        wrong = [name for name, text in texts.items() if read[name] != text]
        return f'"{wrong[0]}" holds text that marks a field in this form: {short(texts[wrong[0]])}' if wrong else ""


class _Named(Form):
    """Fields begin with their names, at the start of a line."""

    def read(self, signature: Signature, completion: Completion) -> dict[str, str]:
        found = super().read(signature, completion)
        if completion.fields and isinstance(
            self.layout(signature)[0], Field
        ):  # no name is put there, and some LMs write it
            first = signature.outputs[0]
            if mark := _marker(first).match(found[first]):
                found[first] = found[first][mark.end() :]
        return found

    def parse(self, signature: Signature, text: str) -> dict[str, str]:
        return _split_at_markers(signature.outputs, text)

    def _lines(self, signature: Signature, names: Sequence[str], *, before: str) -> Iterator[Fixed | Field]:
        """A line for each of the last fields; `before` is what stands before the first."""
        for name, following in zip(names, [*names[1:], ""], strict=True):
            yield Fixed(f"{before}{name}:")
            stops = _marks(following) if following else _next_example(signature)
            yield _field(signature, name, lead=" ", stops=stops)
            before = "\n"


class ReasonThenFill(_Named):
    """Reasoning first, in the LM's own way; then each remaining field behind its name. The default.

    Nothing in the prompt talks of a format, since being asked for one takes small LMs out of their reasoning: the
    engine puts "name:" there when the LM has ended its turn, or has written it itself. A stage with one output and no
    reasoning gives the bare value.
    """

    def layout(self, signature: Signature) -> Layout:
        names = [name for name in signature.outputs if name != signature.reasoning]
        if len(signature.outputs) == 1:
            return (_field(signature, names[0], stops=_next_example(signature)),)
        if not signature.reasoning:
            return tuple(self._lines(signature, names, before=""))
        # With the blank line first: the stop that is found first should begin the fixed text that follows.
        stops = (*_marks(names[0], before="\n\n"), *_marks(names[0]))
        reasoning = _field(signature, signature.reasoning, stops=stops)
        return (reasoning, *self._lines(signature, names, before="\n\n"))


class Lines(_Named):
    """A field a line, `name: value`, and the prompt says so; a stage with one output gives the bare value.

    LMs that follow a format well do so with this one; smaller ones stop reasoning when asked for lines.
    """

    shows_missing_reasoning = True

    def ask(self, signature: Signature, prompt: Prompt) -> str:
        inputs = [f"{name}: {said}" for name in signature.inputs if (said := hint(signature, name))]
        if len(signature.outputs) == 1:
            (name,) = signature.outputs
            about = hint(signature, name)
            return "\n".join(
                [prompt.instruction, *inputs, f"Reply with the {name} only" + (f": {about}." if about else ".")]
            )
        outputs = [f"{name}: {hint(signature, name) or f'the {name}'}" for name in signature.outputs]
        return "\n".join([prompt.instruction, *inputs, "Reply with these lines:", *outputs])

    def layout(self, signature: Signature) -> Layout:
        if len(signature.outputs) == 1:
            return (_field(signature, signature.outputs[0], stops=_next_example(signature)),)
        return tuple(self._lines(signature, signature.outputs, before=""))


class Tags(Form):
    """Each field between XML tags: `<answer>value</answer>`, inputs too."""

    shows_missing_reasoning = True

    def ask(self, signature: Signature, prompt: Prompt) -> str:
        wanted = " ".join(f"<{name}>…</{name}>" for name in signature.outputs)
        return "\n".join([prompt.instruction, *self.about(signature), f"Reply with {wanted}."])

    def show(self, signature: Signature, inputs: Mapping[str, str]) -> str:
        return "\n".join(f"<{name}>{inputs.get(name, self.missing)}</{name}>" for name in signature.inputs)

    def layout(self, signature: Signature) -> Layout:
        parts: list[Fixed | Field] = []
        before = ""
        for name in signature.outputs:
            parts += [Fixed(f"{before}<{name}>"), _field(signature, name, stops=(f"</{name}>",))]
            before = f"</{name}>\n"
        return (*parts, Fixed(before.rstrip()))


class Markers(Form):
    """The markers of DSPy's chat format, `[[ ## answer ## ]]` before each field, for prompts that were made for it."""

    shows_missing_reasoning = True

    def ask(self, signature: Signature, prompt: Prompt) -> str:
        wanted = "\n\n".join(f"[[ ## {name} ## ]]\n(the {name})" for name in signature.outputs)
        form = f"Reply in this form:\n\n{wanted}\n\n[[ ## completed ## ]]"
        return "\n".join([prompt.instruction, *self.about(signature), "", form])

    def show(self, signature: Signature, inputs: Mapping[str, str]) -> str:
        return "\n\n".join(f"[[ ## {name} ## ]]\n{inputs.get(name, self.missing)}" for name in signature.inputs)

    def layout(self, signature: Signature) -> Layout:
        parts: list[Fixed | Field] = []
        for place, name in enumerate(signature.outputs):
            following = [*signature.outputs, "completed"][place + 1]
            before = "\n\n" if parts else ""
            parts.append(Fixed(f"{before}[[ ## {name} ## ]]"))
            parts.append(_field(signature, name, lead="\n", stops=(f"\n\n[[ ## {following}", "\n[[ ##")))
        return (*parts, Fixed("\n\n[[ ## completed ## ]]"))


def hint(signature: Signature, name: str) -> str:
    """What the LM is told of a field beside its name: its description, and its choices unless that names them all."""
    described = signature.descriptions.get(name, "")
    kind = signature.type_of(name)
    choices = tuple(choices_of(kind) or (("yes", "no") if kind is bool and name in signature.outputs else ()))
    if _names_all(described, choices):
        return described
    listed = "yes or no" if kind is bool else f"one of {', '.join(choices)}"
    return f"{described} ({listed})" if described else listed


@functools.cache
def _names_all(described: str, choices: Sequence[str]) -> bool:
    return all(re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", described, re.IGNORECASE) for choice in choices)


def encodable(texts: dict[str, str]) -> dict[str, str]:
    """The outputs' texts as they are.

    Raises:
        ParseError: one has half a surrogate pair, as an escape in JSON may be: no file or tokenizer takes it.
    """
    for name, text in texts.items():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ParseError(f'"{name}" has half a surrogate pair at character {error.start}: {short(text)}') from None
    return texts


def _field(signature: Signature, name: str, *, lead: str = "", stops: Sequence[str] = ()) -> Field:
    return _typed(signature, Field(name, lead=lead, stops=tuple(stops)))


def _typed(signature: Signature, field: Field) -> Field:
    """The field with what its type allows; a syntax of its own stays."""
    if field.syntax is not None:
        return field
    kind = signature.type_of(field.name)
    line = ("\n",) if kind is Line and "\n" not in field.stops else ()
    return replace(field, stops=(*line, *field.stops), syntax=syntax_of(kind))


def _wanted(signature: Signature, field: Field) -> str:
    """What belongs in a field, as a repair's request shows it."""
    if isinstance(field.syntax, Schema):
        return f"JSON of the schema {field.syntax.json}"
    return (hint(signature, field.name) if field.name in signature.outputs else "") or f"the {field.name}"


@functools.cache
def _fixed(text: str) -> re.Pattern[str]:
    """A fixed text with any white space, or none, where it has some: LMs write more or less than they are shown."""
    return re.compile(r"\s*".join(map(re.escape, text.split())))


def _marks(name: str, before: str = "\n") -> tuple[str, ...]:
    """How LMs begin the line of a field: its name, as it is or in words, plain or in bold."""
    words = name.replace("_", " ")
    texts = dict.fromkeys((name, name.capitalize(), words.capitalize(), words.title()))
    return tuple(f"{before}{bold}{text}:" for bold in ("", "**") for text in texts)


def _next_example(signature: Signature) -> tuple[str, ...]:
    # An LM that goes on after its last field begins to invent the next example: its first line is an input field's.
    return tuple(f"\n{name}:" for name in signature.inputs)


@functools.cache
def _marker(name: str) -> re.Pattern[str]:
    words = re.escape(name).replace("_", "[ _]")  # "Final Answer:" is how LMs write final_answer
    return re.compile(rf"^[ \t*#]*{words}[ \t*]*:[ \t*]*", re.IGNORECASE | re.MULTILINE)


def _split_at_markers(names: Sequence[str], text: str) -> dict[str, str]:
    """Field -> text after its marker. Markers count at the start of a line, in the order of the fields, once each, in
    any letter case; text before the first marker belongs to the first field.

    Raises:
        ParseError: a field is missing or empty.
    """
    found: dict[str, str] = {}
    current, start, position = names[0], 0, 0
    for index, name in enumerate(names):
        match = _marker(name).search(text, position)
        if match is None:
            continue
        if index > 0:
            found[current] = text[start : match.start()].strip()
        current, start, position = name, match.end(), match.end()
    found[current] = text[start:].strip()
    for name in names:
        if not found.get(name):
            raise ParseError(f'the completion has no "{name}": {short(text)}')
    return {name: found[name] for name in names}


def short(text: str, limit: int = 80) -> str:
    """A text as an error shows it: quoted, on one line, cut."""
    shown = text.strip().replace("\n", "\\n")
    return repr(shown if len(shown) <= limit else shown[: limit - 1] + "…")
