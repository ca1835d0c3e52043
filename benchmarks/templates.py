"""Chat templates of other families of LMs: which form of answer an LM does best with may depend on how it is spoken to.

A system prompt goes before the first user turn where a family has no turn for it.
"""

from __future__ import annotations

from pathlib import Path

from cotune.lightning_modules import LanguageModel

OWN = "own"
_FIRST = "{% set merged = loop.index0 > 0 and messages[loop.index0 - 1].role == 'system' %}"

TEMPLATES = {
    "llama": (
        "{% for m in messages %}"
        "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "mistral": (
        "{% for m in messages %}" + _FIRST + "{% if m.role == 'assistant' %} {{ m.content | trim }}</s>"
        "{% elif m.role == 'system' %}[INST] {{ m.content | trim }}\n\n"
        "{% else %}{% if not merged %}[INST] {% endif %}{{ m.content | trim }} [/INST]{% endif %}"
        "{% endfor %}"
    ),
    "gemma": (
        "{% for m in messages %}"
        + _FIRST
        + "{% if m.role == 'system' %}<start_of_turn>user\n{{ m.content | trim }}\n\n"
        "{% else %}"
        "{% if not merged %}<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n{% endif %}"
        "{{ m.content | trim }}<end_of_turn>\n{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
}
"""Family -> its template, in Jinja."""


def spoken_to_as(family: str, model: str, folder: Path) -> str:
    """The model under a family's template: a folder of links to its files, and that template; itself for its own."""
    if family == OWN:
        return model
    lm = LanguageModel(model)
    lm.load_tokenizer()
    made = (folder / family).resolve()
    made.mkdir(parents=True, exist_ok=True)
    for file in Path(lm.source).iterdir():
        link = made / file.name
        if not link.exists() and file.name != "chat_template.jinja":
            link.symlink_to(file.resolve())
    (made / "chat_template.jinja").write_text(TEMPLATES[family], encoding="utf-8")
    return str(made)
