"""Every way in which one of two ranks can fail, at every place of a call: python -m support.rank_faults SECONDS

All pairs run at once, since they wait above all: a line of JSON for each, of what the other rank said, after how many
seconds, and how and how fast its process ended then. They start as copies of a process that has imported everything.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import sys

from efficient_attn.measuring.ranks import Ranks
from support import rank_errors
from support.awake import Awake

HOW = ("exits", "is killed", "raises", "hangs")
WHERE = (("agreement", "gather"), *itertools.product(("keys", "backward"), ("gather", "ring", "all_to_all")))


def main(limit: float) -> None:
    """All of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([rank_errors.__name__])
    clock = Awake()
    cases = [(how, *where) for how in HOW for where in WHERE]
    pairs = [Ranks(2, context=context) for _ in cases]
    try:
        for pair, case in zip(pairs, cases, strict=True):
            pair.tell(rank_errors.fault, *case, limit, ranks=2)
        for pair, (how, when, transport) in zip(pairs, cases, strict=True):
            found, error = pair.answer(0, 600)
            began = clock.seconds
            pair.pipes[0].send(None)
            pair.processes[0].join(60)
            row = {"how": how, "when": when, "transport": transport, "error": error}
            row |= {"answer": found and found[0], "seconds": found and found[1]}
            row |= {"code": pair.processes[0].exitcode, "ended": clock.seconds - began}
            print(json.dumps(row))
    finally:
        for pair in pairs:
            for process in pair.processes:
                process.kill()
            pair.close()


if __name__ == "__main__":
    main(float(sys.argv[1]))
