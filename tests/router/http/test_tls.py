"""HTTPS: certificates that are used, replaced while it runs, and refused with a sentence."""

import asyncio
import shutil
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest

from services.router.certificate import Certificate
from shared.config import ConfigError
from shared.net.tls import Tls
from tests.builders.fake_scheduler import FakeScheduler
from tests.builders.router import run, running_router

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")

ASK = {"prompt": "the quick fox", "max_tokens": 4}


def make_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    # fmt: off
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-out", str(cert), "-keyout", str(key)],
        check=True, capture_output=True,
    )
    # fmt: on
    return cert, key


async def ask(address: str, trusted: Path) -> httpx.Response:
    context = ssl.create_default_context(cafile=str(trusted))
    async with httpx.AsyncClient(verify=context) as client:
        return await client.post(f"https://{address}/v1/completions", json=ASK)


def test_https_is_spoken_and_a_new_certificate_taken_up(tiny_model, tmp_path):
    cert, key = make_pair(tmp_path, "first")
    other_cert, other_key = make_pair(tmp_path, "second")
    trusted = shutil.copy(cert, tmp_path / "trusted.pem")

    async def test():
        settings = {"ssl_certfile": str(cert), "ssl_keyfile": str(key)}
        async with running_router(tiny_model, FakeScheduler(), **settings) as router:
            assert (await ask(router.http, trusted)).json()["choices"][0]["text"] == "the quick fox"
            with pytest.raises(httpx.ConnectError):
                await ask(router.http, other_cert)
            async with httpx.AsyncClient() as plain:
                with pytest.raises(httpx.HTTPError):
                    await plain.get(f"http://{router.http}/health")
            shutil.copy(other_cert, cert)
            await asyncio.sleep(2.5)  # half of a pair: the old one stays
            assert (await ask(router.http, trusted)).status_code == 200
            shutil.copy(other_key, key)
            async with asyncio.timeout(10):
                while True:
                    try:
                        assert (await ask(router.http, other_cert)).status_code == 200
                        break
                    except httpx.ConnectError:
                        await asyncio.sleep(0.2)

    run(test())


def test_files_that_are_no_pair_are_refused_with_a_sentence(tmp_path):
    cert, key = make_pair(tmp_path, "first")
    other, _ = make_pair(tmp_path, "second")
    with pytest.raises(ConfigError, match="go together"):
        Certificate(Tls(ssl_certfile=str(cert)))
    for pair in ((tmp_path / "missing.pem", key), (other, key), (key, key)):
        with pytest.raises(ConfigError, match="--ssl-certfile") as caught:
            Certificate(Tls(ssl_certfile=str(pair[0]), ssl_keyfile=str(pair[1])))
        assert str(pair[0]) in str(caught.value)
    locked = tmp_path / "locked.key"
    # fmt: off
    subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-in", str(key), "-out", str(locked), "-passout", "pass:hush"],
        check=True, capture_output=True,
    )
    # fmt: on
    with pytest.raises(ConfigError, match="--ssl-keyfile"):
        Certificate(Tls(ssl_certfile=str(cert), ssl_keyfile=str(locked)))
