"""Children that wait until their parent's prompt is computed, so as to share it (``n > 1``)."""

from __future__ import annotations

from quire.core.request import Request

__all__ = ["ForkGroups"]


class ForkGroups:
    """Who waits for whom. Truthy while anybody does."""

    def __init__(self) -> None:
        self._children: dict[str, list[Request]] = {}

    def __bool__(self) -> bool:
        return bool(self._children)

    def add_child(self, child: Request) -> None:
        """The child waits for its ``parent_id``."""
        self._children.setdefault(child.parent_id or "", []).append(child)

    def pop_children(self, parent: Request) -> list[Request]:
        """Those who waited for ``parent``, in order of arrival. They wait no more."""
        return self._children.pop(parent.request_id, [])

    def remove_child(self, request: Request) -> None:
        """The request waits no more, if it did."""
        siblings = self._children.get(request.parent_id or "", [])
        if request in siblings:
            siblings.remove(request)
            if not siblings:
                del self._children[request.parent_id or ""]
