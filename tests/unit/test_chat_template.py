"""Chat templates: what they render, what they refuse, and that they cannot run code or go on for ever."""

from __future__ import annotations

import time
from typing import Any

import pytest

from gateway.tokenizer import ChatTemplate, load_chat_template, load_tokenizer
from stageline.errors import CheckpointError, InvalidArgumentError
from tests.unit.tokenizer_helpers import TEMPLATE, write_folder

USER = [{"role": "user", "content": "hi"}]


def render(source: str, messages: Any = USER, **options: Any) -> str:
    return ChatTemplate(source).render(messages, **options)


def test_a_conversation() -> None:
    assert render(TEMPLATE) == (
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(TEMPLATE, add_generation_prompt=False).endswith("<|im_start|>user\nhi<|im_end|>\n")


def test_the_last_message_is_left_open() -> None:
    messages = [*USER, {"role": "assistant", "content": "Once upon "}]
    assert render(TEMPLATE, messages, continue_final_message=True).endswith("<|im_start|>assistant\nOnce upon ")
    stripping = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
    assert render(stripping, messages, continue_final_message=True) == "[hi][Once upon"
    assert messages[-1]["content"] == "Once upon "  # the caller's message is as it was


def test_nothing_to_continue() -> None:
    with pytest.raises(InvalidArgumentError, match="no text to continue") as caught:
        render(TEMPLATE, [{"role": "assistant", "content": None}], continue_final_message=True)
    assert caught.value.reason == "NOTHING_TO_CONTINUE"
    with pytest.raises(InvalidArgumentError, match="leaves the last message out"):
        render("{{ messages[0].content }}", [*USER, *USER], continue_final_message=True)


def test_what_transformers_gives_a_template() -> None:
    assert render("{{ tools | tojson }}", tools=[{"a": "<é>"}]) == '[{"a": "<é>"}]'
    assert render("{{ {'b': 1, 'a': [2]} | tojson(indent=1, sort_keys=True) }}") == '{\n "a": [\n  2\n ],\n "b": 1\n}'
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("  {% if true %}\nx\n  {% endif %}\ny") == "x\ny"  # trim_blocks and lstrip_blocks
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")
    assert render("{% generation %}a{% set b = 1 %}{% endgeneration %}{{ b is defined }}") == "aFalse"
    assert ChatTemplate("{{ eos_token }}{{ bos_token is defined }}", {"eos_token": "</s>"}).render(USER) == "</s>False"


def test_loops_know_their_length_and_recurse() -> None:
    tree = [{"role": "user", "content": "a", "more": [{"content": "b", "more": []}]}]
    source = "{% for m in messages recursive %}{{ loop.length }}{{ loop.last }}{{ m.content }}({{ loop(m.more) }}){% endfor %}"
    assert render(source, tree) == "1Truea(1Trueb())"
    assert render("{% for k, v in {'a': 1}.items() if v %}{{ k }}{% else %}none{% endfor %}") == "a"
    assert render("{% for x in missing %}x{% else %}none{% endfor %}") == "none"


def test_no_chat_template(tmp_path: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="send a plain prompt, or serve an Instruct model") as caught:
        load_chat_template(load_tokenizer(write_folder(tmp_path, chat_template=None)))
    assert caught.value.reason == "NO_CHAT_TEMPLATE"


def test_the_template_of_a_tokenizer(tmp_path: Any) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path, chat_template="{{ messages[0].content }}{{ eos_token }}"))
    assert load_chat_template(tokenizer).render(USER) == "hi<|im_end|>"


def test_a_template_that_does_not_compile() -> None:
    with pytest.raises(CheckpointError, match="does not compile"):
        ChatTemplate("{% for %}")


@pytest.mark.parametrize("role", ["robot", "User", "", None, 3])
def test_an_unknown_role(role: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"messages\[1\].*system, user, assistant, tool") as caught:
        render(TEMPLATE, [*USER, {"role": role, "content": "x"}])
    assert caught.value.reason == "ROLE_UNKNOWN"
    assert caught.value.metadata["field"] == "messages[1].role"


def test_no_messages() -> None:
    with pytest.raises(InvalidArgumentError, match="must not be empty"):
        render(TEMPLATE, [])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' + none }}", "str"),
        ("{{ messages.clear() }}", "unsafe"),  # messages cannot be changed
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append.__self__ }}", "unsafe"),
        ("{{ render.__globals__ }}", "undefined"),
        ("{% include 'etc' %}", "no loader"),
    ],
)
def test_what_a_template_must_not_do_is_a_typed_error(source: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        render(source)
    assert caught.value.reason == "CHAT_TEMPLATE_REFUSED"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{% set a = f(n - 1) %}{% set a = f(n - 1) %}{% endif %}{% endmacro %}{{ f(40) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set ns = namespace(s='xx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s='xx') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ [1] * 10 ** 10 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{% set ns = namespace(n=3) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
        "{% set s = 'x' * 10000 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
    ],
)
def test_a_template_cannot_go_on_for_ever(source: str) -> None:
    begin = time.process_time()
    with pytest.raises(InvalidArgumentError) as caught:
        render(source)
    assert caught.value.reason == "CHAT_TEMPLATE_REFUSED"
    assert time.process_time() - begin < 20  # a few seconds at worst; unbounded, each takes hours or all memory
