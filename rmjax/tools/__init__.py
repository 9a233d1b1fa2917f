"""Commands beside training: benchmarks, tables of the papers, probes, what a run costs."""
