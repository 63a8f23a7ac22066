"""Thoughts between tags go beside the answer, whatever pieces the text comes in."""

import random

import httpx
import pytest
from tests.conftest import byte_tokenizer

from tinier.serving import Service
from tinier.serving.thinking import Thoughts, num_thought_tokens
from tinier.tokenizer import Tokenizer

TEXTS = [
    # text, whether the prompt opened the thinking, thoughts, answer
    ("<think>\nAs 2 < 3.\n</think>\n\nIt is 3.\n", False, "As 2 < 3.", "It is 3.\n"),
    ("\n<think>a</think>b", False, "a", "b"),
    ("so </thin k> </think>  b ", True, "so </thin k>", "b "),
    ("  no thoughts <think> here</think>", False, "", "  no thoughts <think> here</think>"),
    ("<thinking is hard", False, "", "<thinking is hard"),
    ("<thi", False, "", "<thi"),
    ("", False, "", ""),
    ("<think></think>b", False, "", "b"),
    ("cut off in the middle </thin", True, "cut off in the middle </thin", ""),
    ("cut off \n", True, "cut off", ""),
    ("<think>a</think>", False, "a", ""),
    ("a</think>b</think>c", True, "a", "b</think>c"),
]


@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(("text", "opened", "thoughts", "answer"), TEXTS)
def test_a_text_is_parted_however_it_comes(
    text: str, opened: bool, thoughts: str, answer: str, pieces: int
) -> None:
    draw = random.Random(pieces)
    for _ in range(5):
        cuts = sorted(draw.randrange(len(text) + 1) for _ in range(pieces))
        parting = Thoughts(opened=opened)
        given = [
            parting.push(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)
        ]
        given.append(parting.close())
        assert "".join(one for one, _ in given) == thoughts
        assert "".join(other for _, other in given) == answer


def test_thoughts_come_as_reasoning_content(service: Service) -> None:
    """The template opens the thinking, and the model never closes it: all is thought."""
    asked = {"model": "one", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20,
             "temperature": 0, "ignore_eos": True}  # fmt: skip
    url = f"{service.url}/v1/chat/completions"
    thinking = asked | {"chat_template_kwargs": {"thinks": True}}
    message = httpx.post(url, json=thinking).json()["choices"][0]["message"]
    assert message["content"] == ""
    prompt = {"model": "one", "prompt": "<user>Hi<assistant><think>", "max_tokens": 20,
              "temperature": 0, "ignore_eos": True}  # fmt: skip
    plain = httpx.post(f"{service.url}/v1/completions", json=prompt).json()["choices"][0]["text"]
    assert message["reasoning_content"] == plain.strip()
    with httpx.stream("POST", url, json=thinking | {"stream": True}) as lines:
        chunks = [
            httpx.Response(200, content=line[6:]).json()["choices"][0]["delta"]
            for line in lines.iter_lines()
            if line.startswith("data: {")
        ]
    assert "".join(c.get("reasoning_content", "") for c in chunks) == plain.strip()
    assert "".join(c["content"] for c in chunks) == ""
    answer = httpx.post(url, json=asked).json()["choices"][0]["message"]
    assert answer["reasoning_content"] is None
    assert answer["content"]


def test_what_was_thought_may_be_sent_back(service: Service) -> None:
    history = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "reasoning_content": "a greeting"},
        {"role": "user", "content": "Bye"},
    ]
    asked = {"model": "one", "messages": history, "max_tokens": 2}
    assert httpx.post(f"{service.url}/v1/chat/completions", json=asked).status_code == 200
    made = httpx.post(f"{service.url}/tokenize", json={"model": "one", "messages": history}).json()
    text = httpx.post(f"{service.url}/detokenize", json={"model": "one", "tokens": made["tokens"]})
    assert "<assistant>(a greeting)Hello<user>" in text.json()["prompt"]


def test_tokens_of_thoughts_are_counted_with_their_tags() -> None:
    tokenizer = Tokenizer(byte_tokenizer())

    def counted(text: str, *, opened: bool = False) -> int:
        return num_thought_tokens(tokenizer, tokenizer.encode(text, special=False), opened=opened)

    assert counted("<think>ab</think>cd") == len("<think>ab</think>")
    assert counted("\n<think>ab</think>") == len("\n<think>ab</think>")
    assert counted("ab</think>cd", opened=True) == len("ab</think>")
    assert counted("<think>abcd") == len("<think>abcd")
    assert counted("abcd", opened=True) == 4
    assert counted("abcd</think>") == counted("") == 0
    tokenizer.inner.add_special_tokens({"additional_special_tokens": ["</think>"]})
    tagged = Tokenizer(tokenizer.inner)
    output = tagged.encode("<think>ab</think>cd</think>", special=False)
    assert len(output) == 13  # the tag is one token
    assert num_thought_tokens(tagged, output, opened=False) == len("<think>ab") + 1
