"""Ray actors: thin shells over the library. They hold no algorithm."""
