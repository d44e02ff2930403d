"""The type of a module that another library made, and that fastft knows by what it does.

Annotations of torch call every attribute of a module `Tensor | Module`, a config and a list of
adapters too. A room of patch/ or decode/ that has recognised a module reads the attributes it was
recognised by; `nn.Module` is the type wherever none of them is read.
"""

from typing import Any, TypeAlias

ForeignModule: TypeAlias = Any
