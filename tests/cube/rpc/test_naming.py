"""What a target's text means, and what becomes of it while files are rewritten and names move."""

import asyncio
import contextlib
import gc
import logging
import os
import socket
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cube.errors import BadConfig, Unavailable
from cube.rpc.naming import MOST_FILE_BYTES, Naming, Place, parse_file

QUICK = "?refresh=0.02"


def run(work):
    async def main():
        async with asyncio.timeout(120):
            await work()

    asyncio.run(main())


def first(text):
    return asyncio.run(Naming.parse(text).first())


@contextlib.asynccontextmanager
async def news(naming):
    """A queue of what `changes` gives."""
    heard = asyncio.Queue()

    async def listen():
        async for places in naming.changes():
            heard.put_nowait(places)

    task = asyncio.create_task(listen())
    try:
        yield heard
    finally:
        assert not task.done()
        task.cancel()
        await asyncio.wait((task,))


async def until(what):
    while not what():
        await asyncio.sleep(0.005)


# ---- what a text means ----


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("db:7000", [("db:7000", 1)]),
        ("[::1]:7000", [("[::1]:7000", 1)]),
        ("unix:/run/cube.sock", [("unix:/run/cube.sock", 1)]),
        ("list://a:1,b:2*3", [("a:1", 1), ("b:2", 3)]),
        ("list:// a:1 , [::1]:2*0.5 ", [("a:1", 1), ("[::1]:2", 0.5)]),
        ("list://unix:/x*2,unix:/y", [("unix:/x", 2), ("unix:/y", 1)]),
    ],
)
def test_fixed_places(text, places):
    naming = Naming.parse(text)
    assert naming.is_fixed
    assert naming.known == first(text) == tuple(Place(target, float(weight)) for target, weight in places)
    assert naming.authority is None


def test_a_list_of_endpoints():
    assert Naming.of(["a:1", "unix:/with,comma*2"]).known == (Place("a:1"), Place("unix:/with,comma", 2.0))


def test_fixed_places_never_change():
    async def work():
        assert [places async for places in Naming.parse("list://a:1,b:2").changes()] == []

    run(work)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found ''"),
        ("db", "found 'db'"),
        ("db:0", "found 'db:0'"),
        ("db:65536", "found 'db:65536'"),
        ("db:²", "found 'db:²'"),
        ("db:1 ", "found 'db:1 '"),
        ("1::2:80", "expected host:port, \\[IPv6\\]:port"),
        ("user@db:1", "found 'user@db:1'"),
        ("db/x:1", "found 'db/x:1'"),
        ("unix:", "found 'unix:'"),
        ("list://", "target 'list://': found ''"),
        ("list://a:1,", "found ''"),
        ("list://a:1,b:2,a:1", "a:1 twice"),
        ("list://a:1,a:1*2", "a:1 twice"),
        ("list://a:1*0", "weight '0', expected a number greater than 0"),
        ("list://a:1*-1", "weight '-1'"),
        ("list://a:1*inf", "weight 'inf'"),
        ("list://a:1*nan", "weight 'nan'"),
        ("list://a:1*", "weight ''"),
        ("list://a:1*2*3", "weight '2\\*3'"),
        ("etcd://a:1", "found etcd://, expected host:port"),
        ("file://", "the path of a file"),
        ("file:///x?refresh=0", "found \\?refresh=0"),
        ("file:///x?every=1", "found \\?every=1"),
        ("dns://db", "found 'db'"),
        ("dns://unix:/x", "host:port to resolve"),
        ("dns://db:1?refresh=soon", "found \\?refresh=soon"),
    ],
)
def test_texts_that_mean_nothing(text, message):
    with pytest.raises(BadConfig, match=message):
        Naming.parse(text)


def test_no_endpoints_at_all():
    with pytest.raises(BadConfig, match="no endpoint"):
        Naming.of([])


@given(st.text(max_size=30) | st.text("lfidens:/.,*?[]=0123456789", max_size=30))
def test_any_text_is_a_target_or_a_bad_one(text):
    for form in (text, f"list://{text}", f"dns://{text}", f"file://{text}"):
        with contextlib.suppress(BadConfig):
            naming = Naming.parse(form)
            assert naming.is_fixed == bool(naming.known)


# ---- files ----


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f: found no endpoint"),
        ("# a:1\n\n", "f: found no endpoint"),
        ("a:1\nb\n", "f:2: found 'b'"),
        ("a:1\nb:1 2 3\n", "f:2: found 3 words"),
        ("a:1\n\nb:1 much\n", "f:3: found weight 'much'"),
        ("a:1\nb:1\n# no\na:1 2\n", "f:4: found a:1 again, as in line 1"),
        ("a:1\nlist://b:1\n", "f:2: found 'list://b:1'"),
    ],
)
def test_files_that_are_wrong(text, message):
    with pytest.raises(BadConfig, match=message):
        parse_file(text.encode(), "f")


def test_a_file_that_is_not_text():
    with pytest.raises(BadConfig, match="f: found byte 0xff at offset 4, expected UTF-8"):
        parse_file(b"a:1\n\xff", "f")


@given(
    st.dictionaries(st.from_regex(r"[a-z]{1,5}:[1-9][0-9]{0,3}", fullmatch=True), st.floats(0.001, 1000), min_size=1),
    st.data(),
)
def test_a_file_says_what_was_written(weights, data):
    noise = st.sampled_from(["", "\n", "  \n# x y z\n", "\r\n"])
    lines = [
        f"{data.draw(noise)} {target}\t{weight!r} # {target}{data.draw(st.sampled_from(['', ' ']))}\n"
        for target, weight in weights.items()
    ]
    assert dict(parse_file("".join(lines).encode(), "f")) == weights


def test_files_that_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"#" * (MOST_FILE_BYTES + 1))
    gc.collect()  # what other tests have left open
    before = len(os.listdir("/proc/self/fd"))
    for name, message in [
        ("none", "No such file"),
        (".", "Is a directory"),
        ("pipe", "found something else"),
        ("large", "more than"),
    ]:
        with pytest.raises(BadConfig, match=message):
            first(f"file://{tmp_path / name}")
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "replicas").write_text("a:1")
    assert first("file://replicas") == (Place("a:1"),)


def test_changes_of_a_file(tmp_path, caplog):
    path = tmp_path / "replicas"

    def replace(text):
        (tmp_path / "new").write_text(text)
        os.rename(tmp_path / "new", path)

    async def work():
        path.write_text("a:1\nb:2 3\n")
        naming = Naming.parse(f"file://{path}{QUICK}")
        assert not naming.is_fixed
        assert await naming.first() == (Place("a:1"), Place("b:2", 3.0))
        async with news(naming) as heard:
            path.write_text("a:1\nc:3\n")  # in place
            assert await heard.get() == (Place("a:1"), Place("c:3"))

            (tmp_path / "new").write_text("d:4")
            os.utime(tmp_path / "new", ns=(0, 0))  # older than what it replaces
            os.rename(tmp_path / "new", path)
            assert await heard.get() == (Place("d:4"),)

            path.write_text("e:4")  # the same size, and as good as the same time
            assert await heard.get() == (Place("e:4"),)

            replace("# the same\ne:4\n")
            await asyncio.sleep(0.1)
            assert heard.empty()

            caplog.clear()  # the edits in place may have been seen half done
            for count, problem in enumerate(("e:4\nnonsense\n", "", "e:4\nnonsense\n"), 1):
                replace(problem)
                await until(lambda count=count: len(caplog.records) == count)
                await asyncio.sleep(0.1)  # several looks
            path.unlink()
            await until(lambda: len(caplog.records) == 4)
            assert heard.empty()
            assert naming.known == (Place("e:4"),)
            assert "No such file" in caplog.messages[3]

            replace("e:4")  # all is well again, and nothing has changed
            await asyncio.sleep(0.1)
            assert heard.empty()
            path.unlink()
            await until(lambda: len(caplog.records) == 5)  # the same problem, but a new one

    caplog.set_level(logging.WARNING, "cube.rpc.naming")
    run(work)
    assert f"{path}:2: found 'nonsense'" in caplog.messages[0]
    assert "going on with the 1 endpoints known before" in caplog.messages[0]
    assert f"{path}: found no endpoint" in caplog.messages[1]


def test_a_file_that_is_rewritten_all_the_time(tmp_path):
    """Renamed over, it is never seen half done."""
    path = tmp_path / "replicas"

    async def work():
        def write(n):
            (tmp_path / "new").write_text("".join(f"host{n}:{port}\n" for port in range(1, 200)))
            os.rename(tmp_path / "new", path)

        write(0)
        naming = Naming.parse(f"file://{path}?refresh=0.001")
        await naming.first()
        async with news(naming) as heard:
            for n in range(1, 200):
                write(n)
                await asyncio.sleep(0.001)
            places = ()
            while not places or places[0].target != "host199:1":
                places = await heard.get()
                assert Counter(place.target.partition(":")[0] for place in places).most_common() == [
                    (places[0].target.partition(":")[0], 199)
                ]

    run(work)


# ---- names ----


def test_a_name_that_is_known():
    places = first("dns://localhost:7000")
    assert places
    assert {place.target for place in places} <= {"127.0.0.1:7000", "[::1]:7000"}
    assert first("dns://127.0.0.1:7000") == (Place("127.0.0.1:7000"),)
    assert first("dns://[::1]:7000") == (Place("[::1]:7000"),)


def test_a_name_is_what_its_addresses_are_called():
    assert Naming.parse("dns://db.example:7000?refresh=5").authority == "db.example:7000"


def test_a_name_that_nobody_knows():
    with pytest.raises(Unavailable, match=r"dns://no.invalid:1: the name does not resolve") as caught:
        first("dns://no.invalid:1")
    assert caught.value.never_processed


def test_changes_of_a_name(monkeypatch, caplog):
    """The resolver is replaced: a real one cannot be made to change its mind."""
    answers = [["10.0.0.2", "10.0.0.1"]]

    def getaddrinfo(host, port, *args, **kwargs):
        if not answers[-1]:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, int(port))) for address in answers[-1]]

    async def work():
        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        naming = Naming.parse(f"dns://db:7{QUICK}")
        assert await naming.first() == (Place("10.0.0.1:7"), Place("10.0.0.2:7"))
        async with news(naming) as heard:
            answers.append(["10.0.0.1", "10.0.0.2", "10.0.0.1"])  # another order is no change
            await asyncio.sleep(0.1)
            answers.append([])
            await until(lambda: caplog.records)
            await asyncio.sleep(0.1)
            assert heard.empty()
            answers.append(["10.0.0.3"])
            assert await heard.get() == (Place("10.0.0.3:7"),)

    caplog.set_level(logging.WARNING, "cube.rpc.naming")
    run(work)
    assert len(caplog.records) == 1
    assert "Temporary failure" in caplog.messages[0]
