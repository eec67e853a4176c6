"""Planning: who goes where, decided in integers, identically on every rank.

Nothing here communicates, keeps state or reads a clock. Every rank gathers the same counts and calls the same pure
function, so there is no controller to wait for; plans carry a `digest()` by which ranks notice if they ever differ,
and a `check()` that says why a plan must not run.

* `topology`   link classes and what a byte costs on each; parsing of ``2x4:intra=64gbit,inter=10gbit``
* `cost`       the attention cost model, and its fit to measured times
* `problem`, `balance`, `traffic`, `result`   what a placement strategy is given, held to, minimises and returns
* `placement`  the strategies by name: stay, luffy_paper, netmoe, exact, best, random
* `best` (with `prices`, `seating`, `cyclic`, `best_uneven`)   the default strategy and its parts
* `rehoming`, `mapping`   which rank should own which expert, together with the seats of sequences (luffy.seats)
* `trace`, `replay`, `prediction`   recorded routing, what it would put on any cluster's links, and what that would take
"""
