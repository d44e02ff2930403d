"""Models and tokenizers from wherever the user has them, and from nowhere that could run code.

A source is a name of assets.MODELS, a local folder, a run folder, an adapter's folder (PEFT's, or
our bottleneck adapter's), or a name on the hub. Weights are safetensors, never a pickle; code that
comes with a model is never run.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from fastft.finetune import UserError, assets, need, vocabulary
from fastft.finetune.run_folder import RunFolder

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HEADS = {
    "classify": "AutoModelForSequenceClassification",
    "ner": "AutoModelForTokenClassification",
    "lm": "AutoModelForCausalLM",
    "sft": "AutoModelForCausalLM",
}
ADAPTER = "adapter_config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
# What configurations call the probabilities of their dropouts.
_DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "hidden_dropout", "attention_dropout",
    "dropout", "embd_pdrop", "attn_pdrop", "resid_pdrop", "embedding_dropout", "mlp_dropout",
    "classifier_dropout", "seq_classif_dropout",
)  # fmt: skip


def locate(source: str | Path) -> str:
    """source as from_pretrained takes it: a folder that was looked through, or a hub name."""
    if str(source) in assets.MODELS and not Path(source).exists():
        return str(assets.model(str(source)))
    folder = Path(source).expanduser()
    above = RunFolder(folder.parent)
    if not folder.exists() and above.record.is_file() and folder.name:
        folder = above.model / folder.name  # one of a run's adapters
    if not folder.exists():
        if str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
            raise UserError(f"{source}: no such folder")
        return str(source)
    if not folder.is_dir():
        raise UserError(f"{source}: a file; expected a model's folder")
    run = RunFolder(folder)
    if run.record.is_file():
        if not run.model.is_dir():
            raise UserError(f"{source}: this run has no trained model yet")
        folder = run.model
    _check_folder(folder)
    several = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER}"))
    if several and not any((folder / name).exists() for name in (ADAPTER, "config.json")):
        raise UserError(
            f"{source}: holds the adapters {', '.join(several)}; name one: {source}/..."
        )
    if not any((folder / name).is_file() for name in (ADAPTER, "config.json")):
        raise UserError(f"cannot load {str(source)!r}: it is a folder without config.json")
    return str(folder)


def load_tokenizer(source: str | Path, *, words: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer of source; where it has no padding token that the model knows, its end of text
    pads.

    words: it is given words rather than texts, before which GPT-2's wants a space.
    Raises: UserError.
    """
    need("transformers", "fine-tuning")
    from transformers import AutoTokenizer

    place = locate(source)
    settings = _read(Path(place) / ADAPTER)
    if settings and not (Path(place) / "tokenizer_config.json").exists():
        place = locate(_base_of(Path(place), settings))
    with as_user_error(source):
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        if words and getattr(tokenizer, "add_prefix_space", True) is False:
            tokenizer = AutoTokenizer.from_pretrained(
                place, trust_remote_code=False, add_prefix_space=True
            )
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        # transformers makes an empty one of a folder without its files, and every word is unknown.
        raise UserError(f"{source}: holds no tokenizer (tokenizer.json, or its vocabulary)")
    vocabulary.settle_padding(tokenizer, embedded(source), source)
    return tokenizer


def embedded(source: str | Path) -> int | None:
    """How many tokens source's model has an embedding for; None where it does not say."""
    out: int | None = getattr(load_config(source).get_text_config(), "vocab_size", None)
    return out


def load_model(
    source: str | Path,
    task: str,
    *,
    dtype: str = "float32",
    labels: Sequence[str] | None = None,
    multi_label: bool = False,
    dropout: float | None = None,
    pad_id: int | None = None,
    quantize: bool = False,
    trainable: bool = False,
    base_weights: str = "none",
) -> "PreTrainedModel":
    """The model of source with the head of task, in evaluation mode; an adapter on its base.

    Args:
        task: "classify", "ner", "lm" or "sft".
        dtype: of the weights, a name of torch's.
        labels: names of the classes; None: those the model has. Where the model's own come first
            in them its head stays, with rows for the others; another number gives a new head.
        multi_label: any number of classes at a time.
        dropout: all of the model's dropout probabilities; None: its own.
        pad_id: the tokenizer's padding token, which GPT- and Llama-like classifiers must know.
        quantize: the base in 4 bits, by bitsandbytes (CUDA).
        trainable: an adapter's weights require gradients.
        base_weights: "int8" or "fp8" rounds a language model's layers as they are read, so that it
            need not fit into memory in dtype.
    Raises: UserError.
    """
    import torch
    import transformers

    from fastft.finetune import heads

    place = locate(source)
    adapter = _read(Path(place) / ADAPTER)
    base = locate(_base_of(Path(place), adapter)) if adapter else place
    config = load_config(source)
    known = _named(config)
    grows = task in ("classify", "ner") and heads.grows(known, labels)
    if grows and adapter:
        raise UserError(
            f"{source}: an adapter for the classes {', '.join(known or ())}; to learn others "
            "beside them merge it first"
        )
    _set_labels(config, task, known if grows else labels, multi_label)
    if dropout is not None:
        _set_dropout(config, dropout, source)
    if pad_id is not None and task in ("classify", "ner"):
        config.pad_token_id = pad_id
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "use_safetensors": True}
    if quantize:
        options["quantization_config"] = _four_bits()
    info = {}
    with as_user_error(source):
        kind = getattr(transformers, HEADS[task])
        if base_weights != "none" and task in ("lm", "sft") and Path(base).is_dir():
            from fastft.patch import load

            model: Any = load(
                base, kind, base_weights=base_weights, dtype=options["dtype"], config=config
            )
        else:
            model, info = kind.from_pretrained(
                base,
                config=config,
                trust_remote_code=False,
                ignore_mismatched_sizes=task in ("classify", "ner"),
                output_loading_info=True,
                **options,
            )
    if adapter is None:
        _check_new(model, task, info, source)
        if grows and labels is not None:
            heads.grow(model, task, len(labels))
            _set_labels(model.config, task, labels, multi_label)
        out: PreTrainedModel = model
        return out
    from fastft.finetune import methods

    with as_user_error(source):
        adapted: Any = methods.load(model, place, trainable=trainable)
        out = adapted
        return out


def load_config(source: str | Path) -> "PretrainedConfig":
    """The configuration of source's model. Raises: UserError."""
    from transformers import AutoConfig

    place = locate(source)
    adapter = _read(Path(place) / ADAPTER)
    # An adapter's own configuration, if it has one, knows the classes it was trained for.
    if adapter is not None and not (Path(place) / "config.json").exists():
        place = locate(_base_of(Path(place), adapter))
    with as_user_error(source):
        out: PretrainedConfig = AutoConfig.from_pretrained(place, trust_remote_code=False)
        return out


def known_labels(source: str | Path) -> list[str] | None:
    """The classes that source was trained for, in order; None where nobody named them."""
    return _named(load_config(source))


def _named(config: Any) -> list[str] | None:
    names: dict[Any, str] = config.id2label or {}
    ordered = [str(names[key]) for key in sorted(names)]
    unnamed = ordered == [f"LABEL_{i}" for i in range(len(ordered))]
    return None if unnamed or not ordered else ordered


def save(model: "nn.Module", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """The trained weights as from_pretrained reads them: an adapter alone, or the whole model."""
    from fastft.finetune import methods

    methods.save(model, folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def as_user_error(source: str | Path) -> Iterator[None]:
    """What loading raises for a missing, foreign or damaged file, as one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except (
        OSError, ValueError, RuntimeError, KeyError, TypeError, AssertionError, SafetensorError,
    ) as error:  # fmt: skip
        # The libraries' first sentence says what it was: no such name, no network, no such file.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        here = "" if Path(source).exists() else "; nor is there a folder of this name here"
        raise UserError(f"cannot load {str(source)!r}: {reason}{here}") from None


def _check_folder(folder: Path) -> None:
    """UserError where a folder holds what must not be loaded."""
    safe = list(folder.glob("*.safetensors"))
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    pickles = [name for name in pickles if name != "training_args.bin"]
    if pickles and not safe:
        raise UserError(
            f"{folder}: {pickles[0]} is a pickle, which can run code when it is loaded; "
            "save the model again as safetensors"
        )
    for index in folder.glob("*.index.json"):
        names = (_read(index) or {}).get("weight_map")
        for name in names.values() if isinstance(names, dict) else ():
            if not isinstance(name, str) or PurePosixPath(name).name != name or "\\" in name:
                raise UserError(f"{index}: {name!r} leads out of the folder")
            if not name.endswith(".safetensors"):
                raise UserError(f"{index}: {name!r} is no safetensors file")


def _base_of(folder: Path, settings: dict[str, Any]) -> str:
    """The base model that an adapter's configuration names."""
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{folder}: {ADAPTER} names no base model")
    if ".." in PurePosixPath(base.replace("\\", "/")).parts:
        raise UserError(f"{folder}: the base model {base!r} in {ADAPTER} leads out of the folder")
    if settings.get("megatron_config"):
        raise UserError(f"{folder}: {ADAPTER} asks for modules to be imported; it is not loaded")
    if (Path(base).expanduser() / ADAPTER).exists():
        raise UserError(f"{folder}: its base {base!r} is an adapter too; merge that one first")
    return base


def _set_labels(config: Any, task: str, labels: Sequence[str] | None, multi_label: bool) -> None:
    if task not in ("classify", "ner") or labels is None:
        return
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: i for i, name in enumerate(labels)}
    if task == "classify":
        kind = "multi" if multi_label else "single"
        config.problem_type = f"{kind}_label_classification"


def _set_dropout(config: Any, probability: float, source: str | Path) -> None:
    held = [name for name in _DROPOUTS if hasattr(config, name)]
    if not held:
        raise UserError(f"dropout: {source} has none that could be set")
    for name in held:
        setattr(config, name, probability)


def _four_bits() -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    need("bitsandbytes", "qlora")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _check_new(model: "nn.Module", task: str, info: dict[str, Any], source: str | Path) -> None:
    """UserError where more is new than a head; transformers itself tells what is."""
    mismatched = [entry[0] for entry in info.get("mismatched_keys", ())]
    new = sorted({*info.get("missing_keys", ()), *mismatched})
    if new and (task in ("lm", "sft") or 2 * len(new) > len(list(model.parameters()))):
        shown = ", ".join(new[:4]) + (f" and {len(new) - 4} more" if len(new) > 4 else "")
        raise UserError(f"{source}: holds no weights for {shown}")


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(held, dict):
        raise UserError(f"{path}: expected an object, {{...}}")
    return held
