"""Where a model's parts are: head, layers, the projections back to the hidden width.

Read from the modules' shapes and order rather than from class names, so that models nobody listed
are found too; what does not look as expected is a UserError, never a guess.
"""

from collections.abc import Iterable

from torch import nn

from fastft.finetune import UserError
from fastft.foreign import ForeignModule

CLASSIFICATION = ("classify", "ner")


def head(model: nn.Module, task: str) -> list[str]:
    """Names of the modules that come after the pretrained model, poolers included.

    They may be newly made: every method trains them, and saves them with what it adds. A language
    model's output layer was pretrained with it, and is no head here.
    """
    if task not in CLASSIFICATION:
        return []
    names = [name for name, _ in model.named_children() if name != model.base_model_prefix]
    # A checkpoint without a pooler gets a random one, which a saved adapter must not leave behind.
    names += [name for name, _ in model.named_modules() if name.endswith(".pooler")]
    return [
        name for name in names if next(model.get_submodule(name).parameters(), None) is not None
    ]


def layers(model: ForeignModule) -> tuple[str, nn.ModuleList]:
    """Name and list of the transformer layers, first to last."""
    depth = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name, module
    raise UserError(
        f"{type(model).__name__} holds no list of its {depth} layers (they may share their "
        "weights), which this method looks for"
    )


def last_norms(model: nn.Module) -> list[str]:
    """Names of the norms beside the layers, which run after the last of them."""
    owner = layers(model)[0].rpartition(".")[0]
    found = []
    for name, module in model.get_submodule(owner).named_children():
        parameters = list(module.parameters())
        if parameters and all(parameter.dim() == 1 for parameter in parameters):
            found.append(f"{owner}.{name}" if owner else name)
    return found


def projections(model: ForeignModule) -> tuple[list[str], list[str]]:
    """Names of the linears that end attention and MLP, one of each per layer.

    Both give the hidden width, to be added to the residual stream, and are the last that do so in
    the attention module and in the layer.
    """
    width, attentions, mlps = model.config.hidden_size, [], []
    name, found = layers(model)
    for i, layer in enumerate(found):
        ends = [n for n, m in layer.named_modules() if width_of(m) == width]
        attending = [n for n in ends if "att" in n.split(".")[0]]
        experts = any("expert" in n for n, _ in layer.named_modules())
        if experts or not attending or not ends or ends[-1] == attending[-1]:
            raise UserError(
                f"{type(model).__name__}: where attention and MLP end is not clear from its layers;"
                " name those linear layers by target_modules"
            )
        attentions.append(f"{name}.{i}.{attending[-1]}")
        mlps.append(f"{name}.{i}.{ends[-1]}")
    return attentions, mlps


def width_of(module: nn.Module) -> int | None:
    """Output width of a linear layer; GPT-2's Conv1D calls it nf."""
    if isinstance(module, nn.Linear):
        return module.out_features
    return getattr(module, "nf", None)


def named(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """Full names of the linear layers that are called, or end in, one of the targets.

    Raises: UserError for a target that is none of them.
    """
    linears = [name for name, module in model.named_modules() if width_of(module) is not None]
    found = []
    for target in targets:
        matched = [name for name in linears if f".{name}".endswith(f".{target}")]
        if not matched:
            # Layers repeat: the last words of the names say enough.
            ends = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears))
            raise UserError(
                f"target_modules: no linear layer of this model is called {target!r}; it has {ends}"
            )
        found += matched
    return list(dict.fromkeys(found))
