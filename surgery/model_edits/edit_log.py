"""`EditLog`: makes single changes of a model at once, and notes each with its inverse."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from surgery.errors import SiteError
from surgery.model_edits.module_copy import copy_part, is_config
from surgery.model_edits.structure_tensor import StructureTensor
from surgery.model_edits.table_edit import TableEdit
from surgery.patterns.module_walk import base_modules
from surgery.patterns.offload_hooks import is_offloaded, offloaded_in
from surgery.patterns.wrappers import submodule
from surgery.transaction.undo_log import Journal

__all__ = ["EditLog", "config_pairs"]


class EditLog:
    """The changes of a model by one structural rule.

    Attributes:
        model: the model, as the edits so far have left it.
        edits: the changes so far, each with its inverse.
        copies: pairs of modules: a part of the model, and its copy.
        steps: for a plan's table: (path, class name, what changes there).
        warnings: texts that `apply_rules` warns with.
        tensors: what files of the adapter hold; `store` adds to it.
        before_resizing: raises an error if adapters on a module can't follow to another number of rows.
        unplain: why no plain class can hold the edited model, as texts; empty if one can.
    """

    def __init__(
        self,
        model: nn.Module,
        journal: Journal,
        shared: Iterable[Any] = (),
        before_resizing: Callable[[nn.Module, int], None] = lambda module, size: None,
    ):
        self.model = model
        self.edits: list[TableEdit] = []
        self.copies: list[tuple[nn.Module, nn.Module]] = []
        self.steps: list[tuple[str, str, str]] = []
        self.warnings: list[str] = []
        self.unplain: list[str] = []
        self.tensors: list[StructureTensor] = []
        self.before_resizing = before_resizing
        self._journal = journal
        self._shared = tuple(shared)

    def set_children(self, container: nn.Module, children: Mapping[str, nn.Module | None]) -> None:
        """Give a module other children, in this order."""
        present = set(container._modules.values())
        for name, child in children.items():
            if child is not None and child not in present:
                self._refuse_absent(container, name, child)
        self._make(TableEdit(container, "_modules", dict(container._modules), dict(children)))

    def set_module(self, path: str, module: nn.Module) -> None:
        """Put another module in the place of the one at a path."""
        parent_path, _, name = path.rpartition(".")
        parent = submodule(self.model, parent_path)
        if name not in parent._modules:
            raise SiteError(f"there is no module {name!r} to replace", where=parent_path or "the model")
        self.set_children(parent, {**parent._modules, name: module})

    def set_parameter(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        """Put another parameter in the place of one of a module's own."""
        self.refuse_offloaded(module, name)
        before = {name: module._parameters[name]} if name in module._parameters else {}
        self._make(TableEdit(module, "_parameters", before, {name: parameter}))

    def set_buffer(self, module: nn.Module, name: str, buffer: Tensor | None) -> None:
        """Put another buffer in the place of one of a module's own."""
        self.refuse_offloaded(module, name)
        before = {name: module._buffers[name]} if name in module._buffers else {}
        self._make(TableEdit(module, "_buffers", before, {name: buffer}))

    def store(self, path: str, name: str, *, start: int | None = None, trainable: bool = False) -> None:
        """Make a tensor of the model, or its rows from `start` on, the adapter's: files of the adapter have its values.

        Args:
            path: the path of the module that has the tensor.
            name: its name in the module.
            start: the first row; None: the whole tensor.
            trainable: whether it trains with the adapter. A parameter trains as a whole.
        """
        owner = submodule(self.model, path)
        tensor: Any = owner._parameters.get(name, owner._buffers.get(name))
        shape = tuple(tensor.shape) if start is None else (tensor.shape[0] - start, *tensor.shape[1:])
        key = ".".join(filter(None, (path, name)))
        self.tensors.append(StructureTensor(key, owner, name, shape, tensor.dtype, start, trainable))

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Set a plain attribute of a module or another object."""
        before = {name: owner.__dict__[name]} if name in owner.__dict__ else {}
        self._make(TableEdit(owner, "__dict__", before, {name: value}))

    def set_config(self, old: Any, new: Any, part: str = "") -> None:
        """Put a changed copy in the place of a configuration, at every module that refers to it or to a part of it.

        `part`: the path of the part of the model that it describes. Modules beside it keep the old one: another model
        in the same host module may have the same configuration.
        """
        self.set_configs(dict(config_pairs(old, new)), part)

    def set_configs(self, pairs: Mapping[int, Any], part: str = "") -> None:
        """Put configurations in the place of others, by the ids of these."""
        for path, module in base_modules(self.model):
            around = not path or part.startswith(f"{path}.")
            if not around and part and path != part and not path.startswith(f"{part}."):
                continue
            for name, value in list(module.__dict__.items()):
                if id(value) in pairs:
                    self.set_attribute(module, name, pairs[id(value)])

    def change_config(self, module: nn.Module, values: Mapping[str, Any]) -> None:
        """Set fields of a module's configuration, in a copy that takes its place."""
        old: Any = module.config
        new = copy.deepcopy(old)
        for name, value in values.items():
            setattr(new, name, value)
        part = next((path for path, other in base_modules(self.model) if other is module), "")
        self.set_config(old, new, part)

    def copy(self, part: nn.Module, *, share_weights: bool = False) -> nn.Module:
        """Return a copy of a part of the model. What it shares with the rest of the model stays shared."""
        if (inner := offloaded_in(part)) is not None:
            top = next((path for path, other in base_modules(self.model) if other is part), "")
            raise SiteError(
                f"this {type(part).__name__} can't be copied",
                where=".".join(filter(None, (top, inner))),
                why="accelerate offloads its weights, and keeps them under the name of one module",
                fix=_BEFORE,
            )
        copied = copy_part(self.model, part, share_weights, self._shared)
        self.copies.append((part, copied))
        return copied

    def refuse_offloaded(self, module: nn.Module, name: str) -> None:
        """Raise `SiteError` if accelerate offloads the module, because its tensors can't be exchanged then."""
        if is_offloaded(module):
            raise SiteError(
                f"the {name} of this {type(module).__name__} can't be exchanged",
                where=next((path for path, other in base_modules(self.model) if other is module), ""),
                why="accelerate offloads it, and brings the tensor that it keeps for each call",
                fix=_BEFORE,
            )

    def _refuse_absent(self, container: nn.Module, name: str, child: nn.Module) -> None:
        """Refuse a new module on the meta device in an offloaded model: its values stay away for good."""
        on_meta = any(tensor.is_meta for tensor in (*child.parameters(), *child.buffers()))
        if on_meta and offloaded_in(child) is None and offloaded_in(self.model) is not None:
            path = next((path for path, other in base_modules(self.model) if other is container), "")
            raise SiteError(
                f"a {type(child).__name__} can't take the place of an offloaded module",
                where=".".join(filter(None, (path, name))),
                why="its tensors are on the meta device, as those that accelerate offloads are between calls",
                fix=_BEFORE,
            )

    def _make(self, edit: TableEdit) -> None:
        self._journal.undo(edit.undo)
        self.edits.append(edit)
        edit.make()


_BEFORE = "apply the rule before the model is offloaded"


def config_pairs(old: Any, new: Any) -> Iterable[tuple[int, Any]]:
    """The id of each configuration in `old`, with its counterpart in `new`."""
    yield id(old), new
    for name, value in vars(old).items():
        counterpart = vars(new).get(name)
        if is_config(value) and counterpart is not None:
            yield from config_pairs(value, counterpart)
