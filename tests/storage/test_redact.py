"""Claims about secrets: keys are taken out wherever they stand, and the program's fields may have any name."""

from __future__ import annotations

from typing import Any

import pytest
from cotune.storage.redact import redacted, redacted_text
from cotune.storage.run_identity import counted_options

TAGS: dict[str, Any] = {
    "model": {
        "lm": {"init_args": {"model": "m", "api_key": "a-key-of-the-lm"}},
        "program": {
            "init_args": {
                "signature": "sentence, token -> contains_secret",
                "descriptions": {"token": "the word to be tagged", "password": "as it was typed"},
                "types": {"contains_secret": "bool"},
                "retriever": {"init_args": {"token": "a-key-of-the-retriever"}},
            }
        },
    },
    "data": {"init_args": {"path": "word_form.csv", "inputs": {"token": "word_form"}, "labels": {"secret": "leaks"}}},
}
CANARIES = ("a-key-of-the-lm", "a-key-of-the-retriever")


@pytest.mark.parametrize("part", [TAGS, TAGS["model"]])
def test_fields_called_token_or_password_are_written_as_they_are_and_keys_are_not(part: dict[str, Any]) -> None:
    written = repr(redacted(part))
    assert not [canary for canary in CANARIES if canary in written]
    assert written == repr(part).replace(CANARIES[0], "***").replace(CANARIES[1], "***")


def test_such_fields_make_another_run_and_keys_do_not() -> None:
    counted = counted_options(TAGS)
    assert counted["data.init_args.inputs.token"] == "word_form"
    assert counted["model.program.init_args.types.contains_secret"] == "bool"
    assert not set(CANARIES) & set(map(str, counted.values()))


def test_a_command_line_keeps_fields_and_loses_keys() -> None:
    words = "--data.inputs.token word_form --data.token=hidden-1 --model.lm.api_key hidden-2"
    assert redacted_text(words) == "--data.inputs.token word_form --data.token=*** --model.lm.api_key ***"
