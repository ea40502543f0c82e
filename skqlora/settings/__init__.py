"""What a user may choose, the rules for what a user leaves open, and the choices of one fit.

Knows nothing of texts, models or files: plain values come in, plain values go out.
"""
