"""Seats: which rank, and which micro-batch, computes a sequence of an optimizer step, decided before the first layer.

* `features`    what a sequence is like, from its token ids alone
* `predictor`   rows that it will send to each rank, from its features
* `layout`, `seater`, `cells`   what there is to sit on; seats from predicted rows, as read or learnt; their parts
* `topics`, `topic`   what sequences are about, fitted and assigned; seats by topic
* `sharing`     one predictor on all ranks
* `exchange`    sequences to their seats, for loaders where every rank reads its own

Everything but the last two is pure, and decides in integers: every rank calls it with the same sequences and gets the
same seats without a word.
"""
