"""A service whose requests say which of its workflows runs them."""

import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from cube.errors import BadRequest, Internal
from cube.rpc.calls import Call
from predictor.requests import Form
from predictor.service import Answer, Service, T
from predictor.tensors import Texts, datatype_of

log = logging.getLogger(__name__)

_LONGEST = 1_000  # bytes of a key that are looked at


class MappedService(Service):
    """Several services under one name; the text in an input of a request picks the one that answers it."""

    def __init__(self, key: str, by_value: Mapping[str, Service], form: Form):
        """key: the BYTES input, the same text in every element. form: what any of them takes, and the key."""
        first = next(iter(by_value.values()))
        super().__init__(first.name, first.version, first.platform, form, ())
        self._key, self._by_value = key, by_value
        self.services = list({id(service): service for service in by_value.values()}.values())
        self.lanes = [lane for service in self.services for lane in service.lanes]
        self.tables = {table: version for service in self.services for table, version in service.tables.items()}
        for service in self.services:
            self.outputs = {**service.outputs, **self.outputs}
            service.counts = self.counts  # requests are this service's, whoever answers them

    def infer(
        self,
        inputs: Mapping[str, Any],
        wanted: Sequence[str],
        call: Call,
        priority: int = 0,
        *,
        then: Callable[[Answer], T],
    ) -> T | Awaitable[T]:
        """See Service."""
        if self.recorders:
            then = self._recorded(inputs, then)
        began = time.monotonic_ns()
        try:
            service, rest = self._picked(inputs)
        except BadRequest as error:
            self._ended(call, began, 0, (), error)
            raise
        return service.infer(rest, wanted, call, priority, then=then)

    async def debug(self, inputs: Mapping[str, Any], call: Call) -> dict[str, dict[str, Any]]:
        """See Service."""
        service, rest = self._picked(inputs)
        return await service.debug(rest, call)

    async def warm_up(self, requests: Sequence[Mapping[str, Any]] = ()) -> None:
        """See Service."""
        picked = [self._picked(request) for request in requests]
        for service in self.services:
            own = [rest for one, rest in picked if one is service]
            try:
                await service.warm_up(own)
            except (BadRequest, Internal) as error:
                if own or not requests:
                    raise
                log.warning("service %s, which has no recorded request: warm-up failed (%s)", service.name, error)

    async def try_company(self) -> None:
        """See Service."""
        for service in self.services:
            await service.try_company()

    def _picked(self, inputs: Mapping[str, Any]) -> tuple[Service, dict[str, Any]]:
        """The service that answers a request, and the request without its key."""
        place, known = f"input {self._key!r}", f"one of {', '.join(map(repr, self._by_value))}"
        rest = dict(inputs)
        given = rest.pop(self._key, None)
        if not isinstance(given, Texts):
            raise BadRequest(place, "nothing" if given is None else datatype_of(given), f"BYTES, {known}")
        if not given.sizes.size:
            raise BadRequest(place, "no text", f"the same in every element, {known}")
        first = bytes(given.data[given.starts[0] : given.starts[0] + min(given.sizes[0], _LONGEST)])
        text = first.decode("utf-8", "replace")
        if given.sizes[0] > _LONGEST or text not in self._by_value:
            raise BadRequest(place, repr(text), known)
        if not _are_all(given, first):
            raise BadRequest(place, "different texts", f"the same in every element, {known}")
        return self._by_value[text], rest


def _are_all(given: Texts, text: bytes) -> bool:
    """Whether every element is this text. Letter by letter, of all elements at once: they may be millions."""
    if (given.sizes != len(text)).any():
        return False
    return all(bool((given.data[given.starts + at] == letter).all()) for at, letter in enumerate(text))
