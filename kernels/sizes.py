"""The shapes of the networks that the kernels are compiled and measured for (configs/model/; a test
compares them)."""

from typing import NamedTuple


class Size(NamedTuple):
    """What the kernels see of a network."""

    width: int  # D
    hidden: int  # F, of a routed expert
    experts: int  # E
    top_k: int  # K
    classes: int  # V

    def capacity(self, tokens: int, factor: float = 1.5) -> int:
        """Rows of an expert with drop-and-pad, as mm_train.dispatch has them."""
        return -int(-factor * tokens * self.top_k // self.experts)


SIZES = {
    "tiny": Size(width=128, hidden=64, experts=16, top_k=4, classes=2048),  # for CPUs
    "s": Size(width=768, hidden=384, experts=60, top_k=4, classes=128256),
    "m": Size(width=1024, hidden=512, experts=60, top_k=4, classes=128256),
    "l": Size(width=1280, hidden=640, experts=60, top_k=4, classes=128256),
}
SCALE = 2.5  # on the routing weights


def sizes_named(names: str) -> dict[str, Size]:
    """The sizes of a list like "s,m". Raises ValueError for an unknown one."""
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in SIZES:
            raise ValueError(f"there is no size {name!r}; sizes are {', '.join(SIZES)}")
    return {name: SIZES[name] for name in wanted}
