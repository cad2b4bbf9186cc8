"""The code that is saved with a model. Not uploaded with it: what was uploaded is saved again as it is."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from torch import nn
from transformers.dynamic_module_utils import get_relative_imports

from .components import COMPONENTS
from .portable_model import code_reference


def save_code(model: nn.Module, classes: Iterable[type], folder: Path) -> None:
    """Write the files of these classes, and all that they import relatively, flat into `folder`."""
    for cls in classes:
        file = getattr(sys.modules[cls.__module__], "__file__", None)
        if file is None:  # of a class from a notebook there is none
            continue
        missing, written = [Path(file).stem], set()
        while missing:
            written.add(name := missing.pop())
            copy = folder / f"{name}.py"
            if name == "components":
                copy.write_text(_components_of(model))
            else:
                shutil.copyfile(Path(file).with_name(copy.name), copy)
            missing += set(get_relative_imports(copy)) - written


def _components_of(model: nn.Module) -> str:
    """`components.py` with what the model uses."""
    used = {code_reference(type(module)) for module in model.modules()}
    names = {cls.__name__: cls.__module__.split(".")[-1] for cls in COMPONENTS if code_reference(cls) in used}
    imports = "".join(f"from .{module} import {name}\n" for name, module in names.items())
    text = "The methods and backbones of wsss_hf that this model uses; importing this file registers them."
    return f'"""{text}"""\n\n{imports}\nCOMPONENTS = [{", ".join(names)}]\n'
