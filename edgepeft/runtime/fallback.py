"""Going on on the CPU where a GPU that device "auto" took gives up in the middle."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edgepeft.console import say
from edgepeft.errors import TargetError

if TYPE_CHECKING:
    from edgepeft.runtime.session import Bundle


class GpuGaveUpError(TargetError):
    """A run that a GPU began and did not end: it was lost, or its memory is full."""


def or_on_the_cpu(call: Callable[..., Any]) -> Callable[..., Any]:
    """Let a bundle's method begin again on the CPU, and stay there, where a GPU that device "auto" took gives up."""

    @functools.wraps(call)
    def called(self: Bundle, *given: Any, **named: Any) -> Any:
        try:
            return call(self, *given, **named)
        except GpuGaveUpError as reason:
            if self.instead is None:
                raise
            say(f"going on on the CPU: {reason}")
            found, name = self.instead(), self._used
            found.use(name)
            self.__dict__ = found.__dict__  # at once, for whoever calls from another thread
            return call(self, *given, **named)

    return called
