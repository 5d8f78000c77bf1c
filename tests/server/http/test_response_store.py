"""Stored responses are bounded in number and in bytes, and belong to a key."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.server.http.errors import ApiError
from quire.server.http.response_store import ResponseStore

MESSAGES = [{"role": "user", "content": "x"}]


@given(st.integers(0, 4), st.integers(0, 300), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 200)), max_size=20))
def test_never_more_than_the_bounds(max_responses, max_bytes, added):
    store, sizes = ResponseStore(max_responses, max_bytes), {}
    for i, (_, size) in enumerate(added):
        store.add_response(f"resp_{i}", None, b"x" * size, MESSAGES)
        sizes[f"resp_{i}"] = size
    assert len(store) <= max_responses and store.num_bytes <= max_bytes
    kept = []
    for name, size in sizes.items():
        try:
            kept.append(name)
            assert len(store.find_response(name, None).response) == size
        except ApiError:
            kept.pop()
    assert len(kept) == len(store)
    for name in kept:
        store.delete_response(name, None)
    assert store.num_bytes == 0 and len(store) == 0


def test_another_keys_response_is_not_there():
    store = ResponseStore(2, 1000)
    store.add_response("a", "mine", b"{}", MESSAGES)
    assert store.find_response("a", "mine").list_messages() == MESSAGES
    for owner in (None, "other"):
        with pytest.raises(ApiError) as refused:
            store.find_response("a", owner)
        assert refused.value.status == 404
