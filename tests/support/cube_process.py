"""A cube-server as a process that a test may kill, stop and listen to."""

import contextlib
import os
import re
import signal
import subprocess
import threading

import grpc
from places import BIN

from cube.pb import cube_pb2 as pb

CONTROL = "/cube_serving.cube.CubeControl"


class Caller:
    """Calls on one connection; in the order in which they begin, as far as the server is concerned."""

    def __init__(self, channel, metadata):
        self._channel, self._metadata = channel, metadata

    def begin(self, path, request, kind, timeout_s=100):
        """A future of the reply."""
        send = self._channel.unary_unary(path, response_deserializer=kind.FromString)
        return send.future(request.SerializeToString(), timeout=timeout_s, metadata=self._metadata)

    def __call__(self, path, request, kind, timeout_s=100):
        """The reply."""
        return self.begin(path, request, kind, timeout_s).result()


class CubeProcess:
    """One running; `address` is empty where it could not start."""

    def __init__(self, process):
        self.process, self.lines, self._news = process, [], threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        found = re.search(r"listening on ([^ ,]+),", process.stdout.readline())
        self.address = found[1] if found else ""

    def _read(self):
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()

    def close(self):
        """To be called when the process is gone."""
        self._reader.join()
        self.process.stdout.close()
        self.process.stderr.close()

    @property
    def workers(self):
        """Their process ids, in the order of their numbers."""
        pid = self.process.pid
        with contextlib.suppress(FileNotFoundError), open(f"/proc/{pid}/task/{pid}/children") as file:
            return sorted(map(int, file.read().split()))
        return []

    def log(self, text):
        """The lines of its log with `text` in it so far."""
        with self._news:
            return [line for line in self.lines if text in line]

    def wait_for(self, text, count=1):
        """Until there are so many lines with `text` in it."""
        with self._news:
            assert self._news.wait_for(lambda: sum(text in line for line in self.lines) >= count, 60), self.lines

    def end(self):
        """Wait for its end: exit code and log."""
        code = self.process.wait(100)
        self._reader.join()
        return code, "\n".join(self.lines)

    @contextlib.contextmanager
    def calling(self, token=None):
        """A Caller, on a connection of its own."""
        with grpc.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            yield Caller(channel, [("authorization", f"Bearer {token}")] if token else None)

    def control(self, verb, table, base, delta=0, timeout_s=100):
        """Load, Switch or Unload → StatusReply."""
        with self.calling() as call:
            request = pb.VersionRequest(table=table, version=pb.Version(base=base, delta=delta))
            return call(f"{CONTROL}/{verb}", request, pb.StatusReply, timeout_s)

    def status(self):
        """Of whichever worker takes the connection."""
        with self.calling() as call:
            return call("/cube_serving.cube.Cube/Status", pb.StatusRequest(), pb.StatusReply)


@contextlib.contextmanager
def cube_process(data, *flags, new_group=False, listen="127.0.0.1:0"):
    """Serve shard 0 of 1 of `data` on a free port. It is killed afterwards if it has not ended."""
    command = [BIN / "cube-server", "--shard", 0, "--shards", 1, "--data", data, "--listen", listen, *flags]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
        process_group=0 if new_group else None,
    )  # fmt: skip
    server = CubeProcess(process)
    try:
        yield server
    finally:
        for pid in server.workers:
            os.kill(pid, signal.SIGKILL)  # one may have been stopped
        process.kill()
        process.wait(60)
        server.close()
