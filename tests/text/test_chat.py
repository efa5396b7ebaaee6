"""Rendered conversations equal transformers', and no conversation runs away."""

# ruff: noqa: E501 - templates are written as checkpoints have them

import json
import time
from pathlib import Path

import pytest

from shared.text.chat import ChatTemplate, ChatTemplateError, load_chat_template
from shared.text.tokenizer import TokenizerError, load_tokenizer
from tests.builders.tokenizers import byte_level, write_tokenizer

CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "additional_special_tokens": ["<extra>"],
}
MESSAGES = [
    {"role": "system", "content": "Be brief.\nBe <kind> & 'good'."},
    {"role": "user", "content": "  héllo 🙂  ", "name": "ann"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": ""},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "ä<b>", "parameters": {"z": 1, "a": [1, 2]}}}]

TEMPLATES = {
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% endif %}"
        "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if loop.index0 == 0 and system_message is defined %}"
        "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "chatml": """
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content | trim ~ '<|im_end|>' ~ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "tools": """
{% if tools %}
Tools:
{% for tool in tools %}
  {{ tool | tojson }}
  {{ tool.function | tojson(indent=2) }}
  {{ tool.function.parameters | tojson(sort_keys=true, separators=(',', ':')) }}
{% endfor %}
{% endif %}
{%- macro say(m, i) -%}[{{ i }}/{{ m.role }}{% if m.name is defined %}:{{ m.name }}{% endif %}]{{ m.content }}{%- endmacro %}
{% set ns = namespace(n=0) %}
{% for m in messages %}
{% if m.role == 'system' %}{% continue %}{% endif %}
{% set ns.n = ns.n + 1 %}
{{ say(m, loop.index) }} {{ loop.last }} {{ loop.length }} {{ loop.revindex }} {{ loop.previtem.role if loop.previtem is defined }}
{% if ns.n > 5 %}{% break %}{% endif %}
{% endfor %}
{% generation %}{{ eos_token }}{% endgeneration %}
{{ strftime_now('%Y') }} {{ 7 * 3 }} {{ 2 ** 5 }} {{ '%s!' % 'x' }} {{ 'ab' * 3 }} {{ [1, 2] + [3] }} {{ extra | default('none') }}
{% for key, value in {'b': 1, 'a': 2} | dictsort %}{{ key }}{{ value }}{% else %}empty{% endfor %}
{% for x in [[1, [2]], [3, []]] recursive %}{{ x }}{{ loop(x[1]) if x is sequence and x[1] is defined and x[1] is iterable }}{% endfor %}
{{ range(3) | list }} {% for a, b in [[1, 2]] if a < b %}{{ a }}{{ b }}{% endfor %}
""",
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = write_tokenizer(tmp_path_factory.mktemp("chat"), byte_level(), **CONFIG)
    return AutoTokenizer.from_pretrained(str(folder))


def rendered(template, messages=MESSAGES, **fields):
    return ChatTemplate({"default": template}, SPECIALS).render(messages, **fields)


SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_rendering_equals_transformers(theirs, name, tools):
    for messages in (MESSAGES, MESSAGES[1:], MESSAGES[1:2]):
        for kwargs in ({}, {"extra": "yes"}, {"add_generation_prompt": False}):
            expected = theirs.apply_chat_template(
                messages,
                tools=tools,
                chat_template=TEMPLATES[name],
                tokenize=False,
                **{"add_generation_prompt": True, **kwargs},
            )
            assert rendered(TEMPLATES[name], messages, tools=tools, template_kwargs=kwargs) == expected


def test_the_bundled_model_s_template_equals_transformers():
    folder = Path(__file__).parents[2] / "ops" / "demo_model" / "model"
    if not (folder / "chat_template.jinja").is_file():
        pytest.skip("the bundled model is not there yet")
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(str(folder)).apply_chat_template(
        MESSAGES[1:2], tokenize=False, add_generation_prompt=True
    )
    template = load_chat_template(folder, load_tokenizer(folder))
    assert template is not None and template.render(MESSAGES[1:2]) == expected


def write(folder, **files):
    write_tokenizer(folder, byte_level(), **CONFIG)
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


def test_the_template_is_found_in_each_place(tmp_path):
    own = {**CONFIG, "chat_template": "config"}
    folder = write_tokenizer(tmp_path / "a", byte_level(), **own)
    tokenizer = load_tokenizer(folder)
    assert load_chat_template(folder, tokenizer).render(MESSAGES) == "config"
    (folder / "chat_template.jinja").write_text("file")
    assert load_chat_template(folder, tokenizer).render(MESSAGES) == "file"
    (tmp_path / "given.jinja").write_text("given")
    assert load_chat_template(folder, tokenizer, str(tmp_path / "given.jinja")).render(MESSAGES) == "given"
    plain = write_tokenizer(tmp_path / "b", byte_level(), **CONFIG)
    assert load_chat_template(plain, tokenizer) is None


def test_named_templates_are_chosen_as_transformers_chooses(tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    folder = write_tokenizer(tmp_path / "a", byte_level(), **CONFIG, chat_template=named)
    template = load_chat_template(folder, load_tokenizer(folder))
    assert (template.render(MESSAGES), template.render(MESSAGES, tools=TOOLS)) == ("plain", "tools")
    only = [{"name": "rag", "template": "x"}]
    folder = write_tokenizer(tmp_path / "b", byte_level(), **CONFIG, chat_template=only)
    with pytest.raises(ChatTemplateError, match="no default"):
        load_chat_template(folder, load_tokenizer(folder)).render(MESSAGES)


@pytest.mark.parametrize("declared", [7, [{"name": "default"}], {"default": "x"}])
def test_a_malformed_template_is_refused_by_name(tmp_path, declared):
    folder = write_tokenizer(tmp_path / "odd", byte_level(), **CONFIG, chat_template=declared)
    with pytest.raises(TokenizerError, match=r"chat template of .*odd"):
        load_chat_template(folder, load_tokenizer(folder))


def test_additional_template_files_are_read(tmp_path):
    folder = write_tokenizer(tmp_path / "a", byte_level(), **CONFIG)
    (folder / "chat_template.jinja").write_text("plain")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    template = load_chat_template(folder, load_tokenizer(folder))
    assert template.render(MESSAGES, tools=TOOLS) == "tools"


def test_a_template_that_is_not_jinja_is_refused_at_start(tmp_path):
    with pytest.raises(TokenizerError, match="not valid"):
        ChatTemplate({"default": "{% for %}"}, {})
    folder = write_tokenizer(tmp_path / "a", byte_level(), **CONFIG)
    (tmp_path / "latin").write_bytes(b"\xe9")
    for name, why in (("none", "No such file or directory"), ("a", "Is a directory"), ("latin", "it is not UTF-8")):
        with pytest.raises(TokenizerError, match=f"^--chat-template: cannot read {tmp_path / name}: {why}$"):
            load_chat_template(folder, load_tokenizer(folder), str(tmp_path / name))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[99].content }}", "refuses this conversation"),
        ("{{ 1 // 0 }}", "fails on this conversation"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "nests too deeply"),
        ("{{ messages.append(1) }}", "refuses this conversation"),
        ("{{ ''.__class__.__mro__ }}", "refuses this conversation"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", "refuses this conversation"),
    ],
)
def test_a_template_that_fails_says_so_without_a_traceback(template, message):
    with pytest.raises(ChatTemplateError, match=message):
        rendered(template)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% set r = range(3000) | list %}{% for i in r %}{% for j in r %}{% for k in r %}{% endfor %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(n=2) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ 10 ** 100000000 }}",
        "{% for i in range(99999) %}{{ 'xxxxxxxxxx' * 100 }}{% endfor %}",
        "{{ range(10 ** 9) | list }}",
    ],
)
def test_a_rendering_that_runs_away_is_ended(template):
    begin = time.monotonic()
    with pytest.raises(ChatTemplateError):
        rendered(template)
    assert time.monotonic() - begin < 8


def test_an_empty_conversation_is_refused():
    with pytest.raises(ChatTemplateError, match="empty"):
        rendered("x", [])


def test_client_s_variables_cannot_replace_the_conversation():
    assert rendered("{{ messages | length }}", template_kwargs={"messages": []}) == str(len(MESSAGES))


def test_json_of_a_tool_keeps_its_order_and_letters():
    assert rendered("{{ tools[0] | tojson }}", tools=TOOLS) == json.dumps(TOOLS[0], ensure_ascii=False)


@pytest.mark.parametrize(
    ("sources", "takes"),
    [
        ({"default": "{% if tools %}{{ tools | tojson }}{% endif %}"}, True),
        ({"default": "{% if x is defined %}{% set tools = x %}{% endif %}{{ tools or '' }}"}, True),
        ({"default": "{{ messages[0].content }} tools"}, False),
        ({"default": "{{ messages }}", "tool_use": "{{ tools }}"}, True),
    ],
)
def test_a_template_takes_tools_if_it_asks_for_them(sources, takes):
    assert ChatTemplate(sources, {}).takes_tools is takes
