"""Config files that are wrong, or mean other than they seem: the file, the line, the value and the fix."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cotune.fit.config_files import ConfigFileError, check_config_files

GOOD = "name: t\nmodel:\n  program:\n    init_args: {signature: 'a, b -> c', instruction: Name it.}\n"


def said(folder: Path, content: str | bytes) -> str:
    path = folder / "t.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigFileError) as error:
        check_config_files(["fit", "--config", str(path)])
    return str(error.value).replace(str(path), "t.yaml")


def test_a_good_file_passes_and_one_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(GOOD + "data: {labels: [a], path: null, sizes: {train: 1}}\n")
    words = ["fit", "--config", str(tmp_path / "t.yaml"), "-c"]
    check_config_files([*words, "name: options", "--fresh"])
    with pytest.raises(ConfigFileError, match=r"none.yaml\": there is no such file\.$"):
        check_config_files([*words, str(tmp_path / "none.yaml"), "--fresh"])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"name: t\nx: f\xfcr\n", 't.yaml" is not UTF-8: byte 12, on line 2, is 0xfc'),
        (GOOD.replace("'a, b -> c'", "a, b -> c"), "line 4: 'b -> c' reads as a key.*signature: \"a, b -> c\""),
        (GOOD.replace("Name it.", "Name it, now"), 'instruction: "Name it, now"'),
        (GOOD.replace("Name it.", "Name it: now"), "line 4 is not YAML"),
        (GOOD + "seed: @5\n", "line 5 is not YAML.*needs quotes"),
        (GOOD + "name: u\n", "'name' is on line 1 and again on line 5"),
        (GOOD + "\tx: 1\n", "line 5 is not YAML.*no tabs"),
        (GOOD + "x: [1, 2\n", "is not YAML.*bracket"),
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- a\n", "holds a list"),
        ("text\n", "holds the text 'text'"),
        ("x: \x01\n", "special characters are not allowed"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: str | bytes, expected: str) -> None:
    message = said(tmp_path, content)
    assert re.search(expected, message), message
    assert "\n" not in message


def test_an_option_before_a_file_that_sets_it_too_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("name: a\ndata: {class_path: Iris, init_args: {sizes: {train: 5}}}\n")
    for early in (
        ["--name", "b"],
        ["--data", "Table"],
        ["--data.init_args.sizes.train=9"],
        ["--data.sizes.train", "9"],
    ):
        with pytest.raises(ConfigFileError, match=f"{early[0].partition('=')[0]} stands before --config .*a.yaml"):
            check_config_files(["fit", *early, "--config", str(path)])
        check_config_files(["fit", "--config", str(path), *early])
    check_config_files(["fit", "--seed_everything", "3", "--data.sizes.val", "9", "--config", str(path)])


def test_every_file_that_the_command_line_names_is_looked_at(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_bytes(b"\xff")
    for words in ([f"--config={bad}"], ["-c", str(bad)], ["--data", str(bad)], [f"--model.lm={bad}"]):
        with pytest.raises(ConfigFileError, match="not UTF-8"):
            check_config_files(["fit", *words])
    with pytest.raises(ConfigFileError, match="is a folder"):
        check_config_files(["fit", "--config", str(tmp_path)])
