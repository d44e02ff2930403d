"""README.md and docs/ as tests see them: blocks of code with what is said of each, and their run.

An HTML comment before a block says what a reader need not see:

    <!-- file: NAME -->       the block is the content of a file, which the blocks after it read
    <!-- slow -->             the block takes long, and so runs with the slow tests only
    <!-- not run: REASON -->  the block is not run at all, for this reason

Blocks of a page run in order, in one namespace and one folder. There, hub names that the pages
use are folders of tiny models.
"""

import re
import shlex
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastft import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LANGUAGES = {"python", "sh", "text", "csv", "json", "yaml"}
COMMENT = re.compile(r"<!-- (file|slow|not run)(?:: (.*))? -->")


@dataclass(frozen=True)
class Block:
    page: str
    line: int  # of its first line of code, from 1
    language: str
    code: str
    file: str | None = None
    slow: bool = False
    not_run: str | None = None

    @property
    def runs(self) -> bool:
        return self.language in ("python", "sh") and self.not_run is None and self.file is None


def blocks(page: Path) -> list[Block]:
    found, said, opened, lines = [], {}, None, []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if opened is not None and line.strip() == "```":
            own = {"file": said.get("file"), "slow": "slow" in said, "not_run": said.get("not run")}
            name = str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name
            code = "".join(f"{own}\n" for own in lines)
            found.append(Block(name, opened[0], opened[1], code, **own))
            opened, said, lines = None, {}, []
        elif opened is not None:
            lines.append(line)
        elif line.startswith("```"):
            opened = number + 1, line[3:].strip()
        elif match := COMMENT.fullmatch(line.strip()):
            said[match[1]] = match[2]
        elif line.strip():
            assert not said, f"{page.name}:{number}: <!-- {said} --> stands before no block"
    assert opened is None, f"{page.name}:{opened[0]}: the block does not end"
    return found


def run(block: Block, namespace: dict) -> None:
    """Runs one block in the folder that is current. Raises what its code raises."""
    if block.file is not None:
        Path(block.file).write_text(block.code)
    elif block.language == "python":
        code = "\n" * (block.line - 1) + block.code  # a traceback names the page's own line
        exec(compile(code, block.page, "exec"), namespace)
    elif block.language == "sh":
        for line in commands(block.code):
            run_command(line, f"{block.page}:{block.line}")


def commands(code: str) -> list[str]:
    """Lines of a shell, those that go on joined, comments left out."""
    lines = code.replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def run_command(line: str, where: str) -> None:
    """`fastft …` is run; of other commands what they name must exist."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["cat"] and words[2:4] == ["|", "fastft"]:
        with standard_input(words[1]):
            code = cli.main(words[4:])
    elif words[0] == "fastft":
        code = cli.main(words[1:])
    elif words[0] == "torchrun":
        module = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        code = subprocess.run(module, env=environment()).returncode
    else:
        check_names(words, where)
        return
    assert code == 0, f"{where}: {line}: exit code {code}"


def environment() -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}


@contextmanager
def standard_input(path: str):
    before = sys.stdin
    with open(path, encoding="utf-8") as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = before


def check_names(words: list[str], where: str) -> None:
    """What a command that is not run refers to in this repository is there."""
    makefile, project = (ROOT / name for name in ("Makefile", "pyproject.toml"))
    if words[0] == "make":
        for word in words[1:]:
            name, _, value = word.partition("=")
            form = rf"^{name}:" if "=" not in word else rf"^{name} \?="
            assert re.search(form, makefile.read_text(), re.M), f"{where}: make has no {word}"
            if name == "ARGS":
                check_paths(shlex.split(value), where)
    elif words[:2] == ["pip", "install"]:
        for extras in re.findall(r"\[([\w,]+)\]", " ".join(words)):
            for extra in extras.split(","):
                assert f"\n{extra} = [" in project.read_text(), f"{where}: no extra {extra}"
    elif words[:2] == ["python", "-m"]:
        path = ROOT / words[2].replace(".", "/")
        assert (
            path.with_suffix(".py").exists()
            or (path / "__main__.py").exists()
            or (words[2] in ("venv", "pip"))
        ), f"{where}: no module {words[2]}"
    elif words[0] in ("pytest", "python"):
        check_paths(words[1:], where)
    else:
        known = (["git", "clone"], ["cd", "fastft"], [".", ".venv/bin/activate"])
        assert words[:2] in known, f"{where}: {words} is neither run nor checked"


def check_paths(words: list[str], where: str) -> None:
    for word in words:
        if "/" in word:
            assert (ROOT / word.split("::")[0]).exists(), f"{where}: there is no {word}"


def vocabulary() -> list[str]:
    """The words of all blocks: what the tiny models' tokenizer knows."""
    code = " ".join(block.code for page in PAGES for block in blocks(page))
    return sorted(set(re.findall(r"[a-z]+|\d", code.lower())))


def tiny_models(folder: Path) -> None:
    """Writes the models whose names the pages use, where those names lead to as paths."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    special = ["<pad>", "<unk>", "<s>", "</s>", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *vocabulary(), *"!?.,:;'\"-_()|"]

    def tokenizer(**settings):
        inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
        inner.normalizer = normalizers.Lowercase()
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        if "cls_token" in settings:
            ends = [("[CLS]", 4), ("[SEP]", 5)]
            inner.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, ends)
        own = {"unk_token": "<unk>", "pad_token": "<pad>", "clean_up_tokenization_spaces": False}
        return PreTrainedTokenizerFast(tokenizer_object=inner, **own, **settings)

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    sizes |= {"num_hidden_layers": 2, "vocab_size": len(words), "pad_token_id": 0}
    places = {"max_position_embeddings": 512}
    chat = tokenizer(bos_token="<s>", eos_token="</s>", padding_side="left")
    chat.chat_template = (
        "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s> {% endfor %}"
        "{% if add_generation_prompt %}<s> assistant {% endif %}"
    )
    llama = LlamaConfig(num_key_value_heads=2, bos_token_id=2, eos_token_id=3, **sizes | places)
    bert = BertConfig(**sizes | places)
    encoder = tokenizer(cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    for name, model, own in (
        ("HuggingFaceTB/SmolLM2-135M-Instruct", LlamaForCausalLM(llama), chat),
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", LlamaForCausalLM(llama), chat),
        ("bert-base-uncased", BertForMaskedLM(bert), encoder),
    ):
        model.save_pretrained(folder / name)
        own.save_pretrained(folder / name)
