from types import SimpleNamespace

from quire_recall.proposer import Recall

from quire.testing import parametrize_with_checks


@parametrize_with_checks(Recall)
def test_keeps_its_contract(check):
    check()


def request(number, tokens, salt=None):
    return SimpleNamespace(request_id=number, token_ids=tokens, cache_salt=salt)


def test_one_request_learns_from_another_of_the_same_salt_alone():
    proposer = Recall(4)
    proposer.propose(request(1, [1, 2, 3, 4, 5, 6], "a"), 4)
    assert proposer.propose(request(2, [9, 1, 2, 3], "a"), 2) == [4, 5]
    assert proposer.propose(request(3, [9, 1, 2, 3], "b"), 2) == []
