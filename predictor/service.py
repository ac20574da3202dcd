"""predict: find the model, run it, answer. The same behind every door; it knows no transport."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cube.errors import BadRequest, NotServed
from cube.rpc.calls import Call
from predictor.models import Model
from predictor.ops.op import Values


class Answer(NamedTuple):
    """Outputs in the order asked for, and what they were made from."""

    model: Model
    outputs: Values
    facts: dict[str, int | str]


class InferenceService:
    """The models of a process. Owned by the event loop."""

    def __init__(self, models: Sequence[Model]):
        self._models = {model.name: model for model in models}

    def model(self, name: str, version: str = "") -> Model:
        """A model by name and version, any version if empty; raises NotServed."""
        model = self._models.get(name)
        if model is None:
            raise NotServed(f"model {name!r}", sorted(self._models))
        if version not in ("", model.version):
            raise NotServed(f"model {name!r} version {version!r}", [model.version])
        return model

    async def infer(
        self, name: str, version: str, inputs: Mapping[str, Any], wanted: Sequence[str], call: Call
    ) -> Answer:
        """Run a model. inputs: numpy arrays and Texts by name; wanted: names of outputs, all if empty."""
        model = self.model(name, version)
        known = [tensor.name for tensor in model.outputs]
        for output in wanted:
            if output not in known:
                raise BadRequest(f"output {output!r}", "a name the model does not make", f"one of {', '.join(known)}")
        outputs, facts = await model.run(inputs, call)
        return Answer(model, {output: outputs[output] for output in wanted or known}, facts)
