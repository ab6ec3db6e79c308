"""One view of a decoder, and what is added to it: exit heads and the deliberation gate."""
