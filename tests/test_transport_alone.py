"""The transport of one process passes the contract."""

from __future__ import annotations

import pytest
from transport_contract import TransportContract

from kvcoll.transport.alone import AloneTransport
from kvcoll.transport.contract import Transport

pytestmark = pytest.mark.single


class TestAlone(TransportContract):
    @pytest.fixture
    def transport(self) -> Transport:
        return AloneTransport()

    def all_of(self, mine: bytes) -> list[bytes]:
        return [mine]
