import json

import pytest

from gkd_jax.data import recipes
from gkd_jax.data.metrics.gsm8k import gsm8k_accuracy, parse_answer
from gkd_jax.data.metrics.text_metrics import bleu, exact_match, rouge
from gkd_jax.data.mixtures import Mixture
from gkd_jax.data.pipeline import DatasetConfig
from gkd_jax.data.registry import get_task
from gkd_jax.data.sources import InMemory, JsonLines, ParallelText, TfdsSource, Tsv
from gkd_jax.data.vocabularies import ByteVocabulary


def test_recipes_default_to_tfds():
    task = recipes.wmt14_en_de()
    assert task.sources["train"] == TfdsSource("wmt14_translate/de-en", "train")
    assert task.sources["validation"] == TfdsSource("wmt14_translate/de-en", "validation")
    assert task.metrics == (bleu,)
    example = task.to_text({"en": "A house.", "de": "Ein Haus."})
    assert example.inputs == "translate English to German: A house."
    assert (example.targets, example.references) == ("Ein Haus.", ("Ein Haus.",))

    task = recipes.xsum()
    assert task.sources["test"] == TfdsSource("xsum", "test")
    assert task.metrics == (rouge,)
    example = task.to_text({"document": "Long.", "summary": "Short."})
    assert (example.inputs, example.targets) == ("summarize: Long.", "Short.")

    assert recipes.gsm8k().sources["test"] == TfdsSource("gsm8k", "test")
    assert isinstance(recipes.flan2021().sources["train"], Mixture)


@pytest.mark.parametrize("name", ["arithmetic", "flan2021", "gsm8k", "wmt14_en_de", "xsum"])
def test_recipes_are_known_by_name(name):
    assert get_task(name).name == name


def test_files_at_hand_take_the_place_of_tfds(tmp_path):
    (tmp_path / "a.en").write_text("one\ntwo\n", "utf-8")
    (tmp_path / "a.de").write_text("eins\nzwei\n", "utf-8")
    files = ParallelText(tmp_path / "a.en", tmp_path / "a.de")
    task = recipes.wmt14_en_de(train=files, prefix="en-de: ")
    assert task.sources["validation"] == TfdsSource("wmt14_translate/de-en", "validation")
    example = task.to_text(task.sources["train"].open()[1])
    assert (example.inputs, example.targets) == ("en-de: two", "zwei")

    (tmp_path / "x.jsonl").write_text('{"article": "a", "abstract": "b"}\n', "utf-8")
    task = recipes.xsum(
        train=JsonLines(tmp_path / "x.jsonl"), inputs_field="article", targets_field="abstract"
    )
    assert task.to_text(task.sources["train"].open()[0]).targets == "b"


def test_a_missing_field_is_a_clear_error(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"article": "a", "abstract": "b"}\n', "utf-8")
    config = DatasetConfig(
        task=recipes.xsum(train=JsonLines(tmp_path / "x.jsonl")),
        split="train",
        feature_lengths={"inputs": 16, "targets": 16},
        batch_size=1,
        vocabulary=ByteVocabulary(),
    )
    with pytest.raises(ValueError, match=r"wants the field 'document'.*it has 'article'"):
        config.build()


_GSM8K = InMemory(
    [
        {
            "question": f"How many are {number} and 1?",
            "answer": f"He has {number}.\n{number}+1=<<{number}+1={number + 1}>>{number + 1}.\n"
            f"#### {number + 1}",
        }
        for number in range(8)
    ]
)


def test_gsm8k_asks_after_chain_of_thought_exemplars():
    task = recipes.gsm8k(train=_GSM8K, test=_GSM8K)
    example = task.to_text(task.sources["test"].open()[2])
    questions = example.inputs.split("Q: ")
    assert len(questions) == 6
    assert questions[0] == ""
    assert questions[1].startswith("There are 15 trees in the grove.")
    assert questions[1].endswith("The answer is 6.\n\n")
    assert questions[5] == "How many are 2 and 1?\nA:"
    assert example.targets == "He has 2. 2+1=3. The answer is 3."
    assert example.references == ("3",)
    scores = task.metrics[0]([list(example.references)], [example.targets])
    assert scores["gsm8k_accuracy"].value == 100.0


def test_the_exemplars_are_right():
    numbers = [parse_answer(answer) for _, answer in recipes.CHAIN_OF_THOUGHT_EXEMPLARS]
    assert numbers == [6, 5, 39, 8]


def test_gsm8k_formats():
    raw = _GSM8K.open()[4]
    original = recipes.gsm8k(num_exemplars=0, answer_format="original").to_text(raw)
    assert original.inputs == "Q: How many are 4 and 1?\nA:"
    assert original.targets == raw["answer"]
    assert original.references == ("5",)
    generated = recipes.gsm8k(num_exemplars=0).to_text({"question": "q", "answer": "So 5."})
    assert (generated.targets, generated.references) == ("So 5.", ("So 5.",))
    flan = recipes.gsm8k(
        num_exemplars=0, question_field="input", rationale_field="rationale"
    ).to_text({"input": "q", "answer": "5", "rationale": "4 + 1 = 5."})
    assert (flan.targets, flan.references) == ("4 + 1 = 5. The answer is 5.", ("5",))


def test_exemplars_from_a_source_never_hold_the_question_itself():
    task = recipes.gsm8k(num_exemplars=2, exemplars=_GSM8K)
    source = _GSM8K.open()
    for index, exemplars in ((0, (1, 2)), (1, (0, 2)), (5, (0, 1))):
        prompt = task.to_text(source[index]).inputs
        assert [int(part.split(" and")[0]) for part in prompt.split("How many are ")[1:]] == [
            *exemplars,
            index,
        ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_exemplars": 5}, "num_exemplars must be from 0 to 4; got 5"),
        ({"num_exemplars": 9, "exemplars": _GSM8K}, "num_exemplars must be from 0 to 8; got 9"),
        ({"answer_format": "cot"}, "answer_format must be one of .*; got 'cot'"),
    ],
)
def test_gsm8k_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        recipes.gsm8k(**settings)


def test_arithmetic_needs_no_data():
    task = recipes.arithmetic(num_train=100, num_heldout=20, max_steps=2)
    config = DatasetConfig(
        task=task,
        split="test",
        feature_lengths={"inputs": 96, "targets": 48},
        batch_size=8,
        vocabulary=ByteVocabulary(),
    )
    dataset = config.build()
    assert dataset.num_examples == 20
    batch, _ = next(iter(dataset.eval_batches()))
    text = config.vocabulary.decode(batch.targets[0])
    example = dataset.raw(0)
    assert text == example.targets
    assert gsm8k_accuracy([list(example.references)], [text])["gsm8k_accuracy"].value == 100.0


def test_instruction_reads_json_lines_and_flan_tsv(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"inputs": "Say yes.", "targets": "yes"}\n', "utf-8")
    (tmp_path / "b.tsv").write_text("2+2?\\nOptions:\\n- 4\t4\tTwo and two.\n", "utf-8")
    task = recipes.instruction(
        train=Mixture((JsonLines(tmp_path / "a.jsonl"), recipes.flan_cot_tsv(tmp_path / "b.tsv"))),
        output_parser=recipes.final_answer,
    )
    assert set(task.sources) == {"train"}
    assert task.metrics == (exact_match,)
    source = task.sources["train"].open()
    plain, reasoned = (task.to_text(source[index]) for index in range(2))
    assert (plain.inputs, plain.targets, plain.references) == ("Say yes.", "yes", ("yes",))
    assert reasoned.inputs == "2+2?\nOptions:\n- 4\nLet's think step by step."
    assert reasoned.targets == "Two and two. The answer is 4."
    assert reasoned.references == ("4",)
    assert task.output_parser("It is four. The answer is 4.") == "4"


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("So the answer is (C).", "(C)"),
        ("The answer is: yes", "yes"),
        ("The answer is a. No: the final answer is b.\nQ: next", "b"),
        (" no phrase. ", "no phrase."),
    ],
)
def test_final_answer(output, answer):
    assert recipes.final_answer(output) == answer


def test_real_gsm8k_and_flan_files(external_data):
    files = external_data / "gsm8k"
    task = recipes.gsm8k(
        train=JsonLines(files / "train.jsonl"), test=JsonLines(files / "test.jsonl")
    )
    source = task.sources["train"].open()
    raw_source = [json.loads(line) for line in (files / "train.jsonl").open(encoding="utf-8")]
    for index in range(0, len(source), 50):
        example = task.to_text(source[index])
        assert "<<" not in example.targets
        assert "\n" not in example.targets
        assert parse_answer(example.targets) == parse_answer(raw_source[index]["answer"])
        assert parse_answer(example.references[0]) == parse_answer(raw_source[index]["answer"])

    folder = external_data / "flan_cot" / "cot_data"
    sources = tuple(
        recipes.flan_cot_tsv(folder / f"{name}_train.tsv") for name in ("creak", "qasc", "gsm8k")
    )
    task = recipes.instruction(train=Mixture(sources), output_parser=recipes.final_answer)
    source = task.sources["train"].open()
    assert len(source) == 6915 + 1084 + 7473
    assert task.to_text(source[0]).references == ("no",)
    gsm8k = recipes.gsm8k(
        train=Tsv(folder / "gsm8k_train.tsv", columns=("input", "answer", "rationale")),
        question_field="input",
        rationale_field="rationale",
    )
    assert gsm8k.to_text(gsm8k.sources["train"].open()[0]).references == ("72",)
