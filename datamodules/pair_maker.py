"""PairMaker: traces as training pairs, in the ids of the LM that is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cotune.datamodules.collate import Pair
from cotune.datamodules.encode import Vocabulary
from cotune.datamodules.trace import Trace
from cotune.errors import BadValueError
from cotune.programs import Demo, FieldTypeError, Form, Program, Prompts, hide_own_demos
from cotune.programs.demos import canonical
from cotune.programs.forms import form_of

Encode = Callable[[Sequence[Mapping[str, str]]], list[int]]


@dataclass(frozen=True)
class PairMaker:
    """Makes training pairs of traces: renders a stage's prompt, encodes it, and adds the ids that were written.

    A trace of another tokenizer's LM, or one without ids, is trained on as its outputs in this form and this LM's ids,
    values as their types write them.

    Args:
        prompts: what stands in the pairs.
        encode: messages -> prompt ids.
        end_id: token that ends a turn; appended to a completion that ended at a stop string.
        window: longest pair, in tokens.
        vocabulary: of the LM that is trained; one without a name takes all ids for its own.
    """

    program: Program
    form: Form
    prompts: Prompts
    encode: Encode
    end_id: int
    window: int
    vocabulary: Vocabulary = field(default_factory=Vocabulary)

    def pair(self, trace: Trace, demos: Sequence[Demo] | None = None) -> Pair:
        """The pair of a trace, with these demos instead of the prompt's own where any are given.

        Never with a demo of the trace's own example: it would teach to copy the answer.

        Raises:
            ValueError: another tokenizer's ids have weights of their own, which a text cannot keep; or what it wrote is
                no value of its field's type.
        """
        signature = self.program.stages[trace.stage].signature
        prompt = hide_own_demos(self.prompts, trace.example)[trace.stage]
        if demos:
            prompt = replace(prompt, demos=tuple(demos))
        trace = self.own(trace)
        end = [] if trace.complete else [self.end_id]
        return Pair(
            self.encode(form_of(self.form, prompt).render(signature, prompt, trace.inputs)),
            [*trace.completion_ids, *end],
            name=_name(trace),
            # The end of the turn that is appended weighs as the token before it in cross-entropy. Nobody chose it, so
            # where choices are judged it has no part.
            ce=trace.ce and [*trace.ce, *trace.ce[-len(end) :][: len(end)]],
            pg=trace.pg and [*trace.pg, *(0.0 for _ in end)],
            kl=trace.kl and [*trace.kl, *(0.0 for _ in end)],
            candidates=trace.candidates and [*trace.candidates, *((-1,) * len(trace.candidates[0]) for _ in end)],
            reference=trace.reference and [*trace.reference, *((0.0,) * len(trace.reference[0]) for _ in end)],
            sampled=trace.sampled and [*trace.sampled, *(0.0 for _ in end)],
            group=trace.group,
            desirable=trace.desirable,
        )

    def fits(self, pair: Pair) -> bool:
        return len(pair.prompt_ids) + len(pair.completion_ids) <= self.window

    def own(self, trace: Trace) -> Trace:
        """The trace in this LM's ids: one that is foreign as this LM would write it."""
        return self._translated(trace) if self.is_foreign(trace) else trace

    def unwritable(self, trace: Trace) -> str:
        """Why the form cannot write a trace's outputs so that they are read back; "" where it can."""
        form = form_of(self.form, self.prompts[trace.stage])
        return form.unwritable(self.program.stages[trace.stage].signature, trace.outputs)

    def is_foreign(self, trace: Trace) -> bool:
        """Whether a trace's ids mean something else to this LM than what was written.

        A trace that does not say whose its ids are is read with this LM's tokenizer, and its text compared.
        """
        own = self.vocabulary
        if not own.tokenizer:
            return False
        if trace.tokenizer or not trace.completion_ids:
            return trace.tokenizer != own.tokenizer
        written = own.decode(trace.completion_ids)
        return not written.strip().startswith(trace.completion.strip())

    def _translated(self, trace: Trace) -> Trace:
        """The trace as this LM would write it: its outputs in this run's form, in this LM's ids."""
        if trace.ce is not None or trace.pg or trace.kl or trace.candidates:
            raise BadValueError(
                f'{_name(trace)}: it has weights for tokens of another tokenizer ("{trace.base or "unknown"}"), '
                "which do not fit this LM's tokens. Collect with this LM: leave data.traces out."
            )
        signature = self.program.stages[trace.stage].signature
        try:
            outputs = canonical(signature, trace.outputs)
        except FieldTypeError as error:
            raise BadValueError(
                f"{_name(trace)}: {error} This program cannot learn to write it. Give data.traces of a program with "
                "the same types, or remove the trace."
            ) from None
        text = form_of(self.form, self.prompts[trace.stage]).write(signature, outputs)
        return replace(
            trace,
            outputs=outputs,
            completion=text,
            completion_ids=self.vocabulary.encode(text),
            complete=False,
            forced=(),
            sampled=(),
            tokenizer=self.vocabulary.tokenizer,
        )


def _name(trace: Trace) -> str:
    return f'"{trace.example}" (stage {trace.stage})'
