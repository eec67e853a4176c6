"""The lab: a cluster of slow links inside one machine.

What the library saves is traffic, and traffic costs little on a machine whose ranks talk through memory. So `luffy
lab` gives each rank a network of its own, joined to the others by links of a rate that you choose, and runs the very
program that would run on a cluster. Nothing in it is simulated: processes, sockets, collectives and waiting times are
real, only the wires are narrow. Numbers taken here are *emulated*: they are of this machine's processors behind those
wires.

* `spec`       what a cluster looks like: ranks, nodes, rates, and who shares a network card
* `namespace`  the system calls: network namespaces, and processes that die with their parent
* `network`    the wires: bridges, virtual Ethernet pairs, token buckets
* `probe`      what the wires really give, measured before every command
* `gpus`       ranks that share a GPU, side by side
* `place`      how a training's ranks find their places: the one part of this that `luffy.train` knows
* `processes`  starting, stopping and sweeping up
* `run`, `cli` the command, from its options to its exit status
"""
