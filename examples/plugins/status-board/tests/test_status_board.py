from quire_status_board.exporter import BoardExporter

from quire.testing import parametrize_with_checks


@parametrize_with_checks(BoardExporter)
def test_keeps_its_contract(check):
    check()
