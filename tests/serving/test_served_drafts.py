"""A server whose models have a draft: the same answers, and how many tokens of it were right."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tests.conftest import write_tiny
from tests.serving.conftest import ENGINE

from tinier.errors import InputError
from tinier.serving import ServeConfig, Service

ASKED: dict[str, Any] = {
    "prompt": list(b"Ten green bottles, ten green bottles hanging on"), "max_tokens": 60, "seed": 3,
    "ignore_eos": True,
}  # fmt: skip


def answer(url: str, **fields: Any) -> dict[str, Any]:
    made = httpx.post(f"{url}/v1/completions", json=ASKED | fields, timeout=60)
    assert made.status_code == 200, made.text
    found: dict[str, Any] = made.json()
    return found


def test_answers_are_the_same_and_say_what_was_right(
    service: Service, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    draft = shutil.copytree(model_folders["one"], tmp_path / "draft")
    sources = [f"one={model_folders['one']}", f"small={draft}"]
    with Service(sources, replace(ENGINE, draft=str(draft)), ServeConfig(port=0)) as drafting:
        for temperature in (0, 1):
            fields = {"model": "one", "temperature": temperature, "n": 2}
            plain, drafted = answer(service.url, **fields), answer(drafting.url, **fields)
            assert [c["text"] for c in drafted["choices"]] == [c["text"] for c in plain["choices"]]
            assert "completion_tokens_details" not in plain["usage"]
        # a draft is a draft for others, and serves alone too
        assert answer(drafting.url, model="small")["usage"]["completion_tokens"] == 60
        counts = {
            name: sum(map(float, re.findall(rf"tinier_{name}_total{{.*}} (.*)", metrics)))
            for metrics in [httpx.get(f"{drafting.url}/metrics").text]
            for name in ("draft_tokens", "accepted_draft_tokens")
        }
        assert counts["draft_tokens"] >= counts["accepted_draft_tokens"] > 0
    with Service(sources[:1], replace(ENGINE, draft="prompt"), ServeConfig(port=0)) as looking:
        fields = {"model": "one", "temperature": 0, "max_tokens": 200, "stream": False}
        assert answer(looking.url, **fields)["choices"] == answer(service.url, **fields)["choices"]


def test_usage_has_what_a_draft_did(model_folders: dict[str, Path], tmp_path: Path) -> None:
    draft = shutil.copytree(model_folders["one"], tmp_path / "draft")
    config = replace(ENGINE, draft=str(draft))
    with Service([f"one={model_folders['one']}"], config, ServeConfig(port=0)) as drafting:
        details = [
            answer(drafting.url, model="one", temperature=0)["usage"].get(
                "completion_tokens_details"
            )
            for _ in range(3)
        ]
    said = [one for one in details if one]
    assert said
    assert all(one["accepted_prediction_tokens"] > 0 for one in said)
    assert all(one["rejected_prediction_tokens"] == 0 for one in said)  # it is the model itself


def test_a_draft_with_other_tokens_is_refused(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    write_tiny(tmp_path / "other", "llama", dtype=torch.float32)
    tokenizer = tmp_path / "other" / "tokenizer.json"
    text = tokenizer.read_text(encoding="utf-8")
    tokenizer.write_text(
        text.replace('"a":', '"q1":', 1).replace('"b":', '"a":', 1), encoding="utf-8"
    )
    config = replace(ENGINE, draft=str(tmp_path / "other"))
    with (
        pytest.raises(InputError, match="different tokenizers"),
        Service([f"one={model_folders['one']}"], config, ServeConfig(port=0)),
    ):
        pass
