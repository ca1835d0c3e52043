"""Programs: ordinary Python that yields what it wants from the LM."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

from cotune.errors import CotuneError, WrongTypeError
from cotune.programs.layout import Choices
from cotune.programs.prompt import Prompt, Prompts
from cotune.programs.signature import Signature
from cotune.programs.types import as_text, syntax_of

if TYPE_CHECKING:
    from cotune.programs.form import Form
    from cotune.programs.lm import LM, Sampling

Outputs = Mapping[str, Any]
"""What a stage call gives back: output field -> value, text where the signature names no other type."""


_NAMED = "A stage is named by the attribute of the program that it is assigned to, one each: self.hop_1 = Stage(...)."


class StageError(CotuneError, TypeError):
    """Stages of a program stand where they have no name, or a second one."""


@dataclass(frozen=True)
class Call:
    """A wish of a program: run this stage on these inputs. `yield` it, and the typed outputs come back."""

    stage: str
    inputs: Mapping[str, str]
    scores: bool = False

    # Asked for an output before it was yielded: only these four, so that a call is in all else a plain value.

    def __getitem__(self, name: str) -> NoReturn:
        raise self.not_yielded()

    def __format__(self, spec: str) -> NoReturn:
        raise self.not_yielded()

    def keys(self) -> NoReturn:
        """What `{**call}` asks for."""
        raise self.not_yielded()

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(name if name.startswith("_") else str(self.not_yielded()))

    def not_yielded(self) -> StageError:
        """That this call stands where its outputs should."""
        return StageError(
            f'the call of stage "{self.stage}" has no outputs before it is yielded. Write: outputs = yield '
            f"self.{self.stage}(...)"
        )


class NamedValues(dict[str, Any]):
    """Values by name that are attributes too: `found["city"]`, or `found.city` where dicts have no method of that name.

    >>> NamedValues(city="Oslo").city
    'Oslo'
    """

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(self._without(name))

    def __missing__(self, name: str) -> NoReturn:
        raise KeyError(self._without(name))

    def _without(self, name: str) -> str:
        return f'there is no value "{name}"; there are {", ".join(self) or "none"}'


@dataclass(frozen=True)
class Stage:
    """One kind of LM call of a program. Its name, the attribute it is assigned to, is its identity.

    The signature may be given in its short form, or as a class body (`Signature.of`). With `scores` the outputs hold
    "scores", too: field -> choice -> log-probability of the choice (see `Completion.scores`), for the fields that have
    choices. It needs an LM in this process, and a form with a place for each field, which JSON is not.

    >>> class Echo(Program):
    ...     say = Stage("text -> answer")
    ...     def run(self, text):
    ...         return (yield self.say(text=text))
    >>> Echo().say(text="hello")
    Call(stage='say', inputs={'text': 'hello'}, scores=False)
    """

    signature: Signature
    name: str = ""
    scores: bool = False

    def __init__(self, signature: Signature | str | type, name: str = "", scores: bool = False) -> None:
        if isinstance(signature, str):
            signature = Signature.parse(signature)
        elif not isinstance(signature, Signature):
            signature = Signature.of(signature)
        object.__setattr__(self, "signature", signature)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "scores", scores)
        if scores and "scores" in signature.outputs:
            raise ValueError(f'the stage {signature} has a field "scores", and scores=True adds one; rename the field.')
        if scores and not any(isinstance(syntax_of(signature.type_of(name)), Choices) for name in signature.outputs):
            raise ValueError(f"scores=True: no output of {signature} has choices; give one the type Literal[...].")

    def __set_name__(self, owner: type, name: str) -> None:
        if self.name and self.name != name:
            raise StageError(
                f'{owner.__name__}.{name} is the stage already named "{self.name}"; create one Stage per attribute.'
            )
        object.__setattr__(self, "name", name)

    def __call__(self, *unnamed: NoReturn, **inputs: Any) -> Call:
        """A call of this stage. Values become text: see `Signature.shown`.

        Raises:
            TypeError: a field is missing, unknown or given without its name, or the stage has no name.
        """
        if not self.name:
            raise StageError(f"the stage {self.signature} has no name. {_NAMED}")
        if unnamed:
            raise StageError(f"inputs are given by name. Write: {self.as_called()}")
        expected = self.signature.inputs
        missing = [name for name in expected if name not in inputs]
        unknown = [name for name in inputs if name not in expected]
        if missing or unknown:
            message = f'misses "{missing[0]}"' if missing else f'does not take "{unknown[0]}"'
            raise TypeError(f'stage "{self.name}" {message}; its inputs are {", ".join(expected) or "none"}.')
        for value in inputs.values():
            if isinstance(value, Call):
                raise value.not_yielded()
        return Call(self.name, {name: self.signature.shown(name, inputs[name]) for name in expected}, self.scores)

    def as_called(self) -> str:
        """How a call of it is written in `run`."""
        return f"yield self.{self.name}({', '.join(f'{name}=...' for name in self.signature.inputs)})"


class Program(ABC):
    """Base class of LM programs: stages as attributes, and `run`, a generator of stage calls.

    Attributes:
        max_calls: LM calls after which a run is broken off and counted as a fault, so that a loop that never ends does
            not hold up all examples. A program that needs more sets its own.
    """

    max_calls: int = 100

    @abstractmethod
    def run(self, *args: Any, **inputs: Any) -> Generator[Call, Outputs, Mapping[str, Any]]:
        """Yields `Call`s, is sent each one's outputs, and returns the prediction: a mapping of named values.

        It is called with the example's inputs as keyword arguments. (`*args` only tells type checkers that a subclass
        may name its own: `def run(self, question: str)`.)
        """

    def __call__(
        self,
        *unnamed: NoReturn,
        lm: LM,
        prompts: Prompts | None = None,
        form: Form | None = None,
        sampling: Sampling | None = None,
        **inputs: Any,
    ) -> NamedValues:
        """Runs the program once, tuned by nothing: `Predict("question -> answer")(question="…", lm=LanguageModel())`.

        Args:
            lm: anything with `complete`.
            prompts: of its stages; without them each stage has its instruction and no demos.
            form, sampling: as in `ProgramModule`.
            inputs: arguments of `run`.

        Raises:
            PredictionError: a completion could not be read, or the program raised.
            WrongTypeError: an input is given without its name.
        """
        if unnamed:
            raise WrongTypeError("pass the inputs of run() by name, e.g. program(question=..., lm=...).")
        from cotune.programs.example import Example
        from cotune.programs.form import ReasonThenFill
        from cotune.programs.lm import Sampling
        from cotune.programs.runner import Runner

        runner = Runner(self, lm, form or ReasonThenFill(), None, sampling or Sampling(), max_error_rate=1.0)
        return runner.run([Example.of(inputs, {})], prompts or self.initial_prompts())[0].answer

    def __setattr__(self, name: str, value: Any) -> None:
        # A stage made in __init__ gets its name here, as __set_name__ gives it to one in the class body.
        if isinstance(value, Stage):
            value = replace(value, name=value.name or name)
        super().__setattr__(name, value)

    @property
    def stages(self) -> dict[str, Stage]:
        """Stages by name, those of base classes first.

        Raises:
            StageError: the program has no stage, a stage stands under a second name, or stands where it has none.
        """
        found: dict[str, Stage] = {}
        for attributes in [vars(cls) for cls in reversed(type(self).__mro__)] + [vars(self)]:
            for attribute, value in attributes.items():
                if isinstance(value, Stage):
                    if value.name != attribute:
                        raise StageError(f'stage "{value.name}" has a second name, "{attribute}"; assign it once.')
                    found[attribute] = value
                elif where := _hidden(value):
                    raise StageError(f"{type(self).__name__}.{attribute}: stages in {where} have no name. {_NAMED}")
        if not found:
            raise StageError(f"{type(self).__name__} has no stages; assign a Stage to an attribute of it.")
        return found

    def initial_prompts(self) -> dict[str, Prompt]:
        """The zero-shot prompts that every schedule starts from: each signature's own instruction, no demos."""
        return {name: Prompt(stage.signature.instruction) for name, stage in self.stages.items()}


def _hidden(value: Any) -> str:
    """What an attribute is that holds stages where a program does not look for them; "" for any other."""
    if isinstance(value, Program):
        return "another program"
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
    nameless = (isinstance(item, Program) or (isinstance(item, Stage) and not item.name) for item in items)
    return f"a {type(value).__name__}" if any(nameless) else ""


__all__ = ["Call", "Outputs", "Program", "Stage", "as_text"]
