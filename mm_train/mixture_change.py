"""A mixture that takes over from another one in the middle of a run (data.on_change=continue). Torch-free.

The new mixture holds from the sample that the checkpoint would have read next. A source whose shards are the same goes
on in its own order where it was, whatever its new share; one with other shards, and a new one, starts at its beginning.
Nothing is read twice; what was left of the old mixture's last block, less than order.BLOCK samples, is passed over.

All of it is written into the identity of the data (Loader.identity), which every checkpoint holds, under `since`:

    sample   from which the mixture holds
    used     source -> {samples: how often it had been used by then, shards: sha256 of which manifest}, also of sources
             that are no longer read
    before   the sources of the mixture before
    earlier  its own `since`, when it was not the first either
"""

from typing import Any

from mm_train.order import Mixture

Identity = dict[str, Any]
START: Identity = {"sample": 0, "used": {}}


def take_over(before: Identity, sample: int) -> Identity:
    """`since` of a mixture that follows the one with identity `before` at `sample`."""
    since = {"sample": sample, "used": _used_up(before, sample), "before": before["sources"]}
    return since | ({"earlier": before["since"]} if "since" in before else {})


def uses(since: Identity, sources: Identity) -> dict[str, int]:
    """How often each of `sources` had been used when they took over; those with other shards not at all."""
    used = since["used"]
    same = [name for name, facts in sources.items() if used.get(name, {}).get("shards") == facts["shards"]]
    return {name: used[name]["samples"] for name in same}


def in_words(before: Identity, now: Identity, sample: int) -> str:
    """What changes from the sources `before` to `now`."""
    changes = []
    for name in sorted({*before, *now}):
        old, new = before.get(name, {}), now.get(name, {})
        if old != new:
            shares = (facts.get("samples_in_1000", 0) for facts in (old, new))
            other = ", from the beginning of other shards" if old and new and old["shards"] != new["shards"] else ""
            changes.append(f"{name} {' -> '.join(map(str, shares))} in 1000{other}")
    return f"the mixture changes at sample {sample:,}: {'; '.join(changes)}"


def _used_up(identity: Identity, sample: int) -> Identity:
    """`used` (see above) of all sources that were read before `sample`."""
    sources, since = identity["sources"], identity.get("since", START)
    weights = {name: facts["samples_in_1000"] for name, facts in sources.items()}
    mixture = Mixture(weights, dict.fromkeys(weights, 1), identity["seed"], since["sample"], uses(since, sources))
    used = {name: {"samples": n, "shards": sources[name]["shards"]} for name, n in mixture.uses(sample).items()}
    return since["used"] | used
