"""The layouts in which people have text, and refusals whose remedy works."""

from __future__ import annotations

import bz2
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from research_eval.datasets.text import TextDataset
from research_eval.datasets.token_data import DataSplits
from research_eval.errors import ConfigError

TEXTS = [f"{('dull', 'fine')[row % 2]} film {row}" for row in range(40)]
LABELS = [("neg", "pos")[row % 2] for row in range(40)]
NAMES = ["neg", "pos"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def dataset(path: Path, **params: Any) -> TextDataset:
    return TextDataset(dataset_name="mine", data_dir=str(path), **{"min_frequency": 1, **params})


def load(path: Path, **params: Any) -> DataSplits:
    return dataset(path, **params).splits()


def texts(path: Path, **params: Any) -> list[str]:
    """The texts of train as the file has them."""
    rows, _ = dataset(path, **params).read(path)
    return rows["train"].texts


def refusal(path: Path, **params: Any) -> str:
    with pytest.raises(ConfigError) as found:
        load(path, **params)
    return str(found.value)


def remedies(message: str) -> dict[str, Any]:
    """The lines that a message tells to write into `dataset_params`."""
    return dict(
        json.loads(f"{{{pair}}}").popitem() for pair in re.findall(r'"[a-z_]+": (?:"[^"]*"|\[.*?\]|false)', message)
    )


def csv_of(delimiter: str = ",", header: str | None = "text,label") -> str:
    lines = [f"{text}{delimiter}{label}" for text, label in zip(TEXTS, LABELS, strict=True)]
    return "\n".join([*([] if header is None else [header.replace(",", delimiter)]), *lines]) + "\n"


def json_rows() -> list[dict[str, str]]:
    return [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]


def content_of(ending: str) -> bytes:
    if ending == ".parquet":
        sink = pa.BufferOutputStream()
        parquet.write_table(pa.table({"text": TEXTS, "label": LABELS}), sink)
        return bytes(sink.getvalue())
    if ending == ".json":
        return json.dumps(json_rows()).encode()
    if ending in (".jsonl", ".ndjson"):
        return "".join(json.dumps(row) + "\n" for row in json_rows()).encode()
    return csv_of("\t" if ending in (".tsv", ".txt") else ",").encode()


def packed(content: bytes, ending: str) -> bytes:
    if ending == ".gz":
        half = len(content) // 2  # two members, as `cat a.gz b.gz` gives
        return gzip.compress(content[:half]) + gzip.compress(content[half:])
    return pa.compress(content, "zstd", asbytes=True) if ending == ".zst" else content


# ------------------------------------------------------------------------------------------------ compression


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".txt"])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_every_type_is_read_in_every_compression(folder: Path, ending: str, compression: str) -> None:
    (folder / f"train{ending}{compression}").write_bytes(packed(content_of(ending), compression))
    splits = load(folder)
    assert splits.label_names == NAMES and texts(folder) == TEXTS
    single = folder / f"train{ending}{compression}"
    assert load(single).fingerprint["sha256"] == splits.fingerprint["sha256"]


def test_shards_may_be_compressed(folder: Path) -> None:
    for shard in range(2):
        (folder / f"train-{shard:05}-of-00002.csv.gz").write_bytes(packed(content_of(".csv"), ".gz"))
    assert texts(folder) == TEXTS * 2
    (folder / "train-00001-of-00002.csv.gz").unlink()
    assert "1 of 2 shards of train.csv.gz are there. Add the missing ones" in refusal(folder)


def test_the_content_counts_and_not_the_name(folder: Path) -> None:
    """A browser unpacks a download and keeps its name, and a file may be packed without saying so."""
    (folder / "train.csv.gz").write_bytes(content_of(".csv"))
    assert texts(folder) == TEXTS
    (folder / "train.csv.gz").unlink()
    (folder / "train.csv").write_bytes(gzip.compress(content_of(".csv")))
    assert texts(folder) == TEXTS


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_small_file_that_unpacks_to_much_is_refused(
    folder: Path, ending: str, compression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("research_eval.datasets.text.opening.MAX_SPLIT_BYTES", 1_000_000)
    filler = {".csv": b"x,y\n", ".jsonl": b'{"text": "x", "label": "y"}\n', ".json": b" ", ".parquet": b"\0"}[ending]
    content = content_of(ending) + filler * 1_500_000
    (folder / f"train{ending}{compression}").write_bytes(packed(content, compression))
    assert (folder / f"train{ending}{compression}").stat().st_size < 300_000
    assert re.search(r"train\..*: holds more than 0 GiB\. Give a part of it", refusal(folder))


def test_a_file_that_is_cut_off_says_so(folder: Path) -> None:
    for compression in (".gz", ".zst"):
        file = folder / f"train.csv{compression}"
        file.write_bytes(packed(content_of(".csv") * 50, compression)[:-30])
        assert re.search(r"incomplete or damaged: copy or download it again", refusal(file))


# ------------------------------------------------------------------------------------------------ JSON


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
@pytest.mark.parametrize(
    "content",
    [
        json.dumps(json_rows()),
        json.dumps(json_rows(), indent=2),
        json.dumps({"data": json_rows()}),
        json.dumps({"version": "1.0", "rows": json_rows(), "columns": ["text", "label"]}, indent=1),
        json.dumps({"text": TEXTS, "label": LABELS}),
        json.dumps({"text": dict(enumerate(TEXTS)), "label": dict(enumerate(LABELS))}),  # as pandas writes it
        "\n".join(json.dumps(row) for row in json_rows()),
        "\ufeff\n" + "\n\n".join(json.dumps({**row, "more": {"a": [1]}}) for row in json_rows()),
    ],
)
def test_every_usual_form_of_json_is_read(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content, encoding="utf-8")
    assert texts(folder) == TEXTS and load(folder).label_names == NAMES


def test_json_lists_keep_texts_and_labels_as_they_are(folder: Path) -> None:
    rows = [{"text": "2024-01-31", "label": 7}, {"label": 2021, "text": "true", "more": [None]}] * 20
    (folder / "train.json").write_text(json.dumps(rows))
    assert texts(folder) == ["2024-01-31", "true"] * 20 and load(folder).label_names == ["7", "2021"]


def test_a_large_json_list_is_refused_and_its_remedy_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("research_eval.datasets.text.tables.MAX_LIST_BYTES", 1000)
    (folder / "train.json").write_bytes(content_of(".json"))
    assert "Write one JSON object in each line" in refusal(folder)
    (folder / "train.json").write_bytes(content_of(".jsonl"))
    assert texts(folder) == TEXTS


# ------------------------------------------------------------------------------------------------ CSV


@pytest.mark.parametrize("delimiter", [":", "^", "~", " ", ";", "tab"])
def test_any_delimiter_can_be_forced(folder: Path, delimiter: str) -> None:
    sign = "\t" if delimiter == "tab" else delimiter
    lines = [f'"{text}"{sign}{label}' for text, label in zip(TEXTS, LABELS, strict=True)]
    (folder / "train.csv").write_text("\n".join([f"text{sign}label", *lines]) + "\n")
    assert texts(folder, delimiter=delimiter) == TEXTS


def test_the_line_that_names_the_delimiter_is_understood(folder: Path) -> None:
    (folder / "train.csv").write_text("sep=|\n" + csv_of("|"))
    assert texts(folder) == TEXTS
    (folder / "train.csv").write_text("sep=;\n" + csv_of(";") + "x;\n")
    assert "blank labels (line 43)" in refusal(folder)


@pytest.mark.parametrize("names", [["text", "label"], ["label", "text"]])
@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_a_file_without_a_header_has_its_columns_named(folder: Path, names: list[str], delimiter: str) -> None:
    lines = [(text, label) if names[0] == "text" else (label, text) for text, label in zip(TEXTS, LABELS, strict=True)]
    (folder / "train.csv").write_text("\n".join(map(delimiter.join, lines)) + "\n")
    message = refusal(folder)
    assert remedies(message)["columns"] == names, message
    assert texts(folder, columns=remedies(message)["columns"]) == TEXTS


@pytest.mark.parametrize(
    ("ending", "option", "is_used"),
    [
        (".parquet", {"encoding": "cp1252"}, False),
        (".jsonl", {"delimiter": ";"}, False),
        (".json", {"quotes": False}, False),
        (".jsonl", {"encoding": "cp1252"}, True),
        (".txt", {"delimiter": "tab"}, True),
    ],
)
def test_an_option_that_no_file_uses_is_refused(
    folder: Path, ending: str, option: dict[str, Any], is_used: bool
) -> None:
    (folder / f"train{ending}").write_bytes(content_of(ending))
    if is_used:
        assert texts(folder, **option) == TEXTS
    else:
        assert f"{next(iter(option))} is for other types of files" in refusal(folder, **option)


def test_columns_that_do_not_fit_are_counted(folder: Path) -> None:
    (folder / "train.csv").write_text(csv_of(header=None))
    assert "columns has 3 names, and the first line has 2 cells" in refusal(folder, columns=["id", "text", "label"])


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_line_breaks_in_a_cell_stay_in_the_text(folder: Path, newline: str) -> None:
    rows = [f'"a ""b"", c{newline}{newline}{text}",{label}' for text, label in zip(TEXTS, LABELS, strict=True)]
    (folder / "train.csv").write_bytes(newline.join(["text,label", *rows, ""]).encode())
    assert texts(folder) == [f'a "b", c{newline}{newline}{text}' for text in TEXTS]


def test_quotation_marks_that_are_ordinary_characters(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in the tab-separated files of GLUE."""
    rows = [
        f'"{text}\t{label}' if row in (3, 8) else f"{text}\t{label}"
        for row, (text, label) in enumerate(zip(TEXTS, LABELS, strict=True))
    ]
    (folder / "train.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    assert len(texts(folder)) < 40
    assert "1 cells have line breaks, and a quotation mark stands inside the cell of line 5" in caplog.text
    assert remedies(caplog.text) == {"quotes": False}
    caplog.clear()
    plain = texts(folder, quotes=False)
    assert plain[3] == f'"{TEXTS[3]}' and len(plain) == 40 and not caplog.records


def test_a_quotation_mark_that_nothing_closes_is_refused(folder: Path) -> None:
    (folder / "train.csv").write_text(
        "label,text\n"
        + "".join(f"{label},{text}\n" for text, label in zip(TEXTS, LABELS, strict=True))
        + 'pos,"the rest\nneg,a\npos,b\n'
    )
    message = refusal(folder)
    assert "train.csv:42: a quotation mark is opened and never closed" in message
    assert texts(folder, **remedies(message))[-3:] == ['"the rest', "a", "b"]


def test_a_single_quotation_mark_in_a_cell_is_no_mistake(folder: Path) -> None:
    (folder / "train.csv").write_text(csv_of() + '5" disk,pos\n"two\nlines",neg\n')
    assert texts(folder)[-2:] == ['5" disk', "two\nlines"]


def test_cells_with_line_breaks_between_tabs_are_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "train.tsv").write_text(csv_of("\t") + '"one\tpos\ntwo"\tneg\nx\tpos\n')
    load(folder)
    assert "1 cells have line breaks between tabs" in caplog.text and '"quotes": false' in caplog.text


def test_rows_with_other_numbers_of_cells_are_named_and_the_remedy_works(folder: Path) -> None:
    (folder / "train.csv").write_text(csv_of() + "good, but long,pos\n")
    assert "train.csv:42: cannot be read: 3 cells, but 2 columns (separated by ','). Put a cell" in refusal(folder)
    (folder / "train.csv").write_text(csv_of() + '"good, but long",pos\n')
    assert texts(folder)[-1] == "good, but long"
    (folder / "train.csv").write_text(csv_of() + "note\n")
    assert "train.csv:42: cannot be read: 1 cells, but 2 columns" in refusal(folder)


# ------------------------------------------------------------------------------------------------ encodings


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".json"])
def test_a_byte_order_mark_names_the_encoding(folder: Path, encoding: str, ending: str) -> None:
    content = content_of(ending).decode().replace("film", "café")
    (folder / f"train{ending}").write_bytes(content.encode(encoding))
    assert texts(folder) == [text.replace("film", "café") for text in TEXTS]


@pytest.mark.parametrize(
    ("encoding", "word"), [("cp1252", "café “nice”"), ("latin-1", "caf\xe9\x81"), ("utf-16-le", "café")]
)
@pytest.mark.parametrize("compression", ["", ".gz"])
def test_the_remedies_for_another_encoding_work(folder: Path, encoding: str, word: str, compression: str) -> None:
    content = csv_of().replace("film 7", word).encode(encoding)
    (folder / f"train.csv{compression}").write_bytes(packed(content, compression))
    params: dict[str, Any] = {}
    for _ in range(3):
        message = refusal(folder, **params)
        assert ":9: not " in message or "looks like UTF-16" in message
        found = re.search(r'"([\w-]+)"(?: \(Western|$)', message)
        assert found, message
        params["encoding"] = found[1]
        if params["encoding"] == encoding:
            break
    assert texts(folder, **params)[7] == TEXTS[7].replace("film 7", word)


def test_an_encoding_that_is_none_is_refused() -> None:
    for name in ("utf-9", "zip", "hex"):
        with pytest.raises(ConfigError, match=f"encoding='{name}'.* Expected a name such as cp1252"):
            TextDataset(dataset_name="x", data_dir="x", encoding=name)


# ------------------------------------------------------------------------------------------------ columns


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("review", "sentiment"),
        ("Sentence", "Label"),
        ("tweet_text", "target"),
        ("reviewText", "stars"),
        ("comment", "class"),
        ("content", "category"),
    ],
)
def test_usual_names_of_columns_are_found_and_said(
    folder: Path, caplog: pytest.LogCaptureFixture, text: str, label: str
) -> None:
    caplog.set_level("INFO")
    (folder / "train.csv").write_text(csv_of(header=f"{text},{label}"))
    assert texts(folder) == TEXTS
    assert f"the text is column {text!r}" in caplog.text and f"the label is column {label!r}" in caplog.text
    caplog.clear()
    assert texts(folder, text_field=text, label_field=label) == TEXTS and not caplog.records


def test_a_column_that_is_given_is_never_replaced(folder: Path) -> None:
    (folder / "train.csv").write_text(csv_of(header="review,label"))
    message = refusal(folder, text_field="Review")
    assert "no column 'Review'; found review, label. Did you mean 'review'?" in message
    assert texts(folder, **remedies(message.split(" If ")[0])) == TEXTS


@pytest.mark.parametrize("header", ["v2,v1", "title,sort", "review,comment", "Text of it,y"])
def test_the_lines_of_the_message_work(folder: Path, header: str) -> None:
    (folder / "train.csv").write_text(csv_of(header=header))
    message = refusal(folder)
    lines = remedies(message.split(" If the first")[0])
    assert lines and texts(folder, **lines) == TEXTS and load(folder, **lines).label_names == NAMES


@pytest.mark.parametrize("name", ["", "Unnamed: 0", "index", "id", "__index_level_0__"])
@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_a_column_that_numbers_the_rows_is_ignored(folder: Path, name: str, ending: str) -> None:
    sign = "\t" if ending == ".tsv" else ","
    lines = [f"{row}{sign}{line}" for row, line in enumerate(csv_of(sign, None).splitlines())]
    (folder / f"train{ending}").write_text("\n".join([f"{name}{sign}text{sign}label", *lines]) + "\n")
    assert texts(folder) == TEXTS
    (folder / f"train{ending}").write_text("\n".join([f"{name}{sign}v2{sign}v1", *lines]) + "\n")
    assert remedies(refusal(folder).split(" If ")[0]) == {"text_field": "v2", "label_field": "v1"}


def test_columns_of_one_name_matter_only_if_they_are_used(folder: Path) -> None:
    (folder / "train.csv").write_text(
        "x,text,x,label\n" + "".join(f"1,{t},2,{n}\n" for t, n in zip(TEXTS, LABELS, strict=True))
    )
    assert texts(folder) == TEXTS
    (folder / "train.csv").write_text(csv_of(header="text,text"))
    assert "two columns are called 'text'" in refusal(folder, label_field="text")


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".json", ".parquet"])
def test_several_columns_are_joined_in_their_order_without_blank_ones(folder: Path, ending: str) -> None:
    titles = [f"title {row}" if row % 3 else " " for row in range(40)]
    names = ["label", "body", "title"]
    if ending == ".parquet":
        nulls = [None if title == " " else title for title in titles]
        parquet.write_table(pa.table({"label": LABELS, "body": TEXTS, "title": nulls}), folder / "train.parquet")
    else:
        rows = list(zip(LABELS, TEXTS, titles, strict=True))
        objects = [dict(zip(names, row, strict=True)) for row in rows]
        content = {
            ".csv": "\n".join([",".join(names), *map(",".join, rows)]),
            ".jsonl": "\n".join(map(json.dumps, objects)),
            ".json": json.dumps(objects),
        }[ending]
        (folder / f"train{ending}").write_text(content + "\n")
    expected = [f"{title}\n{text}" if title.strip() else text for title, text in zip(titles, TEXTS, strict=True)]
    assert texts(folder, text_field=["title", "body"]) == expected
    assert texts(folder, text_field=["body"]) == TEXTS
    message = refusal(folder, text_field=["titel", "body"])
    assert "no column 'titel'; found" in message and "Did you mean 'title'?" in message


def test_other_splits_have_the_columns_of_train(folder: Path) -> None:
    (folder / "train.csv").write_text(csv_of(header="review,sentiment"))
    (folder / "validation.csv").write_text("review,sentiment,comment\na film,neg,x\nb,pos,y\n")
    (folder / "test.csv").write_text("review,stars\na film,5\n")  # another column is not the label
    splits = load(folder)
    assert len(splits.validation) == 2 and splits.test is None


# ------------------------------------------------------------------------------------------------ folders


def test_a_folder_for_each_class(folder: Path) -> None:
    """As the reviews of aclImdb lie."""
    for split, size in (("train", 12), ("test", 6)):
        for row in range(size):
            place = folder / split / LABELS[row] / f"{row}_7.txt"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(f"{TEXTS[row]}\nsecond line", encoding="utf-8")
    (folder / "train" / "unsup").mkdir()
    (folder / "train" / "unsup" / "0_0.txt").write_text("no label")
    (folder / "README").write_text("about")
    splits = load(folder)
    assert splits.label_names == NAMES and len(splits.train) + len(splits.validation) == 12
    assert splits.test is not None and np.bincount(splits.test.labels).tolist() == [3, 3]
    assert f"{TEXTS[0]}\nsecond line" in texts(folder)
    alone = folder / "train"
    assert load(alone).label_names == NAMES and load(alone).test is None


def test_a_text_in_another_encoding_is_named_in_a_folder_of_classes(folder: Path) -> None:
    for name in NAMES:
        (folder / name).mkdir()
        for row in range(4):
            (folder / name / f"{row}.txt").write_bytes(f"café {row}".encode("cp1252"))
    assert "0.txt:1: not UTF-8" in refusal(folder)
    assert texts(folder, encoding="cp1252")[0] == "café 0"


def test_other_files_beside_the_splits_do_no_harm(folder: Path) -> None:
    """As in repositories of the hub."""
    (folder / "data").mkdir()
    (folder / "data" / "train-00000-of-00001.parquet").write_bytes(content_of(".parquet"))
    (folder / "dataset_infos.json").write_text("{}")
    (folder / "requirements.txt").write_text("x")
    assert texts(folder) == TEXTS
    (folder / "train.csv").write_text(csv_of())
    (folder / "train.txt").write_text("a note")
    (folder / "train").mkdir()
    (folder / "train" / "old.csv").write_text("x\n")
    assert texts(folder) == TEXTS


@pytest.mark.parametrize("inside", ["", "data"])
def test_a_folder_for_each_split(folder: Path, inside: str) -> None:
    for split, names in (("train", ["0000.parquet", "0001.parquet"]), ("test", ["0000.parquet"])):
        for name in names:
            (folder / inside / split).mkdir(parents=True, exist_ok=True)
            (folder / inside / split / name).write_bytes(content_of(".parquet"))
    assert texts(folder) == TEXTS * 2
    assert load(folder).fingerprint["rows"]["test"] == 40


def test_a_folder_that_holds_the_set_is_named_and_the_remedy_works(folder: Path) -> None:
    (folder / "plain_text").mkdir()
    (folder / "plain_text" / "train-00000-of-00001.parquet").write_bytes(content_of(".parquet"))
    found = re.search(r"Set dataset_params\.data_dir to '(.*)'", refusal(folder))
    assert found and texts(Path(found[1])) == TEXTS


def test_a_file_of_another_name_is_named_and_the_remedy_works(folder: Path) -> None:
    (folder / "reviews.csv.gz").write_bytes(packed(content_of(".csv"), ".gz"))
    found = re.search(r"set dataset_params\.data_dir to it: '(.*)'", refusal(folder))
    assert found and texts(Path(found[1])) == TEXTS
    (folder / "reviews.csv.gz").rename(folder / "Train.CSV.gz")
    assert texts(folder) == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        ("train.xlsx", b"PK\x03\x04", "Save it in the spreadsheet as CSV UTF-8"),
        ("train.pkl", b"\x80\x04.", "Write it with pandas: to_csv or to_parquet"),
        ("train.arrow", b"ARROW1", "to_parquet"),
        ("train.csv.zip", b"PK\x03\x04", "Unpack it"),
        ("train.csv.bz2", bz2.compress(b"x"), "Unpack it"),
        ("train", b"text,label\n", "rename it: .csv"),
    ],
)
def test_a_file_of_another_type_is_refused_with_the_way_out(
    folder: Path, name: str, content: bytes, remedy: str
) -> None:
    (folder / name).write_bytes(content)
    assert remedy in refusal(folder / name)
    assert name in refusal(folder) and (name == "train" or remedy in refusal(folder))


def test_an_archive_under_a_wrong_name_is_refused(folder: Path) -> None:
    for content in (b"PK\x03\x04abc", bz2.compress(b"x")):
        (folder / "train.csv").write_bytes(content)
        assert "archive. Unpack it" in refusal(folder)


def test_a_path_that_leads_nowhere_names_the_nearest(folder: Path) -> None:
    (folder / "reviews.csv").write_text(csv_of())
    found = re.search(r"Did you mean '(.*)'\?", refusal(folder / "review.csv"))
    assert found and texts(Path(found[1])) == TEXTS


def test_empty_cells_are_refused_with_their_rows(folder: Path) -> None:
    rows = [*json_rows(), {"text": None, "label": "pos"}]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert r"'text' has 1 empty cells (null) (row 41). Fill them in or remove the rows" in refusal(folder)


def test_json_lines_that_are_none_are_named(folder: Path) -> None:
    (folder / "train.jsonl").write_bytes(content_of(".jsonl") + b'{"text": "x" "label": 1}\n')
    assert "train.jsonl:41: cannot be read:" in refusal(folder)
    (folder / "train.jsonl").write_bytes(content_of(".jsonl") + b'{"text": "x", "label": 1}\n')
    assert "Give all values of the column one type" in refusal(folder)
    (folder / "train.jsonl").write_bytes(content_of(".jsonl") + b'{"text": "x", "label": "1"}\n')
    assert texts(folder)[-1] == "x"


# ------------------------------------------------------------------------------------------------ val_size, test_size


def write_rows(folder: Path, counts: dict[str, int]) -> None:
    labels = [name for name, count in counts.items() for _ in range(count)]
    lines = [f"word{row} of {label},{label}" for row, label in enumerate(labels)]
    (folder / "train.csv").write_text("\n".join(["text,label", *lines]) + "\n")


COUNTS = {"common": 140, "rare": 50, "seldom": 10}


@pytest.mark.parametrize(
    ("sizes", "test", "validation"),
    [
        ({"test_size": 0.2}, [28, 10, 2], [11, 4, 1]),  # validation is a tenth of the rest
        ({"test_size": 0.2, "val_size": 0.1}, [28, 10, 2], [14, 5, 1]),  # shares of all rows
        ({"test_size": 20, "val_size": 40}, [14, 5, 1], [28, 10, 2]),
        ({"test_size": 3, "val_size": 0.1}, [1, 1, 1], [14, 5, 1]),
        ({"val_size": 0.5}, None, [70, 25, 5]),
    ],
)
def test_missing_splits_are_drawn_from_every_class(
    folder: Path, sizes: dict[str, float], test: list[int] | None, validation: list[int]
) -> None:
    write_rows(folder, COUNTS)
    splits = load(folder, **sizes)
    parts = {name: part.texts for name, part in dataset(folder, **sizes)._chosen(folder)[0].items()}
    assert sorted(text for part in parts.values() for text in part) == sorted(texts(folder))  # none lost, none twice
    assert np.bincount(splits.validation.labels).tolist() == validation
    assert (None if splits.test is None else np.bincount(splits.test.labels).tolist()) == test
    assert load(folder, **sizes).fingerprint == splits.fingerprint


def unseen(folder: Path, **sizes: float) -> list[str]:
    rows = dataset(folder, **sizes)._chosen(folder)[0]
    return sorted(rows["validation"].texts)


def test_a_tenth_by_name_is_the_tenth_by_default(folder: Path) -> None:
    write_rows(folder, COUNTS)
    assert unseen(folder, val_size=0.1) == unseen(folder)
    assert unseen(folder, val_size=0.2) != unseen(folder)


def test_the_test_rows_do_not_depend_on_the_size_of_validation(folder: Path) -> None:
    write_rows(folder, COUNTS)
    hashes = {load(folder, test_size=0.2, val_size=size).fingerprint["sha256"]["test"] for size in (0.1, 0.3, 7)}
    assert len(hashes) == 1


def test_a_split_that_is_there_is_not_made_again(folder: Path) -> None:
    write_rows(folder, COUNTS)
    (folder / "validation.csv").write_text("text,label\na,common\nb,rare\n")
    assert "val_size=0.2: the set has a validation split of 2 rows. Leave val_size out" in refusal(folder, val_size=0.2)
    (folder / "test.csv").write_text("text\na\nb\n")  # without labels it is none
    splits = load(folder, test_size=0.2)
    assert splits.test is not None and len(splits.test) == 40 and len(splits.validation) == 2


def test_in_a_mix_only_sources_without_the_split_give_rows(folder: Path) -> None:
    for name in ("one", "other"):
        (folder / name).mkdir()
        write_rows(folder / name, {"x": 20, "y": 20})
    (folder / "other" / "test.csv").write_text("text,label\na,x\nb,y\n")
    sources = [str(folder / "one"), str(folder / "other")]
    splits = TextDataset(dataset_name="mix", sources=sources, test_size=0.25, min_frequency=1).splits()
    assert splits.test is not None and np.bincount(splits.test.groups).tolist() == [10, 2]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"val_size": 198}, "val_size=198: 197 rows can be held out, because each class keeps one. Lower it"),
        ({"test_size": 197, "val_size": 1}, "val_size=1, and every class has one row only"),
        ({"test_size": 0.6, "val_size": 0.4}, "val_size=0.4 and test_size=0.6 leave no rows for training"),
    ],
)
def test_sizes_that_leave_nothing_are_refused(folder: Path, sizes: dict[str, float], message: str) -> None:
    write_rows(folder, COUNTS)
    assert message in refusal(folder, **sizes)
