"""The pruning methods: a file each, which holds all that is known of its method as METHOD and is found by its name.

Names are those of the files, so that listing them imports none of the files, and no torch.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import TYPE_CHECKING

from rac_engine.base.errors import BadInput

if TYPE_CHECKING:
    from rac_engine.solve.method import Method

DEFAULT_METHOD = "admm"

RENAMED = {"rac": "'rac' is called admm now (rac is the calibration on the model's own traces)"}
"""Names of earlier versions, and what to say to them."""


def method_names() -> list[str]:
    """Every method by its name in recipes, the default first, then by the alphabet."""
    names = {module.name for module in pkgutil.iter_modules(__path__)}
    return [DEFAULT_METHOD, *sorted(names - {DEFAULT_METHOD})]


def why_unknown(name: str) -> str | None:
    """The mistake in a method's name and how to mend it; None for a name that is right."""
    names = method_names()
    if name in names:
        return None
    if name in RENAMED:
        return RENAMED[name]
    near = difflib.get_close_matches(name, names, n=1)
    return f"{name!r} is not known; " + (f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}")


def find_method(name: str) -> Method:
    """The method of that name; `BadInput` if there is none."""
    if why := why_unknown(name):
        raise BadInput(f"method {why}")
    method: Method = importlib.import_module(f"{__name__}.{name}").METHOD
    assert method.name == name, f"the method in {name}.py says that it is called {method.name}"
    return method
