"""Whether a class can be called as its contract says: what ``quire plugins check`` and an engine at start refuse."""

from __future__ import annotations

import inspect
from typing import Any

__all__ = ["find_signature_mismatch"]


def find_signature_mismatch(cls: type, contract: type) -> str | None:
    """The first method of ``cls`` that does not take the arguments that ``contract`` declares, in their order and by
    their names, as one line; None if all do. A constructor may call its arguments what it likes."""
    declarations: dict[str, Any] = {}
    for base in reversed(cls.__mro__):  # the most derived class of the contract's module has the last word
        if issubclass(base, contract) and base.__module__ == contract.__module__:
            declarations |= vars(base)
    for name, declared in declarations.items():
        function = inspect.unwrap(getattr(declared, "__func__", declared))
        if (name.startswith("_") and name != "__init__") or not inspect.isfunction(function):
            continue
        if error := _find_binding_error(cls, name, declared, function):
            implementation = _format_parameters(getattr(cls, name))
            return f"{name}{implementation} cannot be called as {_format_parameters(function)}: {error}"
    return None


def _format_parameters(function: Any) -> str:
    """Without annotations, which decide nothing."""
    signature = inspect.signature(function)
    parameters = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


def _find_binding_error(cls: type, name: str, declared: Any, function: Any) -> str | None:
    implementation = getattr(cls, name)
    if not callable(implementation):
        return "it is no method"
    parameters = list(inspect.signature(function).parameters.values())
    is_bound = isinstance(inspect.getattr_static(cls, name), classmethod)
    arguments = parameters[1:] if is_bound or isinstance(declared, staticmethod | classmethod) else parameters
    keyword_only = {p.name: None for p in arguments if p.kind is p.KEYWORD_ONLY}
    calls: list[tuple[list[Any], dict[str, None]]] = [
        ([p for p in arguments if p.kind is not p.KEYWORD_ONLY], keyword_only)
    ]
    if name != "__init__":
        self_argument = [] if is_bound else arguments[:1]
        calls.append((list(self_argument), {p.name: None for p in arguments[len(self_argument) :]}))
    for positional, named in calls:
        try:
            inspect.signature(implementation).bind(*positional, **named)
        except TypeError as error:
            return str(error)
    return None
