"""`rewrite_pattern`: a pattern and its replacement as two decorated functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, overload

from surgery import RuleError
from surgery.rules.rewrite import RewriteRule

__all__ = ["RewritePattern", "rewrite_pattern"]

F = TypeVar("F", bound=Callable[..., Any])


class RewritePattern:
    """A pattern's function with its replacement, made by `rewrite_pattern`.

    Attributes:
        function: The pattern's function.
        fields: The fields of its rules.
    """

    def __init__(self, function: Callable[..., Any], fields: dict[str, Any]):
        functools.update_wrapper(self, function)
        self.function, self.fields = function, fields
        self.replaced_by: Callable[..., Any] | None = None

    @property
    def label(self) -> str:
        """The function's name."""
        return getattr(self.function, "__qualname__", repr(self.function))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"RewritePattern({self.label})"

    def replacement(self, function: F) -> F:
        """Decorates the replacement, and returns it as it is."""
        self.replaced_by = function
        return function

    def rule(self, targets: Any = (), **fields: Any) -> RewriteRule:
        """Returns a `RewriteRule` of the pattern and its replacement.

        Args:
            targets: The modules in which the rule searches. Default: all.
            **fields: Fields of the rule, in place of those of the decorator.

        Raises:
            RuleError: The pattern does not have a replacement.
        """
        if self.replaced_by is None:
            raise RuleError(
                f"the pattern {self.label} does not have a replacement",
                fix=f"decorate a function: @{self.label}.replacement",
            )
        return RewriteRule(targets, **{"pattern": self, "replacement": self.replaced_by, **self.fields, **fields})


@overload
def rewrite_pattern(function: Callable[..., Any], /) -> RewritePattern: ...
@overload
def rewrite_pattern(**fields: Any) -> Callable[[Callable[..., Any]], RewritePattern]: ...


def rewrite_pattern(function: Callable[..., Any] | None = None, /, **fields: Any) -> Any:
    """Decorates the pattern of a rewrite rule. Its `replacement` decorates the other half, and `rule` makes the rule.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import rewrite_pattern
    >>> @rewrite_pattern
    ... def swish(x):
    ...     return x * torch.sigmoid(x)
    >>> @swish.replacement
    ... def silu(x):
    ...     return nn.functional.silu(x)
    >>> class Swish(nn.Module):
    ...     def forward(self, x):
    ...         return torch.sigmoid(x) * x
    >>> model, x = Swish(), torch.randn(2, 3)
    >>> _ = apply_rules(model, swish.rule(), example_inputs=x)
    >>> torch.equal(model(x), nn.functional.silu(x))
    True

    Args:
        function: The pattern's function.
        **fields: Fields of the rules that `rule` makes, such as `where` or `training`.

    Returns:
        A `RewritePattern`: it can be called like the function.
    """
    if function is None:
        return lambda function: RewritePattern(function, fields)
    return RewritePattern(function, fields)
