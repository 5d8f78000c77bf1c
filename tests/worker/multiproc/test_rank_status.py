"""Which of several ranks the others wait for."""

from __future__ import annotations

import pytest

from quire.core.layers.parallel import CollectiveNotes
from quire.core.worker.multiproc.rank_status import RankStatus, find_behind

STAGES = [[0, 1], [2, 3]]


def make_status(num_ended: int, num_collectives: int, *, is_busy: bool = True, is_waiting: bool = False) -> RankStatus:
    status = RankStatus()
    for _ in range(num_ended):
        status.begin_message()
        status.end_message()
    if is_busy:
        status.begin_message()
    notes = CollectiveNotes(status.collective_counts)
    for _ in range(num_collectives):
        with notes:
            pass
    if is_waiting:
        notes.__enter__()
    return status


def waiting(num_collectives: int = 7) -> RankStatus:
    return make_status(5, num_collectives, is_waiting=True)


@pytest.mark.parametrize(
    ("statuses", "behind"),
    [
        ([waiting(), make_status(5, 7), waiting(9), waiting(9)], [1]),  # it computes, the others wait for it
        ([waiting(), waiting(), make_status(5, 2), waiting(2)], [2]),
        ([waiting(), waiting(6), waiting(9), waiting(9)], [1]),  # in another collective operation than its neighbour
        ([waiting(), waiting(), waiting(9), waiting(9)], []),
        ([make_status(6, 8), make_status(5, 8), make_status(6, 9), make_status(7, 9)], [1]),  # a GPU's: none waits
        (
            [make_status(6, 8, is_busy=False), make_status(5, 8), waiting(), waiting()],
            [1],
        ),  # the first has nothing to do
        ([make_status(6, 8)] * 4, []),
    ],
)
def test_the_rank_that_others_wait_for_is_found(statuses: list[RankStatus], behind: list[int]) -> None:
    assert find_behind(statuses, STAGES) == behind


def test_a_collective_operation_that_raises_was_left() -> None:
    status = RankStatus()
    with pytest.raises(RuntimeError), CollectiveNotes(status.collective_counts):
        raise RuntimeError("the connection was closed by a peer")
    assert not status.is_waiting and status.num_entered == 1
