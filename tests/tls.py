"""TLS in front of a server that has none, as a load balancer ends it, with a certificate for ``localhost``."""

import asyncio
import ssl
import subprocess
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from types import TracebackType

import pytest

from tests.proxy import CHUNK_BYTES, Proxy

# What a client sends first to ask for TLS.
SSL_REQUEST = b"\x00\x00\x00\x08\x04\xd2\x16\x2f"


@dataclass(frozen=True, kw_only=True)
class Authority:
    """A certificate that signs itself, and its key."""

    file: Path
    key: Path


def make_authority(folder: Path) -> Authority:
    """Make an authority whose certificate is for the host ``localhost`` alone."""
    if which("openssl") is None:
        pytest.skip("certificates are made by the program openssl")
    made = Authority(file=folder / "certificate.pem", key=folder / "key.pem")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"),
            *("-keyout", str(made.key), "-out", str(made.file)),
        ],
        check=True,
        capture_output=True,
    )
    return made


class TlsFront:
    """A port that speaks TLS with clients and hands everything on to a proxy in the clear."""

    def __init__(self, behind: Proxy, authority: Authority) -> None:
        self.encrypted = 0
        self.port = 0
        self._behind = behind
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(authority.file, authority.key)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ready = threading.Event()
        self._writers: list[asyncio.StreamWriter] = []

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        for writer in self._writers:
            writer.transport.abort()
        # A transport is closed by a callback, which needs a turn of the loop; one under TLS two.
        for _ in range(3):
            self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        with suppress(OSError, ssl.SSLError, asyncio.IncompleteReadError):
            opening = await reader.readexactly(len(SSL_REQUEST))
            if opening == SSL_REQUEST:
                writer.write(b"S")
                await writer.start_tls(self._context)
                self.encrypted += 1
                opening = b""
            inner, outer = await asyncio.open_connection(self._behind.host, self._behind.port)
            self._writers.append(outer)
            outer.write(opening)
            await asyncio.gather(self._pump(reader, outer), self._pump(inner, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(OSError, ssl.SSLError):
                while data := await reader.read(CHUNK_BYTES):
                    writer.write(data)
                    await writer.drain()
        finally:
            writer.close()

    def __enter__(self) -> "TlsFront":
        self._thread.start()
        self._ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
