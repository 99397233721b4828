"""How well scorers agree with people: accuracy, calibration, uncertainty, leaks, and the paper's tables.

The way of an evaluation (jobs/evaluate.py): sets and scorers are read, `score_store` finds what is missing, workers
score it, and an audit or a table of the paper is made of what is kept.

sets.py         named preference sets, read into records
named_scorers.py   scorers by name, and in which views each is looked at
requests.py     what the driver asks of a worker
worker.py       one process that encodes and scores
layout.py       at which size a latent scorer sees each image
score_store.py, identity.py   scores, each computed once per (scorer, set, view) and kept
accuracy.py     scores -> accuracy in three conventions, with bootstrap intervals
calibration.py  scores -> Thurstone probabilities, reliability, ECE, Brier
uncertainty.py  scores over noise draws -> Appendix A
leak.py         prompts and images that two sets share
audit.py        everything about some scorers on some sets
paper.py        fit runs -> which scores a table of the paper needs, and its rows
results.py      scores -> the numbers of both
tables.py, figures.py   CSV, Markdown, PNG

A fit measures itself by the short way of `dina_rl/reward/held_out.py`, on the pairs of latent stores.
"""
