"""A teacher's labels: pairs of pictures, their scores, and how sure the difference of two scores is."""
