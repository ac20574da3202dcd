"""The least conversation that satisfies a Listener: lines in, lines out, by commands that provoke its duties."""

from cube.rpc.listener import Listener


class Lines:
    """One connection.

    echo TEXT: TEXT. big N: N bytes. wait NAME: NAME, when LineListener.release(NAME) is called. bye TEXT: TEXT, and the
    end of the connection. Whatever comes before the end of a line is in flight.
    """

    def __init__(self, waiting, is_http2, peer, wake):
        self.is_http2, self.peer, self.wake = is_http2, peer, wake
        self.closing = self.full = False
        self.paused = self.draining = self.gone = False
        self.pauses = self.ticks = self.received = 0
        self._waiting, self._mine, self._rest, self._out = waiting, [], b"", []

    @property
    def idle(self):
        return not (self._mine or self._rest or self._out)

    def receive(self, data):
        assert type(data) is bytes
        self.received += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            verb, _, rest = line.rstrip(b"\r").partition(b" ")
            if verb == b"big":
                self._out += [b"head\n", memoryview(bytes(int(rest))), b"tail\n"]
            elif verb == b"wait":
                self._mine.append(rest)
                self._waiting.setdefault(rest, []).append(self)
            else:
                self._out += [rest, b"\n"]
                self.closing = verb == b"bye"
        self._look()

    def release(self, name):
        if not self.gone:
            self._mine.remove(name)
            self._out += [name, b"\n"]
            self._look()
            self.wake()

    def take(self):
        out, self._out = self._out, []
        return out

    def pause(self):
        self.paused = True
        self.pauses += 1

    def resume(self):
        self.paused = False

    def drain(self):
        self.draining = True
        self._look()

    def tick(self, now):
        self.ticks += 1

    def lost(self):
        self.gone = True

    def _look(self):
        self.closing = self.closing or (self.draining and not self._mine)


class LineListener(Listener):
    """Speaks lines, whatever the connection's first bytes were."""

    def __init__(self, limits=None, tls=None):
        super().__init__({}, None, limits, tls)
        self.conversations = []
        self.waiting = {}  # name → conversations that owe it

    def conversation(self, is_http2, peer, wake):
        self.conversations.append(Lines(self.waiting, is_http2, peer, wake))
        return self.conversations[-1]

    def release(self, name):
        """Answer those who wait for `name`."""
        for conversation in self.waiting.pop(name.encode()):
            conversation.release(name.encode())
