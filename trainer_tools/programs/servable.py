"""What counts the samples of a program, and whether a predictor can serve it by that. Pure.

A request has any number of samples, and a predictor merges and splits requests by them. So they lie along the first
dimension of all that goes by samples: ids, other inputs whose first dimension varies, outputs. A program of which no
input's first dimension varies takes the same number of samples every time: it is served as it is, each request for
itself, and what it makes of them may have any shape, such as a mark for each word of one sentence.
"""

from collections.abc import Iterable, Sequence

from cube.errors import BadData

Shape = Sequence[int | str]  # a text: a size that varies, as the program names it (s0) or computes it (5*s0)


def counted_by(inputs: Iterable[Shape], outputs: Iterable[Shape]) -> str | None:
    """The size that counts samples: what most outputs have first, or inputs if no output's varies.

    None: their number is fixed, for that of no input varies.
    """
    taken = list(inputs)
    if not any(shape and isinstance(shape[0], str) for shape in taken):
        return None
    firsts = [[shape[0] for shape in shapes if shape and _is_name(shape[0])] for shapes in (outputs, taken)]
    found = firsts[0] or firsts[1]
    return str(max(found, key=found.count)) if found else None


def obstacle(what: str, shape: Shape, samples: str | None, recipe: str) -> str:
    """Why something that has to go by samples does not; empty if it does.

    samples: as `counted_by` finds them. recipe: what to do where a shape is fixed.
    """
    if shape and (shape[0] == samples or (samples is None and isinstance(shape[0], int))):
        return ""
    if not shape:
        return f"{what} are a single number, and a request has some for each sample"
    if isinstance(shape[0], int):
        return f"{what} have the fixed shape {text(shape, samples)}, and a request any number of samples: {recipe}"
    return f"{what} have shape {text(shape, samples)}, in which samples do not come first"


def output_obstacle(name: str, shape: Shape, samples: str | None) -> str:
    """Why an output is in nobody's answer; empty if there is nothing against it.

    samples: as `counted_by` finds them. One without samples is everybody's.
    """
    if samples is None or not shape or isinstance(shape[0], int) or shape[0] == samples:
        return ""
    way_out = "export it with samples first, or serve others: --fetch"
    return f"output {name!r} has shape {text(shape, samples)}, in which samples do not come first: {way_out}"


def check_input(name: str, shape: Shape, samples: str | None, readers: Sequence[str] = ()) -> None:
    """Raise BadData for an input in which samples do not come first; one without them is everybody's.

    readers: the lookups that stay and read it, for people.
    """
    if shape and shape[0] != samples and (isinstance(shape[0], str) or samples in shape):
        found, expected = f"shape {text(shape, samples)}", "samples first"
        if readers:
            found += f", and it is read by {' and '.join(readers)}"
            expected += ", or these lookups cut: without --keep, with --only or --min-rows 0"
        raise BadData(f"input {name!r}", found, expected)


def fixed_note(feed: Sequence[int]) -> str:
    """What is said of a lookup whose rows have this shape, in a program that takes as many samples every time."""
    if not feed or feed[0] < 0:
        return ""
    samples = f"{feed[0]} sample{'s' if feed[0] != 1 else ''}"
    return f"; takes {samples} at a time, and no requests are merged: export it with a first dimension that varies"


def text(shape: Shape, samples: str | None) -> str:
    """A shape for people."""
    return f"[{', '.join('samples' if size == samples else str(size) for size in shape)}]"


def _is_name(size: int | str) -> bool:
    """Whether a size varies by itself, and does not follow from another or has no name ("?")."""
    return isinstance(size, str) and not set(size) & set("*+/() ?")
