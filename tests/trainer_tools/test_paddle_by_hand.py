"""Paddle programs made by hand, for what the golden ones have not: which lookups go, and what goes with them."""

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import taken
from paddle_programs import DOUBLED, INNER, LOOKUP, QUICK, made, op, reason, refused, stream, variable
from places import GOLDEN

from cube.errors import BadData
from trainer_tools import manifest
from trainer_tools.pb.paddle_framework_pb2 import BOOLEAN, INT, INTS, LONG, OpDesc, ProgramDesc, VarDesc, VarType
from trainer_tools.programs import paddle, paddle_desc
from trainer_tools.programs.paddle_desc import reads, writes
from trainer_tools.programs.program import Rules
from trainer_tools.prune_program import prune
from trainer_tools.pruning import Options


def test_a_distributed_lookup_is_as_many_lookups_as_it_has_ids(tmp_path):
    several = op("distributed_lookup_table", {"Ids": "a b", "W": "t"}, {"Outputs": "x z"})
    place = made(tmp_path / "m", [several, op("sum", {"X": "x z"}, {"Out": "y"})])
    assert reason(place) == [("x", True, "2,000 rows of 3"), ("z", True, "2,000 rows of 3")]
    prune(place, tmp_path / "out", Options(rules=Rules(keep=["x"]), verify_samples=0))
    program = paddle.load(tmp_path / "out" / "program")
    assert [(t.name, t.shape) for t in program.inputs()] == [("a", [-1, 1]), ("z", [-1, 3])]
    assert [(op.type, reads(op), writes(op)) for op in program.desc.blocks[0].ops][2] == (
        "distributed_lookup_table",
        ["a", "t"],
        ["x"],
    )
    (place / "t").unlink()  # on a parameter server
    assert reason(place) == [
        ("x", True, "rows of 3 on a parameter server"),
        ("z", True, "rows of 3 on a parameter server"),
    ]
    report = prune(place, tmp_path / "out", Options())
    assert (report.rows, report.compared, report.unproven) == (0, 0, "rows of t are on a parameter server")


def test_a_table_on_a_parameter_server_goes_without_its_rows(tmp_path):
    place = tmp_path / "m"
    place.mkdir()
    shutil.copy(GOLDEN / "paddle-331-remote.pdmodel", place / "m.pdmodel")
    bias, weight = stream(np.ones(2, "<f4")), stream(np.ones((11, 2), "<f4"))
    (place / "m.pdiparams").write_bytes(bias + weight)
    report = prune(place, tmp_path / "out")
    assert [c.reason for c in report.candidates] == ["rows of 8 on a parameter server"]
    assert report.unproven == "rows of sparse_embedding_0.w_0 are on a parameter server"
    program = paddle.load(tmp_path / "out" / "program")
    assert [(t.name, t.shape) for t in program.inputs()] == [
        ("dense_input", [-1, 3]),
        ("sparse_embedding_0.tmp_0", [-1, 8]),
    ]
    said = manifest.read(manifest.Manifest, tmp_path / "out" / "manifest.json")
    assert (said.tables, said.cube) == ({}, None)
    assert said.lookups[0].table == "sparse_embedding_0.w_0"


def test_rows_of_float16_feed_a_program_of_float16(tmp_path):
    more = [variable("h", [2000, 2], VarType.FP16, persistable=True)]
    place = made(tmp_path / "m", [op("lookup_table", {"Ids": "a", "W": "h"}, {"Out": "x"}), DOUBLED], *more)
    rows = np.random.default_rng(1).random((2000, 2)).astype("<f2")
    (place / "h").write_bytes(stream(rows))
    prune(place, tmp_path / "out", QUICK)
    program = paddle.load(tmp_path / "out" / "program")
    assert [(t.name, t.datatype, t.shape) for t in program.inputs()] == [("x", "FP16", [-1, 2])]
    assert np.array_equal(np.load(tmp_path / "out" / "rows" / "h" / "rows.npy"), rows.astype("f4"))


@pytest.mark.parametrize("name", ["../t", "/etc/t", "a/../../t", "t\0"])
def test_a_parameter_that_names_a_file_elsewhere_is_refused(tmp_path, name):
    look = op("lookup_table", {"Ids": "a", "W": name}, {"Out": "x"})
    place = made(tmp_path / "m", [look, DOUBLED], variable(name, [2000, 3], persistable=True))
    (tmp_path / "t").write_bytes((place / "t").read_bytes())
    refused(place, tmp_path, "name of a parameter: found .*, expected a path inside")


def test_the_one_other_file_holds_the_parameters_whatever_its_name(model, tmp_path):
    place = model("331-ctr")
    (place / "ctr.pdmodel").rename(place / "model")
    (place / "ctr.pdiparams").rename(place / "weights.bin")
    prune(place, tmp_path / "out", QUICK)
    assert sorted(p.name for p in (tmp_path / "out" / "program").iterdir()) == ["model", "weights.bin"]
    assert paddle.load(tmp_path / "out" / "program").inputs()


@pytest.mark.parametrize(
    ("ops", "why"),
    [
        ([op("range", {}, {"Out": "p"}), op("lookup_table_v2", {"Ids": "p", "W": "t"}, {"Out": "x"})],
         "its ids are computed by op range (p)"),
        ([op("hash", {"X": "a"}, {"Out": "p"}), op("cast", {"X": "p"}, {"Out": "q"}),
          op("lookup_table_v2", {"Ids": "q", "W": "t"}, {"Out": "x"})], "its ids are computed by op hash (p)"),
        ([op("lookup_table_v2", {"Ids": "c", "W": "t"}, {"Out": "x"})], "its ids are constants, c"),
        ([op("reshape2", {"X": "a"}, {"Out": "r"}), op("lookup_table_v2", {"Ids": "r", "W": "t"}, {"Out": "x"})],
         "its ids are flattened by reshape2: 1 of a sample become 3"),
        ([op("transpose2", {"X": "a"}, {"Out": "p"}, OpDesc.Attr(name="axis", type=INTS, ints=[1, 0])),
          op("lookup_table_v2", {"Ids": "p", "W": "t"}, {"Out": "x"})],
         "its ids are transposed, so that samples do not come first (p)"),
        ([op("concat", {"X": "a b"}, {"Out": "p"}, OpDesc.Attr(name="axis", type=INT, i=0)),
          op("lookup_table_v2", {"Ids": "p", "W": "t"}, {"Out": "x"})],
         "its ids are put together by concat along samples (p)"),
        ([op("scale", {"X": "t"}, {"Out": "u"}), op("lookup_table_v2", {"Ids": "a", "W": "u"}, {"Out": "x"})],
         "its table is computed by op scale"),
        ([op("lookup_table_v2", {"Ids": "a", "W": "b"}, {"Out": "x"})], "its table is no parameter"),
        ([op("lookup_table_v2", {"Ids": "a", "W": "wide"}, {"Out": "x"})], "its rows are FP64; a cube's are float32"),
        ([LOOKUP, op("increment", {"X": "x"}, {"Out": "x"})], "2 ops write its output"),
        ([op("fused_embedding_seq_pool", {"Ids": "a", "W": "t"}, {"Out": "x"})], "lookup and pooling are one op"),
    ],
)  # fmt: skip
def test_what_is_no_lookup_of_a_request_stays_and_the_report_says_why(tmp_path, ops, why):
    more = [
        variable("p", [-1, 1], VarType.INT64), variable("r", [-1, 3], VarType.INT64),
        variable("q", [-1, 1], VarType.INT64), variable("u", [2000, 3]),
        variable("c", [5, 1], VarType.INT64, persistable=True),
        variable("wide", [5, 1], VarType.FP64, persistable=True),
    ]  # fmt: skip
    place = made(tmp_path / "m", [*ops, DOUBLED], *more)
    for name, dtype in (("c", "<i8"), ("wide", "<f8")):
        (place / name).write_bytes(stream(np.ones((5, 1), dtype)))
    assert reason(place) == [("x", False, why)]
    with pytest.raises(BadData, match="m/__model__: found no lookup to cut: x stays: "):
        prune(place, tmp_path / "out", QUICK)
    with pytest.raises(BadData, match="--only, lookup x: found"):
        prune(place, tmp_path / "out", Options(rules=Rules(only=["x"])))


def test_lookups_of_one_table_with_another_padding_stay(tmp_path):
    seven = OpDesc.Attr(name="padding_idx", type=LONG, l=7)
    padded = op("lookup_table_v2", {"Ids": "b", "W": "t"}, {"Out": "z"}, seven)
    place = made(tmp_path / "m", [LOOKUP, padded, op("sum", {"X": "x z"}, {"Out": "y"})])
    assert reason(place) == [
        ("x", True, "2,000 rows of 3"),
        ("z", False, "its padding id is 7, that of another lookup of its table None"),
    ]
    prune(place, tmp_path / "out", QUICK)
    assert set(paddle.load(tmp_path / "out" / "program").parameters) == {"t"}  # the one that stays needs it


def test_a_table_that_something_else_reads_stays_in_the_program_too(tmp_path):
    place = made(tmp_path / "m", [LOOKUP, op("matmul_v2", {"X": "x", "Y": "t"}, {"Out": "y"})])
    report = prune(place, tmp_path / "out", QUICK)
    assert report.rows == 2000
    assert report.candidates[0].reason == "2,000 rows of 3; the table stays too, for other ops read it"
    assert set(paddle.load(tmp_path / "out" / "program").parameters) == {"t"}


def test_loops_keep_what_they_need_and_their_lookups(tmp_path):
    body = [op("lookup_table_v2", {"Ids": "b", "W": "t"}, {"Out": "z"}), op("sum", {"X": "z x"}, {"Out": "y"})]
    loop = op("while", {"X": "x b"}, {"Out": "y"}, INNER)
    place = made(tmp_path / "m", [LOOKUP, loop], inner=body)
    assert reason(place) == [("x", True, "2,000 rows of 3"), ("z", False, "it is inside a loop or a branch, block 1")]
    prune(place, tmp_path / "out", QUICK)
    program = paddle.load(tmp_path / "out" / "program")
    assert sorted(t.name for t in program.inputs()) == ["b", "x"]
    assert set(program.parameters) == {"t"}
    assert len(program.desc.blocks) == 2


def test_a_reader_gives_way_to_inputs(tmp_path):
    """As fluid's py_reader leaves a training program: ids and labels come out of an op, nothing is fed."""
    reader = VarDesc(name="r", type=VarType(type=VarType.READER), persistable=True)
    place = made(tmp_path / "m", [op("read", {"Reader": "r"}, {"Out": "a b"}), LOOKUP, DOUBLED], reader)
    desc = ProgramDesc.FromString((place / "__model__").read_bytes())
    del desc.blocks[0].ops[:2]
    (place / "__model__").write_bytes(desc.SerializeToString())
    assert [t.name for t in paddle.load(place).serving().inputs()] == ["a"]
    prune(place, tmp_path / "out", QUICK)
    program = paddle.load(tmp_path / "out" / "program")
    assert [(op.type, writes(op)) for op in program.desc.blocks[0].ops] == [
        ("feed", ["x"]), ("scale", ["y"]), ("fetch", ["fetch"]),
    ]  # fmt: skip


def test_a_real_loop_keeps_its_block_and_its_lookup(model, tmp_path):
    report = prune(model("185-loop"), tmp_path / "out", QUICK)
    assert [(c.lookup.table, c.is_cut, c.reason) for c in report.candidates] == [
        ("embedding_0.w_0", True, "1,001 rows of 4"),
        ("embedding_1.w_0", False, "it is inside a loop or a branch, block 1"),
    ]
    program = paddle.load(tmp_path / "out" / "program")
    assert [(t.name, program.lod_level(t.name)) for t in program.inputs()] == [("words", 1), ("embedding_0.tmp_0", 1)]
    assert [op.type for op in program.desc.blocks[0].ops].count("while") == 1
    assert "lookup_table" in {op.type for op in program.desc.blocks[1].ops}
    assert "embedding_1.w_0" in program.parameters
    assert "embedding_0.w_0" not in program.parameters


def test_a_branch_that_nothing_needs_goes_with_its_block(tmp_path):
    branch = op("conditional_block", {"Input": "b"}, {"Out": "z"}, INNER)
    place = made(tmp_path / "m", [LOOKUP, branch, DOUBLED], inner=[op("scale", {"X": "x"}, {"Out": "z"})])
    prune(place, tmp_path / "out", QUICK)
    program = paddle.load(tmp_path / "out" / "program")
    assert [t.name for t in program.inputs()] == ["x"]
    assert len(program.desc.blocks) == 1


OTHER = op("lookup_table_v2", {"Ids": "b", "W": "t"}, {"Out": "z"})


def ragged(place, *levels):
    """The same program, whose variables are sequences: levels of each, 1 where they are not said."""
    desc = ProgramDesc.FromString((place / "__model__").read_bytes())
    said = dict(levels)
    for var in desc.blocks[0].vars:
        if not var.persistable:
            var.type.dense_tensor.lod_level = said.get(var.name, 1)
    (place / "__model__").write_bytes(desc.SerializeToString())
    return place


@pytest.mark.parametrize(
    ("ops", "levels", "groups"),
    [
        ([op("concat", {"X": "x z"}, {"Out": "y"})], [], [["a.lengths", "b.lengths"]]),
        ([op("relu", {"X": "x"}, {"Out": "p"}), op("sum", {"X": "p z"}, {"Out": "y"})], [],
         [["a.lengths", "b.lengths"]]),
        ([op("sequence_pool", {"X": "x"}, {"Out": "p"}), op("sequence_pool", {"X": "z"}, {"Out": "q"}),
          op("sum", {"X": "p q"}, {"Out": "y"})], [("p", 0), ("q", 0), ("y", 0)], []),
        ([op("sequence_expand", {"X": "x", "Y": "z"}, {"Out": "y"})], [], []),
        ([op("sequence_concat", {"X": "x z"}, {"Out": "y"})], [], []),
        ([op("sum", {"X": "x x"}, {"Out": "y"})], [], []),
    ],
)  # fmt: skip
def test_sequences_that_are_joined_have_to_be_as_long_in_each_input(tmp_path, ops, levels, groups):
    place = made(tmp_path / "m", [LOOKUP, OTHER, *ops], variable("p", [-1, 3]), variable("q", [-1, 3]))
    prune(ragged(place, *levels), tmp_path / "out", QUICK)
    assert manifest.read(manifest.Manifest, tmp_path / "out" / "manifest.json").alike == groups


@pytest.mark.parametrize(
    ("dims", "levels", "why"),
    [
        (
            {"a": [8, 1]},
            [],
            "its ids have the fixed shape [8, 1], and a request any number of samples: save it with -1",
        ),
        ({"a": [8, -1]}, [], "its ids have the fixed shape [8, ?], and"),
        ({}, [("a", 2)], "a holds sequences of sequences (LoD level 2 or more)"),
        ({}, [("y", 2)], "y holds sequences of sequences (LoD level 2 or more)"),
    ],
)
def test_ids_that_no_request_could_hold_sample_by_sample_stay(tmp_path, dims, levels, why):
    """Where others could: another input is of any number of samples."""
    place = made(tmp_path / "m", [LOOKUP, OTHER, op("sum", {"X": "x z"}, {"Out": "y"})])
    if levels:
        ragged(place, *levels)
    sized(place, dims)
    _, is_cut, reason_said = reason(place)[0]
    assert not is_cut
    assert reason_said.startswith(why)


def test_a_program_of_a_fixed_number_of_samples_is_served_as_it_is(tmp_path):
    place = sized(made(tmp_path / "m", [LOOKUP, DOUBLED]), {"a": [8, 1], "x": [8, 1, 3]})
    report = prune(place, tmp_path / "out", QUICK)
    assert "takes 8 samples at a time, and no requests are merged" in report.candidates[0].reason
    said = manifest.read(manifest.Manifest, tmp_path / "out" / "manifest.json")
    assert (said.lookups[0].feed_shape, [t.shape for t in said.outputs]) == ([8, 1, 3], [[-1, 3]])
    assert said.has_fixed_samples()


def sized(place, dims):
    """The same program, in which some variables have other dims."""
    desc = ProgramDesc.FromString((place / "__model__").read_bytes())
    for var in desc.blocks[0].vars:
        if var.name in dims:
            var.type.dense_tensor.tensor.dims[:] = dims[var.name]
    (place / "__model__").write_bytes(desc.SerializeToString())
    return place


@pytest.mark.parametrize(("is_test", "said"), [(None, ["dropout (p)"]), (False, ["dropout (p)"]), (True, [])])
def test_dropout_is_random_unless_it_is_set_to_serve(tmp_path, is_test, said):
    said_so = [] if is_test is None else [OpDesc.Attr(name="is_test", type=BOOLEAN, b=is_test)]
    dropout = op("dropout", {"X": "x"}, {"Out": "p"}, *said_so)
    more = [op("uniform_random", {}, {"Out": "q"}), op("sum", {"X": "p q"}, {"Out": "y"})]
    shapes = variable("p", [-1, 3]), variable("q", [1, 3])
    program = paddle.load(made(tmp_path / "m", [LOOKUP, dropout, *more], *shapes))
    assert program.random_ops() == [*said, "uniform_random (q)"]


def test_a_program_with_random_ops_is_refused_without_a_proof_too(tmp_path):
    dropout = op("dropout", {"X": "x"}, {"Out": "y"}, OpDesc.Attr(name="is_test", type=BOOLEAN, b=False))
    place = made(tmp_path / "m", [LOOKUP, dropout])
    refused(place, tmp_path, r"outputs differ from run to run \(random ops: dropout \(y\)\)")
    prune(place, tmp_path / "out", Options(fetch=["y"], verify_samples=0))  # which sets ops to serve
    assert paddle.load(tmp_path / "out" / "program").random_ops() == []


@pytest.mark.parametrize("name", ["a.keys", "a.text"])
def test_a_name_of_a_request_that_would_mean_two_things_is_refused(tmp_path, name):
    """Ids that are read otherwise too stay an input, and their keys are `a.keys` then, or `a.text`."""
    mask = op("cast", {"X": "a"}, {"Out": "z"})
    feed = op("feed", {"X": "feed"}, {"Out": name}, OpDesc.Attr(name="col", type=INT, i=2))
    total = op("sum", {"X": f"x z {name}"}, {"Out": "y"})
    place = made(tmp_path / "m", [feed, LOOKUP, mask, total], variable(name, [-1, 3]))
    refused(place, tmp_path, f"lookup x: found request input '{name}', which is another's too, expected other names")


@pytest.mark.slow
@pytest.mark.parametrize("combined", [False, True])
def test_a_wide_table_takes_no_more_memory_than_twice_its_size(tmp_path, combined):
    table = np.random.default_rng(1).random((600_000, 64), dtype=np.float32)
    places = []
    for name, rows in (("small", table[:2000]), ("wide", table)):
        wide = [variable("w", rows.shape, persistable=True), variable("p", [1, 3], persistable=True)]
        look = op("lookup_table_v2", {"Ids": "a", "W": "w"}, {"Out": "x"})
        place = made(tmp_path / name, [look, op("matmul_v2", {"X": "x", "Y": "p"}, {"Out": "y"})], *wide, tables=())
        parameters = {"p": stream(np.ones((1, 3), "<f4")), "w": stream(rows)}
        if combined:
            (place / "__params__").write_bytes(parameters["p"] + parameters["w"])
        else:
            for parameter, content in parameters.items():
                (place / parameter).write_bytes(content)
        places.append(place)
    assert taken(*places, tmp_path / "out", samples=0) < 2 * table.nbytes
    assert np.array_equal(np.load(tmp_path / "out/rows/w/rows.npy", mmap_mode="r"), table)
    assert list(paddle.load(tmp_path / "out/program").parameters) == ["p"]


# ---- walking back, against a run ----

NAMES = "abcdefg"


def answer(desc, targets):
    """What each target is, as a term of the inputs; None for what is not there."""
    known = {"a": "a", "b": "b"}
    for o in desc.blocks[0].ops:
        if o.type not in ("feed", "fetch"):
            known |= {name: (o.type, name, *(known.get(n) for n in reads(o))) for name in writes(o)}
    return [known.get(target) for target in targets]


names = st.sampled_from(NAMES)
some = st.lists(names, min_size=1, max_size=2, unique=True)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.lists(names, max_size=3), some), max_size=12), some)
def test_walking_back_keeps_exactly_the_ops_that_the_targets_need(steps, targets):
    desc = ProgramDesc()
    block = desc.blocks.add(idx=0, parent_idx=-1)
    block.vars.extend([variable(name, [1]) for name in NAMES])
    known = {"a", "b"}
    for number, (inputs, outputs) in enumerate(steps):
        block.ops.append(
            op(f"op{number}", {"X": " ".join(n for n in inputs if n in known)}, {"Out": " ".join(outputs)})
        )
        known.update(outputs)
    targets = [target for target in targets if target in known]
    if not targets:
        return
    short = paddle_desc.walked_back(desc, targets, "here")
    paddle_desc.check(short, "here")
    assert answer(short, targets) == answer(desc, targets)
    assert paddle_desc.fetched(short) == targets
    assert set(paddle_desc.fed(short)) <= {"a", "b"}
    for at, o in enumerate(short.blocks[0].ops):
        if o.type not in ("feed", "fetch"):
            less = ProgramDesc()
            less.CopyFrom(short)
            del less.blocks[0].ops[at]
            assert answer(less, targets) != answer(short, targets)
