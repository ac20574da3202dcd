"""What a picture in the Trace Event Format must be."""


def slices_of(trace):
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


def check_format(trace):
    """What the Trace Event Format asks of X and M events, and Perfetto of their order."""
    assert set(trace) <= {"traceEvents", "displayTimeUnit", "otherData"}
    names = {(e["pid"], e["tid"]) for e in trace["traceEvents"] if e["ph"] == "M" and e["name"] == "thread_name"}
    before = 0.0
    for event in trace["traceEvents"]:
        assert event["ph"] in "XM"
        assert {"name", "ph", "pid", "tid", "args"} <= set(event)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] == "X":
            assert event["ts"] >= before
            assert event["dur"] >= 0
            assert (event["pid"], event["tid"]) in names
            before = event["ts"]
    rows = {}
    for event in slices_of(trace):
        open_ = rows.setdefault((event["pid"], event["tid"]), [])
        end = event["ts"] + event["dur"]
        while open_ and open_[-1] <= event["ts"] + 1e-6:
            open_.pop()
        assert not open_ or end <= open_[-1] + 1e-6, event  # within, or after
        open_.append(end)
