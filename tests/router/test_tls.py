"""TLS by both public ports: who is let in, who is not, and certificates replaced while it runs. Over HTTP without
certificates of clients: http/test_tls.py."""

import asyncio
import shutil
import socket
import ssl
from pathlib import Path

import httpx
import pytest
import trustme

from services.cli.client import BlockingClient, CallError, Client, Delta, Request, Tls
from services.cli.probe import probe_https
from services.router.certificate import Certificate
from shared.config import ConfigError
from tests.builders.fake_scheduler import FakeScheduler
from tests.builders.router import run, running_router

ASK = Request(prompt="the quick fox", max_tokens=4)


class Pki:
    """An authority's file, and certificates of it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder, self._authority = folder, trustme.CA()
        self.authority = str(folder / "authority.pem")
        self._authority.cert_pem.write_to_path(self.authority)

    def issue(self, name: str) -> dict[str, str]:
        """Files of a certificate for 127.0.0.1, as settings."""
        pair, chain, key = self._authority.issue_cert("127.0.0.1"), self._folder / f"{name}.pem", self._folder / name
        chain.write_bytes(b"".join(blob.bytes() for blob in pair.cert_chain_pems))
        pair.private_key_pem.write_to_path(key)
        return {"ssl_certfile": str(chain), "ssl_keyfile": str(key)}


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "ours")


@pytest.fixture
def stranger(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "theirs")


async def streamed(address: str, tls: Tls | None) -> str:
    async with Client(address, tls=tls) as client:
        return "".join([e.text async for e in client.generate(ASK, timeout_s=10) if isinstance(e, Delta)])


def streamed_blocking(address: str, tls: Tls | None) -> str:
    with BlockingClient(address, tls=tls) as client:
        client.connect(10)
        with client.generate(ASK, timeout_s=10) as events:
            return "".join(event.text for event in events if isinstance(event, Delta))


async def refused(address: str, tls: Tls | None) -> str:
    """Why the client did not get through."""
    with pytest.raises(CallError) as caught:
        await streamed(address, tls)
    assert caught.value.status == "UNAVAILABLE"
    return caught.value.message


async def status_over_http(address: str, tls: Tls) -> int:
    context = ssl.create_default_context()
    tls.load(context)
    async with httpx.AsyncClient(verify=context) as client:
        return (await client.get(f"https://{address}/v1/models")).status_code


def test_answers_are_streamed_over_tls_to_clients_that_know_the_authority(tiny_model, pki, stranger):
    async def test():
        async with running_router(tiny_model, FakeScheduler(), **pki.issue("server")) as router:
            trusting = Tls(ssl_ca_certs=pki.authority)
            assert await streamed(router.address, trusting) == "the quick fox"
            assert await asyncio.to_thread(streamed_blocking, router.address, trusting) == "the quick fox"
            assert "--ssl-ca-certs" in await refused(router.address, Tls(ssl_ca_certs=stranger.authority))
            assert "--ssl-ca-certs" in await refused(router.address, Tls())  # the system's authorities
            await refused(router.address, None)
            async with Client(router.address) as client:
                with pytest.raises(CallError, match="--tls"):
                    await client.connect(0.5)
            assert await asyncio.to_thread(probe_https, router.http, Tls()) == "SERVING"

    run(test())


def test_where_clients_need_a_certificate_nobody_gets_through_without_a_good_one(tiny_model, pki, stranger):
    async def test():
        files = {**pki.issue("server"), "ssl_ca_certs": pki.authority}
        async with running_router(tiny_model, FakeScheduler(), **files) as router:
            good = Tls(ssl_ca_certs=pki.authority, **pki.issue("client"))
            none = Tls(ssl_ca_certs=pki.authority)
            wrong = Tls(ssl_ca_certs=pki.authority, **stranger.issue("client"))
            assert await streamed(router.address, good) == "the quick fox"
            assert await asyncio.to_thread(streamed_blocking, router.address, good) == "the quick fox"
            assert await status_over_http(router.http, good) == 200
            assert await asyncio.to_thread(probe_https, router.http, good) == "SERVING"
            for bad in (none, wrong):
                await refused(router.address, bad)
                with pytest.raises(httpx.TransportError):
                    await status_over_http(router.http, bad)
                assert await asyncio.to_thread(probe_https, router.http, bad) != "SERVING"
            with BlockingClient(router.address, tls=none) as client, pytest.raises(CallError, match="--ssl-certfile"):
                await asyncio.to_thread(client.connect, 0.5)

    run(test())


def test_new_connections_see_renewed_files_and_a_forgotten_authority_is_forgotten(tiny_model, pki, stranger, tmp_path):
    async def test():
        served, client = pki.issue("server"), pki.issue("client")
        files = {**served, "ssl_ca_certs": shutil.copy(pki.authority, tmp_path / "authorities.pem")}
        renewed = {**stranger.issue("server"), "ssl_ca_certs": stranger.authority}
        before = Tls(ssl_ca_certs=pki.authority, **client)
        after = Tls(ssl_ca_certs=stranger.authority, **stranger.issue("client"))
        old_client = Tls(ssl_ca_certs=stranger.authority, **client)
        async with (
            running_router(tiny_model, FakeScheduler(), **files) as router,
            Client(router.address, tls=before) as open_before,
        ):
            assert (await open_before.complete(ASK)).text == "the quick fox"
            for name, file in renewed.items():
                shutil.copy(file, files[name])

            async def taken_up() -> bool:
                try:
                    return await status_over_http(router.http, after) == 200
                except httpx.TransportError:
                    return False

            async with asyncio.timeout(10):
                while not await taken_up():  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            assert await streamed(router.address, after) == "the quick fox"
            for late in (before, old_client):
                await refused(router.address, late)
                with pytest.raises(httpx.TransportError):
                    await status_over_http(router.http, late)
            assert (await open_before.complete(ASK)).text == "the quick fox"  # on the connection that it has

    run(test())


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_shows_its_certificate_with_every_connection(tiny_model, pki, version):
    context = ssl.create_default_context()
    context.maximum_version = version
    Tls(ssl_ca_certs=pki.authority, **pki.issue("client")).load(context)

    def session_of(address: str, taken_up: ssl.SSLSession | None) -> tuple[ssl.SSLSession | None, bool | None]:
        host, port = address.split(":")
        with (
            socket.create_connection((host, int(port)), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname=host, session=taken_up) as connection,
        ):
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: here\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            return connection.session, connection.session_reused

    async def test():
        files = {**pki.issue("server"), "ssl_ca_certs": pki.authority}
        async with running_router(tiny_model, FakeScheduler(), **files) as router:
            session, _ = await asyncio.to_thread(session_of, router.http, None)
            _, reused = await asyncio.to_thread(session_of, router.http, session)
            assert not reused

    run(test())


def test_files_that_cannot_be_used_are_refused_by_flag_and_name(pki, stranger, tmp_path):
    good, missing = pki.issue("server"), str(tmp_path / "missing.pem")
    cases = [
        ({"ssl_ca_certs": pki.authority}, "--ssl-certfile"),
        ({**good, "ssl_ca_certs": missing}, f"--ssl-ca-certs: cannot use {missing}: No such file"),
        ({**good, "ssl_ca_certs": good["ssl_keyfile"]}, f"--ssl-ca-certs: cannot use {good['ssl_keyfile']}"),
        ({**good, "ssl_certfile": missing}, f"--ssl-certfile: cannot use {missing}: No such file"),
        ({**good, "ssl_keyfile": missing}, f"--ssl-keyfile: cannot use {missing}: No such file"),
        ({**good, "ssl_keyfile": stranger.issue("other")["ssl_keyfile"]}, f"cannot use {good['ssl_certfile']} with"),
    ]
    for files, said in cases:
        with pytest.raises(ConfigError) as caught:
            Certificate(Tls(**files))
        assert said in str(caught.value)
    for client in (Client, BlockingClient):
        with pytest.raises(ConfigError, match="--ssl-ca-certs: cannot use"):
            client("127.0.0.1:1", tls=Tls(ssl_ca_certs=missing))
