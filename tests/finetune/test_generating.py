"""generate: prompts from everywhere, completions those of model.generate, nothing overwritten."""

import io
import json

import pytest
import torch
import transformers
from finetune import tiny

from fastft import cli
from fastft.finetune import GenerateConfig, UserError, generate

PROMPTS = ["word1 word2 word3", "word7", "word4 word5"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.save_model(tmp_path_factory.mktemp("model"))
    # transformers finds out how a tokenizer joins tokens by a text that it has to know.
    words = folder / "tokenizer.json"
    words.write_text(words.read_text().replace('"word59"', '"abcdef"'))
    return str(folder)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.txt"
    path.write_text("\n".join([PROMPTS[0], "", *PROMPTS[1:]]) + "\n")
    return str(path)


def truth(model: str, prompt: str, length: int) -> str:
    held = transformers.AutoModelForCausalLM.from_pretrained(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = held.generate(ids, do_sample=False, max_new_tokens=length, pad_token_id=2)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("settings", [{}, {"patch": False}, {"speculation": "prompt_lookup"}])
def test_completions_are_those_of_transformers(model, prompts, tmp_path, capsys, settings):
    out = tmp_path / "new" / "out.jsonl"
    result = generate(
        GenerateConfig(
            model=model,
            prompts=prompts,
            output=str(out),
            max_new_tokens=12,
            batch_size=2,
            chat=False,
            **settings,
        )  # fmt: skip
    )
    assert [row["completion"] for row in result.completions] == [
        truth(model, prompt, 12) for prompt in PROMPTS
    ]
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert written == result.completions and written[1]["prompt"] == "word7"
    kept = json.loads((tmp_path / "new" / "out.metrics.json").read_text())
    assert kept["completions"] == 3 and kept["path"] == "decoder_layer"
    assert ("rotary" in (kept["patch"] or "")) == settings.get("patch", True)
    shown = capsys.readouterr()
    assert shown.out == "" and "tokens/s" in shown.err


def test_sampling_repeats_by_its_seed(model):
    def drawn(seed: int) -> list[str]:
        asked = GenerateConfig(
            model=model, prompt=PROMPTS[0], temperature=1.0, num_return_sequences=3, seed=seed,
            max_new_tokens=8,
        )  # fmt: skip
        return [row["completion"] for row in generate(asked).completions]

    first = drawn(0)
    assert first == drawn(0) != drawn(1) and len(set(first)) > 1


def test_every_completion_stands_by_its_prompt(model, prompts):
    """So cold that whatever is drawn is the likeliest, and told apart by its prompt."""
    asked = GenerateConfig(
        model=model, prompts=prompts, temperature=1e-5, num_return_sequences=2, batch_size=2,
        max_new_tokens=8, chat=False,
    )  # fmt: skip
    wanted = [
        {"index": i, "sequence": copy, "prompt": prompt, "completion": truth(model, prompt, 8)}
        for i, prompt in enumerate(PROMPTS)
        for copy in range(2)
    ]
    assert generate(asked).completions == wanted
    assert len({row["completion"] for row in wanted}) == 3


def test_from_a_pipe_to_a_pipe(model, monkeypatch, capsys):
    rows = io.StringIO('\ufeffword1 word2\r\n{"text": "word7", "more": 1}\r\n')
    monkeypatch.setattr("sys.stdin", rows)
    arguments = ["generate", "--model", model, "--max-new-tokens", "4", "--stop", "word52"]
    assert cli.main([*arguments, "--template", "{{ text }} word3", "--no-chat"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in found] == ["word1 word2 word3", "word7 word3"]
    assert not any("word52" in row["completion"] for row in found)


def test_a_stop_text_ends_a_completion(model):
    whole = generate(GenerateConfig(model=model, prompt=PROMPTS[0], max_new_tokens=12))
    words = whole.completions[0]["completion"].split()
    stop = words[3]
    asked = GenerateConfig(model=model, prompt=PROMPTS[0], max_new_tokens=12, stop=[stop])
    completion = generate(asked).completions[0]["completion"]
    assert completion.split() == words[: words.index(stop)]


def test_tokens_are_shown_as_they_come(model, capsys):
    asked = GenerateConfig(model=model, prompt=PROMPTS[0], max_new_tokens=6, stream=True)
    found = generate(asked).completions[0]["completion"]
    assert capsys.readouterr().out.split() == found.split() and found


def test_examples_and_chat(model, tmp_path):
    shots = tmp_path / "shots.jsonl"
    shots.write_text(json.dumps({"text": "word8", "label": "word9"}) + "\n")
    asked = GenerateConfig(
        model=model, prompt="word1", examples=str(shots), shots=1, max_new_tokens=2
    )
    (row,) = generate(asked).completions
    assert row["prompt"].split()[:7] == "<s> user word8 </s> <s> assistant word9".split()


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"prompt": "a", "prompts": "b"}, "one of them"),
        ({"num_return_sequences": 2}, "set temperature"),
        ({"top_p": 0.5}, "top_p: only for sampling"),
        ({"stream": True, "temperature": 1.0, "num_return_sequences": 2}, "stream"),
        ({"decode_weights": "int8", "patch": False}, "patch is off"),
    ],
)
def test_settings_that_do_not_belong_together(settings, said):
    with pytest.raises(UserError, match=said):
        GenerateConfig(model="m", **settings)


def test_what_the_user_can_put_right(model, prompts, tmp_path, monkeypatch):
    taken = tmp_path / "taken.jsonl"
    taken.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        generate(GenerateConfig(model=model, prompts=prompts, output=str(taken)))
    assert taken.read_text() == "mine"
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    with pytest.raises(UserError, match="standard input: no prompts"):
        generate(GenerateConfig(model=model))
    for text in ("\udcff\n", '{"prompt": "\\ud83d"}\n'):  # bytes of another encoding; half a smile
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        with pytest.raises(UserError, match="not UTF-8, or holds half a character"):
            generate(GenerateConfig(model=model))
    with pytest.raises(UserError, match="more than the model's"):
        generate(GenerateConfig(model=model, prompt="word1", max_new_tokens=10**6))
    with pytest.raises(UserError, match="nowhere: no such folder"):
        generate(GenerateConfig(model=model, prompt="word1", speculation="./nowhere"))
    # What fails at its first prompt leaves no file that would be in the way of the next try.
    new = tmp_path / "new.jsonl"
    monkeypatch.setattr(
        "fastft.finetune.generating._complete", lambda *_: (_ for _ in ()).throw(UserError("no"))
    )
    with pytest.raises(UserError, match="^no$"):
        generate(GenerateConfig(model=model, prompts=prompts, output=str(new)))
    assert not new.exists()


def test_a_disk_that_is_full_at_the_first_completion_leaves_nothing(
    model, prompts, tmp_path, monkeypatch
):
    import errno

    def full(*held, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fastft.finetune.generating.print", full, raising=False)
    new = tmp_path / "new.jsonl"
    with pytest.raises(UserError, match="new.jsonl: No space left"):
        generate(GenerateConfig(model=model, prompts=prompts, output=str(new)))
    assert not new.exists()
