"""Prompt files of the field: what is read, and what is refused with the line it stands on."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from conftest import ROOT

from erase_diffusion.errors import DataError
from erase_diffusion.prompts_file import MAX_SEED, read_prompts

SHARED = ROOT.parent / "shared" / "data" / "prompts"
HEADER = "case_number,prompt,evaluation_seed\n"


def read(tmp_path: Path, text: str | bytes, name: str = "prompts.csv"):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_prompts(path)


def test_the_columns_of_the_field(tmp_path: Path) -> None:
    text = "case_number,prompt,class,artist,evaluation_seed,evaluation_guidance,note\n"
    text += '7,"a cat, sitting",cat,,42,3.5,first\n8,a church,,Vincent van Gogh,43,,\n'
    first, second = read(tmp_path, text).prompts
    assert (first.case, first.text, first.label, first.seed, first.guidance) == ("7", "a cat, sitting", "cat", 42, 3.5)
    assert first.other == {"note": "first"} and first.artist is None
    assert (second.artist, second.guidance, second.label) == ("Vincent van Gogh", None, None)


def test_bom_crlf_quotes_newlines_and_other_encodings(tmp_path: Path) -> None:
    text = 'case_number,prompt,evaluation_seed\r\n1,"two\r\nlines and ""quotes""",5\r\n\r\n2,café,6\r\n'
    for data in (text.encode("utf-8-sig"), text.encode(), text.encode("utf-16")):
        prompts = read(tmp_path, data).prompts
        assert [p.text.replace("\r", "") for p in prompts] == ['two\nlines and "quotes"', "café"]
        assert [p.seed for p in prompts] == [5, 6]


def test_prompts_without_a_seed_get_one_of_their_case(tmp_path: Path) -> None:
    file = read(tmp_path, "case_number,prompt\n1,a cat\n2,a cat\n")
    assert file.unseeded == 2
    assert file.prompts[0].seed != file.prompts[1].seed
    swapped = read(tmp_path, "case_number,prompt\n2,a cat\n1,a cat\n").prompts
    assert {p.case: p.seed for p in swapped} == {p.case: p.seed for p in file.prompts}


def test_json_lines_and_plain_text(tmp_path: Path) -> None:
    lines = [{"prompt": "a cat", "seed": 3, "class": "cat"}, {"case_number": "x", "prompt": "a dog", "tags": [1]}]
    first, second = read(tmp_path, "\n".join(map(json.dumps, lines)), "prompts.jsonl").prompts
    assert (first.seed, first.label, second.case, second.other) == (3, "cat", "x", {"tags": "[1]"})
    assert [p.text for p in read(tmp_path, "a cat\n\n  a dog \n", "prompts.txt").prompts] == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        (HEADER + "1,a cat, sitting,5\n", 2, "4 cells"),
        (HEADER + "1,a cat,5\n2,a dog\n", 3, "2 cells"),
        (HEADER + '1,"a\ncat",5\n2,a,b,c\n', 4, "4 cells"),
        (HEADER + '1,"never closed,5\n', 2, "end of data"),
        ("case_number,seed\n1,5\n", 1, "no column prompt"),
        ("prompt,prompt\na,b\n", 1, "twice"),
        (HEADER + "1,a cat,5\n1,a dog,6\n", 3, "on line 2"),
        (HEADER + "1,,5\n", 2, "empty"),
        (HEADER + f"1,a cat,{MAX_SEED + 1}\n", 2, "2^64"),
        (HEADER + "1,a cat,-1\n", 2, "2^64"),
        (HEADER + "1,a cat,1e3\n", 2, "2^64"),
        (HEADER + "1,a cat," + "9" * 5000 + "\n", 2, "2^64"),
        ("prompt,evaluation_guidance\na cat,nan\n", 2, "guidance"),
        (HEADER + "1,a\0cat,5\n", 2, "NUL"),
        ((HEADER + "1,caf").encode() + b"\xe9,5\n", 2, "UTF-8"),
        (HEADER + "1," + "x" * 200_000 + ",5\n", 2, "longer"),
        (HEADER + "c" * 300 + ",a cat,5\n", 2, "300 characters"),
    ],
)
def test_refused_with_the_line(tmp_path: Path, text: str | bytes, line: int, says: str) -> None:
    with pytest.raises(DataError, match=rf"line {line}: .*{re.escape(says)}"):
        read(tmp_path, text)


@pytest.mark.parametrize("text", ["", "\n\n", HEADER])
def test_a_file_without_prompts_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="no prompt"):
        read(tmp_path, text)


def test_json_that_is_none_is_refused(tmp_path: Path) -> None:
    half = '{"prompt": "half a pair ' + chr(92) + 'ud83d"}'
    for text in ("{", "[1]", half, '{"prompt": ["a cat"]}', '{"text": 3, "seed": ' + "[" * 100_000, '{"seed": 1}'):
        with pytest.raises(DataError, match="line 1"):
            read(tmp_path, text, "prompts.jsonl")


def test_a_line_without_end_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    with path.open("wb") as file:
        file.write(HEADER.encode())
        file.write(b"x" * 100_000_000)
    started = time.perf_counter()
    with pytest.raises(DataError, match="line 2"):
        read_prompts(path)
    assert time.perf_counter() - started < 5  # it reads no more of the line than it would take


@pytest.mark.skipif(not SHARED.exists(), reason="the field's prompt files are not here")
def test_real_prompt_files() -> None:
    files = sorted(SHARED.glob("*.csv"))
    assert files
    for path in files:
        file = read_prompts(path)
        assert len(file.prompts) == len(path.read_text().splitlines()) - 1
        assert file.unseeded == 0
    paintings = read_prompts(SHARED / "vangogh.csv").prompts
    assert all(p.artist == "Vincent van Gogh" for p in paintings)
    assert paintings[0].text == "A Wheatfield, with Cypresses by Vincent van Gogh"


def test_the_fields_own_names_go_before_others(tmp_path: Path) -> None:
    [one] = read(tmp_path, "text,Prompt,seed,evaluation_seed,id,case_number\nnot me,a cat,1,2,x,y\n").prompts
    assert (one.text, one.seed, one.case, one.other) == ("a cat", 2, "y", {"text": "not me", "seed": "1", "id": "x"})
    with pytest.raises(DataError, match="twice"):
        read(tmp_path, "Prompt,prompt\na,b\n")
    with pytest.raises(DataError, match=r"\.csv, \.jsonl and \.txt"):
        read(tmp_path, "prompt\ta cat\n", "prompts.tsv")
