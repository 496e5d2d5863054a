"""Makes transformers' `resize_token_embeddings` resize the adapters of the embedding and the head, too."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from surgery.authoring.declared_tensors import ParamSpec
from surgery.authoring.hook_call import HookCall
from surgery.authoring.live_site import LiveSite
from surgery.errors import SurgeryError
from surgery.forward.offloaded_weights import value_at
from surgery.forward.own_forward import own_forward
from surgery.forward.parameter_view import tensor_at
from surgery.forward.tape import Layer
from surgery.patterns.module_walk import RESERVED
from surgery.patterns.own_entries import own_child
from surgery.rewritten_model.moved_sites import move_record
from surgery.rewritten_model.verb_root import rewritten
from surgery.state.adapter_tensors import box_of, tensors_of
from surgery.state.in_use import check_free
from surgery.state.record_undo import keep_site
from surgery.state.records import Applied, SiteState, model_state, site_state
from surgery.transaction.undo_log import Journal
from surgery.weaving.rewrite_recording import record_rewrite
from surgery.weaving.site_class import install_live

__all__ = ["check_resizable", "follow_resizing", "grow_site", "leave_resizing"]

_NAME = "resize_token_embeddings"
_KINDS = ("get_input_embeddings", "get_output_embeddings")


def follow_resizing(part: nn.Module, root: nn.Module, journal: Journal) -> None:
    """Wrap `resize_token_embeddings` of a transformers model. `root`: the model that the rules were applied to."""
    if hasattr(type(part), _NAME) and _NAME not in part.__dict__:
        journal.keep(part.__dict__)
        part.__dict__[_NAME] = _Resizing(part, root)


def leave_resizing(part: nn.Module, journal: Journal) -> None:
    if isinstance(part.__dict__.get(_NAME), _Resizing):
        journal.keep(part.__dict__)
        del part.__dict__[_NAME]


class _Resizing:
    """`resize_token_embeddings` of a model with adapters: calls the model's own method and resizes the adapters.

    Resizing is first tried on copies of the embedding and the head. A rule raises if its adapter would compute
    something else for the old tokens (LoKr, whose factors divide the size).
    """

    def __init__(self, part: nn.Module, root: nn.Module):
        self.part, self.root = part, root

    def __call__(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        part, method = self.part, getattr(type(self.part), _NAME)
        state = model_state(self.root)
        before = {name: module for name in _KINDS if (module := _embedding_of(part, name)) is not None}
        on = {id(module): module for module in before.values() if site_state(module) is not None}
        size = _size(before.get(_KINDS[0]), new_num_tokens, *args, **kwargs)
        if state is None or size is None:
            return method(part, new_num_tokens, *args, **kwargs)
        rewritten(self.root)
        self._check_ways(before)
        if not on:
            return method(part, new_num_tokens, *args, **kwargs)
        check_free(self.root)
        for module in on.values():
            _try(module, size)
        flags = [(tensor, tensor.requires_grad) for module in on.values() for tensor in _adapters(module)]
        result = method(part, new_num_tokens, *args, **kwargs)
        with Journal() as journal:
            for name, old in before.items():
                new = _embedding_of(part, name)
                if new is not None and new is not old and id(old) in on and site_state(old) is not None:
                    move_record(state, old, new, journal)
                    if (box := old._modules.pop(RESERVED, None)) is not None:
                        new._modules[RESERVED] = box
            for module in {id(m): m for name in before if (m := _embedding_of(part, name)) is not None}.values():
                if site_state(module) is not None:
                    _grow(module)
                    install_live(module, journal)
        for tensor, flag in flags:
            tensor.requires_grad_(flag)
        return result

    def _check_ways(self, before: dict[str, nn.Module]) -> None:
        """Raise `SurgeryError` if another site has the embedding's weight, since transformers replaces that weight."""
        weights = {id(module._parameters.get("weight")) for module in before.values()}
        known = {id(module) for module in before.values()}
        for module in state.sites() if (state := model_state(self.root)) is not None else ():
            if id(module) not in known and id(module._parameters.get("weight", module)) in weights:
                site = site_state(module)
                raise SurgeryError(
                    "the vocabulary can't be resized under these rules",
                    where=site.path if site is not None else None,
                    why="the module has the embedding's weight, and transformers replaces that weight",
                    fix="resize before rules are applied",
                )


def _embedding_of(part: Any, name: str) -> nn.Module | None:
    try:
        module = getattr(part, name)()
    except (AttributeError, NotImplementedError):
        return None
    return module if isinstance(module, nn.Module) else None


def _size(
    embedding: nn.Module | None, new: Any = None, pad_to_multiple_of: int | None = None, *_: Any, **__: Any
) -> Any:
    """The number of tokens after the call; None if the call does not resize."""
    if embedding is None or (new is None and pad_to_multiple_of is None):
        return None
    size = tensor_at(embedding, "weight").shape[0] if new is None else new
    return size if pad_to_multiple_of is None else -(-size // pad_to_multiple_of) * pad_to_multiple_of


def _adapters(module: nn.Module) -> Iterator[nn.Parameter]:
    boxes = own_child(module, RESERVED)
    if boxes is not None:
        yield from boxes.parameters()


# Growing ------------------------------------------------------------------------------------------------------


def grow_site(module: nn.Module, journal: Journal) -> None:
    """Resize the adapters of a module whose rows were added or taken away."""
    keep_site(journal, module)
    _grow(module, journal)
    install_live(module, journal)


def _grow(module: nn.Module, journal: Journal | None = None) -> None:
    """Record a site's rules again on the resized module, and resize their tensors.

    Trained values stay; new entries get the rules' initial values.
    """
    site = site_state(module)
    assert site is not None
    own = own_forward(module, site.base)
    for applied in site.applied:
        recording = record_rewrite(applied.rule, module, site.path, applied.adapter, own, facts=applied.facts)
        old = tensors_of(module, applied.adapter)
        grown = [spec for spec in recording.specs if spec.shape != tuple(old[spec.name].shape)]
        initial = _initial_tensors(module, site, applied, recording.specs) if grown else {}
        for spec in grown:
            tensor, new = old[spec.name], initial[spec.name].to(old[spec.name].dtype)
            region = tuple(slice(min(a, b)) for a, b in zip(tensor.shape, new.shape, strict=True))
            new[region] = tensor.detach()[region]
            if journal is not None:
                journal.undo(_set_tensor, tensor, tensor.data, tensor.grad)
                tensor.grad = None  # before the data: a gradient has the tensor's shape
            tensor.data, tensor.grad = new, None
        if journal is not None:
            journal.keep(applied.__dict__)
        applied.layer = Layer(applied.adapter, applied.rule.label, recording.tape)


def _initial_tensors(
    module: nn.Module, site: SiteState, applied: Applied, specs: tuple[ParamSpec, ...]
) -> dict[str, Tensor]:
    """An adapter's tensors at a site with the rule's initial values."""
    device = next((tensor.device for tensor in tensors_of(module, applied.adapter).values()), None)
    tensors = {spec.name: torch.empty(spec.shape, dtype=spec.dtype, device=device) for spec in specs}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for spec in specs:
            spec.fill(tensors[spec.name])
        live = LiveSite(module, site.path, applied.adapter, tensors, lambda name, _: value_at(module, name))
        with HookCall(applied.rule, "initialise", site.path):
            applied.rule.initialise(live)
    return tensors


def _set_tensor(tensor: Tensor, data: Tensor, grad: Tensor | None) -> None:
    tensor.grad = None
    tensor.data = data
    tensor.grad = grad


# Trying -------------------------------------------------------------------------------------------------------


def check_resizable(module: nn.Module, size: int, leaving: Collection[str] = (), later: Collection[str] = ()) -> None:
    """Raise `SurgeryError` if adapters on a module can't follow to another number of rows.

    `leaving`: adapters that are removed before. `later`: adapters whose entries must all stay.
    """
    site = site_state(module)
    if site is None or not [applied for applied in site.applied if applied.adapter not in leaving]:
        return
    _try(module, size, leaving)
    for applied in site.applied if later else ():
        if applied.adapter not in later:
            continue
        resized = _resized(module, size)
        _take_out(resized, [other.adapter for other in site.applied if other is not applied])
        before = {name: tensor.shape for name, tensor in tensors_of(resized, applied.adapter).items()}
        _grow(resized)
        if any(tensor.shape != before[name] for name, tensor in tensors_of(resized, applied.adapter).items()):
            raise SurgeryError(
                "the vocabulary can't be resized back",
                where=site.path,
                why=f"the adapter {applied.adapter!r} has entries for tokens that would go",
                fix=f"save and remove {applied.adapter!r} first",
            )


def _take_out(module: nn.Module, adapters: Collection[str]) -> None:
    site = site_state(module)
    if site is not None:
        site.applied = [applied for applied in site.applied if applied.adapter not in adapters]


def _try(module: nn.Module, size: int, leaving: Collection[str] = ()) -> None:
    """Raise `SurgeryError` if a rule can't be resized to another number of tokens."""
    site = site_state(module)
    assert site is not None
    staying = [applied for applied in site.applied if applied.adapter not in leaving]
    for applied in staying:
        why = None
        if site.merged is not None:
            raise SurgeryError("the model is merged", where=site.path, fix="unmerge(model) first")
        if applied.changed:
            why = "it changed the weight at its start, and the record of that is for the old size"
        elif problem := applied.rule.check(_resized(module, size), site.path):
            why = problem
        if why:
            raise _cannot(applied, site, why)
    small, large = _copy_module(module), _resized(module, size)
    for copied in (small, large):
        _take_out(copied, leaving)
    for applied in staying:
        try:
            _grow_trial(large, applied)
            same = all(_alike(a, b) for a, b in zip(*_outputs(applied, small, large), strict=True))
        except SurgeryError as error:
            raise _cannot(applied, site, error.why or error.what) from error
        except (RuntimeError, IndexError, AssertionError) as error:
            raise _cannot(applied, site, f"{type(error).__name__}: {error}"[:200]) from error
        if not same:
            raise _cannot(applied, site, "its tensors would compute something else for the old tokens")


def _cannot(applied: Applied, site: SiteState, why: str) -> SurgeryError:
    return SurgeryError(
        f"{applied.rule.label} [{applied.adapter}] can't be resized to another vocabulary",
        where=site.path,
        why=why,
        fix="resize before rules are applied, or remove this adapter first",
    )


def _grow_trial(large: nn.Module, applied: Applied) -> None:
    before = {name: tuple(tensor.shape) for name, tensor in tensors_of(large, applied.adapter).items()}
    _grow(large)
    box = box_of(large, applied.adapter)
    fixed = box._buffers if box is not None else {}
    for name, tensor in tensors_of(large, applied.adapter).items():
        if name in fixed and tuple(tensor.shape) != before[name]:
            raise SurgeryError(f"{name} is drawn again for another size")


def _outputs(applied: Applied, *modules: nn.Module) -> list[list[Tensor]]:
    """The outputs of the modules with only one adapter live, on the same random input."""
    outputs = []
    for module in modules:
        site = site_state(module)
        assert site is not None
        for rule_record in site.applied:
            rule_record.standing = copy.copy(rule_record.standing)
            rule_record.standing.live, rule_record.standing.weight = rule_record.adapter == applied.adapter, 1.0
        install_live(module, None)
        weight = tensor_at(module, "weight")
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if isinstance(module, nn.Embedding):
                rows = min(tensor_at(other, "weight").shape[0] for other in modules)
                x = torch.randint(rows, (1, 64)).to(weight.device)
            else:
                x = torch.randn(4, weight.shape[1]).to(weight)
            outputs.append([module.eval()(x)])
    return outputs


def _alike(small: Tensor, large: Tensor) -> bool:
    width = min(small.shape[-1], large.shape[-1])
    slack = 1e-4 if small.dtype in (torch.float32, torch.float64) else 1e-1
    return torch.allclose(small[..., :width].float(), large[..., :width].float(), rtol=slack, atol=slack)


def _copy_module(module: nn.Module) -> nn.Module:
    """A copy without hooks that shares the module's own tensors."""
    bare = copy.copy(module)
    for name in [name for name in bare.__dict__ if name.endswith("_hooks")]:
        bare.__dict__[name] = OrderedDict()  # a hook may refer to the whole model
    own = {id(tensor): tensor for tensor in module._parameters.values() if tensor is not None}
    with torch.no_grad():
        return copy.deepcopy(bare, dict(own))


def _resized(module: nn.Module, size: int) -> nn.Module:
    """A copy with another number of tokens. New entries are random, so their effects on outputs are visible."""
    resized: Any = _copy_module(module)
    draw = torch.Generator().manual_seed(0)
    resized._parameters = dict(resized._parameters)
    for name, tensor in resized._parameters.items():
        if tensor is not None:
            new = torch.randn((size, *tensor.shape[1:]), generator=draw).to(tensor.device, tensor.dtype)
            few = min(size, tensor.shape[0])
            new[:few] = tensor.detach()[:few]
            resized._parameters[name] = nn.Parameter(new, requires_grad=False)
    for name in ("num_embeddings", "out_features"):
        if hasattr(resized, name):
            setattr(resized, name, size)
    return resized
