"""CSV and TSV: delimiters, quoting, and notices about quotes that may not be meant."""

import csv
import io
from pathlib import Path

import pyarrow.csv
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.core.options import Columns
from pipeline.sources import Corpus
from tests.unit.sources.written import DEFAULT, ITEM_BYTES, put, read, refusal

rounds = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
STRAY = 'id\ttext\n1\tplain\n2\t"one stray quote\n3\tthree\n4\tfive inches: 5"\n5\tlast\n'


def notices(*sources: str, columns: Columns = DEFAULT) -> list[str]:
    """Return the notices about a corpus, which are the same by value and by reference."""
    by_value, by_reference = (Corpus(sources, columns, ITEM_BYTES) for _ in range(2))
    assert list(by_value.blocks())
    for file in by_reference.files:
        assert list(by_reference.places(file))
    assert by_value.notices.lines() == by_reference.notices.lines()
    return by_value.notices.lines()


def test_a_stray_quote_swallows_no_row_of_tsv() -> None:
    put("stray.tsv", STRAY)
    rows = read("stray.tsv")
    assert rows.keys == ["1", "2", "3", "4", "5"]
    assert rows.texts == [b"plain", b'"one stray quote', b"three", b'five inches: 5"', b"last"]
    assert notices("stray.tsv") == []


def test_quotes_that_tsv_keeps_are_said() -> None:
    put("a.tsv", 'id\ttext\n1\tplain\n2\t"a ""b"""\n3\t"c"\n')
    assert read("a.tsv").texts == [b"plain", b'"a ""b"""', b'"c"']
    assert notices("a.tsv") == [
        "a.tsv: fields stand in quotes, first on line 3, and keep them, since TSV has no quoting; to read them "
        "without, set quote to '\"'."
    ]
    assert notices("a.tsv", columns=Columns(quote="")) == []
    assert read("a.tsv", columns=Columns(quote='"')).texts == [b"plain", b'a "b"', b"c"]
    assert refusal(put("b.tsv", '"id"\t"text"\n"1"\t"x"\n')) == (
        "quote: b.tsv line 1: the column names are quoted, but quoting is off for this file; set the option to '\"'."
    )
    assert refusal(put("c.tsv", 'id\ttext\n1\t"two\nlines"\n')) == (
        "c.tsv line 3: 1 field where the header has 2; if its quotes quote, set quote to '\"'."
    )


@pytest.mark.parametrize(
    ("data", "texts", "lines"),
    [
        ('id,text\n1,"one\n2,two\n3,3"\n4,four\n', 2, "2 to 4"),
        ('id,text,lang\n1,"one,en\n2,5",de\n', 1, "2 to 3"),
        ('text,id\nzero,0\n"one,1\ntwo,2\nthree",3\n', 2, "3 to 5"),
        ('text\n"one\ntwo\n3"\n4\n', 2, "2 to 4"),
        ('text,lang\n"one,en\ntwo,en\n5",de\n', 1, "2 to 4"),
        ('text,n\n\n"one,1\r\ntwo,2\r\nthree",3\r\n', 1, "3 to 5"),
        ('id,text,"size\n1,a,5"\n2,b,6\n', 1, "1 to 2"),
        ("id;text\n1;'one\n2;two\n3;3'\n", 1, "2 to 4"),
    ],
)
def test_a_quoted_field_that_may_hide_rows_is_said_with_its_lines(data: str, texts: int, lines: str) -> None:
    columns = Columns(delimiter=";", quote="'") if ";" in data else Columns()
    put("a.csv", data)
    assert len(read("a.csv", columns=columns).texts) == texts
    (said,) = [line for line in notices("a.csv", columns=columns) if "no column" not in line]
    assert said == (
        f"a.csv lines {lines}: a quoted field goes on over lines that look like rows, and is read as one text. If a "
        "quote was left open there, close it, or set quote to none where quotes are mere letters."
    )


def test_texts_of_several_lines_are_read_without_a_word() -> None:
    letter = 'Dear Ann,\n\nthank you, and "thanks", for all.\nYours,\r\nBob'
    with open("a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "text", "n"], *([n, letter, n] for n in range(3))])
    assert read("a.csv").texts == [letter.encode()] * 3
    assert notices("a.csv") == []


def test_many_notices_are_counted() -> None:
    put("a.csv", "id,text\n" + '1,"a\n2,b"\n' * 7)
    said = notices("a.csv")
    assert len(said) == 3
    assert said[2].endswith(" There are 4 more like this.")


@pytest.mark.parametrize("first", ["sep=;\n", "sep=;\r\n", '"sep=;"\n', "\ufeffsep=;\r", "SEP=;\n"])
def test_excels_first_line_names_the_delimiter(first: str) -> None:
    put("a.csv", f"{first}id;text\n1;a,b\n2;\n")
    rows = read("a.csv")
    assert (rows.keys, rows.texts) == (["1", "2"], [b"a,b", None])
    assert rows.problems[0][2] == "line 4: text is empty"
    assert notices("a.csv", columns=Columns(delimiter=";")) == []
    assert refusal("a.csv", columns=Columns(delimiter="|")) == (
        'delimiter: a.csv line 1: it names ";" as delimiter, and the job another; leave one out.'
    )


def test_a_header_that_only_looks_like_excels_first_line() -> None:
    assert "columns are sep=id, body" in refusal(put("a.csv", "sep=id,body\n1,a\n"))
    assert refusal(put("b.csv", "sep=,")) == "b.csv line 2: no header; name the columns there."


def test_a_row_of_another_width_is_told_with_its_lines() -> None:
    assert refusal(put("a.csv", 'id,text\n1,"a\nb",c\n')) == "a.csv lines 2 to 3: 3 fields where the header has 2."


def test_an_endless_line_is_a_row_of_its_own_where_nothing_quotes() -> None:
    put("a.tsv", b'id\ttext\n1\t"' + b"x" * 5_000_000 + b"\n2\tgood\n")
    rows = read("a.tsv")
    assert [text for text in rows.texts if text] == [b"good"]
    assert len(rows.problems) == 1


letters = st.text(st.sampled_from("ab\"',;|\t é数\u2028"), max_size=8)


@rounds
@given(
    st.lists(st.tuples(letters, letters, letters), max_size=9),
    st.sampled_from([",", ";", "|", "\t"]),
    st.sampled_from(['"', "'", ""]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_rows_are_those_that_arrow_reads(
    written: list[tuple[str, str, str]], delimiter: str, quote: str, end: str
) -> None:
    file = io.StringIO(newline="")
    if quote:
        writer = csv.writer(file, delimiter=delimiter, quotechar=quote, lineterminator=end)
        writer.writerows([["id", "text", "n"], *written])
    else:
        rows = [["id", "text", "n"], *([field.replace(delimiter, "") for field in row] for row in written)]
        file.write("".join(delimiter.join(row) + end for row in rows))
    Path("a.csv").write_bytes(file.getvalue().encode())
    oracle = pyarrow.csv.read_csv(
        "a.csv",
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=delimiter, quote_char=quote or False, double_quote=True, newlines_in_values=True
        ),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(("id", "text", "n"), pyarrow.string()), strings_can_be_null=False
        ),
    )
    found = read("a.csv", columns=Columns(carry=("n",), delimiter=delimiter, quote=quote))
    assert found.keys == [key or None for key in oracle["id"].to_pylist()]
    good = [text for text in oracle["text"].to_pylist() if text.strip()]
    assert [text.decode() for text in found.texts if text] == good
