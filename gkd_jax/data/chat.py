"""Chat templates: prompts as a chat model was trained to read them.

A template is Jinja, as each family ships it in tokenizer_config.json or chat_template.jinja. It is
run in Jinja's sandbox, since it comes with a checkpoint.
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
      path: a checkpoint's directory, or a name on the hub.
      system: a system message before every conversation; None for none.
      settings: further variables of the template, such as {'enable_thinking': False} (Qwen 3).
    """

    path: str
    system: str | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def render(self, messages: Sequence[Message]) -> str:
        """The text that a model answers: the conversation, and the beginning of its answer.

        Args:
          messages: each with 'role' ('user', 'assistant', 'system') and 'content'.

        Raises:
          FileNotFoundError: the checkpoint has no template.
          ValueError: the template is broken, or refuses the messages.
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
        # A template may fail in any way that its code does.
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
    """The compiled template, and the special tokens that it may name."""
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
    if isinstance(text, list):  # Several by name, as older files have them.
        text = {one["name"]: one["template"] for one in text}.get("default")
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
