"""Surgery on a ProgramDesc: pure functions from one to another.

A program is a list of ops over named variables, in block 0; an op may hold a block of further ops (a loop's body). Its
inputs are what `feed` ops write, its outputs what `fetch` ops read, each in the order of an attribute `col`.
"""

from collections.abc import Iterable, Mapping, Sequence

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer as Repeated
from google.protobuf.message import DecodeError

from cube.errors import BadData
from trainer_tools.pb.paddle_framework_pb2 import BLOCK, BLOCKS, BOOLEAN, INT, OpDesc, ProgramDesc, VarDesc, VarType

RECIPE = (
    "a ProgramDesc: paddle.static.save_inference_model or paddle.jit.save, in Paddle 3 with FLAGS_enable_pir_api=0 in "
    "the environment"
)
_EMPTY = "@EMPTY@"  # stands for an argument that is left out
_SOURCES = {"feed", "read"}  # what they write is given to the program from outside
# Ops that make sequences of other lengths than they read, or may read several of different lengths.
_OTHER_LENGTHS = {
    "array_to_lod_tensor", "beam_search", "beam_search_decode", "edit_distance", "im2sequence", "lod_reset",
    "lod_tensor_to_array", "sequence_concat", "sequence_erase", "sequence_expand", "sequence_expand_as",
    "sequence_pad", "sequence_reshape", "sequence_scatter", "sequence_slice", "sequence_unpad",
}  # fmt: skip
_SCORED = {"auc": "Predict", "cross_entropy": "X", "cross_entropy2": "X", "softmax_with_cross_entropy": "Logits"}


def parse(raw: bytes, place: str) -> ProgramDesc:
    """A program whose messages hang together; raises BadData."""
    if raw.lstrip()[:1] == b"{":
        raise BadData(place, "JSON (a program of Paddle 3's PIR)", RECIPE)
    try:
        desc = ProgramDesc.FromString(raw)
        names = [var.name for block in desc.blocks for var in block.vars]
        for op in (op for block in desc.blocks for op in block.ops):
            names += [op.type, *reads(op), *writes(op)]
        # protobuf gives a proto2 string that is no UTF-8 as bytes, or refuses it, as its implementation is
        undecoded = next((name for name in names if not isinstance(name, str)), None)
    except (DecodeError, UnicodeDecodeError) as error:
        raise BadData(place, f"{len(raw):,} bytes that are no ProgramDesc ({error})", RECIPE) from error
    if not desc.IsInitialized():
        raise BadData(place, f"{len(raw):,} bytes that are no ProgramDesc (a required field is missing)", RECIPE)
    if undecoded is not None:
        raise BadData(place, f"a name that is no UTF-8, {undecoded!r}", RECIPE)
    if not desc.blocks or not desc.blocks[0].ops:
        raise BadData(place, f"{len(raw):,} bytes, a ProgramDesc without an op", RECIPE)
    for at, block in enumerate(desc.blocks):
        if block.idx != at or not (block.parent_idx == -1 if at == 0 else 0 <= block.parent_idx < at):
            found = f"number {block.idx} with parent {block.parent_idx}"
            raise BadData(f"{place} block {at}", found, f"number {at} and an earlier block as parent")
        for op in block.ops:
            if not all(at < number < len(desc.blocks) for number in inner_blocks(op)):
                found = f"blocks {inner_blocks(op)}"
                raise BadData(f"{place} block {at}, op {op.type}", found, f"later ones of the {len(desc.blocks)}")
    return desc


def arguments(slots: Iterable[OpDesc.Var], parameter: str) -> list[str]:
    """The variables in one of an op's inputs or outputs."""
    return [name for slot in slots if slot.parameter == parameter for name in slot.arguments]


def reads(op: OpDesc) -> list[str]:
    """The variables an op itself reads."""
    names = [name for slot in op.inputs for name in slot.arguments]
    names += [name for attr in op.attrs for name in (*([attr.var_name] if attr.var_name else []), *attr.vars_name)]
    return [name for name in names if name != _EMPTY]


def writes(op: OpDesc) -> list[str]:
    """The variables an op writes."""
    return [name for slot in op.outputs for name in slot.arguments if name != _EMPTY]


def inner_blocks(op: OpDesc) -> list[int]:
    """Numbers of the blocks an op runs."""
    numbers = [attr.block_idx for attr in op.attrs if attr.type == BLOCK]
    return numbers + [number for attr in op.attrs if attr.type == BLOCKS for number in attr.blocks_idx]


def variables(desc: ProgramDesc) -> dict[str, VarDesc]:
    """The variables of block 0 by name."""
    return {var.name: var for var in desc.blocks[0].vars}


def fed(desc: ProgramDesc) -> list[str]:
    """The inputs, in order."""
    return [name for op in _columns(desc, "feed") for name in arguments(op.outputs, "Out")]


def fetched(desc: ProgramDesc) -> list[str]:
    """The outputs, in order."""
    return [name for op in _columns(desc, "fetch") for name in arguments(op.inputs, "X")]


def walked_back(desc: ProgramDesc, targets: Sequence[str], place: str) -> ProgramDesc:
    """What the targets depend on: as few ops and variables as will do.

    Labels, losses, gradients, optimizers, metrics and readers go that way. There is a feed op for each variable that
    has to be given (those fed before keep their order) and a fetch op for each target; ops are set to serve, not to
    train (is_test). Raises BadData for targets that are not there.
    """
    known = variables(desc)
    if not targets:
        raise BadData(place, "a program without fetch ops", f"the names of its outputs, --fetch NAME{_suggested(desc)}")
    for target in targets:
        if target not in known:
            raise BadData(f"{place} --fetch", repr(target), f"a variable of the program{_suggested(desc)}")
    ops, given = _live(desc, targets, known)
    before = [name for name in fed(desc) if name in given]
    feeds = before + [name for name in given if name not in before]
    ops = [_column_op("feed", name, col) for col, name in enumerate(feeds)] + ops
    ops += [_column_op("fetch", name, col) for col, name in enumerate(targets)]
    return _rebuilt(desc, ops)


def check(desc: ProgramDesc, place: str) -> None:
    """Raise BadData unless every op finds its inputs, parameters or written by an op before it, and types are known."""
    known = variables(desc)
    ready = {var.name for var in desc.blocks[0].vars if var.persistable}
    for op in desc.blocks[0].ops:
        for name in _needs(desc, op):
            if name not in known:
                raise BadData(f"{place} op {op.type}", f"input {name!r} that is declared nowhere", "a variable")
        for name in reads(op):
            if name not in ready and known[name].type.type == VarType.DENSE_TENSOR:
                expected = "an input of the program, a parameter or an earlier op's output"
                raise BadData(f"{place} op {op.type}", f"input {name!r} that nothing before it writes", expected)
        ready.update(writes(op))
    for name in [*fed(desc), *fetched(desc)]:
        if not known[name].type.HasField("dense_tensor"):
            raise BadData(f"{place} variable {name!r}", "no element type", "a tensor: it is an input or output")


def alike(desc: ProgramDesc) -> list[list[str]]:
    """Groups of ragged inputs of which a sample has to have as much in each as in any other: their values are joined.

    Paddle itself takes the lengths of the first, and so mixes samples where only the sums of the others are the same.
    """
    known = variables(desc)
    levels = {name: var.type.dense_tensor.lod_level for name, var in known.items()}
    source = {name: name for name in fed(desc) if levels[name]}  # of each value, an input with samples as long

    def root(name: str) -> str:
        while source[name] != name:
            name = source[name]
        return name

    for op in desc.blocks[0].ops:
        joined = [root(name) for name in reads(op) if name in source]
        if not joined or op.type in _OTHER_LENGTHS or op.type == "fetch":
            continue
        for name in joined[1:]:
            source[root(name)] = root(joined[0])
        source.update({name: joined[0] for name in writes(op) if levels.get(name) and name not in source})
    groups: dict[str, list[str]] = {}
    for name in fed(desc):
        if name in source:
            groups.setdefault(root(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _columns(desc: ProgramDesc, kind: str) -> list[OpDesc]:
    ops = [op for op in desc.blocks[0].ops if op.type == kind]
    return sorted(ops, key=lambda op: next((attr.i for attr in op.attrs if attr.name == "col"), 0))


def _column_op(kind: str, name: str, col: int) -> OpDesc:
    source, target = (["feed"], [name]) if kind == "feed" else ([name], ["fetch"])
    return OpDesc(
        type=kind,
        inputs=[OpDesc.Var(parameter="X", arguments=source)],
        outputs=[OpDesc.Var(parameter="Out", arguments=target)],
        attrs=[OpDesc.Attr(name="col", type=INT, i=col)],
    )


def _needs(desc: ProgramDesc, op: OpDesc) -> list[str]:
    """What an op and the blocks inside it read from block 0."""
    names = reads(op)
    for number in inner_blocks(op):
        block = desc.blocks[number]
        own = {var.name for var in block.vars}.union(*(writes(inner) for inner in block.ops))
        names += [name for inner in block.ops for name in _needs(desc, inner) if name not in own]
    return names


def _live(desc: ProgramDesc, targets: Sequence[str], known: Mapping[str, VarDesc]) -> tuple[list[OpDesc], list[str]]:
    """The ops that the targets depend on, and the variables that have to be given, in the order of their first use."""
    needed, partly = set(targets), set[str]()
    live: list[OpDesc] = []
    for op in reversed(desc.blocks[0].ops):
        written = writes(op)
        if op.type == "fetch" or op.type in _SOURCES or needed.isdisjoint(written):
            continue
        live.append(op)
        # A loop or a branch may leave a variable as it was, an array is written piece by piece: earlier writes count.
        whole = {
            n for n in written if n in known and known[n].type.type == VarType.DENSE_TENSOR and not inner_blocks(op)
        }
        partly.update(name for name in written if name not in whole)
        needed -= whole
        needed.update(_needs(desc, op))
    live.reverse()
    used = dict.fromkeys([name for op in live for name in _needs(desc, op)] + list(targets))
    given = [name for name in used if name in needed and name not in partly and name in known]
    return live, [n for n in given if not known[n].persistable and known[n].type.type == VarType.DENSE_TENSOR]


def _rebuilt(desc: ProgramDesc, ops: Sequence[OpDesc]) -> ProgramDesc:
    """The program with other ops in block 0, and only the variables and blocks that they use."""
    numbers = {0}
    todo = list(ops)
    while todo:
        for number in inner_blocks(todo.pop()):
            numbers.add(number)
            todo += desc.blocks[number].ops
    renumbered = {old: new for new, old in enumerate(sorted(numbers))}
    result = ProgramDesc()
    result.CopyFrom(desc)
    del result.blocks[0].ops[:]
    result.blocks[0].ops.extend(ops)
    for number in reversed(range(len(desc.blocks))):
        if number not in numbers:
            del result.blocks[number]
    used = {"feed", "fetch"}
    for block in result.blocks:
        block.idx = renumbered[block.idx]
        block.parent_idx = renumbered.get(block.parent_idx, -1 if block.idx == 0 else 0)
        block.forward_block_idx = renumbered.get(block.forward_block_idx, -1)
        for op in block.ops:
            used.update(reads(op), writes(op))
            _set_to_serve(op, renumbered)
    _keep_only(result.blocks[0].vars, used)
    for name, kind in (("feed", VarType.FEED_MINIBATCH), ("fetch", VarType.FETCH_LIST)):
        if name not in variables(result):
            result.blocks[0].vars.add(name=name, type=VarType(type=kind), persistable=True)
    return result


def _set_to_serve(op: OpDesc, renumbered: Mapping[int, int]) -> None:
    for attr in op.attrs:
        if attr.type == BLOCK:
            attr.block_idx = renumbered[attr.block_idx]
        elif attr.type == BLOCKS:
            attr.blocks_idx[:] = [renumbered[number] for number in attr.blocks_idx]
        elif attr.type == BOOLEAN and attr.name == "is_test":
            attr.b = True


def _keep_only(slots: "Repeated[VarDesc]", names: set[str]) -> None:
    for at in reversed(range(len(slots))):
        if slots[at].name not in names:
            del slots[at]


def _suggested(desc: ProgramDesc) -> str:
    """What the program's losses and metrics look at."""
    seen = [name for op in desc.blocks[0].ops if op.type in _SCORED for name in arguments(op.inputs, _SCORED[op.type])]
    return f" (its losses and metrics look at {', '.join(dict.fromkeys(seen))})" if seen else ""
