"""How well scorers agree with people: accuracy, calibration, uncertainty, leaks, and the paper's tables.

sets.py         named preference sets, opened and read into records
scoring.py      records -> scores, cached per (scorer, set, view)
accuracy.py     scores -> accuracy in three conventions, with bootstrap intervals
calibration.py  scores -> Thurstone probabilities, reliability, ECE, Brier
uncertainty.py  scores over noise draws -> Appendix A
leak.py         prompts and images that two sets share
paper.py        fit runs -> which scores a table of the paper needs, and its rows
tables.py, figures.py   CSV, Markdown, PNG
pairs.py        the short way for a fit: accuracy on the pairs of a latent store
"""

from dina_rl.evaluation.pairs import GOLDEN_FILE, label_ceiling, pairwise_accuracy, score_pairs, store_ceiling

__all__ = ["GOLDEN_FILE", "label_ceiling", "pairwise_accuracy", "score_pairs", "store_ceiling"]
