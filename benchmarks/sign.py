"""How many feature signs a core makes a second, out of a column of bytes. The rival is the xxhash library in a loop."""

import numpy as np
import xxhash

from benchmarks.results import best_of, keep
from cube.keys import legacy_signs, signs

N = 1_000_000


def main() -> None:
    rng = np.random.default_rng(0)
    slots = rng.integers(1, 27, N)
    rows = []
    for size in (8, 16, 40):
        data = rng.integers(48, 58, N * size, dtype=np.uint8)
        starts, sizes = np.arange(N) * size, np.full(N, size)
        raw, numbers = data.tobytes(), slots.tolist()
        texts = [raw[i : i + size] for i in range(0, N * size, size)]

        def loop(texts=texts, numbers=numbers):
            return [xxhash.xxh64_intdigest(text, slot) for text, slot in zip(texts, numbers, strict=True)]

        assert signs(slots, data, starts, sizes).tolist() == loop()
        legacy_signs(slots, data, starts, sizes)  # compiled before it is timed
        best = best_of(
            {
                "ours": lambda d=data, s=starts, z=sizes: signs(slots, d, s, z),
                "legacy": lambda d=data, s=starts, z=sizes: legacy_signs(slots, d, s, z),
                "xxhash in a loop": loop,
            },
            rounds=7,
        )
        for name, seconds in best.items():
            rate = N / seconds / 1e6
            ratio = best["xxhash in a loop"] / seconds
            rows.append(
                {"bytes a text": size, "who": name, "M signs/s/core": f"{rate:.1f}", "× the loop": f"{ratio:.1f}"}
            )
    keep("sign", rows)


if __name__ == "__main__":
    main()
