"""Reason models (RM section 3.4, CM Appendix A.1): question encoders, attention, and heads."""
