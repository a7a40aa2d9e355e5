"""Sources give the examples of files, and say what is wrong with a file and where."""

import gzip
import json
import os
import subprocess
import sys

import pytest

from gkd_jax.data import registry as task_lib
from gkd_jax.data.registry import get_task, register_task
from gkd_jax.data.sources import InMemory, JsonLines, ParallelText, TfdsSource, Tsv
from gkd_jax.data.task import Task, TextExample
from gkd_jax.data.text_files import TextLines


def _all(source):
    return [source[index] for index in range(len(source))]


def _write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_json_lines_reads_plain_gzip_several_and_blank_lines(tmp_path):
    plain = _write(tmp_path / "a.jsonl", '{"q": "eins", "a": ["1", "I"]}\n\n{"q": "zwei"}')
    packed = str(tmp_path / "b.jsonl.gz")
    with gzip.open(packed, "wb") as file:
        file.write('{"q": "dr\u00fcei\u2028"}\r\n'.encode())
    examples = _all(JsonLines((plain, packed)).open())
    assert examples == [{"q": "eins", "a": ["1", "I"]}, {"q": "zwei"}, {"q": "drüei\u2028"}]


def test_tsv_reads_header_or_given_columns_and_keeps_quotes(tmp_path):
    path = _write(tmp_path / "a.tsv", '\ufeffx\ty\n"eins"\t1\n\nzw"ei\t2\r\n')
    expected = [{"x": '"eins"', "y": "1"}, {"x": 'zw"ei', "y": "2"}]
    assert _all(Tsv(path, fields=("y",)).open()) == expected
    assert _all(Tsv((path, path)).open()) == expected * 2
    given = _all(Tsv(path, columns=("a", "b")).open())
    assert given == [{"a": "x", "b": "y"}, *[{"a": e["x"], "b": e["y"]} for e in expected]]


def test_parallel_text_keeps_blank_lines(tmp_path):
    inputs = _write(tmp_path / "a.en", "one\n\nthree\n")
    first = _write(tmp_path / "a1.de", "eins\n")
    rest = _write(tmp_path / "a2.de", "zwei\ndrei")
    examples = _all(ParallelText(inputs, (first, rest)).open())
    assert [tuple(example.values()) for example in examples] == [
        ("one", "eins"),
        ("", "zwei"),
        ("three", "drei"),
    ]


def test_lines_longer_than_a_block_and_characters_across_blocks(tmp_path, monkeypatch):
    lines = ["ä€" * 7, "", "x", "😀" * 9]
    path = _write(tmp_path / "a.txt", "\n".join(lines))
    for block_bytes in (1, 2, 3, 5, 64):
        monkeypatch.setattr("gkd_jax.data.text_files._BLOCK_BYTES", block_bytes)
        text = TextLines((path,), setting="x")
        assert [text[index] for index in range(len(text))] == lines
        broken = _write(tmp_path / "b.txt", "ä€\n😀\n".encode() + b"ok\xc3\n")
        with pytest.raises(ValueError, match="line 3 of which is not UTF-8"):
            TextLines((broken,), setting="x")


def test_url_paths_open_through_fsspec():
    import fsspec

    with fsspec.open("memory://bucket/a.jsonl.gz", "wb") as file:
        file.write(gzip.compress(b'{"q": "1"}\n{"q": "2"}\n'))
    assert _all(JsonLines("memory://bucket/a.jsonl.gz").open()) == [{"q": "1"}, {"q": "2"}]
    with pytest.raises(FileNotFoundError, match=r"JsonLines\.path.*memory://bucket/none"):
        JsonLines("memory://bucket/none.jsonl").open()


def test_fingerprint_follows_content_only(tmp_path):
    path = _write(tmp_path / "a.jsonl", '{"q": "1"}\n')
    packed = str(tmp_path / "b.jsonl.gz")
    with gzip.open(packed, "wb") as file:
        file.write(b'{"q": "1"}\n')
    first = JsonLines(path).open().fingerprint
    assert first == JsonLines(packed).open().fingerprint
    _write(tmp_path / "a.jsonl", '{"q": "2"}\n')
    assert first != JsonLines(path).open().fingerprint
    columns = [Tsv(path, columns=(name,)).open().fingerprint for name in "ab"]
    assert columns[0] != columns[1]
    memory = [InMemory([{"q": value}]).open().fingerprint for value in ("1", "1", "2")]
    assert memory[0] == memory[1] != memory[2]


def test_file_cut_while_read_is_an_error(tmp_path):
    path = _write(tmp_path / "a.tsv", "eins\nzwei\n")
    source = Tsv(path, columns=("x",)).open()
    os.truncate(path, 6)
    assert source[0] == {"x": "eins"}
    with pytest.raises(ValueError, match="became shorter"):
        source[1]


def test_open_files_are_closed_with_their_source(tmp_path):
    path = _write(tmp_path / "a.tsv", "eins\n")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        Tsv(path, columns=("x",)).open()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("make", "content", "error", "message"),
    [
        (JsonLines, None, FileNotFoundError, r"JsonLines\.path .*not exist: '.*/data'"),
        (Tsv, None, FileNotFoundError, r"Tsv\.path .*not exist: '.*/data'"),
        (JsonLines, "", ValueError, r"JsonLines\.path names an empty file: '.*/data'"),
        (JsonLines, "\n \n", ValueError, r"JsonLines\.path names an empty data set: '.*/data'"),
        (Tsv, "a\tb\n", ValueError, r"Tsv\.path names an empty data set: '.*/data'"),
        (Tsv, "", ValueError, r"Tsv\.path names an empty file"),
        (JsonLines, '{"q": 1}\n\n{"q": 1,}\n', ValueError, r"broken JSON .*/data', line 3, column"),
        (JsonLines, '{"q": 1}\n[1]\n', ValueError, r"/data', line 2 holds a list"),
        (JsonLines, b'{"q": "\xe4"}\n', ValueError, r"/data', line 1 of which is not UTF-8"),
        (JsonLines, b'{"q": 1}\n{"q": "\xc3', ValueError, r"/data', line 2 of which is not UTF-8"),
        (
            lambda path: JsonLines(path, fields=("q", "answer")),
            '{"q": 1, "answer": 2}\n{"q": 1, "reply": 2}\n',
            ValueError,
            r"JsonLines\.fields wants the field 'answer', .*line 2 lacks: it has 'q', 'reply'",
        ),
        (
            lambda path: Tsv(path, fields=("c",)),
            "a\tb\n1\t2\n",
            ValueError,
            r"Tsv\.fields wants the field 'c', which '.*data' lacks: it has 'a', 'b'",
        ),
        (Tsv, "a\tb\n1\t2\n1\n", ValueError, r"/data', line 3 has 1 columns where 2 are wanted"),
        (lambda path: JsonLines(()), None, ValueError, r"JsonLines\.path names no file"),
    ],
)
def test_bad_file_is_one_clear_message(tmp_path, make, content, error, message):
    path = tmp_path / "data"
    if content is not None:
        _write(path, content)
    with pytest.raises(error, match=message):
        make(str(path)).open()


def test_folder_and_broken_gzip_are_clear_messages(tmp_path):
    with pytest.raises(ValueError, match=r"JsonLines\.path names .* cannot be read"):
        JsonLines(str(tmp_path)).open()
    whole = gzip.compress(b'{"q": 1}\n' * 1000)
    for name, content in (("cut.gz", whole[: len(whole) // 2]), ("plain.gz", b'{"q": 1}\n')):
        path = _write(tmp_path / name, content)
        with pytest.raises(ValueError, match="not a complete gzip file"):
            JsonLines(path).open()


def test_headers_of_several_files_must_agree(tmp_path):
    first = _write(tmp_path / "a.tsv", "a\tb\n1\t2\n")
    second = _write(tmp_path / "b.tsv", "a\tc\n1\t2\n")
    with pytest.raises(ValueError, match=r"different headers: '.*b\.tsv', line 1"):
        Tsv((first, second)).open()


def test_parallel_line_count_mismatch_gives_both_counts(tmp_path):
    inputs = _write(tmp_path / "a.en", "one\ntwo\nthree\n")
    targets = _write(tmp_path / "a.de", "eins\nzwei\n")
    with pytest.raises(ValueError, match=r"got 3 \(3 in '.*a\.en'\) and 2 \(2 in '.*a\.de'\)"):
        ParallelText(inputs, targets).open()
    with pytest.raises(FileNotFoundError, match=r"ParallelText\.targets_path"):
        ParallelText(inputs, targets + "x").open()


def test_empty_memory_is_refused():
    with pytest.raises(ValueError, match=r"InMemory\.examples is empty"):
        InMemory([]).open()


def test_tfds_missing_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'gkd_jax\[data\]'"):
        TfdsSource("wmt14_translate/de-en", "train").open()


@pytest.mark.slow
def test_tfds_source_reads_text_and_refuses_what_it_cannot(tmp_path):
    tf = pytest.importorskip("tensorflow")
    tfds = pytest.importorskip("tensorflow_datasets")
    rows = {"document": ["dö 0", "dö 1", "dö 2"], "tags": [["a", "b"], ["c", "d"], ["e", "f"]]}
    features = tfds.features.FeaturesDict(
        {"document": tfds.features.Text(), "tags": tfds.features.Sequence(tfds.features.Text())}
    )
    for file_format in ("array_record", "tfrecord"):
        tfds.dataset_builders.store_as_tfds_dataset(
            name=f"tiny_{file_format}",
            version="1.0.0",
            features=features,
            split_datasets={"train": tf.data.Dataset.from_tensor_slices(rows)},
            data_dir=str(tmp_path),
            file_format=file_format,
        )
    source = TfdsSource("tiny_array_record", "train", str(tmp_path)).open()
    assert sorted(_all(source), key=lambda example: example["document"]) == [
        {"document": document, "tags": tags}
        for document, tags in zip(rows["document"], rows["tags"], strict=True)
    ]
    assert source.fingerprint == TfdsSource("tiny_array_record", "train", str(tmp_path)).open(
    ).fingerprint  # fmt: skip
    for name, split, message in (
        ("tiny_tfrecord", "train", "without random access"),
        ("tiny_array_record", "tests", "Unknown split 'tests'"),
        ("no_such_data", "train", "no_such_data not found"),
    ):
        with pytest.raises(ValueError, match=message):
            TfdsSource(name, split, str(tmp_path)).open()


def test_reading_files_imports_no_tensorflow(tmp_path):
    path = _write(tmp_path / "a.jsonl", json.dumps({"q": "1", "a": "2"}) + "\n")
    program = f"""
import sys
from gkd_jax.data.pipeline import DatasetConfig
from gkd_jax.data.sources import JsonLines, ParallelText, Tsv
from gkd_jax.data.task import Task, TextExample
from gkd_jax.data.vocabularies import ByteVocabulary
task = Task("t", {{"train": JsonLines({path!r})}}, lambda e: TextExample(e["q"], e["a"]))
config = DatasetConfig(task, "train", {{"inputs": 8, "targets": 8}}, 2, ByteVocabulary())
next(config.build().train_iterator())
Tsv({path!r}, columns=("q",)).open(), ParallelText({path!r}, {path!r}).open()
heavy = {{"tensorflow", "seqio", "tensorflow_datasets", "sentencepiece", "gin"}}
print(sorted(heavy & set(sys.modules)), flush=True)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    # The iterator's threads are still alive at exit and must not hold it up.
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stderr


@pytest.fixture
def registry(monkeypatch):
    known = {}
    monkeypatch.setattr(task_lib, "_registry", known)
    return known


def _task(name, examples=({"q": "1"},)):
    return Task(name, {"train": InMemory(examples)}, _to_text)


def _to_text(example):
    return TextExample(example["q"], example["q"])


def test_registered_task_is_found_by_name(registry):
    task = register_task(_task("mine"))
    assert get_task("mine") is task
    assert register_task(_task("mine")) == task
    with pytest.raises(ValueError, match="already registered as 'mine'"):
        register_task(_task("mine", ({"q": "2"},)))


def test_unknown_task_names_the_nearest(registry, monkeypatch):
    monkeypatch.setitem(sys.modules, "gkd_jax.data.recipes", sys)
    monkeypatch.delitem(sys.modules, "seqio", raising=False)
    register_task(_task("wmt14_en_de"))
    with pytest.raises(ValueError, match=r"'wmt_en_de' names no task\. Did you mean 'wmt14_en_de'"):
        get_task("wmt_en_de")


def test_task_module_is_imported_first(registry, tmp_path, monkeypatch):
    _write(
        tmp_path / "my_tasks.py",
        "from gkd_jax.data.sources import InMemory\n"
        "from gkd_jax.data.task import Task, TextExample, register_task\n"
        "register_task(Task('theirs', {'train': InMemory([{}])}, lambda e: TextExample('a', 'b')))",
    )
    _write(tmp_path / "my_broken_tasks.py", "import no_such_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert get_task("theirs", module="my_tasks").name == "theirs"
    with pytest.raises(ValueError, match=r"MIXTURE_OR_TASK_MODULE 'my_taks' cannot be imported"):
        get_task("theirs", module="my_taks")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        get_task("theirs", module="my_broken_tasks")


def test_task_without_sources_or_name_is_refused():
    with pytest.raises(ValueError, match=r"Task\.sources of task 'x' is empty"):
        Task("x", {}, _to_text)
    with pytest.raises(ValueError, match=r"Task\.name"):
        Task("", {"train": InMemory([{}])}, _to_text)


def test_real_files(external_data):
    captions = ParallelText(
        external_data / "multi30k" / "train.en.gz", external_data / "multi30k" / "train.de.gz"
    ).open()
    assert len(captions) == 29_000
    assert captions[0] == {
        "inputs": "Two young, White males are outside near many bushes.",
        "targets": "Zwei junge weiße Männer sind im Freien in der Nähe vieler Büsche.",
    }
    problems = JsonLines(external_data / "gsm8k" / "test.jsonl", fields=("question",)).open()
    assert len(problems) == 1319
    assert problems[0]["answer"].endswith("#### 18")
    rationales = Tsv(
        external_data / "flan_cot" / "cot_data" / "creak_train.tsv",
        columns=("input", "answer", "rationale"),
    ).open()
    assert len(rationales) == 6915
    assert {example["answer"] for example in _all(rationales)} == {"yes", "no"}
