"""Chat templates against transformers' own rendering."""

import json

import hf_tokenizers
import pytest

from gkd_jax.data.chat import Chat, ChatTemplate
from gkd_jax.data.sources import InMemory

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


def test_examples_are_worded_as_conversations(tmp_path):
    folder = checkpoint(tmp_path, CHATML)
    source = InMemory([{"inputs": "Hi", "targets": "a"}, {"inputs": CONVERSATION, "targets": "b"}])
    template = ChatTemplate(str(folder), settings={"enable_thinking": False})
    opened = Chat(source, template).open()
    assert opened[0] == {
        "inputs": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think></think>",
        "targets": "a",
    }
    assert "How many \u00e4pples?<|im_end|>" in opened[1]["inputs"]
    other = Chat(source, ChatTemplate(str(folder))).open()
    assert len({opened.fingerprint, other.fingerprint, source.open().fingerprint}) == 3
    assert hash(template) != hash(ChatTemplate(str(folder)))


def test_what_is_wrong_is_said(tmp_path):
    source = InMemory([{"inputs": "Hi"}])
    with pytest.raises(FileNotFoundError, match=r"which has no chat template"):
        Chat(source, ChatTemplate(str(hf_tokenizers.save(tmp_path / "none")))).open()
    broken = checkpoint(tmp_path / "broken", "{% if %}")
    with pytest.raises(ValueError, match=r"chat template of .*broken is broken"):
        Chat(source, ChatTemplate(str(broken))).open()
    llama = ChatTemplate(str(checkpoint(tmp_path / "llama", LLAMA)))
    with pytest.raises(ValueError, match=r"roles \['user', 'user'\]: Roles must alternate"):
        llama.render([CONVERSATION[0], CONVERSATION[0]])
    with pytest.raises(ValueError, match=r"Chat\.inputs wants the field 'question'"):
        Chat(source, llama, inputs="question").open()
    # A template that came with a checkpoint reaches nothing outside.
    evil = checkpoint(tmp_path / "evil", "{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ValueError, match=r"refuses a conversation"):
        ChatTemplate(str(evil)).render(CONVERSATION)
    assert json.loads((evil / "tokenizer_config.json").read_text())["chat_template"]
