"""A real tracker and real servers on loopback, as people start them on their boards; and bodies of candidates."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.devices.tracker import Standing, Tracker
from pipeline.errors import DeviceError
from pipeline.types import TensorSpec

HOST = "127.0.0.1"
STARTING = 90.0  # seconds: each loads TVM twice, on a machine that may have other things to do

SOURCE = """
#include <stdlib.h>
#include <unistd.h>
#include <tvm/ffi/c_api.h>

static const float* x_of(const TVMFFIAny* args, int i) {{
  char* at = (char*)args[i].v_obj;
  if (args[i].type_index != kTVMFFIDLTensorPtr) at += sizeof(TVMFFIObject);
  return (const float*)((DLTensor*)at)->data;
}}

int __tvm_ffi_main(void* self, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) {{
  const float* x = x_of(args, 0);
  float* y = (float*)x_of(args, 1);
  (void)self, (void)count, (void)result;
  {body}
  return 0;
}}
"""
SPECS = [TensorSpec("x", (4,), "float32"), TensorSpec("y", (4,), "float32")]
DOUBLE = "for (int i = 0; i < 4; ++i) y[i] = 2 * x[i];"
BUSY = "for (volatile int i = 0; i < %d; ++i) {} " + DOUBLE


class Process:
    """A command with all that it starts. What it says goes to a file, because nobody reads a pipe."""

    def __init__(self, log: Path, *arguments: str) -> None:
        with open(log, "ab") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TVM_NUM_THREADS": "1"},
            )
        atexit.register(self.kill)

    def kill(self) -> None:
        atexit.unregister(self.kill)
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)


class Boards:
    """Servers of one tracker, each with a key."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = free_port()
        self.address = f"{HOST}:{self.port}"
        place = ["--host", HOST, "--port", str(self.port), "--port-end", str(self.port + 1)]
        self._tracker = Process(folder / "tracker.log", "tvm.exec.rpc_tracker", *place)
        self._servers: list[Process] = []

    def start(self, key: str) -> Process:
        port = free_port()
        place = ["--host", HOST, "--port", str(port), "--port-end", str(port + 1)]
        log = self._folder / f"{key}-{port}.log"
        server = Process(log, "tvm.exec.rpc_server", *place, "--tracker", self.address, "--key", key)
        self._servers.append(server)
        return server

    def end(self, server: Process) -> None:
        self._servers.remove(server)
        server.kill()

    def close(self) -> None:
        for each in [*self._servers, self._tracker]:
            each.kill()

    def standing(self, key: str) -> Standing:
        with Tracker(self.address) as tracker:
            return tracker.standings().get(key, Standing(0, 0, 0))

    def await_free(self, key: str, count: int) -> None:
        self._await(lambda: self.standing(key).free == count, f"{count} servers of {key}")

    def await_server(self, key: str) -> None:
        """Until there is one, whether it is free or somebody has it already."""
        self._await(lambda: self.standing(key).total > 0, f"a server of {key}")

    def _await(self, is_so: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + STARTING
        while time.monotonic() < end:
            with contextlib.suppress(DeviceError):  # the tracker may still be loading
                if is_so():
                    return
            time.sleep(0.1)
        logs = "\n".join(log.read_text() for log in self._folder.glob("*.log"))
        pytest.fail(f"{what} did not come: {logs[-2000:]}")


def free_port() -> int:
    """A port that nobody has now. Skips the test where none can be had."""
    try:
        with socket.socket() as one:
            one.bind((HOST, 0))
            return int(one.getsockname()[1])
    except OSError as error:
        pytest.skip(f"no port can be had here: {error}")
