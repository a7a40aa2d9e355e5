"""Chat templates: prompts in the format that a chat model was trained with.

A template is written in Jinja and shipped with a checkpoint, in tokenizer_config.json or
chat_template.jinja. Templates are rendered in Jinja's sandbox, since a checkpoint may come from an
untrusted source.
"""

import dataclasses
import functools
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from gkd_jax.common import hub

Message = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a Hugging Face checkpoint.

    Attributes:
      path: directory of a checkpoint, or its name on the hub.
      system: system message at the start of every conversation, if any.
      settings: additional variables of the template, such as {'enable_thinking': False} (Qwen 3).
    """

    path: str
    system: str | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def render(self, messages: Sequence[Message]) -> str:
        """Returns the prompt of a model: the conversation and the start of the model's answer.

        Args:
          messages: mappings with 'role' ('user', 'assistant' or 'system') and 'content'.

        Raises:
          FileNotFoundError: the checkpoint has no template.
          ValueError: the template is broken or rejects the messages.
        """
        if self.system is not None:
            messages = [{"role": "system", "content": self.system}, *messages]
        template, special = _load(os.fspath(self.path))
        try:
            return template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                **special,
                **self.settings,
            )
        # A template contains code, which may raise any exception.
        except Exception as error:
            raise ValueError(
                f"the chat template of {self.path} refuses a conversation of the roles "
                f"{[message.get('role') for message in messages]}: {error}. Set "
                "ChatTemplate.system to None if it knows no system message, or take another path."
            ) from error

    def __hash__(self) -> int:
        return hash((self.path, self.system, json.dumps(dict(self.settings), sort_keys=True)))


@functools.cache
def _load(path: str) -> tuple[Any, dict[str, str]]:
    """Returns the compiled template and the special tokens that it may use."""
    try:
        sandbox = importlib.import_module("jinja2.sandbox")
    except ImportError as error:
        raise ValueError(
            f"ChatTemplate needs the package jinja2, which cannot be imported ({error}). Install "
            "it with: pip install 'gkd_jax[hf]'"
        ) from error
    folder = hub.find(path)
    settings: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").exists():
        settings = dict(json.loads((folder / "tokenizer_config.json").read_text()))
    file = folder / "chat_template.jinja"
    text = file.read_text() if file.exists() else settings.get("chat_template")
    if isinstance(text, list):  # Older files have several named templates.
        text = {named["name"]: named["template"] for named in text}.get("default")
    if not text:
        raise FileNotFoundError(
            f"ChatTemplate.path names {path!r}, which has no chat template (chat_template.jinja, "
            "or in tokenizer_config.json). Take a checkpoint of a chat model, or leave Chat out."
        )
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    special = {
        name: token.get("content", "") if isinstance(token, dict) else token
        for name, token in settings.items()
        if name in ("bos_token", "eos_token", "pad_token", "unk_token") and token is not None
    }
    try:
        return environment.from_string(text), special
    except importlib.import_module("jinja2").TemplateError as error:
        raise ValueError(
            f"the chat template of {path} is broken: {error}. Copy the checkpoint again."
        ) from error


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)
