"""Rehearsal of a memory (RM section 3.3, CM section 3.3): fragments, decoder, losses, sampler."""
