"""What is counted, how it adds up over processes, and what Prometheus reads."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from cube.errors import BadConfig
from cube.storage.store import Store
from cube.table import Table
from cube.telemetry import MOST_TABLES, Telemetry
from cube.version import Version


def table(name):
    class Rows(Store):
        about = SimpleNamespace(version=Version(7))

        def read(self, keys, rows, found):
            raise NotImplementedError

        def __len__(self):
            return 3

    return Table(name, {Version(7): Rows()})


def samples(telemetry):
    """By name and labels."""
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(telemetry.text().decode())
        for sample in family.samples
    }


@given(lookups=st.lists(st.tuples(st.integers(0, 10_000_000), st.floats(0, 2), st.integers(0, 2)), max_size=20))
def test_histograms_hold_what_was_counted_in_any_process(lookups):
    telemetry, mine = Telemetry(3), table("t")
    telemetry.begin(0, {"t": mine})
    for keys, seconds, worker in lookups:
        telemetry.counts(worker).lookup(keys, seconds)
        telemetry.counts(worker).table(0)[0] += keys
    found = samples(telemetry)
    assert found["cube_lookups_total",] == len(lookups)
    assert found["cube_lookup_keys_sum",] == sum(keys for keys, _, _ in lookups)
    assert found["cube_lookup_seconds_sum",] == pytest.approx(sum(s for _, s, _ in lookups), abs=1e-6)
    for name, values in (("keys", [k for k, _, _ in lookups]), ("seconds", [s for _, s, _ in lookups])):
        ends = [key[1] for key in found if key[0] == f"cube_lookup_{name}_bucket"]
        assert ends[-1] == "+Inf"
        for end in ends:
            below = sum(value <= float(end) * (1 + 1e-12) for value in values)
            assert found[f"cube_lookup_{name}_bucket", end] == below


def test_the_end_of_a_bucket_belongs_to_it():
    telemetry = Telemetry(1)
    counts = telemetry.begin(0, {})
    for keys in (0, 1, 2, 3, 4):
        counts.lookup(keys, 1e-5)
    found = samples(telemetry)
    assert [found["cube_lookup_keys_bucket", end] for end in ("1.0", "2.0", "4.0")] == [2, 3, 5]
    assert found["cube_lookup_seconds_bucket", "1e-05"] == 5


def test_keys_are_counted_by_table_and_refusals_by_status():
    telemetry, tables = Telemetry(2), {"b": table("b"), "a": table("a")}
    telemetry.begin(1, tables)
    tables["a"].count(10, 4)
    tables["b"].count(5, 0)
    telemetry.counts(0).table(0)[1] += 100  # another process's keys of `a` that were absent
    telemetry.counts(0).refusal("NOT_FOUND")
    telemetry.counts(1).refusal("NOT_FOUND")
    found = samples(telemetry)
    assert (found["cube_keys_total", "a", "true"], found["cube_keys_total", "a", "false"]) == (6, 104)
    assert (found["cube_keys_total", "b", "true"], found["cube_keys_total", "b", "false"]) == (5, 0)
    assert (tables["a"].keys_found, tables["a"].keys_absent) == (6, 4)  # this process's alone
    assert found["cube_refusals_total", "NOT_FOUND"] == 2
    assert found["cube_table_rows", "7@0", "a", "true"] == 3


def test_more_tables_than_there_is_room_for_are_refused():
    with pytest.raises(BadConfig, match="tables: found 1,025, expected at most 1,024"):
        Telemetry(1).begin(0, {str(n): table(str(n)) for n in range(MOST_TABLES + 1)})
