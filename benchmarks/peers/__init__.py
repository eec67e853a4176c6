"""Other systems on the same wire, data, schedule and meter as Luffy: see docs/research/peers.md.

    python -m benchmarks.peers run --peer hf_ep --ranks 4 --model moe-gpt2-tiny --steps 20 --out DIR
    luffy lab --ranks 4 --link 1gbit -- python -m benchmarks.peers run --peer deepspeed --steps 20 --out DIR

A run leaves the files of `luffy train` behind, so that reports and tables need not know who trained.
"""
