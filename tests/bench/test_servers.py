"""Servers of other machines: refused where times are compared."""

from __future__ import annotations

import socket

import psutil
import pytest

from bench import compare
from bench.servers import is_here, require_same_memory
from turbo.errors import BadInputError


@pytest.mark.parametrize(
    "url", ["http://localhost:1", "http://127.0.0.1", "http://127.8.8.8:1", "http://[::1]:1/path"]
)
def test_loopback_addresses_are_here(url: str):
    assert is_here(url)


def test_every_address_of_this_machine_is_here():
    for entries in psutil.net_if_addrs().values():
        for entry in entries:
            if entry.family == socket.AF_INET:
                assert is_here(f"http://{entry.address}:8188")


def test_a_name_is_here_only_if_all_its_addresses_are(monkeypatch: pytest.MonkeyPatch):
    known = {"both": ["127.0.0.1", "192.0.2.1"], "here": ["127.0.0.1"], "nobody": []}

    def look_up(host: str, port: object) -> list[tuple[object, ...]]:
        if not known[host]:
            raise socket.gaierror("not known")
        return [(socket.AF_INET, None, 0, "", (address, 0)) for address in known[host]]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert [is_here(f"http://{name}:1") for name in known] == [False, True, False]


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ("comfyui --comfyui-url http://192.0.2.1:8188", "--comfyui-url http://192.0.2.1:8188 is"),
        ("sglang --sglang-url https://192.0.2.1", "--sglang-url https://192.0.2.1 is not on this"),
        ("sglang --sglang-url http://[::1", "is no server address"),
        ("comfyui --comfyui-url nonsense", "is no server address"),
    ],
)
def test_a_comparison_with_another_machine_is_refused_in_one_line_before_anything_is_loaded(
    baseline: str, message: str, capsys: pytest.CaptureFixture[str]
):
    assert compare.main(["--model", "nowhere", "--baseline", *baseline.split()]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_server_with_another_machines_memory_is_behind_a_tunnel():
    here = psutil.virtual_memory().total
    for told in (here, here - 2**20, None, "much"):
        require_same_memory("ComfyUI", "http://127.0.0.1:8188", told)
    with pytest.raises(BadInputError, match="it runs elsewhere"):
        require_same_memory("ComfyUI", "http://127.0.0.1:8188", here + 2**32)
