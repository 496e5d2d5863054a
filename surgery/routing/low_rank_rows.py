"""Low-rank branches of all rows of a batch, computed by two batched products."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.forward.own_forward import OwnForward
from surgery.routing.routed_call import Routing
from surgery.state.adapter_tensors import tensors_of
from surgery.weaving.low_rank_kernel import is_autocast
from surgery.weaving.lowering import LowRankEdit

__all__ = ["LowRankRows"]


class LowRankRows:
    """A plan that computes y + (x Aᵢᵀ) Bᵢᵀ sᵢ for all rows at once, where i is the adapter of the row.

    A bank stacks A and B of each row, padded to the largest rank, for two batched products. The plan caches the bank
    while none of its tensors trains. If a bank would be larger than two copies of the adapters (many rows share an
    adapter, or ranks differ much), the plan computes separate products for each adapter's rows; also with dropout.
    """

    def __init__(
        self,
        base: type[nn.Module],
        own: OwnForward,
        routing: Routing,
        branches: dict[str, LowRankEdit],
        module: nn.Module,
    ):
        self.base: Any = base
        self.routing, self.input = routing, own.inputs()[0]
        self.names = tuple(branches)
        self.scales = [branch.scale for branch in branches.values()]
        self.drops = [branch.dropout for branch in branches.values()]
        adapters = [(tensors_of(module, name), branch) for name, branch in branches.items()]
        self.A = [tensors[branch.A] for tensors, branch in adapters]
        self.B = [tensors[branch.B] for tensors, branch in adapters]
        number = {name: i for i, name in enumerate(branches)}
        rows = [(row, number[name]) for row, name in enumerate(routing.rows.names) if name in number]  # type: ignore[index]
        self.branch_rows = [row for row, _ in rows]  # the rows of the batch whose adapter has a branch at this site
        self.row_adapters = [adapter for _, adapter in rows]  # the number of the adapter of each of these rows
        ranks = [len(A) for A in self.A]
        self.banked = len(self.branch_rows) * max(ranks) <= 2 * sum(ranks)
        self.fresh_output = not own.opaque  # an opaque forward may store the tensor that it returns
        # Tensors of inference mode do not count their changes. Detached aliases share the version counter of their
        # parameter. They lie together in memory: reading the counters of scattered parameters took a quarter of the
        # time of routing one token.
        self.counted = [tensor.detach() for tensor in (*self.A, *self.B) if not tensor.is_inference()]
        self.bank: tuple[Tensor, Tensor] | None = None
        self.bank_version = -1
        self.row_index: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        x: Tensor = args[0] if args else kwargs[self.input]
        self.routing.size_of(module, x)
        y: Tensor = self.base.forward(module, *args, **kwargs)
        if not self.banked or (module.training and any(self.drops)):
            return self._add_per_adapter(module, x, y)
        count = self.routing.rows.count
        A, B = self._bank()
        rows = x.reshape(count, -1, x.shape[-1])
        partial = len(self.branch_rows) < count
        if partial:
            rows = rows.index_select(0, self._row_index(x.device))
        if rows.dtype is not A.dtype and not is_autocast():
            rows = rows.to(A.dtype)
        down = torch.bmm(rows, A)
        if partial:
            return self._add_to_rows(y, [(self._row_index(y.device), torch.bmm(down, B))])
        if self._may_change(y) and down.dtype is y.dtype:
            y.view(count, -1, y.shape[-1]).baddbmm_(down, B.to(down.dtype))
            return y
        return y + torch.bmm(down, B).to(y.dtype).view(y.shape)

    def _add_per_adapter(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        rows = self.routing.rows
        inputs, ups = x.reshape(rows.count, -1, x.shape[-1]), []
        for name, A, B, scale, drop in zip(self.names, self.A, self.B, self.scales, self.drops, strict=True):
            index = rows.of(name, rows.count, x.device)
            branch = inputs.index_select(0, index).to(A.dtype)
            if module.training and drop:
                branch = F.dropout(branch, drop, True)
            ups.append((index, F.linear(F.linear(branch, A) * scale, B)))
        return self._add_to_rows(y, ups)

    def _add_to_rows(self, y: Tensor, ups: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Add tensors to rows of the output; `ups`: pairs of row indices and tensors."""
        rows = y.reshape(self.routing.rows.count, -1, y.shape[-1])
        if self._may_change(y):
            for index, up in ups:
                rows.index_add_(0, index, up.to(y.dtype))
            return y
        index, up = (torch.cat(parts) for parts in zip(*ups, strict=True))
        return rows.index_add(0, index, up.to(y.dtype)).view(y.shape)

    def _may_change(self, y: Tensor) -> bool:
        """Whether in-place addition to the output is safe: the forward made it and does not store it."""
        return self.fresh_output and not torch.is_grad_enabled() and y.is_contiguous()

    def _row_index(self, device: torch.device) -> Tensor:
        if self.row_index is None or self.row_index.device != device:
            self.row_index = torch.tensor(self.branch_rows, device=device)
        return self.row_index

    def _bank(self) -> tuple[Tensor, Tensor]:
        """Aᵀ (rows, in, r), a view of the stacked A, and scaled Bᵀ (rows, r, out); zeros pad both to one rank."""
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*self.A, *self.B)):
            return self._stack_tensors()
        version = sum(map(_version, self.counted))
        bank = self.bank
        if bank is None or self.bank_version != version or bank[0].device != self.A[0].device:
            with torch.no_grad(), torch.inference_mode(False):
                bank = self.bank = self._stack_tensors()
            self.bank_version = version
        return bank

    def _stack_tensors(self) -> tuple[Tensor, Tensor]:
        """Stack A and scaled B of each row's adapter, padded to the largest rank."""
        dtype = self.A[0].dtype
        rank = max(len(A) for A in self.A)
        As, Bs = [], []
        for A, B in zip(self.A, self.B, strict=True):
            padding = rank - len(A)
            As.append(F.pad(A, (0, 0, 0, padding)).to(dtype) if padding else A.to(dtype))
            Bs.append(F.pad(B, (0, padding)).to(dtype) if padding else B.to(dtype))
        scales = torch.tensor(self.scales, dtype=dtype, device=Bs[0].device).view(-1, 1, 1)
        A, B = torch.stack(As), torch.stack(Bs).mT * scales
        if self.row_adapters == list(range(len(self.A))):
            return A.mT, B.contiguous()
        row_adapters = torch.tensor(self.row_adapters, device=A.device)
        return A.index_select(0, row_adapters).mT, B.index_select(0, row_adapters)


_version = attrgetter("_version")  # torch counts the changes of a tensor in place
