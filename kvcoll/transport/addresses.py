"""The addresses of this host."""

from __future__ import annotations

import fcntl
import socket
import struct
from typing import Final

_SIOCGIFADDR: Final = 0x8915
_SIOCGIFFLAGS: Final = 0x8913
_IFF_UP: Final = 1


def addresses() -> dict[str, str]:
    """Give the IPv4 address of each interface that is up, but for the loopback."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                flags = fcntl.ioctl(asked, _SIOCGIFFLAGS, request)
                answer = fcntl.ioctl(asked, _SIOCGIFADDR, request)
            except OSError:
                continue  # it has no IPv4 address
            address = socket.inet_ntoa(answer[20:24])
            if struct.unpack_from("<H", flags, 16)[0] & _IFF_UP and not address.startswith("127."):
                found[name] = address
    return found
