"""The exchange: dispatchers that send tokens to their experts and bring answers back, and what they are made of.

* `dispatcher`  what a MoE layer asks of one; `direct`, and around it `condensing`, `hosting`, `rebuilding`
* `wire`        codecs and the transport: in which formats rows cross links
* `copies`, `permute`   which rows leave a token, and their order at the experts
* `condense` (with `hashing`, `shared`), `guests`, `residency`, `planning`, `migrate`, `rebuild`   parts of the wrappers
* `recorder`, `tally`   what routers chose, and how many rows went where
"""
