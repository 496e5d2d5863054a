"""An object that stands before a model and passes everything on to it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import nn

from surgery.errors import SurgeryError, near_misses
from surgery.lifecycle.switching import weights_now
from surgery.patterns.wrappers import unwrap
from surgery.peft.errors import as_builtin, pefts_errors
from surgery.peft.fused_head import fused_head
from surgery.peft.reported_class import reported_class
from surgery.routing.route import route
from surgery.routing.routing_block import RowCountError
from surgery.routing.rows import RowsError
from surgery.state.records import merged_adapters, model_state
from surgery.transaction.neutral_context import neutral
from surgery.transaction.undo_log import Journal

__all__ = ["Facade", "facade", "inside", "whole"]

F = TypeVar("F", bound=Callable[..., Any])
_Seen: Any = nn.Module if TYPE_CHECKING else object  # what type checkers take it for, as isinstance does
# Methods of modules that give the module back: of a façade they give the façade, for `model = model.to(device)`.
_THEMSELVES = frozenset(
    "apply bfloat16 cpu cuda double eval float half ipu mtia requires_grad_ share_memory to to_empty train type "
    "xpu".split()
)

_MIXED = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # those that PEFT's adapter_names always takes


def inside(model: Any) -> Any:
    """The model behind a façade, or the model itself."""
    return model._base if issubclass(type(model), Facade) else model


def facade(kind: type[Facade], model: Any, configs: dict[str, Any]) -> Any:
    """Returns a façade before a model, with the configurations of its adapters."""
    new = object.__new__(kind)
    new._base, new._configs = inside(model), configs
    if not isinstance(new._base, nn.Module):
        error = SurgeryError(f"{type(model).__name__} is not a model", fix="pass a torch.nn.Module")
        raise as_builtin(error, TypeError)
    return new


def whole(method: F) -> F:
    """Makes a method atomic: the model and the façade's configurations change together or not at all.

    Its errors are also PEFT's ValueErrors.
    """

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with pefts_errors(), neutral(self._base), Journal() as journal:
            journal.keep(self._configs)
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]


class Facade(_Seen):
    """Passes for the model: `isinstance` holds, attributes are read from it and set on it, and calls are its calls.

    `isinstance` also holds for PEFT's class of the name `_peft_class`, where PEFT is imported. The façade is not a
    module: code that walks over modules walks over the model's, under the model's names.
    """

    __slots__ = ("__weakref__", "_base", "_configs", "_reported")

    _base: Any
    _configs: dict[str, Any]
    _reported: Any  # the class that was reported last: it lives as long as the façade
    _peft_class: ClassVar[str | None] = None

    @property
    def __class__(self) -> Any:  # what isinstance asks after type()
        reported = reported_class(type(self._base), self._peft_class)
        object.__setattr__(self, "_reported", reported)
        return reported

    @property
    def __dict__(self) -> Any:
        return self._base.__dict__

    def __getattr__(self, name: str) -> Any:  # what is not found otherwise
        if name in Facade.__slots__ or name.startswith("__"):
            raise AttributeError(name)
        attribute = getattr(self._base, name)
        if name == "forward":
            return self._with_rows(attribute)
        return self._returning_self(attribute) if name in _THEMSELVES else attribute

    def _returning_self(self, method: Any) -> Any:
        @functools.wraps(method)
        def called(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            return self if result is self._base else result

        return called

    def _with_rows(self, method: Any) -> Any:
        """A method of the model that also takes PEFT's adapter_names. Its signature is the model's own."""

        @functools.wraps(method)
        def called(*args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
            if adapter_names is None:
                with fused_head(self._base, kwargs), self._call_context(kwargs):
                    return self._completed(method(*args, **kwargs))
            return self(*args, adapter_names=adapter_names, **kwargs)  # rows are counted in calls of the model itself

        return called

    @property
    def _disabled(self) -> bool:
        """Whether the active adapters rest, so that calls compute the base's output."""
        state = model_state(unwrap(self._base))
        return state is not None and bool(state.resting) and not weights_now(state)

    def _call_context(self, keywords: dict[str, Any]) -> AbstractContextManager[Any]:
        """Takes the keywords of a call that the adapters' methods have in PEFT; returns the context of their effect."""
        return nullcontext()

    def _completed(self, output: Any) -> Any:
        """The output of a call, with what the adapters' methods add to its loss."""
        return output

    def __setattr__(self, name: str, value: Any) -> None:
        if name in Facade.__slots__:
            object.__setattr__(self, name, value)
        else:
            setattr(self._base, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._base, name)

    def __dir__(self) -> list[str]:
        return sorted({*dir(type(self)), *dir(self._base)})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._base!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:  # of copies and pickles
        return facade, (type(self), self._base, self._configs)

    def __call__(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        with self._rows(adapter_names), fused_head(self._base, kwargs), self._call_context(kwargs):
            return self._completed(self._base(*args, **kwargs))

    def generate(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        """The model's own `generate`."""
        with self._rows(adapter_names), self._call_context(kwargs):
            return self._base.generate(*args, **kwargs)

    @contextmanager
    def _rows(self, names: Any) -> Iterator[None]:
        """Routes each row to its adapter, if PEFT's adapter_names are given and the adapters are not disabled."""
        if names is None:
            yield
            return
        unknown = sorted({name for name in names if name != "__base__" and name not in self._configs})
        if unknown:
            raise as_builtin(
                SurgeryError(
                    f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}",
                    why=near_misses(unknown[0], self._configs) or f"there are {', '.join(self._configs)}",
                )
            )
        if merged := merged_adapters(unwrap(self._base)):
            what = "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            raise as_builtin(SurgeryError(what, why=f"the weights hold {', '.join(merged)}"))
        if self._disabled:
            yield
            return
        rows = [None if name == "__base__" else name for name in names]
        try:
            with pefts_errors(), route(self._base, rows):
                yield
        except RowCountError as error:
            what = "Length of `adapter_names` should be the same as the number of inputs, but got "
            what += f"{error.names} and {error.rows} respectively."
            raise as_builtin(SurgeryError(what, fix='name an adapter, or "__base__", for each row')) from None
        except RowsError as error:
            raise self._mixed_batch_error(error) from None

    def _mixed_batch_error(self, error: RowsError) -> SurgeryError:
        """PEFT's error for a module that can't have an adapter for each row, with the engine's reason."""
        site = unwrap(self._base).get_submodule(error.where or "")
        if isinstance(site, _MIXED):
            return error
        why, where, kind = f"{error.what}: {error.why}", error.where, TypeError
        supported = ", ".join(each.__name__ for each in _MIXED)
        what = f"Mixed batching is only supported for the following modules: {supported}."
        if isinstance(site, nn.MultiheadAttention):
            what = "lora.MultiheadAttention does not support mixed adapter batches."
        elif any(getattr(config, "target_parameters", None) for config in self._configs.values()):
            what, kind = "lora.ParamWrapper does not support mixed adapter batches yet.", ValueError
        return as_builtin(SurgeryError(what, where=where, why=why, fix=error.fix), kind)
