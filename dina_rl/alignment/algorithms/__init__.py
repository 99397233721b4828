"""How the policy is trained: one file an algorithm, behind one Protocol (`base.Algorithm`)."""
