"""From sources to splits, and one clear line for whatever is wrong with a source."""

import copy
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mergelaw.artifacts.cache import FileCache
from mergelaw.data import documents, inspect, sources
from mergelaw.data.documents import Document, check_overlap, read_split, split_identity, write_split
from mergelaw.data.recipe import Source, SplitRecipe
from mergelaw.errors import MergelawError
from models import tokenizer


def recipe(source, train=None, evaluation=1, calibration=0, eval_source=None, seed=0):
    return SplitRecipe(
        source=Source(**source),
        eval_source=eval_source and Source(**eval_source),
        train_documents=train,
        eval_documents=evaluation,
        calibration_documents=calibration,
        seed=seed,
    )


def records(count, first=0):
    return [
        {"prompt": f"question {n}", "response": f"answer {n}"} for n in range(first, first + count)
    ]


def written(path, content):
    """A file of records: Parquet, JSON lines or a JSON list by its name; text and bytes as given."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(content), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in content))
    else:
        path.write_text(json.dumps(content))
    return str(path)


def build(tmp_path, settings, *names) -> tuple:
    """The documents of splits (all, unless named) and the counts of the last one."""
    splits, counts = [], {}
    for name in names or ("train", "eval", "calibration"):
        folder = tmp_path / "splits" / name
        counts = write_split(settings, name, {}, folder)
        splits.append(read_split(folder))
        assert counts["documents"] == len(splits[-1])
    return *splits, counts


def only_document(tmp_path, record) -> Document:
    """The document of a file that holds one record."""
    name = written(tmp_path / "one.json", [record])
    ((document,), _) = build(tmp_path, recipe({"files": [name]}, train=0), "eval")
    return document


def refusal(tmp_path, source, split="train", **changes):
    """The error of a source that is refused: one line, and nothing is left behind."""
    output = tmp_path / "refused"
    with pytest.raises(MergelawError) as caught:
        write_split(recipe(source, **changes), split, {}, output)
    assert not output.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


USER = [{"role": "user", "content": "Why?"}]
ANSWER = {"role": "assistant", "content": "So."}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Why?", "response": "So."},
        {"prompt": "Why?", "completion": "So.", "response": None},
        {"instruction": "Why?", "output": "So.", "input": ""},
        {"instruction": "Why?", "output": "So.", "input": " \n"},
        {"problem": "Why?", "solution": "So."},
        {"question": "Why?", "answer": "So."},
        {"query": "Why?", "response": "So.", "id": 3, "source": "a book"},
        {"instruction": "Why?", "response": "So.", "context": " "},
        {"inputs": "Why?", "targets": "So."},
        {"input": "Why?", "output": "So."},
        {"user": "Why?", "assistant": "So.", "system": "", "history": [], "tools": []},
        {"instruction": "Why?", "output": "So.", "text": "Below ... Why? ... So."},
        {"prompt": "Why?", "messages": [*USER, {"role": "assistant", "content": "So."}]},
        {
            "question": "Why?",
            "answer": "So.",
            "conversation": [*USER, {"role": "model", "content": "So."}],
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}],
                },
                {
                    "role": "assistant",
                    "content": [{"type": "text", "text": "So.", "image": None}],
                    "weight": 1,
                },
            ]
        },
        {"prompt": USER, "response": "So."},
        {"prompt": USER, "completion": [{"role": "assistant", "content": "So."}]},
        {"messages": [*USER, {"role": "assistant", "content": "So."}]},
        {"messages": [*USER, {"role": "assistant", "content": "So."}, *USER]},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
    ],
)
def test_one_question_and_answer_in_any_form_is_one_document(tmp_path, record):
    document = only_document(tmp_path, record)
    assert document.messages == USER
    assert document.response == "So."
    assert document == only_document(tmp_path, {"prompt": "Why?", "response": "So."})


def test_instruction_and_input_are_joined_by_a_blank_line(tmp_path):
    document = only_document(tmp_path, {"instruction": "Add.", "input": "1, 2", "output": "3"})
    assert document.messages == [{"role": "user", "content": "Add.\n\n1, 2"}]


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"system": "Be short.", "prompt": "c"}, ["Be short.", "c"]),
        ({"system_prompt": "Be short.", "prompt": "c", "context": "d"}, ["Be short.", "c\n\nd"]),
        ({"history": [["a", "b"]], "prompt": "c", "input": "d"}, ["a", "b", "c\n\nd"]),
        (
            {
                "history": [*USER, {"role": "assistant", "content": "b"}],
                "system": "s",
                "prompt": "c",
            },
            ["s", "Why?", "b", "c"],
        ),
    ],
)
def test_system_history_and_context_columns_are_turns_before_the_answer(tmp_path, record, turns):
    document = only_document(tmp_path, {**record, "response": "So."})
    assert [turn["content"] for turn in document.messages] == turns
    chat = [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": "So."}]
    if "context" not in record and "input" not in record:
        chat = {**record, "messages": chat, "prompt": None}
        assert only_document(tmp_path, chat) == document


def test_other_keys_of_turns_are_kept_for_the_template(tmp_path):
    call = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    turns = [
        {"role": "user", "content": "1 + 1?", "id": 7, "weight": None},
        {"role": "assistant", "content": None, "tool_calls": call, "weight": 0},
        {"role": "tool", "content": "2", "name": "add"},
    ]
    answer = {"role": "assistant", "content": "2"}
    document = only_document(tmp_path, {"messages": [*turns, answer]})
    assert document.messages == [
        {"role": "user", "content": "1 + 1?", "id": 7},
        {"role": "assistant", "content": "", "tool_calls": call},
        {"role": "tool", "content": "2", "name": "add"},
    ]
    # Calls make another document, an id does not.
    others = [{**turns[0], "id": 8}, *turns[1:]], [turns[0], {**turns[1], "tool_calls": [1]}]
    same, other = (only_document(tmp_path, {"messages": [*t, answer]}).document for t in others)
    assert same == document.document != other


def test_columns_of_a_users_own(tmp_path):
    rows = [{"title": "Zinc", "ask": "melts?", "reply": f"{n}", "prompt": "x"} for n in range(3)]
    csv = "title,ask,reply\n" + "".join(f"Zinc,melts?,{n}\n" for n in range(3))
    for name, content in (("a.json", rows), ("a.csv", csv), ("a.parquet", rows)):
        columns = {"system": "title", "prompt": "{title}: {ask}", "response": "reply"}
        source = {"files": [written(tmp_path / name, content)], "columns": columns}
        (found, _) = build(tmp_path, recipe(source, train=0), "eval")
        assert [turn["content"] for turn in found[0].messages] == ["Zinc", "Zinc: melts?"]
    text = recipe({**source, "columns": {"text": "{title}\n{reply}"}}, train=0, evaluation=3)
    found, _ = build(tmp_path, text, "eval")
    assert {one.response for one in found} == {f"Zinc\n{n}" for n in range(3)}
    message = refusal(tmp_path, {**source, "columns": {**columns, "system": "titel"}})
    assert "a.parquet: columns names the column 'titel', which no record has; use one of" in message
    for columns in ({"prompt": "ask"}, {"system": "title"}, {"text": "ask", "messages": "title"}):
        with pytest.raises(ValueError, match="'columns' names 'messages', 'prompt' and"):
            Source(files=["a"], columns=columns)


def test_a_text_file_is_a_document(tmp_path):
    (tmp_path / "books").mkdir()
    written(tmp_path / "books" / "a.txt", "\ufeffOnce\nupon a time\n")
    compressed(tmp_path / "books" / "b.txt.gz", b"The end")
    source = {"files": [str(tmp_path / "books")]}
    found, _ = build(tmp_path, recipe(source, train=0, evaluation=2), "eval")
    assert {one.response for one in found} == {"Once\nupon a time\n", "The end"}
    written(tmp_path / "books" / "c.jsonl", records(1))
    assert "books: holds files of plain text and of records; name those" in refusal(
        tmp_path, source
    )


@pytest.mark.parametrize(
    ("at_most", "asked", "sizes"),
    [
        (("eval", "calibration"), (0, 200, 12), [0, 88, 12]),
        (("eval", "calibration"), (0, 50, 12), [0, 50, 12]),
        (("calibration",), (0, 100, 12), [0, 100, 0]),
        (("eval",), (0, 200, 12), [0, 88, 12]),
        (("eval", "calibration"), (0, 200, 90), [0, 75, 25]),
    ],
)
def test_sizes_follow_from_what_is_there_where_they_may(tmp_path, at_most, asked, sizes):
    files = {"files": [written(tmp_path / "a.json", records(100))]}
    part = recipe(files, *asked).model_copy(update={"at_most": at_most})
    assert [len(split) for split in build(tmp_path, part)[:3]] == sizes


def test_a_look_at_the_first_records_of_each_file(tmp_path, capsys):
    first = written(tmp_path / "a.jsonl", records(9))
    second = written(tmp_path / "b.csv", "prompt,response,kind\nx,,a\nwhy,so <|assistant|>,b\n")
    look = inspect(Source(files=[first, second], invalid_records="skip"), records=4)
    assert [one.response for one in look.documents][3:] == ["answer 3", "so <|assistant|>"]
    ours = tokenizer()
    look = inspect(Source(files=[first], where={"response": "answer 8"}), ours, len(ours))
    assert len(look.documents) == 1 and look.longest > 9
    with pytest.raises(MergelawError, match=r"b\.csv, line 2: no response among its columns"):
        inspect(Source(files=[first, second]))
    beyond = ours.convert_tokens_to_ids("<|assistant|>")
    source = Source(files=[second], where={"kind": "b"})
    with pytest.raises(
        MergelawError, match=r"b\.csv: the documents have the token .*embedding has"
    ):
        inspect(source, ours, beyond)
    system = written(tmp_path / "c.jsonl", [{"system": "s", **records(1)[0]}])
    ours = copy.deepcopy(ours)
    ours.chat_template = "{% for m in messages[1:] %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(MergelawError, match=r"c\.jsonl: document .* leaves out its system turn"):
        inspect(Source(files=[system]), ours)
    assert inspect(Source(synthetic="code"), ours).documents == []
    named = written(tmp_path / "d.jsonl", [{"messages": [{**USER[0], "name": "Ann"}, ANSWER]}])
    assert inspect(Source(files=[named]), tokenizer()).changes == {"ignores 'name' of turns": 1}
    assert capsys.readouterr().err == ""  # the caller tells of changes


def test_the_last_assistant_turn_is_the_response(tmp_path):
    turns = [("system", "Be brief."), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]
    document = only_document(
        tmp_path, {"conversations": [{"from": who, "value": text} for who, text in turns]}
    )
    assert [turn["content"] for turn in document.messages] == ["Be brief.", "a", "b", "c"]
    assert [turn["role"] for turn in document.messages] == ["system", "user", "assistant", "user"]
    assert document.response == "d"


def test_plain_text_has_no_messages(tmp_path):
    document = only_document(tmp_path, {"text": "Once upon a time"})
    assert (document.messages, document.response) == (None, "Once upon a time")


def test_normalised_content_is_the_identity(tmp_path):
    texts = ["caf\u00e9  au\nlait", "cafe\u0301 au lait", "caf\u00e9 au lait ", "tea"]
    pairs = [{"prompt": "Order", "response": text} for text in texts]
    for order in (pairs, pairs[::-1]):
        name = written(tmp_path / "a.json", order)
        train, evaluation, _, counts = build(tmp_path, recipe({"files": [name]}))
        assert (counts["records"], counts["duplicates"]) == (4, 2)
        # Which of the equal texts stands for them does not depend on their order either.
        assert {document.response for document in train + evaluation} == {
            "cafe\u0301 au lait",
            "tea",
        }
    assert all(len(document.document) == 16 for document in train)


def compressed(path, content):
    """A file compressed by Arrow, as its suffix says."""
    with pa.output_stream(str(path)) as stream:
        stream.write(content)
    return str(path)


def test_files_of_all_kinds_make_the_same_splits_whatever_their_order(tmp_path):
    lines = [json.dumps(record).encode() + b"\n" for record in records(70)]
    table = "response,prompt\n" + "".join(f"answer {n},question {n}\n" for n in range(60, 65))
    names = [
        written(tmp_path / "a.json", records(20)),
        written(tmp_path / "b.jsonl", records(20, first=15)),
        written(tmp_path / "c.parquet", records(20, first=30)),
        written(tmp_path / "d.jsonl", b"\xef\xbb\xbf" + lines[0] + b"\n\n"),
        compressed(tmp_path / "e.jsonl.gz", b"".join(lines[50:55])),
        compressed(tmp_path / "f.ndjson.zst", b"".join(lines[55:57])),
        compressed(tmp_path / "g.json.bz2", json.dumps(records(3, first=57)).encode()),
        compressed(tmp_path / "h.CSV.GZ".lower(), table.encode()),
        written(tmp_path / "i.tsv", table.replace(",", "\t")),
    ]
    settings = recipe({"files": names}, evaluation=10, calibration=5)
    train, evaluation, calibration, counts = build(tmp_path, settings)
    assert (counts["records"], counts["duplicates"]) == (81, 16)
    assert [len(train), len(evaluation), len(calibration)] == [50, 10, 5]
    texts = [turn["content"] for one in calibration for turn in one.messages]
    assert counts["bytes"] == sum(len(text) for text in texts) + sum(
        len(one.response) for one in calibration
    )
    before = [path.read_bytes() for path in sorted((tmp_path / "splits").glob("*/*"))]
    other = recipe({"files": names[::-1]}, evaluation=10, calibration=5)
    assert build(tmp_path, other)[:3] == (train, evaluation, calibration)
    assert [path.read_bytes() for path in sorted((tmp_path / "splits").glob("*/*"))] == before
    assert build(tmp_path, other.model_copy(update={"seed": 1}))[1] != evaluation


def test_a_folder_and_a_glob_stand_for_their_files(tmp_path):
    (tmp_path / "data" / "more" / ".cache").mkdir(parents=True)
    written(tmp_path / "data" / "a.jsonl", records(4))
    written(tmp_path / "data" / "more" / "b[1].csv", "prompt,response\nquestion 9,answer 9\n")
    written(tmp_path / "data" / "README.md", "# not records")
    written(tmp_path / "data" / "more" / ".cache" / "c.jsonl", records(1, first=20))
    for name, count in (
        ("data", 5),
        ("data/*.jsonl", 4),
        ("data/**/*.csv", 1),
        ("data/more/b[1].csv", 1),
        ("data/more/.cache/*", 1),  # a hidden folder that is named
    ):
        settings = recipe({"files": [str(tmp_path / name)]}, train=0)
        assert build(tmp_path, settings, "eval")[1]["records"] == count, name
    missing = {"files": [str(tmp_path / "data/*.parquet")]}
    assert "data/*.parquet: holds no file to read; use .json" in refusal(tmp_path, missing)
    assert "README.md: unknown kind of file; use" in refusal(
        tmp_path, {"files": [str(tmp_path / "data" / "*")]}
    )


def test_csv_cells_are_text_as_it_stands(tmp_path):
    long = "x" * 200_000
    table = (
        f'prompt,response,kind\nwhen,2024-01-01,1\n"a ""b"",\nc",007,2\nNA,null,\n,,\n{long},y,2\n'
    )
    source = {"files": [written(tmp_path / "a.csv", "\ufeff" + table)]}
    message = refusal(tmp_path, source)
    assert "a.csv, line 6: no response among its columns" in message
    skipping = source | {"invalid_records": "skip"}
    ((*found,), _) = build(tmp_path, recipe(skipping, train=0, evaluation=4), "eval")
    texts = {(one.messages[0]["content"], one.response) for one in found}
    assert texts == {("when", "2024-01-01"), ('a "b",\nc', "007"), ("NA", "null"), (long, "y")}
    counts = build(tmp_path, recipe(source | {"where": {"kind": "2"}}), "train")[1]
    assert counts["records"] == 2


def test_the_columns_are_document_messages_and_response(tmp_path):
    name = written(tmp_path / "a.json", [*records(1), {"text": "plain"}])
    build(tmp_path, recipe({"files": [name]}, train=0, evaluation=2))
    table = pq.read_table(tmp_path / "splits" / "eval" / "documents.parquet")
    assert table.column_names == ["document", "messages", "response"]
    assert set(table["messages"].to_pylist()) == {'[{"content":"question 0","role":"user"}]', None}
    assert len(pq.read_table(tmp_path / "splits" / "train" / "documents.parquet")) == 0


def test_where_keeps_the_records_with_the_value(tmp_path):
    rows = [{**record, "subject": "ab"[n % 2], "bad": 1} for n, record in enumerate(records(10))]
    # What is not kept need not be a document.
    rows.append({"subject": "a"})
    for name in ("a.json", "a.parquet"):
        source = {"files": [written(tmp_path / name, rows)], "where": {"subject": "b", "bad": 1}}
        assert build(tmp_path, recipe(source), "train")[1]["records"] == 5
    message = refusal(tmp_path, {**source, "where": {"topic": "b"}})
    assert "a.parquet: where names the column 'topic', which no record has" in message
    assert message.endswith("['bad', 'prompt', 'response', 'subject']")
    assert refusal(tmp_path, {**source, "where": {"subject": "c"}}).endswith(
        "where = {\"subject\":\"c\"} keeps no record; the records have, for example, 'a'; 'b'"
    )


def test_evaluation_documents_come_from_eval_source(tmp_path):
    source = {"files": [written(tmp_path / "train.json", records(10))]}
    held = {"files": [written(tmp_path / "held.json", records(5, first=10))]}
    settings = recipe(source, evaluation=5, calibration=3, eval_source=held)
    train, evaluation, calibration, _ = build(tmp_path, settings)
    assert {one.response for one in evaluation} == {f"answer {n}" for n in range(10, 15)}
    assert {one.response for one in train + calibration} == {f"answer {n}" for n in range(10)}
    assert len(calibration) == 3
    # Neither is read for the other.
    absent = {"files": [str(tmp_path / "absent.json")]}
    build(tmp_path, recipe(source, evaluation=5, eval_source=absent), "train", "calibration")
    build(tmp_path, recipe(absent, evaluation=5, eval_source=held), "eval")


def test_too_few_documents_are_counted(tmp_path):
    source = {"files": [written(tmp_path / "a.json", records(5) + records(2))]}
    message = refusal(tmp_path, source, train=3, evaluation=2, calibration=1)
    assert (
        "a.json: 5 distinct documents, but 2 were asked for evaluation, 3 for training, 1 for "
        "calibration and 0 to confirm" in message
    )
    message = refusal(tmp_path, source, evaluation=5)
    assert "5 were asked for evaluation, the rest for training, 0 for calibration" in message
    message = refusal(tmp_path, source, "eval", evaluation=6, eval_source=source)
    assert "6 were asked for evaluation, 0 for training, 0 for calibration" in message


def test_a_synthetic_source_gives_as_many_documents_as_are_asked_for(tmp_path):
    source = {"synthetic": "code"}
    train, evaluation, _, counts = build(tmp_path, recipe(source, 800, 100))
    assert counts["records"] - counts["duplicates"] == 900
    more = build(tmp_path, recipe(source, 1600, 100, 50))
    assert (more[0][:800], more[1]) == (train, evaluation)
    identities = [one.document for split in more[:3] for one in split]
    assert len(set(identities)) == len(identities) == 1750
    assert "give train_documents a number" in refusal(tmp_path, source)


def test_a_synthetic_source_runs_dry_with_a_message(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "draw", lambda domain, seed: itertools.repeat(records(1)[0]))
    message = refusal(tmp_path, {"synthetic": "code"}, train=5)
    assert "the synthetic domain code: 1 distinct documents" in message


GOOD = '{"prompt": "a", "response": "b"}'


def test_turns_may_be_json_text_as_in_csv(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    document = only_document(tmp_path, {"messages": json.dumps(turns)})
    assert document == only_document(tmp_path, {"messages": turns})
    wrong = {"files": [written(tmp_path / "a.json", [{"messages": "[half"}])]}
    assert "'messages' must be a list of messages, not '[half'" in refusal(tmp_path, wrong)


def test_a_folders_links_are_followed_and_lead_somewhere(tmp_path):
    (tmp_path / "there").mkdir()
    written(tmp_path / "there" / "a.jsonl", records(3))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "there")
    (folder / "again").symlink_to(folder)
    train, *_ = build(tmp_path, recipe({"files": [str(folder)]}))
    assert len(train) == 2
    (folder / "b.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    assert "b.jsonl: no such file" in refusal(tmp_path, {"files": [str(folder)]})


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson"])
def test_json_is_a_list_or_lines_whatever_its_name(tmp_path, name):
    rows = [json.dumps(record) for record in records(3)]
    found = [
        build(tmp_path / str(number), recipe({"files": [written(tmp_path / name, content)]}))[0]
        for number, content in enumerate(
            (
                "\n".join(rows),
                "\r\n".join(rows) + "\r\n",
                "\ufeff" + "\n".join(rows),
                f"[{','.join(rows)}]",
                f"\ufeff\n [{', '.join(rows)}]",
            )
        )
    ]
    assert all(one == found[0] for one in found) and len(found[0]) == 2  # one is evaluated


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", "a.json: the file holds no records"),
        ("a.jsonl", "", "a.jsonl: the file holds no records"),
        ("a.csv", "prompt,response\n", "a.csv: the file holds no records"),
        ("a.csv", "", "a.csv: the file holds no records"),
        (
            "a.csv",
            "prompt,response\na,b\nc,d,e\n",
            "a.csv, at or after line 3: not CSV in UTF-8: more",
        ),
        (
            "a.csv",
            "text,text\na,b\n",
            "a.csv, at or after line 1: not CSV in UTF-8: the header names",
        ),
        ("a.csv", 'text\na\n"b\n', "a.csv, at or after line 2: not CSV"),
        ("a.csv", b"text\na\n\xff\n", "not CSV in UTF-8: 'utf-8' codec can't decode"),
        ("a.jsonl.gz", "{}", "a.jsonl.gz: the file cannot be read: zlib inflate failed"),
        ("a.json", "[]", "a.json: the file holds no records"),
        ("a.json", "[{]", "a.json, line 1, column 3: not JSON"),
        ("a.json", "[\n{'a': 1}]", "a.json, line 2, column 2: not JSON"),
        ("a.json", '{"data": [1]}', "a.json, line 1: no response among its columns ['data']"),
        ("a.json", f"[{GOOD}, 3]", "a.json, record 2: a record must be an object, not 3"),
        ("a.json", b'["\xff"]', "a.json, line 1: not UTF-8"),
        ("a.json", "[" * 100_000, "a.json, line 1: JSON that Python cannot hold"),
        ("a.json", f"[{'1' * 9999}]", "a.json, line 1: JSON that Python cannot hold"),
        ("a.jsonl", "\n\n", "a.jsonl: the file holds no records"),
        ("a.jsonl", f'{GOOD}\n\n{{"a', "a.jsonl, line 3, column 2: not JSON"),
        ("a.json", '{\n"data": []}', "a.json, line 1: a record goes over several lines"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\nsize 3\n", "run git lfs pull"),
        ("a.jsonl", f"{GOOD}\n[1]", "a.jsonl, line 2: a record must be an object, not [1]"),
        ("a.jsonl", GOOD.encode() + b"\n\xff", "a.jsonl, line 2: not UTF-8"),
        ("a.jsonl", GOOD.encode("utf-16"), "a.jsonl, line 1: not UTF-8"),
        (
            "a.parquet",
            "PAR1 not really PAR1",
            "a.parquet, after row 0: not a readable Parquet file",
        ),
        (
            "a.parquet",
            [{"prompt": "a", "response": b"b"}],
            "a.parquet, row 1: 'response' must be text",
        ),
        ("a.doc", "prompt", "a.doc: unknown kind of file; use .json, .jsonl"),
    ],
)
def test_a_bad_file_is_named_with_the_place(tmp_path, name, content, message):
    assert message in refusal(tmp_path, {"files": [written(tmp_path / name, content)]})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a"}, "no response among its columns ['prompt']; a record needs"),
        ({"prompt": "a", "response": None}, "no response among its columns"),
        ({"prompt": "a", "response": " \n"}, "'response' is empty"),
        ({"prompt": "", "response": "b"}, "'prompt' is empty"),
        ({"prompt": [], "response": "b"}, "'prompt' is empty"),
        ({"prompt": "a", "response": 3}, "'response' must be text, not 3"),
        ({"prompt": "a", "response": "\ud800"}, "'response' holds half of a surrogate pair"),
        ({"instruction": "a", "input": 3, "output": "b"}, "'input' must be text, not 3"),
        ({"prompt": "a", "completion": USER}, "'completion' holds no assistant turn"),
        ({"messages": USER}, "its messages hold no assistant turn"),
        (
            {"messages": [{"role": "assistant", "content": "b"}]},
            "its messages begin with the response",
        ),
        ({"messages": "a"}, "'messages' must be a list of messages, not 'a'"),
        ({"messages": ["a"]}, "'messages' must be a list of messages, not ['a']"),
        (
            {"messages": [{"role": ["user"], "content": "a"}]},
            "'messages' has a message with role ['user']",
        ),
        (
            {"messages": [{"role": "oracle", "content": "a"}]},
            "'messages' has a message with role 'oracle'",
        ),
        (
            {"prompt": "a", "response": "b", "completion": "c"},
            "prompt/response and prompt/completion are different documents; name one of them in",
        ),
        ({"prompt": "a", "response": "b", "messages": [*USER, ANSWER]}, "messages and prompt/resp"),
        ({"question": "a", "answer": "b", "text": "a passage"}, "'text' beside 'question/answer'"),
        ({"text": "a", "context": "b"}, "'text' beside 'context'"),
        (
            {"prompt": "a", "response": "b", "tools": ["c"]},
            "'tools' beside 'prompt/response' would",
        ),
        ({"messages": [*USER, ANSWER], "context": "c"}, "'context' beside 'messages' would be"),
        (
            {"messages": [{"role": "system", "content": "s"}, *USER, ANSWER], "system": "t"},
            "it has two system prompts",
        ),
        ({"prompt": "a", "response": "b", "history": [["a"]]}, "'history' must hold pairs, not"),
        ({"prompt": "a", "response": "b", "history": "c"}, "'history' must be a list of messages"),
        (
            {"messages": [*USER, {**ANSWER, "reasoning_content": "r"}]},
            "its answer has 'reasoning_co",
        ),
        ({"messages": [*USER, {**ANSWER, "tool_calls": [{}]}]}, "its answer has 'tool_calls'"),
        ({"messages": [*USER, {**ANSWER, "weight": 0}]}, "its answer has weight 0, but would be"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]},
            "'content' must be text, not [{'type': 'image'}]",
        ),
        ({"messages": [{"role": "user"}]}, "'content' must be text, not None"),
        ({"text": ""}, "'text' is empty"),
    ],
)
def test_a_bad_record_is_named_with_the_place(tmp_path, record, message):
    name = written(tmp_path / "a.json", [*records(3), record])
    refused = refusal(tmp_path, {"files": [name]})
    assert f"a.json, record 4: {message}" in refused
    assert refused.endswith("correct or remove the record, or set invalid_records: skip")


def test_invalid_records_are_counted_and_skipped_if_one_says_so(tmp_path, capsys):
    good, bad = records(20), {"prompt": "what?", "response": " "}
    source = {"files": [written(tmp_path / "a.jsonl", [*good[:7], bad, *good[7:], bad, bad])]}
    refused = refusal(tmp_path, source)
    assert "a.jsonl, line 8: 'response' is empty" in refused and "(and 2 more like it)" in refused
    skipping = recipe(source | {"invalid_records": "skip"}, evaluation=5)
    skipped = build(tmp_path, skipping)
    counts = skipped[-1]
    assert (counts["records"], counts["duplicates"], counts["invalid_records"]) == (23, 0, 3)
    log = capsys.readouterr().err
    assert "3 of 23 records skipped, the first is " in log and "a.jsonl, line 8" in log
    clean = {"files": [written(tmp_path / "b.jsonl", good)]}
    assert build(tmp_path, recipe(clean, evaluation=5))[:3] == skipped[:3]


def test_a_missing_file_an_empty_folder_and_a_damaged_parquet_are_named(tmp_path):
    assert "a.json: no such file" in refusal(tmp_path, {"files": [str(tmp_path / "a.json")]})
    (tmp_path / "b.json").mkdir()
    assert "b.json: holds no file to read" in refusal(
        tmp_path, {"files": [str(tmp_path / "b.json")]}
    )
    path = tmp_path / "c.parquet"
    assert "c.parquet: no such file" in refusal(tmp_path, {"files": [str(path)]})
    written(path, records(5000))
    content = bytearray(path.read_bytes())
    content[100:200] = bytes(100)
    path.write_bytes(content)
    assert "c.parquet, after row 0: not a readable" in refusal(tmp_path, {"files": [str(path)]})
    path = compressed(
        tmp_path / "d.jsonl.gz", b"".join(b'{"text": "%d"}\n' % n for n in range(9999))
    )
    (tmp_path / "d.jsonl.gz").write_bytes((tmp_path / "d.jsonl.gz").read_bytes()[:-99])
    assert "d.jsonl.gz: the file cannot be read: Truncated" in refusal(tmp_path, {"files": [path]})


def test_a_local_folder_is_a_dataset_that_leaves_no_copy(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    written(folder / "a.jsonl", [{**record, "kind": "x"} for record in records(5)])
    source = {"dataset": str(folder)}
    counts = build(tmp_path, recipe({**source, "where": {"kind": "x"}}), "train")[1]
    assert counts["records"] == 5
    message = refusal(tmp_path, {**source, "split": "test"})
    assert "data [test]: the dataset cannot be loaded: " in message
    (folder / "a.jsonl").write_text('{"prompt": "a", "resp')
    assert "the dataset cannot be loaded: " in refusal(tmp_path, source)
    assert not (tmp_path / "cache").exists()


def test_a_dataset_that_cannot_be_reached_is_named(tmp_path, monkeypatch):
    import datasets

    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach the Hub.\nTraceback and more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = refusal(tmp_path, {"dataset": "org/name", "revision": "a" * 40})
    assert message.startswith(
        "org/name [train]: the dataset cannot be loaded: Couldn't reach the Hub; "
    )


def test_a_dataset_of_the_hub_is_taken_from_the_cache_at_its_revision_only(tmp_path):
    """Offline, by the library itself: it would hand out another version than was asked for."""
    import datasets

    file, commit = written(tmp_path / "a.jsonl", records(9)), "a" * 40
    cache = tmp_path / "home" / "datasets"
    datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))
    # As it lies after a download: by repository, configuration, version and commit.
    (made,) = (info.parent for info in cache.glob("json/*/*/*/dataset_info.json"))
    version = cache / "org___name" / "default" / "0.0.0" / commit
    version.parent.mkdir(parents=True)
    made.rename(version)
    (version / "json-train.arrow").rename(version / "name-train.arrow")
    info = json.loads((version / "dataset_info.json").read_text())
    (version / "dataset_info.json").write_text(json.dumps(info | {"dataset_name": "name"}))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    for revision, status in ((commit, 0), ("main", 0), ("b" * 40, 1)):
        settings = recipe({"dataset": "org/name", "revision": revision}).model_dump_json(
            exclude_defaults=True
        )
        program = (
            "from pathlib import Path; from mergelaw.data.documents import *;"
            f"recipe = SplitRecipe.model_validate_json({settings!r});"
            f"write_split(recipe, 'train', {{}}, Path({str(tmp_path / revision)!r}))"
        )
        ended = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == status, ended.stderr
    assert (
        f"org/name [train]: revision {'b' * 40} is not in the cache, {commit} is;" in ended.stderr
    )


def folders(tmp_path, **domains):
    """Folders of splits by domain, each from the numbers of its records."""
    by_domain = {}
    for domain, numbers in domains.items():
        name = written(tmp_path / f"{domain}.json", [records(1, n)[0] for n in numbers])
        settings = recipe({"files": [name]}, train=0, evaluation=len(numbers))
        by_domain[domain] = tmp_path / domain
        write_split(settings, "eval", {}, by_domain[domain])
    return by_domain


def test_overlap_of_splits_is_refused_across_domains(tmp_path):
    train = folders(tmp_path, a=[1, 2], b=[1, 2, 4])
    evaluation = folders(tmp_path, c=[3], d=[5, 6])
    calibration = folders(tmp_path, e=[7])
    check_overlap(train, evaluation, calibration)
    for splits, words in (
        (
            (train, evaluation | folders(tmp_path, f=[1, 2, 7]), {}),
            "a trains on documents that f evaluates on: 2 of",
        ),
        (
            (train, evaluation, folders(tmp_path, g=[8, 6])),
            "g calibrates on documents that d evaluates on: 1 of",
        ),
        (
            (train, evaluation, folders(tmp_path, h=[4])),
            "b trains on documents that h calibrates on: 1 of",
        ),
    ):
        with pytest.raises(MergelawError) as caught:
            check_overlap(*splits)
        assert str(caught.value).startswith(words)
        assert "'question " in str(caught.value) and "remove them" in str(caught.value)


def test_domains_that_evaluate_the_same_documents_are_said_or_refused(tmp_path):
    sets = folders(tmp_path, a=[1, 2, 3], b=[3, 4], c=[5])
    (note,) = check_overlap({}, sets, {})
    assert "domains a (3) and b (2): 1 evaluation documents are in both" in note
    with pytest.raises(MergelawError, match="domains b and d: evaluate the same 2 documents"):
        check_overlap({}, sets | folders(tmp_path, d=[4, 3]), {})
    same = folders(tmp_path, e=[6], f=[6])
    assert check_overlap(same, {}, {}) == []  # two experts may learn from one corpus


def test_what_is_not_a_split_is_refused(tmp_path):
    with pytest.raises(MergelawError, match="not a split of a corpus"):
        check_overlap({"a": tmp_path}, {}, {})
    written(tmp_path / "documents.parquet", [{"document": "b"}])
    with pytest.raises(MergelawError, match="not a split of a corpus"):
        read_split(tmp_path)


# Identities of splits


def identities(settings, cache=None):
    names = ("train", "eval", "calibration")
    return [split_identity(settings, name, cache or FileCache()) for name in names]


def test_a_split_of_files_is_known_by_its_documents(tmp_path):
    source = {"files": [written(tmp_path / "a.json", records(30))]}
    settings = recipe(source, evaluation=10, calibration=5)
    train, evaluation, calibration = before = identities(settings)
    assert all(len(identity["documents"]) == 64 for identity in before)
    # Neither the kind of file nor its name, nor the order of its records matters.
    moved = {"files": [written(tmp_path / "b.parquet", records(30)[::-1])]}
    assert identities(recipe(moved, evaluation=10, calibration=5)) == before
    # Another number of documents changes the splits that it is about.
    fewer = identities(recipe(source, train=10, evaluation=10, calibration=4))
    assert fewer[1] == evaluation and fewer[0] != train and fewer[2] != calibration
    assert identities(recipe(source, train=10, evaluation=10, calibration=5))[1:] == before[1:]
    # A document more lands in one split and moves at most one document over each border.
    source = {"files": [written(tmp_path / "a.json", records(31))]}
    documents_before = build(tmp_path, recipe(moved, evaluation=10, calibration=5))[:3]
    documents_after = build(tmp_path, recipe(source, evaluation=10, calibration=5))[:3]
    after = identities(recipe(source, evaluation=10, calibration=5))
    assert [a == b for a, b in zip(after, before, strict=True)] == [
        a == b for a, b in zip(documents_after, documents_before, strict=True)
    ]
    # A new eval_source changes evaluation alone.
    held = {"files": [written(tmp_path / "c.json", records(10, first=50))]}
    apart = identities(recipe(source, evaluation=10, calibration=5, eval_source=held))
    more = {"files": [written(tmp_path / "d.json", records(11, first=50))]}
    other = identities(recipe(source, evaluation=11, calibration=5, eval_source=more))
    assert (other[0], other[2]) == (apart[0], apart[2]) and other[1] != apart[1]


def test_contents_are_remembered_while_a_file_stays(tmp_path, monkeypatch):
    path, file = tmp_path / "a.jsonl", tmp_path / "new" / "digests.json"
    settings = recipe({"files": [written(path, records(5))]})
    os.utime(path, ns=(1, 1))
    before = identities(settings, FileCache(file))
    assert before[0] != before[1]
    monkeypatch.setattr(sources, "_records", None)  # reading would fail
    assert identities(settings, FileCache(file)) == before
    monkeypatch.undo()
    written(path, records(5, first=3))  # of the same size
    os.utime(path, ns=(1, 1))
    changed = identities(settings, FileCache(file))
    assert changed == identities(settings) != before
    with pytest.raises(MergelawError, match=r"a\.jsonl: no such file"):
        path.unlink()
        identities(settings, FileCache(file))


def test_a_split_of_a_hub_dataset_or_a_synthetic_domain_is_its_source_and_counts():
    source = {"dataset": "org/name", "revision": "abc", "where": {"x": 1}}
    train, evaluation, _ = identities(recipe(source, evaluation=7, calibration=3))
    assert evaluation == {"source": source, "seed": 0, "eval_documents": 7}
    assert train == evaluation | {"train_documents": None, "calibration_documents": 3}
    train, evaluation, calibration = identities(recipe({"synthetic": "code"}, 50, 7, 3))
    version = documents.GENERATOR_VERSION
    assert evaluation == {
        "source": {"synthetic": "code"},
        "generator_version": version,
        "seed": 0,
        "eval_documents": 7,
    }
    assert train == evaluation | {"train_documents": 50}
    assert calibration == train | {"calibration_documents": 3}


def test_remembered_identities_need_no_heavy_import(tmp_path):
    settings = recipe({"files": [written(tmp_path / "a.json", records(3))]})
    identities(settings, FileCache(tmp_path / "cache.json"))
    code = (
        "import sys; from pathlib import Path; from mergelaw.data.documents import *;"
        f"recipe = SplitRecipe.model_validate_json({settings.model_dump_json(exclude_defaults=True)!r});"
        f"split_identity(recipe, 'train', FileCache(Path({str(tmp_path / 'cache.json')!r})));"
        "heavy = {'pandas', 'pyarrow', 'datasets', 'torch', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_files_that_changed_after_their_key_was_made_are_noticed(tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    for source in ({"files": [str(tmp_path / "a.jsonl")]}, {"dataset": str(folder)}):
        path = folder / "train.parquet" if "dataset" in source else tmp_path / "a.jsonl"
        written(path, records(9))
        settings = recipe(source)
        identity = split_identity(settings, "train", FileCache())
        write_split(settings, "train", identity, tmp_path / "first")
        written(path, records(9, first=1))
        with pytest.raises(MergelawError, match="changed since the run began; rerun"):
            write_split(settings, "train", identity, tmp_path / "second")
        assert not (tmp_path / "second").exists()


# Files that expand


def repeated(path: Path, text: str, times: int, kind: str) -> Path:
    """A Parquet file that holds a text once and repeats it."""
    index = pa.array([0] * times, pa.int32())
    column = pa.DictionaryArray.from_arrays(index, pa.array([text]))
    table = {"prompt": index, "response": column}
    offsets = pa.array(range(times + 1), pa.int32())
    if kind == "turns":
        turns = pa.StructArray.from_arrays([column, column], ["role", "content"])
        table = {"messages": pa.ListArray.from_arrays(offsets, turns)}
    if kind == "map":
        keys = pa.array(["a"] * times)
        table = {"messages": pa.MapArray.from_arrays(offsets, keys, column)}
    pq.write_table(pa.table(table), path, compression="zstd", store_schema=False)
    return path


@pytest.mark.parametrize("kind", ["text", "turns", "map", "rows", ".gz", ".zst", ".bz2"])
def test_a_few_bytes_that_expand_to_many_are_refused(tmp_path, kind):
    """Before they are in memory."""
    path = tmp_path / "bomb.parquet"
    if kind in ("text", "turns", "map"):
        repeated(path, "x" * (1 << 20), 20_000, kind)
    elif kind == "rows":
        rows = pa.nulls(1 << 20, pa.string())
        with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
            for _ in range(65):
                writer.write_table(pa.table({"text": rows}))
    else:
        path = tmp_path / f"bomb.jsonl{kind}"
        with pa.output_stream(str(path), compression=sources.COMPRESSED[kind]) as stream:
            for _ in range(65):
                stream.write(bytes(1 << 20))
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 32, 1 << 32))\n"
        "from mergelaw.data.recipe import Source\n"
        "from mergelaw.data import sources; from mergelaw.errors import MergelawError\n"
        "sources.ROOM = 1 << 26\n"
        "try: print(len(list(sources.kept_records(Source(files=[sys.argv[1]])))))\n"
        "except MergelawError as error: print(error)"
    )
    command = [sys.executable, "-c", program, str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.startswith(f"{path}: expands from ") and "; remove what" in run.stdout


@pytest.mark.parametrize("kind", ["text", "turns", "map"])
def test_what_is_repeated_within_reason_is_read(tmp_path, kind):
    path = repeated(tmp_path / "a.parquet", "word", 3000, kind)
    found = list(sources.kept_records(Source(files=[str(path)])))
    assert len(found) == 3000
    turn = {"role": "word", "content": "word"}
    last = {"text": {"prompt": 0, "response": "word"}, "turns": {"messages": [turn]}}
    assert found[-1][1] == last.get(kind, {"messages": [("a", "word")]})
