"""Which servers may be measured: the times of two machines are not compared."""

from __future__ import annotations

import ipaddress
import socket
import urllib.parse

from turbo.comfyui_http import ServerHttp, is_loopback
from turbo.errors import BadInputError
from turbo.messages import one_line

ANOTHER_MACHINE = "another one"
"""What a results file has under `server_machine` where the server is not on its machine."""


def is_here(url: str) -> bool:
    """Whether every address that a server's name has belongs to this machine.

    A tunnel's end belongs to it too, wherever the tunnel leads.
    """
    return is_loopback(url) or _addresses(url) <= _own_addresses()


def require_here(option: str, url: str) -> None:
    """Refuse a server of another machine.

    Args:
        option: With which it was given.
        url: Its address.

    Raises:
        BadInputError: It is no address, or not one of this machine.
    """
    if not is_here(ServerHttp(url, timeout=1.0).url):  # which is what checks an address
        raise BadInputError(
            f"{option} {one_line(url)} is not on this machine, and times of two machines are not "
            "compared; run the comparison where the server runs, and give its loopback address "
            "there, such as http://127.0.0.1:8188"
        )


def require_same_memory(program: str, url: str, told: object) -> None:
    """Refuse a server that has another machine's memory, as one behind a tunnel does.

    Args:
        program: The server's.
        url: Its address.
        told: Bytes of main memory that it says it has; anything else tells nothing.

    Raises:
        BadInputError: They are not this machine's.
    """
    import psutil

    here = psutil.virtual_memory().total
    if type(told) is int and told > 0 and abs(told - here) > 2**30:
        raise BadInputError(
            f"{program} at {url} has {told / 2**30:.1f} GiB of main memory and this machine "
            f"{here / 2**30:.1f} GiB: it runs elsewhere, and times of two machines are not "
            "compared; run the comparison there"
        )


def _addresses(url: str) -> set[str]:
    """Those of a server; of a name that nobody knows the name itself, which is no one's."""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return {host}
    return {_plain(address) for address in found}


def _own_addresses() -> set[str]:
    import psutil

    found = {
        _plain(entry.address)
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    }
    return found | {"0.0.0.0", "::"}  # where nobody but this machine itself answers


def _plain(address: str) -> str:
    """An address in its one usual form, without the interface that it is reached through."""
    return str(ipaddress.ip_address(address.partition("%")[0]))
