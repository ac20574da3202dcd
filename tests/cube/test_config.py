"""Settings: flag > environment > file > default, and nothing wrong goes unnoticed."""

from pathlib import Path

import pytest
from places import ROOT

from cube.config import read, settle
from cube.errors import BadConfig, BadData
from cube.pb.cube_config_pb2 import CubeConfig
from cube.version import Version
from predictor.pb.predictor_config_pb2 import ClientConfig, PredictorConfig


@pytest.fixture
def file(tmp_path):
    def write(text) -> Path:
        path = tmp_path / "c.prototxt"
        path.write_text(text)
        return path

    return write


def test_a_flag_beats_the_environment_beats_the_file(file):
    path = file('data: "file"\nlisten: "file"\nkeep_versions: 5')
    got = settle(
        CubeConfig(), path, "CUBE", {"CUBE_DATA": "env", "CUBE_LISTEN": "env"}, {"data": "flag", "listen": None}
    )
    assert (got.data, got.listen, got.keep_versions) == ("flag", "env", 5)


def test_a_list_comes_whole_from_the_strongest_source(file):
    path = file('model: "a"\nmodel: "b"')
    assert settle(PredictorConfig(), path, "PREDICTOR", {}, {}).model == ["a", "b"]
    assert settle(PredictorConfig(), path, "PREDICTOR", {"PREDICTOR_MODEL": "c,d"}, {}).model == ["c", "d"]
    assert settle(PredictorConfig(), path, "PREDICTOR", {"PREDICTOR_MODEL": "c,d"}, {"model": ["e"]}).model == ["e"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('data: "x"\nshrd {}', r"c\.prototxt:2:1: found unknown field 'shrd', expected 'shard'"),
        ("shard { adress: 'x' }", r"c\.prototxt:1:9: found unknown field 'adress', expected 'address'"),
        ("data: 5", r"c\.prototxt:1:7: found .*Expected string"),
        ("keep_versions: -1", r"c\.prototxt:1:16: found .*out of range"),
        ("keep_versions: ", r"c\.prototxt:1"),
    ],
)
def test_a_wrong_file_is_refused_with_line_and_nearest_name(file, text, message):
    with pytest.raises(BadConfig, match=message):
        read(file(text), CubeConfig())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadConfig, match=r"nowhere\.prototxt: found No such file"):
        read(tmp_path / "nowhere.prototxt", CubeConfig())


def test_an_environment_variable_of_the_wrong_type_is_named():
    with pytest.raises(
        BadConfig, match="environment CUBE_MAX_KEYS: found 'many', expected a whole number of at least 1"
    ):
        settle(CubeConfig(), None, "CUBE", {"CUBE_MAX_KEYS": "many"}, {})


def test_a_flag_out_of_range_is_named():
    with pytest.raises(BadConfig, match="max_keys: found"):
        settle(CubeConfig(), None, "CUBE", {}, {"max_keys": -1})


@pytest.mark.parametrize(
    ("name", "kind"), [("cube", CubeConfig), ("predictor", PredictorConfig), ("client", ClientConfig)]
)
def test_the_committed_configurations_are_read(name, kind):
    assert read(ROOT / "conf" / f"{name}.prototxt", kind()).ByteSize()


@pytest.mark.parametrize(("text", "version"), [("7@0", (7, 0)), ("7", (7, 0)), ("12@3", (12, 3))])
def test_versions_are_read(text, version):
    assert Version.parse(text) == version


@pytest.mark.parametrize("text", ["", "@", "a@0", "1@b", "1@2@3", "-1@0", "١@0", "1.5", str(2**63)])
def test_what_is_no_version_is_refused(text):
    with pytest.raises(BadData, match=r"version: found"):
        Version.parse(text)
