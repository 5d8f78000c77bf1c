"""Which network interface of this host has an address."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct

__all__ = ["find_interface"]

_SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of an interface, into bytes 20 to 24 of ``struct ifreq``."""


def find_interface(host: str) -> str | None:
    """The name of the interface with the address ``host``; None where there is none, or that cannot be known."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if address.is_loopback:
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == host:
                return name
    return None
