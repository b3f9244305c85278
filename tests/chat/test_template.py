"""Chat templates: against transformers, and hostile ones."""

import datetime
import time

import pytest
from texts import CHATML, small_tokenizer, smollm2_file

from bitjax.chat import render
from bitjax.chat.conversation import BITNET_TEMPLATE
from bitjax.interop.gguf.container import open_container
from bitjax.interop.tokenizers import write_huggingface_tokenizer

TALK = [
    {"role": "user", "content": "Hi <b>'there'</b> & \"you\" \n"},
    {"role": "assistant", "content": "  Hello! 😀\n"},
    {"role": "user", "content": "What is 2+2?"},
]
SYSTEM = {"role": "system", "content": "Be brief.\n\nAnd kind."}

# The forms that released models' templates take.
TEMPLATES = {
    "chatml": CHATML,
    "bitnet": BITNET_TEMPLATE,
    "headers": """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "instructions": """\
{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system_message = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}\
{% else %}{% set loop_messages = messages %}{% set system_message = '' %}{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate') }}
    {% endif %}
    {% set content = system_message + message['content'] if loop.index0 == 0 else message.content %}
    {% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
{{ ' ' + content.strip() + ' ' + eos_token }}
    {% endif %}
{% endfor %}
""",
    "controls": """\
{%- set ns = namespace(last=-1, found=false) -%}
{%- for m in messages[::-1] -%}
  {%- if m.role == 'user' -%}{%- set ns.last = loop.revindex0 -%}{%- break -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
  {%- if m.role == 'system' -%}{%- continue -%}{%- endif -%}
  {%- if m.role == 'assistant' -%}{% generation %}{{ m.content }}{% endgeneration %}
  {%- else -%}{{ loop.index }}/{{ ns.last }}: {{ m | tojson }} {{ m.content.split('\\n')[0] }}
  {%- endif -%}
{%- endfor -%}
{%- if tools is defined and tools -%}{{ tools | tojson(indent=2) }}{%- endif -%}
{{ messages | length }} {{ {'é': [1, none, true]} | tojson }}
""",
    "macros": """\
{% macro turn(role, content) -%}
<{{ role | upper }}>{{ content | replace('\\n', ' ') | e }}</{{ role }}>
{%- endmacro %}
{% for m in messages %}
  {{ turn(m['role'], m['content']) }}
{% endfor %}
{{ 'now: ' ~ strftime_now('%Y') }}
""",
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    pytest.importorskip("transformers", reason="transformers is not installed; see 'parity'")
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("small")
    write_huggingface_tokenizer(folder, small_tokenizer())
    return AutoTokenizer.from_pretrained(folder)


def names(tokenizer):
    return {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("system", [False, True], ids=["", "system"])
def test_as_transformers(theirs, template, system):
    messages = [SYSTEM, *TALK] if system else TALK
    for answer in (True, False):
        wanted = theirs.apply_chat_template(
            messages,
            chat_template=TEMPLATES[template],
            tokenize=False,
            add_generation_prompt=answer,
        )
        assert render(TEMPLATES[template], messages, answer, **names(theirs)) == wanted


def test_smollm2s_own(theirs):
    template = open_container(smollm2_file()).metadata["tokenizer.chat_template"]
    wanted = theirs.apply_chat_template(
        TALK, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert render(template, TALK, **names(theirs)) == wanted
    assert "You are a helpful AI assistant named SmolLM" in wanted


def test_today():
    assert render("{{ strftime_now('%Y') }}", []) == datetime.datetime.now().strftime("%Y")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system prompts') }}", "template refuses: no system prompts"),
        ("{% for %}", "template is malformed at line 1"),
        ("{{ 1 // 0 }}", "template failed: ZeroDivisionError"),
        ("{{ messages[0].content.nothing.more }}", "template refuses: 'str object' has no"),
        ("{{ messages.append(1) }}", "template refuses: access to attribute 'append'"),
        ("{{ ''.__class__.__mro__ }}", "template refuses: access to attribute '__class__'"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "template refuses: access to"),
        ("{% include '/etc/passwd' %}", "template failed: TypeError: no loader|refuses"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "template calls itself without end"),
        ("{% for i in range(999999) %}{% endfor %}", "template failed: OverflowError"),
        ("{% set x = namespace(s='a') %}{% for i in range(60) %}{% set x.s = x.s ~ x.s %}"
         "{% endfor %}", "template took too much memory"),
        ("{{ 'a' * 10 ** 10 }}", "template took too much memory"),
        ("{{ 'a'.ljust(10 ** 10) }}", "template took too much memory"),
        ("{{ '%10000000000d' % 1 }}", "template (took too much memory|failed)"),
        ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "took too much memory"),
        ("{% if " + "(" * 5000 + "1" + ")" * 5000 + " %}{% endif %}", "template|too many"),
        ("{{ '" + "x" * 200_000 + "' }}", "template has 200,008 characters; it may have 131,072"),
    ],
    ids=range(17),
)  # fmt: skip
def test_refused(template, message):
    with pytest.raises(ValueError, match=message):
        render(template, TALK)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
        "{{ f(60) }}",
    ],
    ids=["loops", "power", "calls"],
)
def test_endless_templates_end(template):
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"template took (too much time|more than)"):
        render(template, TALK)
    assert time.monotonic() - started < 60  # 2 s of computing, on a machine that may be busy
