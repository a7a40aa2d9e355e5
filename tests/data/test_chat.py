"""Chat templates against transformers' own rendering."""

import json

import hf_tokenizers
import pytest

from gkd_jax.data.chat import ChatTemplate
from gkd_jax.data.hf_tokenizer import HFTokenizer
from gkd_jax.data.pipeline import DatasetConfig
from gkd_jax.data.sources import InMemory
from gkd_jax.data.task import Task, TextExample

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}"
    "{% endif %}"
)
LLAMA = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + (system + ' ' if system else '') + "
    "message['content'] | trim + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
CONVERSATION = [
    {"role": "user", "content": "Hi "},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "How many \u00e4pples?"},
]


def checkpoint(folder, template):
    return hf_tokenizers.save(folder, chat_template=template)


@pytest.mark.parametrize("template", [CHATML, LLAMA], ids=["chatml", "llama"])
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("as_file", [False, True])
def test_prompts_are_those_of_transformers(tmp_path, template, system, as_file):
    transformers = pytest.importorskip("transformers")
    folder = checkpoint(tmp_path, None if as_file else template)
    if as_file:
        (folder / "chat_template.jinja").write_text(template)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    messages = [{"role": "system", "content": system}] * (system is not None) + CONVERSATION
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(str(folder), system=system).render(CONVERSATION) == expected


def data(folder, **changes):
    task = Task("t", {"train": InMemory([{"q": "Hi", "a": "b"}] * 3)}, to_text)
    settings = dict(
        task=task, split="train", feature_lengths={"inputs": 64, "targets": 8}, batch_size=2,
        vocabulary=HFTokenizer(folder), inputs_eos=False, inputs_bos=True,
    )  # fmt: skip
    return DatasetConfig(**settings | changes)


def to_text(example):
    return TextExample(example["q"], example["a"])


@pytest.mark.pitfall(38)
def test_student_and_teacher_read_their_own_templates(tmp_path):
    """Any task's prompt, worded twice; shown side by side; part of what the data are."""
    folder = checkpoint(tmp_path / "student", CHATML)
    chat = ChatTemplate(str(folder), settings={"enable_thinking": False})
    teacher_chat = ChatTemplate(str(checkpoint(tmp_path / "teacher", LLAMA)), system="Be brief.")
    lengths = {"inputs": 96, "targets": 8, "teacher_inputs": 40}
    config = data(folder, chat=chat, teacher_chat=teacher_chat, feature_lengths=lengths)
    dataset = config.build()
    batch = next(dataset.train_iterator())
    encode = config.vocabulary.encode
    wanted = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think></think>"
    assert batch.inputs[0][batch.inputs_mask[0]].tolist() == [1, *encode(wanted)]
    assert batch.teacher_inputs.shape == (2, 40)
    # The template wrote the beginning of sequence: it is there once.
    own = batch.teacher_inputs[0][batch.teacher_inputs_mask[0]].tolist()
    assert own == [1, *encode("[INST] Be brief. Hi [/INST]")]
    read = batch.as_teacher_reads()
    assert read.inputs is batch.teacher_inputs
    assert read.targets is batch.targets
    assert batch.inputs is not read.inputs
    report = dataset.describe()
    assert "  inputs[0]: '" in report
    assert "teacher_inputs[0]: '[INST] Be brief. Hi [/INST]'" in report
    others = (
        data(folder), data(folder, chat=chat), data(folder, chat=ChatTemplate(str(folder))),
        data(folder, chat=chat, teacher_chat=chat),
    )  # fmt: skip
    fingerprints = {one.build().fingerprint for one in (config, *others)}
    assert len(fingerprints) == 5
    with pytest.raises(ValueError, match=r"unknown features \['teacher_inputs'\]"):
        data(folder, feature_lengths=lengths)


def test_what_is_wrong_is_said(tmp_path):
    folder = hf_tokenizers.save(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"which has no chat template"):
        data(folder, chat=ChatTemplate(str(folder))).build()
    broken = checkpoint(tmp_path / "broken", "{% if %}")
    with pytest.raises(ValueError, match=r"chat template of .*broken is broken"):
        data(folder, teacher_chat=ChatTemplate(str(broken))).build()
    llama = ChatTemplate(str(checkpoint(tmp_path / "llama", LLAMA)))
    with pytest.raises(ValueError, match=r"roles \['user', 'user'\]: Roles must alternate"):
        llama.render([CONVERSATION[0], CONVERSATION[0]])
    # A template that came with a checkpoint reaches nothing outside.
    evil = checkpoint(tmp_path / "evil", "{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ValueError, match=r"refuses a conversation"):
        ChatTemplate(str(evil)).render(CONVERSATION)
    assert json.loads((evil / "tokenizer_config.json").read_text())["chat_template"]
