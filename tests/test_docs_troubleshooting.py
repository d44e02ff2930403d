"""docs/troubleshooting.md: every message is one that fastft gives, by the code hidden below it."""

import re
import shlex
import sys
import warnings
from pathlib import Path

import docs_pages as docs
import pytest
import torch
import transformers
from finetune import tiny

import fastft
from fastft import cli, doctor

PAGE = docs.ROOT / "docs" / "troubleshooting.md"
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def entries() -> list[tuple[str, str]]:
    """Heading, and the code under it that shows its messages."""
    parts = re.split(r"^#+ (.*)$", PAGE.read_text(), flags=re.M)
    found = []
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
        code = re.search(r"^<!-- shown by\n(.*?)^-->$", text, re.S | re.M)
        assert bool(code) == ("`" in heading), heading
        if code:
            found.append((heading, code[1]))
    return found


ENTRIES = entries()


def pattern(message: str) -> str:
    return r"[\s\S]*".join(re.escape(part) for part in message.split("…"))


def causal_lm():
    return transformers.AutoModelForCausalLM.from_pretrained(NAME)


def gpt2(positions: int):
    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=4, n_positions=positions, vocab_size=50, bos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config).eval()


def command(line: str) -> None:
    words = shlex.split(line)
    assert words[0] == "fastft" and cli.main(words[1:]) == 2, line


def rows(records: list[dict]) -> Path:
    return tiny.save_rows(Path("rows.jsonl"), records)


def texts() -> Path:
    return rows([{"text": "light is scattered"}, {"text": "the sky is blue"}])


def namespace() -> dict:
    import peft

    return {
        "fastft": fastft, "fastft_doctor": doctor, "torch": torch, "transformers": transformers,
        "peft": peft, "name": NAME, "causal_lm": causal_lm, "gpt2": gpt2, "command": command,
        "rows": rows, "texts": texts,
        "tokenizer": transformers.AutoTokenizer.from_pretrained(NAME),
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("models")
    docs.tiny_models(made)
    return made


@pytest.mark.parametrize("heading, code", ENTRIES, ids=[heading for heading, _ in ENTRIES])
def test_message_is_given(heading, code, folder, tmp_path, monkeypatch, capsys):
    for made in folder.iterdir():
        (tmp_path / made.name).symlink_to(made)
    monkeypatch.chdir(tmp_path)
    told = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            exec(compile(code, "troubleshooting.md", "exec"), namespace())
        except Exception as error:
            told.append(str(error))
    told += [str(one.message) for one in warned]
    captured = capsys.readouterr()
    told += [captured.out, captured.err]
    print("\n".join(told), file=sys.stderr)
    for message in re.findall(r"`([^`]+)`", heading):
        if message != "stats.reason":
            assert re.search(pattern(message), "\n".join(told)), message


def test_as_many_as_are_promised():
    assert len(ENTRIES) >= 25
